"""What a task is: the loss of each example, and the metrics that say how well a model does.

A batch is a mapping of named tensors, each with one row an example: `inputs`, `targets`, and whatever else a data set
has. All else, such as clients, rounds, files and pictures, knows no more of what is learnt than what is said here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

INPUTS, TARGETS = "inputs", "targets"
"""Fields that every data set has."""

LOSS = "loss"
"""What the mean loss is called among metrics."""

Batch = Mapping[str, Tensor]
"""Named tensors, (B, ...)."""


@dataclass(frozen=True)
class Metric:
    """A number that says how well a model does on some examples.

    Attributes:
        name: As it stands in files, behind `test_`.
        better: Whether more is better (`higher`) or less (`lower`).
        unit: Of what people are shown; empty for none.
        factor: By which the number in files is multiplied to be shown in that unit.
        digits: Decimal places in which it is shown.
    """

    name: str
    better: Literal["higher", "lower"]
    unit: str = ""
    factor: float = 1.0
    digits: int = 4

    def shown(self, value: float) -> str:
        """A value as people are shown it, with its unit."""
        return f"{value * self.factor:.{self.digits}f}{f' {self.unit}' if self.unit else ''}"

    @property
    def label(self) -> str:
        """Its name and unit, for an axis or a column."""
        return f"{self.name}, {self.unit}" if self.unit else self.name


class Task(ABC):
    """One kind of thing to learn.

    Attributes:
        metrics: What is measured beside the mean loss; by the first, runs are compared.
        loss_unit: Unit of the loss.
    """

    metrics: tuple[Metric, ...]
    loss_unit: str = ""

    def output(self, model: nn.Module, batch: Batch) -> Any:
        """What the model makes of a batch; it is given nothing but the inputs."""
        return model(batch[INPUTS])

    @abstractmethod
    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Loss of every example, (B,), differentiable, in single precision."""

    @abstractmethod
    def totals(self, output: Any, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over the examples, (), from which the metrics follow; sums over batches are added up."""

    @abstractmethod
    def measure(self, totals: Mapping[str, float], examples: int, loss: float) -> dict[str, float]:
        """The metrics by name, from the sums over a number of examples and their mean loss."""

    @abstractmethod
    def objection(self, output: Any, batch: Batch) -> str | None:
        """Why an output cannot be that of a model for this task, as the end of a sentence; None if it can."""
