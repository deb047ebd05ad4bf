"""FedADMM: every client has a dual, and the server tracks the average of the clients' augmented models.

Gong, Li, Freris 2022, arXiv 2204.03529, Algorithm 1. A round, for every client i that takes part:

    w_i+  = about argmin of F_i(w_i) + <y_i, w_i - w> + (rho/2)|w_i - w|^2       (client)
    y_i+  = y_i + rho (w_i+ - w)
    D_i   = (w_i+ + y_i+ / rho) - (w_i + y_i / rho)
    w    += eta (mean of those present of D_i)                                   (server)

with y_i = 0 and w_i = w^0, the initial weights, before a client's first round. The client half, which approaches the
argmin by local SGD, is FedDyn's too: `strategies.augmented_sgd`.

Symbols: w the server's weights, w_i the client's, y_i `dual`, u_i = w_i + y_i / rho the augmented model. Means are
weighted by `alpha`; the paper's are uniform. The paper names two eta: 1, which is quick, and |S|/N,
the share of the clients that take part, for which w stays the average of all u_i. `eta: null` is the latter: that
average itself, so that it holds for whatever weights, and whoever answers.

The client sends w_i+, in as many bytes as the paper's D_i. The server keeps u_i and, for clients that lost it, y_i.

On what it finds. Where it stops, w_i = w and y_i = -grad F_i(w). With `eta: null` the average of all u_i then says that
the average y_i is zero: w is the solution, whatever the skew, if gradients are exact. With everybody there and
equal weights eta = 1 is the same. With a number for eta and a part p of the clients a round, what stays as it was is
w - (eta/p) (average of all u_i), and it stops where grad F(w) = rho (1 - p/eta) (w - w^0) with equal weights: nearly
the solution, for rho is small.

The authors' code is another method: it takes the server's w for the client's last w_i, so that D_i = 2 (w_i+ - w). Then
w - (2 eta / (p rho)) (average of all y_i) stays as it was, and it stops where grad F(w) = -(p rho / (2 eta)) (w - w^0).

On stability. y_i / rho is a velocity, as in `strategies.feddyn`: with everybody there and eta 1 the
two are one method. D_i also holds how far w has gone since the client's last turn, or since w^0 for one that is new. So
eta above p extrapolates: w+ - w has about eta (w - what w was 1/p rounds ago) in it, which grows without end unless the
clients pull back. What was seen once, in the setting that `strategies.scaffold` tells of, with rho 0.01: eta 1 diverged
within ten rounds; `eta: null` had 82.7 % after 60 (FedAvg 89.2 %), slowed by those who have not answered yet and count
as w^0. The authors' code, with its w in the place of the last w_i, has no such term, and their eta of 1 is for that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar, Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from strategies.augmented_sgd import next_dual
from strategies.base import checks
from strategies.base.averaging import Answers, Averaging, mean
from strategies.base.layout import Layout
from strategies.base.messages import DUAL, WEIGHTS

GONE, INITIAL = "gone", "initial"
"""u_i - w^0, how far a client's augmented model has gone; w^0."""


@checks.literals
class FedAdmm(Averaging):
    """Server half: tracks the average of the augmented models; the client half is `AugmentedSgd`.

    Args:
        layout: Layout of the model's parameters.
        clients: N.
        rho: Penalty; the clients'.
        eta: Step of the server; None: the average of all augmented models, as by the share of the clients that answer.
        alpha: Weights of the clients: `examples` (n_i/n) or `uniform` (1/N, the paper).
        state: Where the clients' vectors are kept: in `memory`, or on `disk`.

    Raises:
        ValueError: A value is outside its range.
    """

    remembered: ClassVar[Collection[str]] = (DUAL,)

    def __init__(
        self,
        layout: Layout,
        clients: int,
        rho: float,
        eta: float | None,
        alpha: Literal["examples", "uniform"],
        state: Literal["memory", "disk"] = "memory",
    ) -> None:
        checks.positive("rho", rho)
        if eta is not None:
            checks.positive("eta", eta)
        super().__init__(layout, alpha, [DUAL, GONE], clients, state)
        self.rho, self.eta = rho, eta
        self.duals, self.gone = self.tables[DUAL], self.tables[GONE]
        self.kept = {INITIAL: torch.empty(0)}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Send the weights; those of the first round are w^0."""
        asked = list(super().configure_train(server_round, arrays, config, grid))
        if not len(self.kept[INITIAL]):
            self.kept = {INITIAL: self.consensus.clone()}
        return asked

    def step(self, answers: Answers, weights: Mapping[int, float]) -> Tensor:
        """Take duals and augmented models forward, and follow their average."""
        initial = self.kept[INITIAL]
        reached = {node: said[WEIGHTS] for node, said in answers.arrays.items()}
        duals = {n: next_dual(self.duals[n], row, self.consensus, self.rho) for n, row in reached.items()}
        gone = {node: reached[node] - initial + dual / self.rho for node, dual in duals.items()}
        self.duals.begin(duals, weights)
        average = self.gone.begin(gone, weights)
        if self.eta is None:
            return initial + average
        moved = {node: now - self.gone[node] for node, now in gone.items()}
        return self.consensus + self.eta * mean(moved, weights)
