"""FedVARP: the mean of the updates, with what the absent last sent in the place of what they would send.

Jhunjhunwala et al. 2022, arXiv 2207.14130. A round, for every client i that takes part:

    w_i  = local SGD from w, as FedAvg's                                     (client)
    v    = mean of those present of ((w_i - w) - u_i) + mean of all N of u_i (server)
    w   += server_lr v
    u_i  = w_i - w, of the w that the client was sent

Symbols: w the server's weights, w_i the client's, u_i `update`: what client i moved in its last round, zero before it
has answered. Means are weighted by `alpha`; the paper's are uniform. With everybody there it is FedAvg. It takes away
the noise of drawing some of the clients, not the drift of local steps: it stops where FedAvg with everybody stops.
Clients keep nothing, and the bytes are FedAvg's; the server keeps a vector of each.

On stability. An update is as old as the client's last turn: with N clients of which few take part, a part of v is of
weights that are long gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from strategies.base import checks
from strategies.base.averaging import Answers, Averaging, mean
from strategies.base.layout import Layout
from strategies.base.messages import WEIGHTS

UPDATE = "update"
"""The table of the clients' last updates."""


@checks.literals
class FedVarp(Averaging):
    """Server half: the variance-reduced mean of the updates; the client half is `LocalSgd`.

    Args:
        layout: Layout of the model's parameters.
        clients: N.
        server_lr: Learning rate of the server; the paper: 1.
        alpha: Weights of the clients: `examples` (n_i/n) or `uniform` (1/N, the paper).
        state: Where the updates are kept: in `memory`, or on `disk`.

    Raises:
        ValueError: A value is outside its range.
    """

    def __init__(
        self,
        layout: Layout,
        clients: int,
        server_lr: float,
        alpha: Literal["examples", "uniform"],
        state: Literal["memory", "disk"] = "memory",
    ) -> None:
        checks.positive("server_lr", server_lr)
        super().__init__(layout, alpha, [UPDATE], clients, state)
        self.server_lr, self.updates = server_lr, self.tables[UPDATE]

    def step(self, answers: Answers, weights: Mapping[int, float]) -> Tensor:
        """Step by v; see the module's equations."""
        moved = {node: said[WEIGHTS] - self.consensus for node, said in answers.arrays.items()}
        news = mean({node: row - self.updates[node] for node, row in moved.items()}, weights)
        before = self.updates.average
        self.updates.begin(moved, weights)
        return self.consensus + self.server_lr * (news + before)
