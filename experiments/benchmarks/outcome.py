"""What a measurement gave: figures, each with what it should be, and the times behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from experiments.benchmarks.measure import Rounds


@dataclass(frozen=True)
class Figure:
    """A ratio, once for each pair of rounds.

    Attributes:
        name: What is divided by what.
        values: One for each pair; none if a side is not installed.
        at_least: What the median should reach, or None.
        at_most: What the median should not exceed, or None.
    """

    name: str
    values: Sequence[float]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def median(self) -> float:
        """The figure that is reported."""
        return median(self.values)

    @property
    def target(self) -> float | None:
        """The bound, whichever it is."""
        return self.at_most if self.at_least is None else self.at_least

    @property
    def met(self) -> bool:
        """Whether the median is as it should be."""
        low, high = self.at_least or 0.0, self.at_most or float("inf")
        return low <= self.median <= high


@dataclass(frozen=True)
class Outcome:
    """One measurement.

    Attributes:
        name: Its name.
        title: What was measured, in words.
        figures: The ratios.
        rounds: What every side said of each of its rounds.
        parts: Share of the time, by what it was spent on.
        notes: What else there is to say.
    """

    name: str
    title: str
    figures: Sequence[Figure] = ()
    rounds: Rounds = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


def ratio(rounds: Rounds, over: str, under: str) -> list[float]:
    """Seconds of one side by those of another, turn by turn; empty if either is not installed."""
    return [a["seconds"] / b["seconds"] for a, b in zip(rounds[over], rounds[under], strict=False)]


def save(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write outcomes as JSON."""
    path.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")


def load(path: Path) -> list[Outcome]:
    """The outcomes that `save` wrote."""
    return [
        Outcome(**whole | {"figures": [Figure(**figure) for figure in whole["figures"]]})
        for whole in json.loads(path.read_text())
    ]
