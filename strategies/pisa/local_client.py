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
whatever the skew, if the gradients are exact. Mini-batches make w_i, and with it pi_i, jitter about that point.

On stability. The local loop needs lr (h + sigma) < 2 (1 + momentum), h the largest curvature; sigma has the units of
a curvature and is set by hand: nothing here finds it. A client drifts by |g_i + pi_i| / sigma at most, roughly, and its
dual remembers that drift until its next turn. For the consensus, mean pi_i / sigma is a velocity. What was seen on
mnist_mini: with a tenth of 100 clients and two classes each, or Dirichlet .1, it is well behaved; with one class each
it stays near chance, below FedAvg, and diverges with sigma 1; with all of ten clients of two classes it swings by tens
of points, more with sigma .3 than with .1. A falling lr steadies the end under Dirichlet .1, and ended in a collapse
with all of ten, for the velocity is damped by a share of about sigma lr steps / (1 - momentum), which falls with it.
Where it is not well behaved, one preconditioned step (`strategies.pisa`) is what to use.

Symbols: w `consensus`, w_i `weights`, pi_i `dual`, b the momentum buffer.
"""

from __future__ import annotations

from strategies.augmented_sgd import AugmentedSgd
from strategies.base import checks
from strategies.base.layout import Layout
from strategies.local_sgd import OptimizerFactory
from strategies.optimizers import Sgd
from strategies.pisa.penalty import Penalty


class PisaLocalClient(AugmentedSgd):
    """Client half: local epochs on the augmented Lagrangian, and the replica of the dual.

    Args:
        layout: Layout of the model's parameters.
        penalty: sigma, by hand, and the learning rate of a round; the server's.
        momentum: Momentum within a round.
        weight_decay: Added to the gradient as weight_decay * w_i.
        local_epochs: Passes over the client's examples in a round.
        optimizer: Of the steps.

    Raises:
        ValueError: A number is outside its range, or there is no sigma.
    """

    def __init__(
        self,
        layout: Layout,
        penalty: Penalty,
        momentum: float,
        weight_decay: float,
        local_epochs: int,
        optimizer: OptimizerFactory = Sgd,
    ) -> None:
        checks.positive("penalty.sigma", penalty.sigma)
        assert penalty.sigma is not None
        super().__init__(
            layout,
            penalty.sigma,
            lr=penalty.lr,
            momentum=momentum,
            weight_decay=weight_decay,
            local_epochs=local_epochs,
            optimizer=optimizer,
        )
        self._schedule = penalty

    def penalty_at(self, round_number: int) -> float:
        """Sigma, which may grow."""
        sigma = self._schedule.sigma_at(round_number, None)
        assert sigma is not None
        return float(sigma)

    def lr_at(self, round_number: int) -> float:
        """Lr by its schedule."""
        return self._schedule.lr_at(round_number)
