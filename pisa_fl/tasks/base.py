"""What a task is: the loss of each example, and the metrics that say how well a model does.

A batch is a mapping of named tensors, each with one row an example: `inputs`, `targets`, and whatever else a data set
has. All else, such as clients, rounds, files and pictures, knows no more of what is learnt than what is said here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pisa_fl.metric import Measures, Metric

INPUTS, TARGETS = "inputs", "targets"
"""Fields that every data set has."""

DRAWS = "draws"
"""Field of numbers from [0, 1), a row an example and of its targets' shape, by which other targets are drawn."""

LOSS = "loss"
"""What the mean loss is called among metrics."""

Batch = Mapping[str, Tensor]
"""Named tensors, (B, ...)."""


class Task(ABC):
    """One kind of thing to learn.

    Attributes:
        metrics: What is measured beside the mean loss; by the first, runs are compared.
        loss_unit: Unit of the loss.
        classes: Whether targets are numbers of classes, (B, ...), and outputs their logits, (B, ..., K).
    """

    metrics: tuple[Metric, ...]
    loss_unit: str = ""
    classes: bool = False

    @property
    def measures(self) -> Measures:
        """What is measured of a model."""
        return Measures.of(self.metrics, self.loss_unit)

    def output(self, model: nn.Module, batch: Batch) -> Any:
        """What the model makes of a batch; it is given nothing but the inputs."""
        return model(batch[INPUTS])

    @abstractmethod
    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Loss of every example, (B,), differentiable, in single precision."""

    def drawn(self, output: Any, batch: Batch) -> Batch:
        """The batch with targets drawn from the distribution that an output stands for, by its field `draws`.

        Of that distribution, the loss is minus the logarithm of the density, up to a constant: what the true Fisher
        matrix takes. What may differ from one client to another are only the draws.
        """
        raise NotImplementedError(
            f"{type(self).__name__} says of no distribution that targets could be drawn from: define `drawn`, or set"
            " strategy.preconditioner.fisher=empirical"
        )

    @abstractmethod
    def totals(self, output: Any, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over the examples, (), from which the metrics follow; sums over batches are added up."""

    @abstractmethod
    def measure(self, totals: Mapping[str, float], examples: int, loss: float) -> dict[str, float]:
        """The metrics by name, from the sums over a number of examples and their mean loss."""

    def chance(self, targets: Tensor) -> float | None:
        """The first metric of whoever gives all of these targets' examples the one best answer; None: not known."""
        return None

    @abstractmethod
    def objection(self, output: Any, batch: Batch) -> str | None:
        """Why an output cannot be that of a model for this task, as the end of a sentence; None if it can."""
