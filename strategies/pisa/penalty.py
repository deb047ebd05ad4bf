"""PISA's penalties: sigma of the augmented Lagrangian and rho of the preconditioner.

By hand, sigma and rho are numbers, as in the paper. Automatic, they follow from a step length and a momentum,
which need no knowledge of the data. Write q for the typical size of Q. With K = 1 and all clients taking part,
the averages over clients of dual and step obey (g the average gradient, p = -sum alpha_i pi_i, ' the next round):

    p' = (1-c) p + c g,     c = sigma/(sigma + rho q)
    w' = w - (p' + c (g - p)) / sigma

that is, -pi is a moving average of the gradient, a momentum, and w moves by p/sigma a round. So

    sigma = q / lr,     rho = momentum / ((1-momentum) lr)     gives     c = 1 - momentum

and a steady gradient of size q moves w by lr a round. In a consensus of all, the rows of clients that are absent hold
it back by their share, and sigma and rho are multiplied by that of the others; a fresh consensus has no such rows.

lr itself may follow a schedule: it grows over the first `warmup` rounds, while little is known of Q, and falls from
the first to `final` of itself at round `horizon`, where it stays: a run that goes on beyond it does so in small steps.

q tells of gradients that were. A tensor whose gradient is zero at first (a layer behind a zero-initialised one), or
grows by orders of magnitude within a round, has a residual of which q says nothing: divided by q it would be a step
of any length. Such a residual, `SURPRISE` times q or more, only gives the direction: it is brought to the size q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.schedule import Schedule, share_left

SURPRISE = 200.0
"""How many times q the root mean square of a tensor's residual may be. Under skew it honestly is a hundred and more,
for q is the size of the federation's gradient, in which the clients' cancel."""

QUIET = 1e-8
"""The least q: less counts as nothing observed. What SISA's authors add to Q."""


@checks.literals
@dataclass(frozen=True)
class Penalty:
    """How sigma and rho are found; immutable, the same on the server and every client.

    Attributes:
        lr: Step length of the automatic penalty, in units of a weight a round.
        momentum: Momentum of the automatic penalty.
        sigma: Penalty by hand, or None for the automatic one.
        rho: Weight of the preconditioner by hand, or None for the automatic one.
        gamma: sigma is divided by it as the rounds go on, in (0, 1]; the paper's gamma_i.
        grow_every: Rounds between divisions: after rounds 1 + grow_every, 1 + 2 grow_every, ...
            (the authors count from 0 and divide after rounds 10, 20, ...).
        participation: Share of the clients that takes part in a round.
        consensus: `all` or `fresh`, as the server's.
        schedule: How lr falls over the rounds: `constant`, `linear` or `cosine`.
        warmup: Rounds over which lr grows to its full size.
        horizon: Round at which the schedule ends.
        final: What is left of lr there, as a share.

    Raises:
        ValueError: A number is outside its range.
    """

    lr: float
    momentum: float
    sigma: float | None
    rho: float | None
    gamma: float
    grow_every: int
    participation: float = 1.0
    consensus: Literal["all", "fresh"] = "all"
    schedule: Schedule = "constant"
    warmup: int = 0
    horizon: int = 100
    final: float = 0.05

    def __post_init__(self) -> None:
        for key in ("lr", "sigma", "rho"):
            if (value := getattr(self, key)) is not None:
                checks.positive(key, value)
        checks.decay("momentum", self.momentum)
        checks.share("gamma", self.gamma)
        checks.whole("grow_every", self.grow_every, 1)
        checks.share("participation", self.participation)
        checks.whole("warmup", self.warmup, 0)
        checks.whole("horizon", self.horizon, 0)
        checks.share("final", self.final)

    def sigma_at(self, round_number: int, scale: Tensor | None) -> Tensor | None:
        """Penalty of a round (counted from 1), () or (d,); None if it needs a scale and there is none.

        Args:
            round_number: The round.
            scale: Typical size of Q, (d,), or None if nothing was observed yet.
        """
        growth = self._growth(max(0, (round_number - 2) // self.grow_every))
        if self.sigma is not None:
            return torch.tensor(self.sigma * growth)
        if scale is None:
            return None
        return scale.clamp(min=QUIET) * (growth * self._held_back / self.lr_at(round_number))

    def rho_at(self, round_number: int) -> float:
        """Weight of the preconditioner in a round (counted from 1)."""
        if self.rho is not None:
            return self.rho
        return self._held_back * self.momentum / ((1 - self.momentum) * self.lr_at(round_number))

    def lr_at(self, round_number: int) -> float:
        """Step length of a round (counted from 1)."""
        share = share_left(self.schedule, round_number, self.horizon, self.final)
        return self.lr * share * min(1.0, round_number / max(1, self.warmup))

    @property
    def _held_back(self) -> float:
        return self.participation if self.consensus == "all" else 1.0

    def _growth(self, times: int) -> float:
        """What sigma has grown by, up to `checks.GREATEST`: nothing moves any more long before."""
        most = math.log(checks.GREATEST)
        return checks.GREATEST if -math.log(self.gamma) * times > most else self.gamma**-times

    def believed(self, residual: Tensor, size: Tensor | None, layout: Layout) -> Tensor:
        """The residual (C, d), where a tensor's is out of all proportion to q brought to that size.

        Args:
            residual: g_i + pi_i, or what takes its place.
            size: Norm that each tensor has if its elements are q, (T,), or None for a penalty by hand, which leaves
                the residual as it is.
            layout: Of the residual.
        """
        if size is None:
            return residual
        norms = layout.norms(residual)
        surprising = norms > SURPRISE * size
        if not surprising.any():
            return residual
        least = layout.norms(torch.full_like(residual[:1], QUIET))
        share = torch.where(surprising, torch.maximum(size, least) / norms, 1.0).clamp(max=1.0)
        return residual * layout.expand(share)
