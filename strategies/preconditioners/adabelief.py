"""AdaBelief's second moment, of the gradient's deviation from what was expected, as a curvature preconditioner.

AdaBelief (Zhuang et al. 2020, arXiv 2010.07468, Algorithm 2):

    m = b1 m + (1-b1) g
    s = b2 s + (1-b2) (g - m)^2 + eps
    Q = diag(sqrt(s / (1-b2^t)) + eps)

Where gradients are as they were, Q is small and steps are long; where they are not, they are short. The averaged
gradient of all clients, without the noise of mini-batches, deviates little from its average: what is measured is the
curvature along the path.

Aligned, clients' gradients are averaged first.
"""

from __future__ import annotations

from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field
from strategies.preconditioners.base import State
from strategies.preconditioners.diagonal import Diagonal


class AdaBelief(Diagonal):
    """Element-wise steps by the belief in the gradient.

    Args:
        layout: Layout of the model's parameters.
        beta1: Decay of the gradient's moving average; the paper: 0.9.
        beta2: Decay of the deviation's; the paper: 0.999.
        eps: Added to the deviation's square and to the root; the paper: 1e-16.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, layout: Layout, beta1: float, beta2: float, eps: float) -> None:
        checks.decay("beta1", beta1)
        checks.decay("beta2", beta2)
        checks.not_negative("eps", eps)
        self.layout, self._beta1, self._beta2, self._eps = layout, beta1, beta2, eps

    def state_fields(self) -> dict[str, Field]:
        """`mean` m (d,), `belief` s (d,) and `mass` 1-b2^t (1,)."""
        size = self.layout.size
        return {
            "mean": Field(size),
            "belief": Field(size, minimum=0.0),
            "mass": Field(1, minimum=0.0),
        }

    def accumulate(self, state: State, statistic: State) -> dict[str, Tensor]:
        """One step of the moving averages."""
        mean = state["mean"] * self._beta1 + statistic["observed"] * (1 - self._beta1)
        deviation = (statistic["observed"] - mean).square()
        return {
            "mean": mean,
            "belief": state["belief"] * self._beta2 + deviation * (1 - self._beta2) + self._eps,
            "mass": state["mass"] * self._beta2 + (1 - self._beta2),
        }

    def diagonal(self, state: State) -> Tensor:
        """q, (C, d)."""
        return (state["belief"] / state["mass"]).sqrt() + self._eps
