"""Low-rank adaptive steps in a basis of cosines.

DCT-AdamW (Modoranu et al. 2025, arXiv 2505.17967), whose basis is fixed and known to everybody. For a matrix W (m x
n; convolutions as out x in*kh*kw; transposed if m < n, so that n is its smaller side), h the federation's gradient
and C the orthonormal matrix of the discrete cosine transform, C_jk = sqrt((2 - [k=0])/n) cos(pi (j + 1/2) k / n),

    H = h + E                                 E only with `feedback`
    S = H C_J                                 J: the `rank` columns of H C with the largest norms
    v = b v + (1-b) S^2                       columns that J had before keep theirs, new ones begin with zero
    D = q S / (sqrt(v / (1-b^t)) + eps) C_J^T                  t: rounds since the column entered J
    E = H - S C_J^T                           what was left out, to be stepped along later

Of all choices of J, that one leaves out the least; the authors' code goes by sums of absolute values. Adam's first
moment, which the paper keeps too, is left to the dual, which is a moving average of D (docs/algorithm.md, departure
1). The state is rank max(m, n) numbers a matrix, and d more with feedback. The paper corrects a new column's moment
by the age of all; so young a moment would make its first steps ten times too long, hence an age for every column.

The messages do not shrink: J is known when the gradients are there, and the wire has no second exchange for it.
`strategy.compression` makes them smaller.

How P acts on clients whose data differ, and what its fixed points are, is in `strategies.preconditioners.direction`.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field
from strategies.preconditioners.base import State
from strategies.preconditioners.direction import Direction


class DctLowRank(Direction):
    """Steps by the second moment of the coordinates that matter most, along those alone.

    Args:
        layout: Layout of the model's parameters.
        rank: Coordinates of each row or column that are stepped along.
        feedback: Whether what they leave out is added to the next gradient; takes d numbers.
        beta: Decay of the moving averages of squares; the paper: 0.999 for the moment.
        eps: Added to their roots; the paper: 1e-8.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, layout: Layout, rank: int, feedback: bool, beta: float, eps: float) -> None:
        super().__init__(layout, beta, eps)
        checks.whole("rank", rank, 1)
        self._feedback = feedback
        shapes = layout.matrices.items()
        self._chosen = Layout({name: (max(shape), min(rank, *shape)) for name, shape in shapes})
        self._columns = Layout({name: (1, count) for name, (_, count) in self._chosen.matrices.items()})

    def own_fields(self) -> dict[str, Field]:
        """`moment` v, `columns` J and `masses` 1-b^t of each of J, of all matrices; `error` E (d,), with feedback."""
        fields = {
            "moment": Field(self._chosen.size, minimum=0.0),
            "columns": Field(self._columns.size, minimum=0.0),
            "masses": Field(self._columns.size, minimum=0.0),
        }
        return fields | ({"error": Field(self.layout.size)} if self._feedback else {})

    def follow(
        self, state: State, observed: Tensor, sizes: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The columns of this round, one step of their moment, and the direction along them."""
        memory = {name: state[name].clone() for name in self.own_fields()}
        if self._feedback:
            memory["error"] += observed
        moments = dict(self._chosen.each_matrix(memory["moment"]))
        columns, masses = (dict(self._columns.each_matrix(memory[name])) for name in ("columns", "masses"))
        directions = {}
        for name, matrix in self.layout.each_matrix(memory["error"] if self._feedback else observed):
            wide = matrix.shape[-2] < matrix.shape[-1]
            tall = matrix.mT if wide else matrix
            n, count = tall.shape[-1], columns[name].shape[-1]
            basis = cosines(n).to(tall)
            turned = tall @ basis
            norms = turned.square().sum(dim=-2, keepdim=True)
            chosen = norms.topk(count, dim=-1).indices.sort(dim=-1).values
            kept = (columns[name].mT == chosen).to(tall)  # which of the columns before is which of now
            back = basis.T[chosen[:, 0]]
            seen = turned.gather(-1, chosen.expand(-1, tall.shape[-2], -1))
            square = torch.lerp(seen.square(), moments[name] @ kept, self._beta)
            mass = masses[name] @ kept * self._beta + (1 - self._beta)
            step = (seen / ((square / mass).sqrt() + self._eps)) @ back * sizes[name]
            directions[name] = step.mT if wide else step
            for known, new in ((moments, square), (masses, mass), (columns, chosen)):
                known[name].copy_(new)
            if self._feedback:
                tall.sub_(seen @ back)
        return memory, directions


@cache
def cosines(n: int) -> Tensor:
    """C, orthonormal, (n, n): in its columns cosines of half a period more each."""
    rows = torch.arange(n, dtype=torch.float64).unsqueeze(1)
    waves = torch.cos(math.pi / n * (rows + 0.5) * torch.arange(n, dtype=torch.float64))
    waves[:, 0] *= 0.5**0.5
    return waves * (2 / n) ** 0.5
