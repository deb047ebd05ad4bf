"""Local SGD on the augmented Lagrangian, and the dual step: the client half of FedADMM, FedDyn and PISA's local form.

A round, for every client i that takes part:

    w_i  = about argmin of F_i(w_i) + <y_i, w_i - w> + (penalty/2)|w_i - w|^2
    y_i += penalty (w_i - w)

The argmin is approached from w_i = w by `local_epochs` passes of mini-batch SGD, as the authors of both papers do it,
or by the steps of another optimizer:

    g    = grad F_i(w_i; batch) + weight_decay w_i + y_i + penalty (w_i - w)
    b    = momentum b + g
    w_i -= lr b

Symbols: w the server's weights, w_i the client's, y_i `dual`, zero before a client's first round, b the momentum
buffer. The client sends w_i alone, FedAvg's bytes: from it the server follows y_i by the client's own operations, so
that a client that lost its state goes on. Where it stops, w_i = w and y_i = -grad F_i(w).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor

from strategies.base import checks
from strategies.base.client import Instruction, Stack, Update
from strategies.base.layout import Layout
from strategies.base.messages import DUAL, ROUND, WEIGHTS, Field, integer, squared
from strategies.local_sgd import Local, LocalSgd


def next_dual(dual: Tensor, weights: Tensor, consensus: Tensor, penalty: float) -> Tensor:
    """y_i after a round: the same bits on either side."""
    return dual + (weights - consensus).mul_(penalty)


class AugmentedSgd(LocalSgd):
    """Client half: local SGD on the augmented Lagrangian; see the module's equations.

    Args:
        layout: Layout of the model's parameters.
        penalty: Weight of the proximal term, and length of the dual step; the server's.
        local: As `LocalSgd`'s.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, layout: Layout, penalty: float, **local: Unpack[Local]) -> None:
        super().__init__(layout, **local)
        checks.positive("penalty", penalty)
        self.penalty = penalty

    def penalty_at(self, round_number: int) -> float:
        """The penalty of a round, counted from 1."""
        return self.penalty

    def state_sizes(self) -> dict[str, int]:
        """The dual."""
        return {DUAL: self.layout.size}

    def reply_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The weights, of which the dual is made."""
        return {WEIGHTS: squared(self.layout.size)}

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """The local epochs, and the dual after them."""
        start, dual = instruction.arrays[WEIGHTS], state[DUAL]
        number = integer(instruction.config, ROUND)
        penalty = self.penalty_at(number)
        done = self.descend(stack, start, self.lr_at(number), penalty, dual)

        def following(sent: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {DUAL: next_dual(dual, sent[WEIGHTS], start, penalty)}

        return Update({WEIGHTS: done.weights}, done.loss, following)
