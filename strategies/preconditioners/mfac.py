"""M-FAC: the Fisher matrix of the last gradients, inverted exactly.

M-FAC (Frantar, Kurtic, Alistarh 2021, arXiv 2107.03356), a block for each tensor, of d elements. With g_1, ..., g_n the
last averaged gradients, at most k of them,

    t = (1/n) sum |g_j|^2                    q = sqrt(t/d)
    F = (1/n) sum g_j g_j^T                  Q = (q/t) (damping t I + F)

F is of the size of a gradient's square, and Q of that of its elements: where all gradients are the same g, Q has
the eigenvalue (1 + damping) q along it and damping q across. So sigma = q/lr and rho = m/((1-m) lr) mean what they
mean for others: q, the root of the mean square of an element, is the typical size of Q, a steady gradient moves
the weights by lr a round, and along it the momentum is m. What is new, across, is followed at once. With G (n x d)
the gradients and D = sigma I + rho q damping I, by Woodbury's identity,

    (sigma I + rho Q)^-1 r = D^-1 r - D^-1 G^T (n t/(rho q) I + G D^-1 G^T)^-1 G D^-1 r

exactly, at the cost of k d, in a form that rho = 0 is no exception to.

What is not the paper's: it adds a number to F, here damping is a share of F's trace, so that it does not matter how
large gradients are. Its gradients are 1,024 of mini-batches, here they are the federation's, of which a run has a few
dozen; and where the paper mends coefficients as gradients come and go, the k x k matrices are made anew, which for a
small k is little work.

Q's eigenvalues are damping q nearly everywhere, and momentum is short there. With that as the typical size, as K-FAC
has it, momentum is m across and longer along the gradients. That was better with everybody there and worse without:
where half of ten clients of one class each answered, a convolutional network had learned next to nothing after 20
rounds in three of five runs, and in none of five as it is (docs/preconditioners.md has numbers).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field, squared
from strategies.preconditioners.base import Preconditioner, State


class Mfac(Preconditioner):
    """Steps across the last gradients, short where these were.

    Args:
        layout: Layout of the model's parameters.
        gradients: k, how many are kept; the paper: 1,024 of mini-batches.
        damping: Share of F's trace that is added to its eigenvalues; the paper adds a number.

    Raises:
        ValueError: A number is outside its range.
    """

    gradient_field = "observed"
    rate = (
        0.1  # of runs where half of the clients answered, none of 9 failed with that, and four of 15 with 0.5
    )

    def __init__(self, layout: Layout, gradients: int, damping: float) -> None:
        checks.whole("gradients", gradients, 1)
        checks.positive("damping", damping)
        self.layout, self.gradients, self.damping = layout, gradients, damping

    def state_fields(self) -> dict[str, Field]:
        """`ring`: the gradients, (k d,); `age` (1,): how many there were in all."""
        return {"ring": Field(self.gradients * self.layout.size), "age": Field(1, minimum=0.0)}

    def statistic_fields(self) -> dict[str, Field]:
        """`observed`: the gradient, (d,)."""
        return {"observed": squared(self.layout.size)}

    def statistic(self, gradient: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """The gradient itself."""
        return {"observed": gradient}

    def accumulate(self, state: State, statistic: State) -> dict[str, Tensor]:
        """The oldest gradient gives way to the new one."""
        places = torch.arange(self.gradients, device=state["age"].device)
        oldest = (places == state["age"] % self.gradients).unsqueeze(-1)
        ring = torch.where(oldest, statistic["observed"].unsqueeze(1), self._ring(state))
        return {"ring": ring.flatten(1), "age": state["age"] + 1}

    def scale(self, state: State) -> Tensor | None:
        """q of each tensor, (d,)."""
        if not state["age"].any():
            return None
        return self.layout.expand(torch.cat([size for _, size, _ in self._blocks(state)], dim=-1))[0]

    def solve(self, state: State, residual: Tensor, sigma: Tensor, rho: float) -> Tensor:
        """By Woodbury's identity; see the module's equations."""
        factors = self.factored(state, sigma, rho, lambda: list(self._factors(state, sigma, rho)))
        parts = residual.split(self.layout.sizes, dim=-1)
        return torch.cat([_solved(part, *own) for part, own in zip(parts, factors, strict=True)], dim=-1)

    def _factors(
        self, state: State, sigma: Tensor, rho: float
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of each tensor G, D^-1, s G D^-1 and the Cholesky factor of I + s G D^-1 G^T, with s = rho q/(n t)."""
        sigmas = sigma.expand(1, self.layout.size).split(self.layout.sizes, dim=-1)
        for (ring, size, total), own in zip(self._blocks(state), sigmas, strict=True):
            inverse = 1 / (own + rho * size * self.damping)
            share = rho * size / total.clamp(min=torch.finfo(size.dtype).tiny)
            spread = ring * (share * inverse).unsqueeze(1)
            inner = torch.eye(self.gradients, device=ring.device) + (spread @ ring.mT).double()
            yield ring, inverse, spread, torch.linalg.cholesky(inner)

    def _blocks(self, state: State) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """G of each tensor, zero where there is none yet, its q (C, 1) and its n t (C, 1)."""
        count = state["age"].clamp(max=self.gradients)
        for ring in self._ring(state).split(self.layout.sizes, dim=-1):
            total = ring.square().sum(dim=(1, 2)).unsqueeze(-1)
            yield ring, (total / (count * ring.shape[-1])).sqrt(), total

    def _ring(self, state: State) -> Tensor:
        """The gradients, (C, k, d)."""
        return state["ring"].unflatten(-1, (self.gradients, self.layout.size))


def _solved(residual: Tensor, ring: Tensor, inverse: Tensor, spread: Tensor, inner: Tensor) -> Tensor:
    """D^-1 r - s D^-1 G^T (I + s G D^-1 G^T)^-1 G D^-1 r."""
    step = inverse * residual
    along = torch.cholesky_solve((ring @ step.unsqueeze(-1)).to(inner.dtype), inner)
    return step - (spread.mT @ along.to(spread.dtype)).squeeze(-1)
