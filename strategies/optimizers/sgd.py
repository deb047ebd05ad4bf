"""SGD with momentum, and weight decay in the gradient: PyTorch's.

g  = grad F_i(w_i; batch) + weight_decay w_i, and what the method adds
b  = momentum b + g
w_i -= lr b
"""

from __future__ import annotations

from torch import Tensor

from strategies.base.messages import Field
from strategies.optimizers.base import Differentiate, Memory, Optimizer

MOMENTUM = "momentum"
"""b."""


class Sgd(Optimizer):
    """Steps along the sum of gradients, which momentum makes fade; arguments as `Optimizer`'s."""

    def memory_fields(self) -> dict[str, Field]:
        """B, if there is momentum."""
        return {MOMENTUM: Field(self.layout.size)} if self.momentum else {}

    def gradient(
        self, memory: Memory, differentiate: Differentiate, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients with weight decay in them."""
        gradient, loss = self.of_loss(memory, differentiate, weights)
        if self.weight_decay:
            gradient.add_(weights, alpha=self.weight_decay)
        return gradient, loss

    def of_loss(self, memory: Memory, differentiate: Differentiate, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients without it."""
        return differentiate(weights)

    def direction(self, memory: Memory, gradient: Tensor, weights: Tensor) -> Tensor:
        """B, or the gradient where there is no momentum."""
        return memory[MOMENTUM].mul_(self.momentum).add_(gradient) if self.momentum else gradient
