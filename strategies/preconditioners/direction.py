"""What preconditioners have in common that map the gradient to a direction, by a non-linear P.

P is applied to the federation's gradient h = sum_i alpha_i g_i, as the server averages it (with `consensus: fresh`, of
everybody's last), and clients differ as their gradients do:

    q   = sqrt(moving average of h's mean square) + eps             one number a matrix
    D   = q P(h)                                                    in the gradient's units
    w_i = w - (sigma I + rho q)^-1 (D + k (g_i - h) + pi_i)         k = `spread`

The average of these residuals is D + sum_i alpha_i pi_i. So, with everybody there, the path is that of P applied to
the average, whatever the skew, and the duals hold what clients want more or less than the others, as they do for
other preconditioners. The automatic penalty has sigma = q/lr: a steady direction moves the weights by about lr a
round.

k is nothing to that path. But where only some answer, their differences do not cancel, and D is as long as q, however
small h becomes, while clients may differ by many times q: with k = 1 and half of ten clients there, the first twenty
rounds did more harm than good. (`difference`, docs/algorithm.md, departure 8, multiplies k.)

At a fixed point pi_i = -(k (g_i - h) + D), so that D = -lambda w. Without lambda D is zero, and with it h, unless P
says otherwise: the solution of the problem. (Steps do not shrink with the gradient, as those of any P without a scale;
the schedule of lr ends them.) With lambda, w is pulled to zero against P(h) in place of h, as by decoupled weight
decay.

Unaligned, h is a client's own gradient and the residual P(g_i) + pi_i. A mean of orthogonalised gradients is not the
orthogonalised mean: its fixed points, where sum_i alpha_i P(g_i) = 0, are the problem's if all clients are alike.

D - k h is a vector that all clients have in common. Where every round observes anew (`align_every: 1` with `lag: 0`, or
unaligned) it is forgotten after its round, and what is kept is as little as P's paper promises. Tensors of fewer than
two dimensions follow the second moment: they have a q for each element, and D = h.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field
from strategies.preconditioners.base import State
from strategies.preconditioners.diagonal import Diagonal


class Direction(Diagonal):
    """P of matrices, and the second moment of the rest.

    Args:
        layout: Layout of the model's parameters.
        beta: Decay of the moving averages of squares.
        eps: Added to their roots.

    Raises:
        ValueError: A number is outside its range.
    """

    spread: ClassVar[float] = 0.3
    """k; with 1, two runs in fifteen were at a guess after 20 rounds (`experiments.safety`, muon)."""

    def __init__(self, layout: Layout, beta: float, eps: float) -> None:
        checks.decay("beta", beta)
        checks.not_negative("eps", eps)
        self.layout, self._beta, self._eps = layout, beta, eps
        sizes = dict(zip(layout.shapes, layout.sizes, strict=True))
        counts = [1 if name in layout.matrices else size for name, size in sizes.items()]
        places = torch.arange(sum(counts)).split(counts)
        self._places = torch.cat([p.expand(size) for p, size in zip(places, layout.sizes, strict=True)])

    @abstractmethod
    def own_fields(self) -> dict[str, Field]:
        """What P remembers."""

    @abstractmethod
    def follow(
        self, state: State, observed: Tensor, sizes: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """P's memory after one more gradient, (C, d), and D of each matrix, (C, m, n), given its q, (C, 1, 1)."""

    def state_fields(self) -> dict[str, Field]:
        """The memory, and `turn` D - k h (d,)."""
        return self.memory_fields() | {"turn": Field(self.layout.size)}

    def memory_fields(self) -> dict[str, Field]:
        """P's own; `moments` of each matrix and of each element of the rest, and `mass` 1-beta^t (1,)."""
        return self.own_fields() | self._moment_fields()

    def solver_fields(self) -> dict[str, Field]:
        """The moments and `turn`."""
        return self._moment_fields() | {"turn": Field(self.layout.size)}

    def accumulate(self, state: State, statistic: State) -> dict[str, Tensor]:
        """One step of the moving averages and of P's memory, and the direction that follows."""
        observed = statistic["observed"]
        moments = {
            "moments": torch.lerp(self._squares(observed), state["moments"], self._beta),
            "mass": state["mass"] * self._beta + (1 - self._beta),
        }
        q = dict(self.layout.each_matrix(self.diagonal(moments)))
        sizes = {name: matrix[:, :1, :1] for name, matrix in q.items()}
        memory, directions = self.follow(state, observed, sizes)
        turn = observed * (1 - self.spread)
        gradients = dict(self.layout.each_matrix(observed))
        for name, target in self.layout.each_matrix(turn):
            torch.sub(directions[name], gradients[name] * self.spread, out=target)
        return memory | moments | {"turn": turn}

    def direction(self, state: State, gradient: Tensor) -> Tensor:
        """k g + (D - k h), (C, d)."""
        return gradient * self.spread + state["turn"]

    def diagonal(self, state: State) -> Tensor:
        """q, (C, d)."""
        roots = (state["moments"] / state["mass"]).sqrt() + self._eps
        return roots[:, self._places.to(roots.device)]

    def _squares(self, observed: Tensor) -> Tensor:
        """Mean square of each matrix, and the squares of the rest, one after the other."""
        parts = zip(self.layout.shapes, observed.square().split(self.layout.sizes, dim=-1), strict=True)
        matrices = self.layout.matrices
        return torch.cat([p.mean(-1, keepdim=True) if name in matrices else p for name, p in parts], dim=-1)

    def _moment_fields(self) -> dict[str, Field]:
        size = int(self._places[-1]) + 1
        return {"moments": Field(size, minimum=0.0), "mass": Field(1, minimum=0.0)}


class MomentumDirection(Direction):
    """P of a moving average of the gradient.

    M = mu M + (1-mu) h, and P of M or, with Nesterov's look ahead, of mu M + (1-mu) h once more. PISA's duals are a
    momentum already, of directions: mu may be smaller than where there are none, and 0 leaves nothing to remember.

    Args:
        layout: Layout of the model's parameters.
        mu: Decay of the moving average.
        nesterov: Whether to look ahead.
        beta: Decay of the moving averages of squares.
        eps: Added to their roots.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, layout: Layout, mu: float, nesterov: bool, beta: float, eps: float) -> None:
        super().__init__(layout, beta, eps)
        checks.decay("mu", mu)
        self._mu, self._nesterov = mu, nesterov

    @abstractmethod
    def point(self, matrix: Tensor, size: Tensor) -> Tensor:
        """D of a momentum, (C, m, n), given q (C, 1, 1)."""

    def own_fields(self) -> dict[str, Field]:
        """`momentum` M (d,), if there is one."""
        return {"momentum": Field(self.layout.size)} if self._mu else {}

    def follow(
        self, state: State, observed: Tensor, sizes: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step of the momentum, and where it points."""
        memory, ahead = {}, observed
        if self._mu:
            ahead = memory["momentum"] = torch.lerp(observed, state["momentum"], self._mu)
            if self._nesterov:
                ahead = torch.lerp(observed, ahead, self._mu)
        matrices = self.layout.each_matrix(ahead)
        return memory, {name: self.point(matrix, sizes[name]) for name, matrix in matrices}
