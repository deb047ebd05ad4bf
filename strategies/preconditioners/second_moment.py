"""SISA's preconditioner: Q = diag of the root second moment of the residual (arXiv 2502.10784, Algorithm 2).

    v  = beta v + (1-beta) (g + pi)^2
    v^ = v / (1-beta^t)
    Q  = diag(sqrt(v^) + eps + floor mean(sqrt(v^)))        mean over each tensor

The factor 1-beta^t is kept as the moving average of the constant one (`mass`), which stays right when
averages of several clients are mixed. The authors' federated code never advances t beyond one:
`bias_correction: first_step` divides by 1-beta for ever. The floor is not in the paper: without it, elements
of small gradients follow every gradient at once, and late rounds may oscillate (docs/algorithm.md).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field, averaged, squared
from strategies.preconditioners.base import State
from strategies.preconditioners.diagonal import Diagonal


@checks.literals
class SecondMoment(Diagonal):
    """Element-wise adaptive steps.

    Args:
        layout: Layout of the model's parameters.
        beta: Decay of the moving average; the authors: 0.999.
        eps: Added to the root; the authors: 1e-8.
        floor: Added to the root, as a share of its mean over the tensor; the authors: 0.
        moment_of: `residual` (g + pi, the paper) or `gradient` (g).
        average: What the server averages when clients are aligned. `vector`: their residuals or gradients,
            whose average is then squared, so that Q is that of the whole federation, whatever the skew.
            `square`: their squares.
        bias_correction: `exact`, or the authors' `first_step`.

    Raises:
        ValueError: A value is outside its range.
    """

    def __init__(
        self,
        layout: Layout,
        beta: float,
        eps: float,
        floor: float,
        moment_of: Literal["residual", "gradient"],
        average: Literal["vector", "square"],
        bias_correction: Literal["exact", "first_step"],
    ) -> None:
        checks.decay("beta", beta)
        checks.not_negative("eps", eps)
        checks.not_negative("floor", floor)
        self.layout = layout
        self.beta, self.eps, self.floor = beta, eps, floor
        self._of_gradient = moment_of == "gradient"
        self._squared = average == "square"
        self._exact = bias_correction == "exact"
        self.gradient_field = "observed" if self._of_gradient and not self._squared else None

    def state_fields(self) -> dict[str, Field]:
        """`moment` v (d,) and `mass` 1-beta^t (1,)."""
        return {"moment": Field(self.layout.size, minimum=0.0), "mass": Field(1, minimum=0.0)}

    def statistic_fields(self) -> dict[str, Field]:
        """`observed`: the residual or gradient, or its square, (d,)."""
        return {"observed": averaged(self.layout.size, 0.0) if self._squared else squared(self.layout.size)}

    def statistic(self, gradient: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """The residual (or gradient), squared if squares are to be averaged."""
        observed = gradient if self._of_gradient else residual
        return {"observed": observed.square() if self._squared else observed}

    def accumulate(self, state: State, statistic: State) -> dict[str, Tensor]:
        """One step of the moving averages."""
        observed = statistic["observed"]
        square = observed if self._squared else observed.square()
        return {
            "moment": state["moment"] * self.beta + square * (1 - self.beta),
            "mass": state["mass"] * self.beta + (1 - self.beta),
        }

    def diagonal(self, state: State) -> Tensor:
        """Diagonal of Q, (C, d)."""
        root = self._moment_root(state)
        if self.floor:
            root = root + self.floor * self.layout.expand(self.layout.mean(root))
        return root

    def scale(self, state: State) -> Tensor | None:
        """Mean of sqrt(v^) + eps over each tensor, (d,)."""
        if not state["mass"].any():
            return None
        return self.layout.expand(self.layout.mean(self._moment_root(state)))[0]

    def _moment_root(self, state: State) -> Tensor:
        """sqrt(v^) + eps, (C, d)."""
        mass = state["mass"] if self._exact else 1 - self.beta
        return (state["moment"] / mass).sqrt() + self.eps
