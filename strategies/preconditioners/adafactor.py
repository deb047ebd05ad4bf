"""Adafactor's second moment, of rank one, as a curvature preconditioner.

Adafactor (Shazeer and Stern 2018, arXiv 1804.04235, Algorithm 4), whose estimate AdaPreLoRA (arXiv 2605.08734) takes
for the weights themselves. For a matrix W (m x n; convolutions as out x in*kh*kw) and G its gradient in round t,

    b = 1 - t^-decay
    r = b r + (1-b) mean over columns of G^2          c = b c + (1-b) mean over rows of G^2
    Q = diag(sqrt(r c^T / mean(r)) + eps)

r c^T / mean(r) has the means of rows and columns that the whole moment would have, from m + n numbers in place of m n.
Tensors of fewer than two dimensions have the moment itself. The first b is zero, so that nothing needs a correction.
The paper's clipping of updates and its relative steps are not here: the penalty does what they are for.

Aligned, clients' gradients are averaged and then squared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field
from strategies.preconditioners.base import State
from strategies.preconditioners.diagonal import Diagonal


class Adafactor(Diagonal):
    """Element-wise steps from the moments of rows and columns.

    Args:
        layout: Layout of the model's parameters.
        decay: Power by which the moving averages become slower; the paper: 0.8.
        eps: Added to the root; the paper adds 1e-30 to the squares.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, layout: Layout, decay: float, eps: float) -> None:
        checks.positive("decay", decay)
        checks.not_negative("eps", eps)
        self.layout, self._decay, self._eps = layout, decay, eps

    def state_fields(self) -> dict[str, Field]:
        """`moments`: of rows, then of columns, of each matrix, and of each element of the rest; `age` t (1,)."""
        sizes = (sum(self.layout.matrices.get(name, (size,))) for name, size in self._elements())
        return {"moments": Field(sum(sizes), minimum=0.0), "age": Field(1, minimum=0.0)}

    def accumulate(self, state: State, statistic: State) -> dict[str, Tensor]:
        """One step of the moving averages."""
        age = state["age"] + 1
        square, parts = statistic["observed"].square(), []
        matrices = dict(self.layout.each_matrix(square))
        for name, _ in self._elements():
            if name in matrices:
                parts += [matrices[name].mean(dim=-1), matrices[name].mean(dim=-2)]
            else:
                parts.append(square[:, self.layout.spans[name]])
        share = age**-self._decay
        return {"moments": torch.lerp(state["moments"], torch.cat(parts, dim=1), share), "age": age}

    def diagonal(self, state: State) -> Tensor:
        """q, (C, d)."""
        moments, start = state["moments"], 0
        whole = moments.new_empty(len(moments), self.layout.size)
        matrices = dict(self.layout.each_matrix(whole))
        for name, size in self._elements():
            if name in matrices:
                m, n = self.layout.matrices[name]
                rows, columns = moments[:, start : start + m], moments[:, start + m : start + m + n]
                shares = rows / rows.mean(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
                matrices[name].copy_(shares.unsqueeze(-1) * columns.unsqueeze(-2))
                start += m + n
            else:
                whole[:, self.layout.spans[name]] = moments[:, start : start + size]
                start += size
        return whole.sqrt_().add_(self._eps)

    def _elements(self) -> list[tuple[str, int]]:
        """Name and number of elements of every tensor."""
        return list(zip(self.layout.shapes, self.layout.sizes, strict=True))
