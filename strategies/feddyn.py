"""FedDyn: local problems that are regularised anew every round, so that their solutions agree at the optimum.

Acar et al. 2021, arXiv 2111.04263, Algorithm 1. A round, for every client i that takes part:

    w_i   = argmin of F_i(w_i) + <y_i, w_i> + (alpha/2)|w_i - w|^2           (client)
    y_i  += alpha (w_i - w)
    h     = mean of all N clients of -y_i, zero for those who never answered (server)
    w     = mean of those present of w_i - h / alpha

The client half, which approaches the argmin by local SGD, is FedADMM's too: `strategies.augmented_sgd`.

Symbols: w the server's weights, w_i the client's, y_i `dual`, -y_i being the paper's grad L_i: what the client takes
for grad F_i at its last w_i, h the server's state, alpha `penalty`. Means are weighted by `alpha` of the configuration,
by examples or uniformly; the paper's are uniform.

On signs. The paper's server has h -= alpha (1/N) sum over those present of (w_i - w), which is the mean of all -y_i at
every time. The authors' code keeps y_i / alpha, the sum of all w_i - w, on either side, adds its mean to that of
the w_i, and has alpha / (N n_i / n) in the place of alpha where clients have different numbers of examples n_i. It also
clips gradients to a norm of 10 and lets lr fall by 0.2 % a round, which the paper's algorithm does not say and is not
done here. `strategies.pisa.local_client` is nearly this method.

Where it stops, w_i = w and y_i = -grad F_i(w), and h = 0: at the solution, whatever the skew, if gradients are exact.

On stability. -h / alpha is a velocity that nothing damps but the clients: with alpha -> 0 their problem becomes
FedAvg's, but the server adds to every mean all the w_i - w of the past. That is no FedAvg: it swings. A client's local
problem needs lr (curvature + alpha) < 2 (1 + momentum). What was seen once, in the
setting that `strategies.scaffold` tells of, with alpha 0.01: 93.0 % after 60 rounds (FedAvg 89.2 %).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar, Literal

from torch import Tensor

from strategies.augmented_sgd import next_dual
from strategies.base import checks
from strategies.base.averaging import Answers, Averaging, mean
from strategies.base.layout import Layout
from strategies.base.messages import DUAL, WEIGHTS


@checks.literals
class FedDyn(Averaging):
    """Server half: the mean of the weights less h / alpha; the client half is `AugmentedSgd`.

    Args:
        layout: Layout of the model's parameters.
        clients: N.
        penalty: alpha; the clients'.
        alpha: Weights of the clients: `examples` (n_i/n) or `uniform` (1/N, the paper).
        state: Where the y_i are kept: in `memory`, or on `disk`.

    Raises:
        ValueError: A value is outside its range.
    """

    remembered: ClassVar[Collection[str]] = (DUAL,)

    def __init__(
        self,
        layout: Layout,
        clients: int,
        penalty: float,
        alpha: Literal["examples", "uniform"],
        state: Literal["memory", "disk"] = "memory",
    ) -> None:
        checks.positive("penalty", penalty)
        super().__init__(layout, alpha, self.remembered, clients, state)
        self.penalty, self.duals = penalty, self.tables[DUAL]

    def step(self, answers: Answers, weights: Mapping[int, float]) -> Tensor:
        """Take the duals forward, and step to the mean of the weights less h / alpha."""
        reached = {node: said[WEIGHTS] for node, said in answers.arrays.items()}
        duals = {n: next_dual(self.duals[n], row, self.consensus, self.penalty) for n, row in reached.items()}
        return mean(reached, weights) + self.duals.begin(duals, weights) / self.penalty
