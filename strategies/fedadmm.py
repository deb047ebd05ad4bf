"""FedADMM: every client has a dual, and the server tracks the average of the clients' augmented models.

Gong, Li, Freris 2022, arXiv 2204.03529, Algorithm 1. A round, for every client i that takes part:

    w_i+  = about argmin of F_i(w_i) + <y_i, w_i - w> + (rho/2)|w_i - w|^2       (client)
    y_i+  = y_i + rho (w_i+ - w)
    D_i   = (w_i+ + y_i+ / rho) - (w_i + y_i / rho)
    w    += eta (mean of those present of D_i)                                   (server)

with y_i = 0 and w_i = w^0, the initial weights, before a client's first round. The argmin is approached from w_i = w by
`local_epochs` passes of mini-batch SGD, as the authors' code does it:

    g    = grad F_i(w_i; batch) + weight_decay w_i + y_i + rho (w_i - w)
    b    = momentum b + g
    w_i -= lr b

Symbols: w the server's weights, w_i the client's, y_i `dual`, u_i = w_i + y_i / rho the augmented model, b the momentum
buffer. Means are weighted by `alpha`; the paper's are uniform. The paper names two eta: 1, which is quick, and |S|/N,
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

On stability. y_i / rho is a velocity, as in `strategies.feddyn`, whose l_i is -y_i: with everybody there and eta 1 the
two are one method. D_i also holds how far w has gone since the client's last turn, or since w^0 for one that is new. So
eta above p extrapolates: w+ - w has about eta (w - what w was 1/p rounds ago) in it, which grows without end unless the
clients pull back. What was seen once, in the setting that `strategies.scaffold` tells of, with rho 0.01: eta 1 diverged
within ten rounds; `eta: null` had 82.7 % after 60 (FedAvg 89.2 %), slowed by those who have not answered yet and count
as w^0. The authors' code, with its w in the place of the last w_i, has no such term, and their eta of 1 is for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from strategies.base import checks
from strategies.base.averaging import Answers, Averaging, mean
from strategies.base.client import Instruction, Stack, Update
from strategies.base.layout import Layout
from strategies.base.messages import WEIGHTS, Field, record, squared
from strategies.base.table import Table
from strategies.local_sgd import LocalSgd

DUAL, GONE, INITIAL = "dual", "gone", "initial"
"""y_i; u_i - w^0, how far a client's augmented model has gone; w^0."""


def next_dual(dual: Tensor, weights: Tensor, consensus: Tensor, rho: float) -> Tensor:
    """y_i after a round: the same bits on either side."""
    return dual + (weights - consensus).mul_(rho)


@checks.literals
class FedAdmm(Averaging):
    """Server half: tracks the average of the augmented models.

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
        self.rho, self.eta = rho, eta
        self.duals, self.gone = (Table(layout.size, clients, state == "disk") for _ in range(2))
        self.initial = torch.empty(0)
        super().__init__(layout, alpha, {DUAL: self.duals, GONE: self.gone})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Send the weights; those of the first round are w^0."""
        asked = list(super().configure_train(server_round, arrays, config, grid))
        if not len(self.initial):
            self.initial = self.consensus.clone()
        return asked

    def step(self, answers: Answers, weights: Mapping[int, float]) -> Tensor:
        """Take duals and augmented models forward, and follow their average."""
        reached = {node: said[WEIGHTS] for node, said in answers.arrays.items()}
        duals = {n: next_dual(self.duals[n], row, self.consensus, self.rho) for n, row in reached.items()}
        gone = {node: reached[node] - self.initial + dual / self.rho for node, dual in duals.items()}
        self.duals.begin(duals, weights)
        average = self.gone.begin(gone, weights)
        if self.eta is None:
            return self.initial + average
        moved = {node: now - self.gone[node] for node, now in gone.items()}
        return self.consensus + self.eta * mean(moved, weights)

    def supply(self, client: int) -> ArrayRecord | None:
        """The dual of a client that lost it."""
        return record({DUAL: self.duals[client].clone()}) if client in self.duals else None

    def state_dict(self) -> dict[str, Tensor]:
        """The tables and w^0."""
        return super().state_dict() | {INITIAL: self.initial}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        super().load_state_dict(state)
        self.initial = state[INITIAL].clone()


class FedAdmmClient(LocalSgd):
    """Client half: local SGD on the augmented Lagrangian.

    Args:
        layout: Layout of the model's parameters.
        rho: Penalty; the server's.
        lr: Learning rate.
        momentum: Momentum within a round.
        weight_decay: Added to the gradient as weight_decay * w_i.
        local_epochs: Passes over the client's examples in a round.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self, layout: Layout, rho: float, lr: float, momentum: float, weight_decay: float, local_epochs: int
    ) -> None:
        super().__init__(layout, lr, momentum, weight_decay, local_epochs)
        checks.positive("rho", rho)
        self.rho = rho

    def state_sizes(self) -> dict[str, int]:
        """The dual."""
        return {DUAL: self.layout.size}

    def reply_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The weights, of which the dual is made."""
        return {WEIGHTS: squared(self.layout.size)}

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """The local epochs, and the dual after them; see the module's equations."""
        start, dual = instruction.arrays[WEIGHTS], state[DUAL]
        done = self.descend(stack, start, self.lr, self.rho, dual)

        def following(sent: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {DUAL: next_dual(dual, sent[WEIGHTS], start, self.rho)}

        return Update({WEIGHTS: done.weights}, done.loss, following)
