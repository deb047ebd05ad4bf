"""metrics.csv in the run directory: a row a round, a column a metric."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from pisa_fl.metric import Metrics
from pisa_fl.results.observer import Observer, Run
from pisa_fl.system.files import append, write


class Csv(Observer):
    """The lines of metrics.jsonl as a table; what a round does not have is empty."""

    def __init__(self) -> None:
        self._run: Run | None = None
        self._columns: Sequence[str] = ()

    def started(self, run: Run) -> None:
        """As `Observer.started`."""
        self._run = run

    def round(self, line: Metrics) -> None:
        """Add a row; the first one, and one with a new column, has the table written anew."""
        if self._run is None or self._run.directory is None:
            return
        if set(line) <= set(self._columns):
            append(self._run.directory / "metrics.csv", _rows(self._columns, [line]))
        else:
            self._write_all()

    def finished(self, summary: Mapping[str, Any]) -> None:
        """As `Observer.finished`."""
        if not self._columns:
            self._write_all()

    def _write_all(self) -> None:
        if self._run is None or self._run.directory is None:
            return
        lines = self._run.metrics
        self._columns = list(dict.fromkeys(key for line in lines for key in line))
        header = dict(zip(self._columns, self._columns, strict=True))
        write(self._run.directory / "metrics.csv", _rows(self._columns, [header, *lines]))


def _rows(columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str:
    text = StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(lines)
    return text.getvalue()
