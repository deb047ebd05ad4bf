"""What is measured of a model: its name in files and for people, its unit, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

TRAIN_LOSS = "train_loss"
"""Key of the loss of the weights that a round began with, on what its clients trained on."""

Metrics = dict[str, Any]
"""One line of metrics.jsonl: numbers, and the run's id."""


@dataclass(frozen=True)
class Metric:
    """A number that says how well a model does on some examples.

    Attributes:
        name: What people and summary.json (`final_<name>`, `best_<name>`) call it.
        better: Whether more is better (`higher`) or less (`lower`).
        unit: Of the number that people see; empty for none.
        factor: That number over the one in files.
        digits: Of that number, after the point.
        most: The most that it can be in files; None: as much as you like.
    """

    name: str
    better: Literal["higher", "lower"]
    unit: str = ""
    factor: float = 1.0
    digits: int = 4
    most: float | None = None

    @property
    def key(self) -> str:
        """Its name in metrics.jsonl, where it is of the test set; rounds without an evaluation lack it."""
        return f"test_{self.name}"

    @property
    def label(self) -> str:
        """Name and unit, as a table or an axis has them."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def worst(self) -> float:
        """What nothing is worse than; a share is never below zero."""
        if self.better == "lower":
            return math.inf
        return 0.0 if self.unit == "%" else -math.inf

    def shown(self, value: float | None) -> str:
        """A value for people; per cent with their sign."""
        if value is None or not math.isfinite(value):
            return "not finite"
        return f"{self.factor * value:.{self.digits}f}{' %' if self.unit == '%' else ''}"

    def reaches(self, value: float, target: float) -> bool:
        """Whether a value is as good as a target."""
        return value >= target if self.better == "higher" else value <= target

    def at_chance(self, value: float | None, chance: float | None) -> bool:
        """Whether a value, None if it is not finite, is no better than that of a guess, None if that is not known."""
        if chance is None:
            return False
        return value is None or not (value > chance if self.better == "higher" else value < chance)

    def best(self, lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The first of the lines with the best value, of those that have one."""
        choose = max if self.better == "higher" else min
        return choose((line for line in lines if self.key in line), key=lambda line: line[self.key])


@dataclass(frozen=True)
class Measures:
    """What is measured of every round's model.

    Attributes:
        metrics: The task's; by the first, the quality, runs are compared and targets are set.
        loss: The mean loss.
    """

    metrics: tuple[Metric, ...]
    loss: Metric

    @classmethod
    def of(cls, metrics: Sequence[Metric], loss_unit: str) -> Measures:
        """Those of a task."""
        return cls(tuple(metrics), Metric("loss", "lower", loss_unit))

    @property
    def quality(self) -> Metric:
        """What a run of a sweep is worth at its end."""
        return self.metrics[0]

    @property
    def all(self) -> tuple[Metric, ...]:
        """All, in the order in which they are shown."""
        return (*self.metrics, self.loss)

    def described(self) -> list[dict[str, Any]]:
        """As a run directory's config.yaml keeps them."""
        return [asdict(metric) for metric in self.all]

    @classmethod
    def read(cls, described: Sequence[Mapping[str, Any]] | None) -> Measures:
        """From what `described` gave; runs that do not say it were of images.

        Raises:
            TypeError: It is something else.
        """
        if described is None:
            return cls.of([Metric("accuracy", "higher", "%", 100, 2, 1)], "nats")
        *metrics, loss = (Metric(**one) for one in described)
        return cls(tuple(metrics), loss)
