"""MIFA: the mean of what every client last sent, whoever is there.

Gu et al. 2021, arXiv 2106.04159, Algorithm 1 (memory-augmented impatient federated averaging). A round, for every
client i that takes part:

    w_i  = local SGD from w, as FedAvg's                                     (client)
    u_i  = w_i - w                                                           (server)
    w   += server_lr (mean of all N of u_i)

Symbols: w the server's weights, w_i the client's, u_i `update`: what client i moved in its last round. Means are
weighted by `alpha`; the paper's are uniform. In the paper everybody answers the first round; here u_i is zero until
client i has answered. With everybody there it is FedAvg, and it stops where FedAvg with everybody stops. Clients keep
nothing, and the bytes are FedAvg's; the server keeps a vector of each.

On stability. The mean is as old as the clients' last turns: if a tenth of them takes part, every update is made about
ten times. A server_lr of the share of the clients that take part makes it once; the paper's learning rate falls as 1/t.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from strategies.base.averaging import Answers
from strategies.base.messages import WEIGHTS
from strategies.fedvarp import FedVarp


class Mifa(FedVarp):
    """Server half: the mean of all last updates; arguments as `FedVarp`'s, the client half is `LocalSgd`."""

    def step(self, answers: Answers, weights: Mapping[int, float]) -> Tensor:
        """Step by the mean of the table; see the module's equations."""
        moved = {node: said[WEIGHTS] - self.consensus for node, said in answers.arrays.items()}
        return self.consensus + self.server_lr * self.updates.begin(moved, weights)
