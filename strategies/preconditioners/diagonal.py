"""What preconditioners have in common whose Q is a diagonal made of the federation's gradient."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from strategies.base.messages import Field, squared
from strategies.preconditioners.base import Preconditioner, State


class Diagonal(Preconditioner):
    """Q = diag(q), from the gradients that clients observe; aligned, from their average."""

    gradient_field: str | None = "observed"

    @abstractmethod
    def diagonal(self, state: State) -> Tensor:
        """q, (C, d)."""

    def statistic_fields(self) -> dict[str, Field]:
        """`observed`: the gradient, (d,)."""
        return {"observed": squared(self.layout.size)}

    def statistic(self, gradient: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """The gradient itself."""
        return {"observed": gradient}

    def scale(self, state: State) -> Tensor | None:
        """Mean of q over each tensor, (d,)."""
        if not any(vector.any() for vector in state.values()):
            return None
        return self.layout.expand(self.layout.mean(self.diagonal(state)))[0]

    def solve(self, state: State, residual: Tensor, sigma: Tensor, rho: float) -> Tensor:
        """Residual / (sigma + rho q), element by element."""
        return residual * self.factored(state, sigma, rho, lambda: 1 / (sigma + rho * self.diagonal(state)))
