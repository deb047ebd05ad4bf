"""What an optimizer of local steps is: which gradients it takes, what it remembers of them, where it steps.

Its memory begins as zeros in every round, unless the method has clients go on from one that the server averages.
Tensors are rows, (C, d), one for each of C clients that are computed together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field

Memory = dict[str, Tensor]
"""What is remembered from step to step, {name: (C, size)}; steps write to it."""

Differentiate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Weights (C, d) -> gradients (C, d) and losses (C,) of a mini-batch, which nobody else will write to."""


class Optimizer(ABC):
    """Where the steps of local epochs go.

    Args:
        layout: Layout of the model's parameters.
        momentum: Decay of the average of gradients.
        weight_decay: Share of the weights in a step, or in the gradient, as the optimizer has it.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, layout: Layout, momentum: float, weight_decay: float) -> None:
        checks.decay("momentum", momentum)
        checks.not_negative("weight_decay", weight_decay)
        self.layout, self.momentum, self.weight_decay = layout, momentum, weight_decay

    def memory_fields(self) -> dict[str, Field]:
        """What is remembered from step to step."""
        return {}

    def begin(self, weights: Tensor) -> Memory:
        """The memory before a step, zeros."""
        return {name: weights.new_zeros(len(weights), f.size) for name, f in self.memory_fields().items()}

    def gradient(
        self, memory: Memory, differentiate: Differentiate, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients that a step is made of, (C, d), and the losses at the weights, (C,)."""
        return differentiate(weights)

    @abstractmethod
    def direction(self, memory: Memory, gradient: Tensor, weights: Tensor) -> Tensor:
        """What lr times is taken from the weights, (C, d); takes the memory forward.

        Args:
            memory: It is written to.
            gradient: What `gradient` gave and what the method adds to it.
            weights: Where it was taken.
        """
