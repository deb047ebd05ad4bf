"""PISA's primal step, wherever it is taken: by the clients, or by the server for them.

w_i = w - (sigma I + rho Q)^-1 (P(h + difference (g_i - h)) + pi_i)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.pisa.penalty import Penalty
from strategies.preconditioners import Preconditioner
from strategies.preconditioners.base import State


@dataclass(frozen=True)
class PrimalStep:
    """What clients have in common when they take it.

    Attributes:
        preconditioner: Q, as a function of `held`.
        penalty: sigma and rho.
        held: The state of the common Q, a row for all.
        sigma: The penalty of this round, () or (d,).
        rho: The weight of Q in this round.
        scale: Typical size q of Q, (d,), that an automatic penalty follows; else None.
        size: Norm of each tensor if its elements are q, (T,), where an automatic penalty follows a q that knows nothing
            of the gradients at hand; else None.
        common: The federation's gradient h, a single row, if a client's difference from it has a weight; else None.
        difference: That weight.
    """

    preconditioner: Preconditioner
    penalty: Penalty
    held: State
    sigma: Tensor
    rho: float
    scale: Tensor | None
    size: Tensor | None
    common: Tensor | None = None
    difference: float = 1.0

    @classmethod
    def of_round(
        cls,
        preconditioner: Preconditioner,
        penalty: Penalty,
        held: State,
        round_number: int,
        lag: int,
        device: torch.device | str = "cpu",
        common: Tensor | None = None,
        difference: float = 1.0,
    ) -> PrimalStep | None:
        """The step of a round (counted from 1) with a Q that is `lag` rounds old; None if that has observed nothing."""
        if held and not any(vector.any() for vector in held.values()):
            return None
        scale = preconditioner.scale(held) if penalty.sigma is None else None
        sigma = penalty.sigma_at(round_number, scale)
        assert sigma is not None
        size = None if scale is None or not lag else preconditioner.layout.norms(scale.to(device))
        rho = penalty.rho_at(round_number)
        return cls(preconditioner, penalty, held, sigma.to(device), rho, scale, size, common, difference)

    @classmethod
    def with_own(
        cls,
        preconditioner: Preconditioner,
        penalty: Penalty,
        held: State,
        round_number: int,
        statistic: State,
    ) -> PrimalStep:
        """The step with a Q that no others share, once it has taken a statistic in; its penalty is by hand."""
        step = cls.of_round(
            preconditioner, penalty, preconditioner.accumulate(held, statistic), round_number, 0
        )
        assert step is not None
        return step

    def residual(self, gradient: Tensor, dual: Tensor) -> Tensor:
        """P(h + difference (g_i - h)) + pi_i, (C, d)."""
        if self.common is not None:
            # each operation by itself: fused, the same row may have other bits among other rows
            gradient = (gradient - self.common).mul_(self.difference).add_(self.common)
        return self.preconditioner.direction(self.held, gradient) + dual

    def solve(self, residual: Tensor) -> Tensor:
        """(sigma I + rho Q)^-1 of a residual that is believed, (C, d)."""
        believed = self.penalty.believed(residual, self.size, self.preconditioner.layout)
        return self.preconditioner.solve(self.held, believed, self.sigma, self.rho)
