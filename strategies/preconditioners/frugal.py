"""FRUGAL: adaptive steps for a few columns at a time, signs for the rest.

FRUGAL (Zmushko et al. 2024, arXiv 2411.07837, Algorithm 1, columns as in its authors' `columns`). For a matrix W (m x
n; convolutions as out x in*kh*kw), h the federation's gradient and J a share `density` of its columns,

    v = b v + (1-b) h_J^2,  from zero whenever J changes                     state-full
    D = q h_J / (sqrt(v / (1-b^t)) + eps)         for columns of J, t the rounds since J changed
    D = q s sign(h)                               for the others             state-free

J changes every `refresh` rounds. The authors draw it anew; here the columns take turns, so that nothing need be drawn
or remembered, and after 1/density changes each has had its turn. Adam's first moment, which the authors keep too, is
left to the dual, which is a moving average of D (docs/algorithm.md, departure 1): the state is density times d.

How P acts on clients whose data differ, and what its fixed points are, is in `strategies.preconditioners.direction`.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field
from strategies.preconditioners.base import State
from strategies.preconditioners.direction import Direction


class Frugal(Direction):
    """Steps by the second moment where there is one, by the sign elsewhere.

    Args:
        layout: Layout of the model's parameters.
        density: Share of every matrix's columns that have a moment, in (0, 1]; the paper: 0.25.
        refresh: Rounds that they have it for; the paper: 200 steps.
        sign: s, length of the other columns' steps; the paper: 1.
        beta: Decay of the moving averages of squares; the paper: 0.999 of the columns' moment.
        eps: Added to their roots; the paper: 1e-8.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self, layout: Layout, density: float, refresh: int, sign: float, beta: float, eps: float
    ) -> None:
        super().__init__(layout, beta, eps)
        checks.share("density", density)
        checks.whole("refresh", refresh, 1)
        checks.not_negative("sign", sign)
        self._refresh, self._sign = refresh, sign
        self._chosen = Layout({name: (m, ceil(density * n)) for name, (m, n) in layout.matrices.items()})

    def own_fields(self) -> dict[str, Field]:
        """`moment` v of the columns of J of all matrices; `age`, rounds so far (1,)."""
        return {"moment": Field(self._chosen.size, minimum=0.0), "age": Field(1, minimum=0.0)}

    def follow(
        self, state: State, observed: Tensor, sizes: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step of the chosen columns' moment, and both kinds of direction."""
        turns = torch.div(state["age"], self._refresh, rounding_mode="floor")
        since = state["age"] - turns * self._refresh + 1
        moment = torch.where(since == 1, 0.0, state["moment"])
        correction = (1 - self._beta**since).unsqueeze(-1)
        directions = {}
        moments = dict(self._chosen.each_matrix(moment))
        for name, matrix in self.layout.each_matrix(observed):
            m, count = self._chosen.matrices[name]
            first = turns.long() * count
            places = (first + torch.arange(count, device=first.device)) % matrix.shape[-1]
            places = places.unsqueeze(-2).expand(-1, m, -1)
            chosen = matrix.gather(-1, places)
            square = moments[name].lerp_(chosen.square(), 1 - self._beta)
            adapted = chosen / ((square / correction).sqrt() + self._eps)
            step = (self._sign * matrix.sign()).scatter(-1, places, adapted)
            directions[name] = step * sizes[name]
        return {"moment": moment, "age": state["age"] + 1}, directions
