"""SGD-SaI: one learning rate a tensor, scaled once at initialisation.

SGD-SaI (Xu et al. 2024, arXiv 2412.11768, Algorithm 1). From the first gradient G of each tensor,

    s = norm(G) / (std(G) + eps)
    Q = diag(1 / s)

and never again: the state is one number a tensor. s, the "gradient's signal-to-noise ratio", is about the root of the
tensor's size. It says nothing of the gradient's size, so that steps shrink with the gradient, as SGD's do: they are of
another size than others', and `rate` makes up for that. A tensor of one element has no deviation; it has s = 1, the
root of its size.

Aligned, s is of the average of all clients' first gradients, the same for all. A tensor whose first gradient was zero
is measured at its first that is not, and until then has the root of its size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field
from strategies.preconditioners.base import State
from strategies.preconditioners.diagonal import Diagonal


class SgdSai(Diagonal):
    """A step length for each tensor, fixed by its first gradient.

    Args:
        layout: Layout of the model's parameters.
        eps: Added to the deviation; the paper: 1e-8.

    Raises:
        ValueError: A number is outside its range.
    """

    rate = 0.25

    def __init__(self, layout: Layout, eps: float) -> None:
        checks.not_negative("eps", eps)
        self.layout, self._eps = layout, eps
        self._sizes = torch.tensor(layout.sizes)

    def state_fields(self) -> dict[str, Field]:
        """`ratio` s of each tensor, (T,), zero where there is none yet; `mass` (1,), one once anything was observed."""
        return {"ratio": Field(len(self.layout.sizes), minimum=0.0), "mass": Field(1, minimum=0.0)}

    def accumulate(self, state: State, statistic: State) -> dict[str, Tensor]:
        """Measure the tensors that were not measured."""
        observed = statistic["observed"]
        norms = self.layout.norms(observed)
        parts = observed.split(self.layout.sizes, dim=-1)
        deviations = [p.std(dim=-1) if p.shape[-1] > 1 else p.abs().squeeze(-1) for p in parts]
        ratio = norms / (torch.stack(deviations, dim=-1) + self._eps)
        return {
            "ratio": torch.where(state["ratio"] > 0, state["ratio"], ratio),
            "mass": torch.ones_like(state["mass"]),
        }

    def diagonal(self, state: State) -> Tensor:
        """q, (C, d)."""
        ratio = state["ratio"]
        usual = self._sizes.to(ratio).sqrt().expand_as(ratio)
        return self.layout.expand(1 / torch.where(ratio > 0, ratio, usual))
