"""Q = I: PISA without preconditioning, inexact ADMM (PISA, arXiv 2502.10784, Algorithm 1 with Q_i = I)."""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.base.layout import Layout
from strategies.base.messages import Field
from strategies.preconditioners.base import Preconditioner, State


class Identity(Preconditioner):
    """The step is the residual divided by sigma + rho.

    Args:
        layout: Layout of the model's parameters.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def state_fields(self) -> dict[str, Field]:
        """Nothing is kept."""
        return {}

    def statistic_fields(self) -> dict[str, Field]:
        """Nothing is observed."""
        return {}

    def scale(self, state: State) -> Tensor:
        """One, (d,)."""
        return torch.ones(self.layout.size)

    def solve(self, state: State, residual: Tensor, sigma: Tensor, rho: float) -> Tensor:
        """Residual / (sigma + rho)."""
        return residual / (sigma + rho)
