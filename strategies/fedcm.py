"""FedCM: every local step holds the federation's last gradient, as a momentum on the client's side.

Xu et al. 2021, arXiv 2106.10874, Algorithm 1. A round, for every client i that takes part:

    w_i   = w, then for every mini-batch of `local_epochs` passes            (client)
        g    = grad F_i(w_i; batch) + weight_decay w_i
        w_i -= lr (mix g + (1 - mix) v)
    v     = mean of those present of (w - w_i) / (lr K_i)                    (server)
    w     = mean of those present of w_i

Symbols: w the server's weights, w_i the client's, v `velocity`: the mean step of the last round, zero in the first;
mix the paper's alpha, K_i the client's number of steps. Means are weighted by `alpha`; the paper's are uniform. The
last line is the paper's w -= eta_g v with eta_g = lr K, if all take K steps. Clients keep nothing, which suits many
clients of which few take part; the way down carries two vectors, the way up one and a number.

On stability. v is a moving average with a memory of 1 / mix rounds: a small mix is slow to begin, for the first round
goes but a share mix of the way, and overshoots where clients pull apart. With everybody there, local steps still drift:
it does not find the solution under skew. There is no momentum of the local SGD beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.averaging import Answers, Averaging, mean
from strategies.base.client import Instruction, Stack, Update
from strategies.base.layout import Layout
from strategies.base.messages import WEIGHTS, Field, real
from strategies.local_sgd import LocalSgd, OptimizerFactory, lr_at
from strategies.optimizers import Sgd

VELOCITY, STEPS = "velocity", "steps"
"""v in an instruction; K_i in a reply."""


@checks.literals
class FedCm(Averaging):
    """Server half: the mean of the weights, and the mean step.

    Args:
        layout: Layout of the model's parameters.
        lr: The clients' learning rate.
        alpha: Weights of the clients: `examples` (n_i/n) or `uniform` (the paper).
        lr_decay: Factor of lr from round to round.

    Raises:
        ValueError: A value is outside its range.
    """

    def __init__(
        self, layout: Layout, lr: float, alpha: Literal["examples", "uniform"], lr_decay: float = 1.0
    ) -> None:
        checks.positive("lr", lr)
        checks.share("lr_decay", lr_decay)
        super().__init__(layout, alpha)
        self.lr, self.lr_decay = lr, lr_decay
        self.kept = {VELOCITY: torch.zeros(layout.size)}

    def shared(self) -> dict[str, Tensor]:
        """The mean step of the last round."""
        return self.kept

    def step(self, answers: Answers, weights: Mapping[int, float]) -> Tensor:
        """Step to the mean of the weights; see the module's equations."""
        reached = {node: said[WEIGHTS] for node, said in answers.arrays.items()}
        steps = {node: max(1.0, real(said, STEPS)) for node, said in answers.metrics.items()}
        lr = lr_at(self.round_number, self.lr, self.lr_decay)
        pace = {node: (self.consensus - row) / (lr * steps[node]) for node, row in reached.items()}
        self.kept = self.kept | {VELOCITY: mean(pace, weights)}
        return mean(reached, weights)


class FedCmClient(LocalSgd):
    """Client half: local SGD without momentum of its own.

    Args:
        layout: Layout of the model's parameters.
        mix: Share of the client's own gradient in a step; the paper's alpha.
        lr: Learning rate; the server's.
        weight_decay: Added to the gradient as weight_decay * w_i.
        local_epochs: Passes over the client's examples in a round.
        lr_decay: Factor of lr from round to round; the server's.
        optimizer: SGD, or SAM, with which it is MoFedSAM (arXiv 2206.02618).

    Raises:
        ValueError: A number is outside its range, or the optimizer another.
    """

    def __init__(
        self,
        layout: Layout,
        mix: float,
        lr: float,
        weight_decay: float,
        local_epochs: int,
        lr_decay: float = 1.0,
        optimizer: OptimizerFactory = Sgd,
    ) -> None:
        super().__init__(layout, lr, 0.0, weight_decay, local_epochs, lr_decay, optimizer)
        self.require_sgd("FedCM's velocity is a mean of the gradients in the steps")
        checks.share("mix", mix)
        self.mix = mix

    def instruction_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The weights, and the mean step of the last round."""
        return super().instruction_fields(config) | {VELOCITY: Field(self.layout.size)}

    def reply_numbers(self, config: Mapping[str, Any]) -> Collection[str]:
        """The number of steps."""
        return [STEPS]

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """The local epochs; see the module's equations."""
        slope = instruction.arrays[VELOCITY] * ((1 - self.mix) / self.mix)
        lr = self.lr_now(instruction)
        done = self.descend(stack, instruction.arrays[WEIGHTS], lr * self.mix, 0.0, slope)
        return Update({WEIGHTS: done.weights}, done.loss, numbers={STEPS: torch.tensor(done.steps)})
