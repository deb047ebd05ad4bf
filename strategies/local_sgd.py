"""Local stochastic gradient descent: the client half of FedAvg, FedProx, FedAvgM and the FedOpt family, and its
loop over mini-batches, which is also that of every other client half that takes such steps.

FedAvg (McMahan et al. 2017, arXiv 1602.05629, Algorithm 1), with momentum and weight decay as
NIID-Bench (arXiv 2102.02079) uses them; FedProx (Li et al. 2020, arXiv 1812.06127, equation 2) adds the
proximal term (mu/2)|w_i - w|^2. From w_i = w, for every mini-batch of `local_epochs` passes:

    g    = grad F_i(w_i; batch) + weight_decay w_i + mu (w_i - w)
    b    = momentum b + g
    w_i -= lr b

Symbols: w the server's weights, w_i the client's, b the momentum buffer (zero at the start of every
round), mu the penalty that Flower's FedProx sends as `proximal-mu` (zero when nobody sends it). The server
halves are Flower's own.

These are the steps of `optimizer: sgd`; others are in `strategies.optimizers`. In round r, counted from 1, lr is
lr lr_decay^(r-1). FedDyn, FedCM and FedSMOO are published with an lr_decay of 0.998, and of 1 where nothing is said.

A gradient counts as often as later steps repeat it by momentum, less what the proximal term takes back. How often all
of them count together is `reach`, the |a_i|_1 of FedNova (arXiv 2007.07481): the number of steps without momentum and
proximal term, and what K steps with them amount to. w_i - w = -lr reach times a weighted mean of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.client import Batch, ClientHalf, Instruction, Stack, Update
from strategies.base.layout import Layout
from strategies.base.messages import ROUND, WEIGHTS, integer, real
from strategies.optimizers import Optimizer, Sgd
from strategies.optimizers.base import Memory

OptimizerFactory = Callable[[Layout, float, float], Optimizer]
"""Makes an optimizer from layout, momentum and weight decay."""


class Local(TypedDict):
    """What every client half that takes local steps is told of them: arguments of `LocalSgd`."""

    lr: float
    momentum: float
    weight_decay: float
    local_epochs: int
    lr_decay: NotRequired[float]
    optimizer: NotRequired[OptimizerFactory]


def lr_at(round_number: int, lr: float, lr_decay: float) -> float:
    """The learning rate of a round, counted from 1."""
    return lr * lr_decay ** (round_number - 1)


@dataclass(frozen=True)
class Descent:
    """What came of the local epochs.

    Attributes:
        weights: Of each client, (C, d).
        loss: Mean over the epochs, (C,).
        steps: Mini-batches of each.
        memory: What the optimizer remembers at the end.
    """

    weights: Tensor
    loss: Tensor
    steps: Sequence[int]
    memory: Memory


class LocalSgd(ClientHalf):
    """Mini-batch steps on F_i, plus FedProx's proximal term when the server asks for it.

    Args:
        layout: Layout of the model's parameters.
        lr: Learning rate; NIID-Bench: 0.01.
        momentum: Momentum within a round; NIID-Bench: 0.9.
        weight_decay: Added to the gradient as weight_decay * w_i, if the optimizer is SGD; NIID-Bench: 1e-5.
        local_epochs: Passes over the client's examples in a round; NIID-Bench: 10.
        lr_decay: Factor of lr from round to round.
        optimizer: Of the steps.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self,
        layout: Layout,
        lr: float,
        momentum: float,
        weight_decay: float,
        local_epochs: int,
        lr_decay: float = 1.0,
        optimizer: OptimizerFactory = Sgd,
    ) -> None:
        checks.positive("lr", lr)
        checks.whole("local_epochs", local_epochs, 1)
        checks.share("lr_decay", lr_decay)
        self.layout, self.local_epochs = layout, local_epochs
        self.lr, self.lr_decay = lr, lr_decay
        self.optimizer = optimizer(layout, momentum, weight_decay)

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """Run the local epochs; see the module's equations."""
        mu = real(instruction.config, "proximal-mu", 0.0)
        done = self.descend(stack, instruction.arrays[WEIGHTS], self.lr_now(instruction), mu)
        return Update({WEIGHTS: done.weights}, done.loss)

    def lr_at(self, round_number: int) -> float:
        """The learning rate of a round, counted from 1."""
        return lr_at(round_number, self.lr, self.lr_decay)

    def lr_now(self, instruction: Instruction) -> float:
        """The learning rate of an instruction's round."""
        return self.lr_at(integer(instruction.config, ROUND))

    def require_sgd(self, why: str) -> None:
        """Refuse an optimizer whose steps are not sums of gradients.

        Raises:
            ValueError: It is one.
        """
        if not isinstance(self.optimizer, Sgd):
            raise ValueError(f"optimizer must be sgd or sam: {why}")

    def reach(self, steps: Sequence[int], lr: float, mu: float) -> Tensor:
        """What each client's steps of SGD amount to without momentum and proximal term, (C,), double precision."""
        moved, buffer, reached = 0.0, 0.0, [0.0]
        for _ in range(max(steps)):
            # the loop below, its gradients all one
            buffer = self.optimizer.momentum * buffer + 1 - lr * mu * moved
            moved += buffer
            reached.append(moved)
        return torch.tensor([reached[count] for count in steps], dtype=torch.float64)

    def descend(
        self,
        stack: Stack,
        start: Tensor,
        lr: float,
        mu: float,
        slope: Tensor | None = None,
        given: Mapping[str, Tensor] | None = None,
        differentiate: Callable[[Tensor, Batch], tuple[Tensor, Tensor]] | None = None,
        epochs: int | None = None,
        fixed: Tensor | None = None,
    ) -> Descent:
        """The local epochs, on F_i(w_i) + <slope_i, w_i> + (mu/2)|w_i - start|^2, with weight decay.

        Args:
            stack: The clients.
            start: Where they begin, (d,) or (C, d).
            lr: Learning rate.
            mu: Weight of the proximal term.
            slope: A linear term of each client's, (C, d), or None.
            given: What the optimizer remembers at the beginning, and needs besides, (C, size); None: zeros.
            differentiate: Gradients (C, d) and losses (C,) of a batch at the clients' weights, of another objective
                than F_i; None: `stack.gradient`.
            epochs: Passes over the examples; None: `local_epochs`.
            fixed: Which weights stay as they are, (d,); None: none of them. The optimizer sees no gradient of theirs.
        """
        of_all = differentiate or stack.gradient

        def of_free(weights: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            gradient, loss = of_all(weights, batch)
            return (gradient if fixed is None else gradient.masked_fill_(fixed, 0.0)), loss

        weights = start.expand(len(stack.clients), -1).clone()
        memory = self.optimizer.begin(weights) | {name: rows.clone() for name, rows in (given or {}).items()}
        remembered = [memory[name] for name in self.optimizer.memory_fields()]
        loss = weights.new_zeros(len(stack.clients))
        examples = torch.zeros_like(loss)
        steps = [0] * len(stack.clients)
        for batch in stack.batches(self.local_epochs if epochs is None else epochs):
            idle = [row for row, count in enumerate(batch.examples) if not count]
            held = [(rows, rows[idle]) for rows in (weights, *remembered)] if idle else []
            gradient, batch_loss = self.optimizer.gradient(memory, partial(of_free, batch=batch), weights)
            if slope is not None:
                gradient.add_(slope)
            if mu:
                gradient.add_(weights - start, alpha=mu)
            weights.sub_(self.optimizer.direction(memory, gradient, weights), alpha=lr)
            for rows, before in held:  # of those who have no batch any more
                rows[idle] = before
            if fixed is not None:
                weights.copy_(torch.where(fixed, start, weights))
            loss += batch_loss * batch.counts
            examples += batch.counts
            steps = [count + (n > 0) for count, n in zip(steps, batch.examples, strict=True)]
        return Descent(weights, loss / examples, steps, memory)
