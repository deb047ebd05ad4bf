"""What is measured of a model: its names in files and for people, its unit, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A number of the server's model on the test set, which every line of metrics.jsonl has.

    Attributes:
        key: Its name there.
        name: What people and summary.json (`final_<name>`, `best_<name>`) call it.
        unit: Of the number that people see.
        scale: That number over the one in files.
        digits: Of that number, after the point.
        larger_is_better: Which way is better.
    """

    key: str
    name: str
    unit: str
    scale: float
    digits: int
    larger_is_better: bool

    @property
    def label(self) -> str:
        """Name and unit, as a table or an axis has them."""
        return f"{self.name}, {self.unit}"

    def shown(self, value: float | None) -> str:
        """A value for people; per cent with their sign."""
        if value is None:
            return "not finite"
        return f"{self.scale * value:.{self.digits}f}{' %' if self.unit == '%' else ''}"

    def reaches(self, value: float, target: float) -> bool:
        """Whether a value is as good as a target."""
        return value >= target if self.larger_is_better else value <= target

    def best(self, lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The first of the lines with the best value."""
        choose = max if self.larger_is_better else min
        return choose(lines, key=lambda line: line[self.key])


QUALITY = Metric("test_accuracy", "accuracy", "%", scale=100, digits=2, larger_is_better=True)
"""What runs are compared by, and targets are set for; its final value is what a run of a sweep is worth."""

LOSS = Metric("test_loss", "loss", "nats", scale=1, digits=4, larger_is_better=False)

METRICS = (QUALITY, LOSS)
"""What is shown of every round, in this order."""

TRAIN_LOSS = "train_loss"
"""Key of the loss of the weights that a round began with, on what its clients trained on."""
