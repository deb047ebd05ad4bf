"""MOON: local SGD with a contrast, which keeps what a client's model sees near to what the server's sees.

Li, He and Song 2021, arXiv 2103.16057, Algorithm 1. Client i lowers, from w_i = w by `local_epochs` passes of
mini-batch SGD, the mean over its examples x of

    loss(w_i; x) + mu c(x),    c = -log( exp(s(z, z_w) / T) / (exp(s(z, z_w) / T) + exp(s(z, z_p) / T)) )

Symbols: z, z_w and z_p the representations of x in w_i, in the server's w and in w_p, the client's own model after its
last round, s the cosine, T `temperature`, mu the weight of the contrast. Gradients are taken through z alone. The
server half is FedAvg's; with mu = 0 so is everything. The training loss that is reported is without the contrast.

The representation is what goes into the model's last linear layer, all of it as one vector where there are several
places. The authors' models have a projection head, two linear layers of which the second gives 256 numbers, before the
last layer, and the head's output is their representation: that is the same rule, and a model with such a head is a
model of one's own. Without it, and behind a ReLU, representations are never negative, and cosines are nearer to one.

A client keeps w_p, a vector of d numbers; the server knows nothing of it. One that takes part for the first time has
none, nor has one that lost it, which is said in the run's messages: w takes its place. Then z_p = z_w, the contrast
has no gradient, and the client's round is FedAvg's. An evaluation's forward pass gives z_w and z_p: without dropout,
with running statistics. These two passes are counted in `passes`, which is 5/3 of FedAvg's.

The authors tune mu over 0.1, 1, 5 and 10, and found 5 best for CIFAR-10, 1 for CIFAR-100 and 0.1 for Tiny-ImageNet;
T is 0.5.

On stability: the contrast is bounded, by log(1 + exp(2 / T)) for each example, and its gradient with respect to z falls
as 1/|z|: as FedAvg's, where representations do not vanish. What was seen once, on mnist_mini with a tenth of 100
clients of two classes each, a fifth of their examples kept for tests, an MLP with 64 hidden units, batches of 64,
5 epochs a round, lr 0.01 and momentum 0.9, after 25 rounds: 83.0 % with mu = 1, 72.8 % with mu = 5 (FedAvg 82.7 %).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import torch.nn.functional as F
from torch import Tensor

from strategies.base import checks
from strategies.base.beyond_gradients import Forward, Term
from strategies.base.client import Batch, Instruction, Stack, Update, remembered
from strategies.base.layout import Layout
from strategies.base.messages import WEIGHTS
from strategies.local_sgd import Local, LocalSgd

PREVIOUS = "previous"
"""w_p in what a client remembers."""


class MoonClient(LocalSgd):
    """Client half: local SGD with the contrast; the server half is FedAvg's.

    Args:
        layout: Layout of the model's parameters.
        mu: Weight of the contrast.
        temperature: T.
        local: As `LocalSgd`'s.

    Raises:
        ValueError: A number is outside its range, or the model has no linear layer.
    """

    def __init__(self, layout: Layout, mu: float, temperature: float, **local: Unpack[Local]) -> None:
        super().__init__(layout, **local)
        checks.not_negative("mu", mu)
        checks.positive("temperature", temperature)
        self.mu, self.temperature = mu, temperature
        linear = [name for name, layer in layout.layers.items() if layer.kind == "linear"]
        if not linear:
            raise ValueError("MOON contrasts what goes into the last linear layer, and the model has none")
        self.layer = linear[-1]

    def state_sizes(self) -> dict[str, int]:
        """The client's last model."""
        return {PREVIOUS: self.layout.size}

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """The local epochs; see the module's equations."""
        start = instruction.arrays[WEIGHTS]
        previous = remembered(state[PREVIOUS], start)

        def differentiate(weights: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            given = {
                name: stack.outputs(model, batch, [self.layer]).inputs[self.layer]
                for name, model in (("server", start), ("previous", previous))
            }
            return stack.gradient(weights, batch, Term(self._contrast, [self.layer], given))

        done = self.descend(stack, start, self.lr_now(instruction), 0.0, differentiate=differentiate)
        return Update({WEIGHTS: done.weights}, done.loss, lambda sent: {PREVIOUS: done.weights})

    def _contrast(self, forward: Forward, given: Mapping[str, Tensor]) -> Tensor:
        """mu c of every example, (B,)."""

        def near(other: Tensor) -> Tensor:
            own = forward.inputs[self.layer].float().flatten(1)
            return F.cosine_similarity(own, other.float().flatten(1)) / self.temperature

        return self.mu * F.softplus(near(given["previous"]) - near(given["server"]))
