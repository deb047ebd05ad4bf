"""PISA whose clients solve their subproblem by local epochs of mini-batch SGD with momentum.

Zhou et al., arXiv 2502.10784, Algorithm 1, with Q = I and, for its one preconditioned step, local epochs on the
augmented Lagrangian: from w_i = w and b = 0, for every mini-batch of `local_epochs` passes

    g     = grad F_i(w_i; batch) + weight_decay w_i + pi_i + sigma (w_i - w)
    b     = momentum b + g
    w_i  -= lr b

then the dual step, and the server half `strategies.Pisa` on the wire `primal` with its fresh consensus:

    pi_i += sigma (w_i - w)
    w     = sum_present alpha_i w_i + sum_all alpha_i pi_i / sigma

each sum normalised, the first among those present, the second among those ever seen. That is close to FedDyn (Acar et
al. 2021, arXiv 2111.04263). Where it stops, w_i = w and pi_i = -(grad F_i(w) + weight_decay w): at the solution,
whatever the skew, if the gradients are exact. Mini-batches make w_i, and with it pi_i, jitter about that point, unless
lr falls.

On stability. The local loop needs lr (h + sigma) < 2 (1 + momentum), h the largest curvature; sigma has the units of
a curvature and is set by hand: nothing here finds it. A client drifts by |g_i + pi_i| / sigma at most, roughly, and its
dual remembers that drift until its next turn. With one class a client and a tenth of the clients a round, the local
losses saturate, drifts are long and duals misleading: such runs stayed near chance, below FedAvg, and with sigma 1 they
diverged. One preconditioned step (`strategies.pisa`) is what to use there.

Symbols: w `consensus`, w_i `weights`, pi_i `dual`, b the momentum buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from strategies import checks
from strategies.client import Cohort, Instruction, Update
from strategies.layout import Layout
from strategies.local_sgd import LocalSgd
from strategies.messages import ROUND, WEIGHTS, Field, integer, squared
from strategies.penalty import Penalty
from strategies.pisa import DUAL


class PisaLocalClient(LocalSgd):
    """Client half: local epochs on the augmented Lagrangian, and the replica of the dual.

    Args:
        layout: Layout of the model's parameters.
        penalty: sigma, by hand, and the learning rate of a round; the server's.
        momentum: Momentum within a round.
        weight_decay: Added to the gradient as weight_decay * w_i.
        local_epochs: Passes over the client's examples in a round.

    Raises:
        ValueError: A number is outside its range, or there is no sigma.
    """

    def __init__(
        self, layout: Layout, penalty: Penalty, momentum: float, weight_decay: float, local_epochs: int
    ) -> None:
        super().__init__(layout, penalty.lr, momentum, weight_decay, local_epochs)
        checks.positive("sigma", penalty.sigma)
        self.penalty = penalty

    def state_sizes(self) -> dict[str, int]:
        """The dual."""
        return {DUAL: self.layout.size}

    def reply_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The weights, of which the dual is made."""
        return {WEIGHTS: squared(self.layout.size)}

    def solve(self, cohort: Cohort, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """The local epochs and the dual step; see the module's equations."""
        consensus, round_number = instruction.arrays[WEIGHTS], integer(instruction.config, ROUND)
        sigma, lr = self.penalty.sigma_at(round_number, None), self.penalty.lr_at(round_number)
        assert sigma is not None
        weights, loss = self.descend(cohort, consensus, lr, float(sigma), state[DUAL])
        # the ledger's own operations in their order, so that its dual has the same bits
        dual = state[DUAL] + (weights - consensus).mul_(sigma)
        return Update({WEIGHTS: weights}, loss, {DUAL: dual})
