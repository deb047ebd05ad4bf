"""AdamW: steps of about one size for every weight, and weight decay beside the gradient.

Loshchilov and Hutter 2019, arXiv 1711.05101. With g the gradient and what the method adds to it,

    m  = momentum m + (1 - momentum) g
    v  = beta_2 v + (1 - beta_2) g^2
    w_i -= lr (m^ / (sqrt(v^) + eps) + weight_decay w_i)

Symbols: m^ and v^ are m and v divided by the weight of all gradients in them, 1 - momentum^t and 1 - beta_2^t; momentum
is Adam's beta_1. A weight moves by about lr a step, whatever the gradient's size: an lr ten or more times smaller than
SGD's is usual, and what a method adds to the gradient turns the step more than it lengthens it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field
from strategies.optimizers.base import Memory, Optimizer

FIRST, SECOND, MASS = "first", "second", "mass"
"""m, v, and the weights of all gradients in either."""


class AdamW(Optimizer):
    """Steps by the root of the second moment.

    Args:
        layout: Layout of the model's parameters.
        momentum: Decay of the first moment; the paper: 0.9.
        weight_decay: Share of the weights in a step; the paper tunes it.
        beta_2: Decay of the second moment; the paper: 0.999.
        eps: Added to its root; the paper: 1e-8.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self, layout: Layout, momentum: float, weight_decay: float, beta_2: float, eps: float
    ) -> None:
        super().__init__(layout, momentum, weight_decay)
        checks.decay("beta_2", beta_2)
        checks.positive("eps", eps)
        self.beta_2, self.eps = beta_2, eps

    def memory_fields(self) -> dict[str, Field]:
        """The moments (d,), and their `mass` (2,)."""
        size = self.layout.size
        return {
            FIRST: Field(size),
            SECOND: Field(size, minimum=0.0),
            MASS: Field(2, minimum=0.0),
        }

    def direction(self, memory: Memory, gradient: Tensor, weights: Tensor) -> Tensor:
        """The corrected moments' quotient, and the decay."""
        first, second, mass = memory[FIRST], memory[SECOND], memory[MASS]
        first.lerp_(gradient, 1 - self.momentum)
        second.mul_(self.beta_2).addcmul_(gradient, gradient, value=1 - self.beta_2)
        for column, beta in enumerate((self.momentum, self.beta_2)):
            mass[:, column].mul_(beta).add_(1 - beta)
        root = (second / mass[:, 1:]).sqrt_().add_(self.eps)
        return torch.addcmul(weights * self.weight_decay, first / mass[:, :1], 1 / root)
