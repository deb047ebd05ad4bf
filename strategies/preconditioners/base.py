"""What a preconditioner is: the matrix Q of PISA's primal step, and the statistics it is built from.

    w_i = w - (sigma I + rho Q)^-1 (P(g_i) + pi_i)

A *curvature* preconditioner knows a positive semi-definite Q and applies (sigma I + rho Q)^-1 exactly; its
direction P is the identity. A *direction* preconditioner is a non-linear map P of the gradient, at best of the
federation's (`strategies.preconditioners.direction`).

Q is built from the moving average of a *statistic*. Each client observes the statistic of its own
residual. Unaligned, it averages its own (the paper's form) and the average is part of the client's state.
Aligned, the server averages the clients' statistics (weights alpha_i) before they enter the moving average,
and every client is sent the same Q: statistics of differently distributed clients differ ("preconditioner
drift", arXiv 2602.19271), and so would their steps.

A statistic follows from the gradient, or from what a *probe* sees in the model's layers while the gradient is computed.
The latter, and the loss, are sent beside the gradient, in rounds that the statistic is taken of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from strategies.base.beyond_gradients import Probe
from strategies.base.layout import Layout
from strategies.base.messages import Field

PROBED = "probed"
"""Name of the vector of a statistic that a probe makes: what it makes of its layers, one after the other."""

LOSS = "loss"
"""Name of the number of a statistic that is the client's mean loss where its gradient was taken."""

State = Mapping[str, Tensor]
"""Named vectors with a leading client axis, (C, size): one row a client, or a single row for all."""


class Preconditioner(ABC):
    """Q, as a function of an explicit state; a state of zeros is one that has observed nothing.

    Attributes:
        layout: Layout of the model's parameters.
        probe: What sees the layers while a gradient is computed, and makes the vector `probed` of the statistic; None:
            there is no such vector.
        gradient_field: Field of the statistic that is the gradient itself, so that its average is the federation's;
            None: there is none.
        rate: What the automatic penalty's lr is multiplied by, so that one lr suits all.
        trust: What the bound on the consensus's step (`strategies.pisa.bound`) is multiplied by where Q has taken in
            the gradients that it is applied to.
    """

    layout: Layout
    probe: Probe | None = None
    gradient_field: str | None = None
    rate: float = 1.0
    trust: float = 1.0
    _factored: tuple[State, Tensor, float, Any] | None = None

    @abstractmethod
    def state_fields(self) -> dict[str, Field]:
        """The vectors of the state."""

    def nothing(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The state of one that has observed nothing, a single row."""
        return {
            name: torch.zeros(1, field.size, dtype=getattr(torch, field.types[0]), device=device)
            for name, field in self.state_fields().items()
        }

    def memory_fields(self) -> dict[str, Field]:
        """The vectors of the state that `accumulate` reads: all that is kept where every round observes anew."""
        return self.state_fields()

    def solver_fields(self) -> dict[str, Field]:
        """The vectors of the state that `scale`, `direction` and `solve` read: what clients need of a common Q."""
        return self.state_fields()

    @abstractmethod
    def statistic_fields(self) -> dict[str, Field]:
        """The vectors of the statistic."""

    def statistic(self, gradient: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """What one step observes, from gradient g_i (C, d) and residual g_i + pi_i (C, d); not `probed`, `loss`."""
        return {}

    def accumulate(self, state: State, statistic: State) -> dict[str, Tensor]:
        """The moving average after one more statistic."""
        return {}

    def moved(self, state: State, step: Tensor) -> State:
        """The state after the consensus has moved by a step, (1, d); a Q that is not common is not told."""
        return state

    def direction(self, state: State, gradient: Tensor) -> Tensor:
        """P(g), (C, d)."""
        return gradient

    @abstractmethod
    def scale(self, state: State) -> Tensor | None:
        """Typical size of Q for the automatic penalty, (d,); None before anything was observed.

        The state has a single row: an automatic penalty is the same for every client.
        """

    @abstractmethod
    def solve(self, state: State, residual: Tensor, sigma: Tensor, rho: float) -> Tensor:
        """(sigma I + rho Q)^-1 residual, (C, d), for a penalty sigma of shape (d,) or ()."""

    def factored(self, state: State, sigma: Tensor, rho: float, make: Callable[[], Any]) -> Any:
        """What `make` computes from a state and penalties: once for as long as it is asked about the very same ones.

        Clients that share Q are solved for one after the other; what they have in common is most of the work.
        """
        if self._factored is not None:
            known, own_sigma, own_rho, factors = self._factored
            if known is state and own_sigma is sigma and own_rho == rho:
                return factors
        factors = make()
        self._factored = state, sigma, rho, factors
        return factors
