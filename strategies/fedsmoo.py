"""FedSMOO: FedDyn whose clients take SAM's gradient at points that they agree on.

Sun et al. 2023, arXiv 2305.11584. A round, for every client i that takes part, from w_i = w, for every mini-batch of
`local_epochs` passes (client):

    h     = grad F_i(w_i; batch)
    e     = radius (h - m_i - s) / |h - m_i - s|
    m_i  += e - s
    g     = grad F_i(w_i + e; the same batch) + weight_decay w_i + y_i + alpha (w_i - w)
    b     = momentum b + g
    w_i  -= lr b

then FedDyn's y_i += alpha (w_i - w), and FedDyn's step of the server with

    s     = radius m / |m|,     m = mean of those present of m_i             (server)

Symbols: w the server's weights, w_i the client's, y_i `dual` and alpha `penalty` as in `strategies.feddyn` (the paper's
-lambda_i and 1/beta), e where SAM takes its gradient, s `common` the place that all clients are to agree on, m_i
`shift` the multiplier of e = s, b the momentum buffer; y_i, m_i and s are zero at first. Means are weighted by `alpha`
of the configuration; the paper's are uniform. Both ways carry two vectors, twice FedAvg's bytes, and a step
differentiates its mini-batch twice. The paper has no momentum.

What follows the authors' code (FL-Simulator). There, s is the direction of the mean m_i of those present: the paper's
subproblem also has the last e in it, which they leave out as small. That part of the paper could not be read in public
text. They clip gradients to a norm of 10, which is not done here, and have lr 0.1, falling by 0.2 % a round, alpha 0.1,
radius 0.1, weight decay 0.001 and no momentum.

With radius 0 it is FedDyn. Where gradients are exact it stops where sum_i grad F_i(w + e_i) = 0, not at the solution,
and since e has one length it does not come to rest nearer than lr lets it.

On stability: FedDyn's, and this. m_i has the units of e, and is subtracted from a gradient: how much of h - m_i - s is
gradient depends on the units of the loss. m_i grows by up to 2 radius a step while a client disagrees with s; once it
is longer than h, e follows from it and no longer from the gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from strategies.augmented_sgd import AugmentedSgd, next_dual
from strategies.base import checks
from strategies.base.averaging import Answers, mean
from strategies.base.client import Instruction, Stack, Update
from strategies.base.layout import Layout
from strategies.base.messages import DUAL, WEIGHTS, Field, averaged
from strategies.feddyn import FedDyn
from strategies.optimizers.base import Differentiate, Memory
from strategies.optimizers.sam import Sam, ascent

SHIFT, COMMON = "shift", "common"
"""m_i; s."""


@checks.literals
class FedSmoo(FedDyn):
    """Server half: FedDyn's, and the place where the clients are to take gradients.

    Args:
        layout: Layout of the model's parameters.
        clients: N.
        penalty: alpha; the clients'.
        radius: Length of s; the clients'.
        alpha: Weights of the clients: `examples` (n_i/n) or `uniform` (1/N, the paper).
        state: Where the y_i and m_i are kept: in `memory`, or on `disk`.

    Raises:
        ValueError: A value is outside its range.
    """

    remembered: ClassVar[Collection[str]] = (DUAL, SHIFT)

    def __init__(
        self,
        layout: Layout,
        clients: int,
        penalty: float,
        radius: float,
        alpha: Literal["examples", "uniform"],
        state: Literal["memory", "disk"] = "memory",
    ) -> None:
        super().__init__(layout, clients, penalty, alpha, state)
        checks.not_negative("radius", radius)
        self.radius = radius
        self.kept = {COMMON: torch.zeros(layout.size)}

    def shared(self) -> dict[str, Tensor]:
        """S."""
        return self.kept

    def step(self, answers: Answers, weights: Mapping[int, float]) -> Tensor:
        """FedDyn's step, and the next s."""
        shifts = {node: said[SHIFT] for node, said in answers.arrays.items()}
        self.tables[SHIFT].begin(shifts, weights)
        self.kept = {COMMON: ascent(mean(shifts, weights)[None], self.radius)[0]}
        return super().step(answers, weights)


class AgreedSam(Sam):
    """SAM at points that clients are to agree on; its memory needs s besides. Arguments as `Sam`'s."""

    def memory_fields(self) -> dict[str, Field]:
        """B and m_i."""
        return super().memory_fields() | {SHIFT: Field(self.layout.size)}

    def of_loss(self, memory: Memory, differentiate: Differentiate, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients at w_i + e, and the losses at w_i."""
        slope, loss = differentiate(weights)
        shift, common = memory[SHIFT], memory[COMMON]
        away = ascent(slope - shift - common, self.radius)
        shift.add_(away - common)
        return differentiate(weights + away)[0], loss


class FedSmooClient(AugmentedSgd):
    """Client half: FedDyn's local problem by the steps of `AgreedSam`.

    Args:
        layout: Layout of the model's parameters.
        penalty: alpha; the server's.
        radius: How far away the gradients are taken; the server's.
        lr: Learning rate.
        momentum: Momentum within a round.
        weight_decay: Added to the gradient as weight_decay * w_i.
        local_epochs: Passes over the client's examples in a round.
        lr_decay: Factor of lr from round to round.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self,
        layout: Layout,
        penalty: float,
        radius: float,
        lr: float,
        momentum: float,
        weight_decay: float,
        local_epochs: int,
        lr_decay: float = 1.0,
    ) -> None:
        super().__init__(
            layout,
            penalty,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            local_epochs=local_epochs,
            lr_decay=lr_decay,
            optimizer=partial(AgreedSam, radius=radius),
        )

    def state_sizes(self) -> dict[str, int]:
        """The dual, and m_i."""
        return super().state_sizes() | {SHIFT: self.layout.size}

    def instruction_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The weights and s."""
        return super().instruction_fields(config) | {COMMON: Field(self.layout.size)}

    def reply_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The weights, of which the dual is made, and m_i."""
        return super().reply_fields(config) | {SHIFT: averaged(self.layout.size)}

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """The local epochs, and dual and m_i after them; see the module's equations."""
        start, dual = instruction.arrays[WEIGHTS], state[DUAL]
        memory = {SHIFT: state[SHIFT], COMMON: instruction.arrays[COMMON].expand_as(dual)}
        done = self.descend(stack, start, self.lr_now(instruction), self.penalty, dual, memory)

        def following(sent: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {DUAL: next_dual(dual, sent[WEIGHTS], start, self.penalty), SHIFT: sent[SHIFT]}

        return Update({WEIGHTS: done.weights, SHIFT: done.memory[SHIFT]}, done.loss, following)
