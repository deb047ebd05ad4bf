"""Draws the pictures of a run directory while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import partitioners
from pisa_fl.metric import Metrics
from pisa_fl.results.figures import draw_curves
from pisa_fl.results.observer import Observer, Run


class Picture(Observer):
    """A picture of the run, drawn at its end however it ends, unless nothing more can be written.

    Args:
        path: Where to draw it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._run: Run | None = None

    @property
    def name(self) -> str:
        """As `Observer.name`."""
        return self._path.name

    def started(self, run: Run) -> None:
        """As `Observer.started`."""
        self._run = run

    def finished(self, summary: Mapping[str, Any]) -> None:
        """As `Observer.finished`."""
        self.draw()

    def stopped(self, reason: BaseException) -> None:
        """As `Observer.stopped`."""
        if isinstance(reason, Exception) and not isinstance(reason, OSError):
            self.draw()

    def draw(self) -> None:
        """Draw it."""


class PartitionPicture(Picture):
    """What every client holds of every class; drawn once."""

    def round(self, line: Metrics) -> None:
        """Draw it after the first round, which would wait a second for it."""
        if line["round"] > 0:
            self.draw()

    def draw(self) -> None:
        """As `Picture.draw`."""
        if self._run is not None and self._run.federation.partition and not self._path.exists():
            data = self._run.federation.data
            partitioners.draw(self._run.federation.partition, data.groups, data.group_names, self._path)


class Curves(Picture):
    """Metrics against rounds, up to the present one.

    Args:
        path: Where to draw it.
        redraw: Seconds between drawings; one takes about half a second.
    """

    def __init__(self, path: Path, redraw: float) -> None:
        super().__init__(path)
        self._redraw, self._drawn = redraw, time.monotonic()

    def round(self, line: Metrics) -> None:
        """As `Observer.round`."""
        if line["round"] > 0 and time.monotonic() >= self._drawn + self._redraw:
            self.draw()

    def draw(self) -> None:
        """As `Picture.draw`."""
        if self._run is not None and self._run.metrics:
            draw_curves(self._run.metrics, self._run.name, self._path, self._run.measures)
            self._drawn = time.monotonic()
