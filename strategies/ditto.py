"""Ditto: beside FedAvg, every client has a model of its own that is drawn towards the server's.

Li et al. 2021, arXiv 2012.04221, Algorithm 1. A round, for every client i that takes part:

    w_i = local SGD from w, as FedAvg's, `local_epochs` passes                                  (client)
    v_i = local SGD from v_i on F_i(v_i) + (lambda/2)|v_i - w|^2, `personal_epochs` passes
    w   = mean of those present of w_i                                                          (server)

Symbols: w the server's weights, w_i the client's answer, v_i the client's own model, lambda its pull towards w. The
server half is FedAvg's, and w follows the same path as FedAvg's whatever lambda is: v_i is nobody else's business. With
lambda = 0 clients learn alone; with a great lambda v_i is w, for as long as lr lambda < 2 (1 + momentum), with SGD.

v_i is kept by the client and never sent: d numbers. It begins at w, in the client's first round, and anew if the client
lost it, which is said in the run's messages. Both trainings go through the mini-batches in the same order, and both are
counted in `passes`. A client's own metrics (`evaluate_clients_every`) are those of v_i, and of w for a client that has
none; the server's test set is given to w. In a model with running statistics (BatchNorm), those that are averaged, and
used for v_i as well, are of both trainings.

On stability: as FedAvg's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import Tensor

from strategies.base import checks
from strategies.base.client import Instruction, Stack, Update, remembered
from strategies.base.layout import Layout
from strategies.base.messages import WEIGHTS
from strategies.local_sgd import Local, LocalSgd

OWN = "own"
"""v_i in what a client remembers."""


class DittoClient(LocalSgd):
    """Client half: FedAvg's, and the client's own model; the server half is FedAvg's.

    Args:
        layout: Layout of the model's parameters.
        lambda_: Pull of the client's own model towards the server's.
        personal_epochs: Passes over the client's examples for its own model.
        local: As `LocalSgd`'s, of both but for `local_epochs`.

    Raises:
        ValueError: A number is outside its range.
    """

    personal = True

    def __init__(self, layout: Layout, lambda_: float, personal_epochs: int, **local: Unpack[Local]) -> None:
        super().__init__(layout, **local)
        checks.not_negative("lambda_", lambda_)
        checks.whole("personal_epochs", personal_epochs, 1)
        self.lambda_, self.personal_epochs = lambda_, personal_epochs

    def state_sizes(self) -> dict[str, int]:
        """v_i."""
        return {OWN: self.layout.size}

    def own_weights(self, weights: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """v_i."""
        return remembered(state[OWN], weights)

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """FedAvg's round, then that of v_i; see the module's equations."""
        update = super().solve(stack, instruction, state)
        w = instruction.arrays[WEIGHTS].expand(len(stack.clients), -1)
        before = self.own_weights(w, state)
        # the pull is towards w, and that of `descend` towards where it begins
        slope = self.lambda_ * (before - w)
        lr = self.lr_now(instruction)
        own = self.descend(stack, before, lr, self.lambda_, slope, epochs=self.personal_epochs)
        return Update(update.arrays, update.loss, lambda sent: {OWN: own.weights})
