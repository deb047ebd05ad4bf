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

A gradient counts as often as later steps repeat it by momentum, less what the proximal term takes back. How often all
of them count together is `reach`, the |a_i|_1 of FedNova (arXiv 2007.07481): the number of steps without momentum and
proximal term, and what K steps with them amount to. w_i - w = -lr reach times a weighted mean of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.client import Batch, ClientHalf, Instruction, Stack, Update
from strategies.base.layout import Layout
from strategies.base.messages import WEIGHTS, real


@dataclass(frozen=True)
class Descent:
    """What came of the local epochs.

    Attributes:
        weights: Of each client, (C, d).
        loss: Mean over the epochs, (C,).
        steps: Mini-batches of each.
    """

    weights: Tensor
    loss: Tensor
    steps: Sequence[int]


class LocalSgd(ClientHalf):
    """Mini-batch SGD with momentum on F_i, plus FedProx's proximal term when the server asks for it.

    Args:
        layout: Layout of the model's parameters.
        lr: Learning rate; NIID-Bench: 0.01.
        momentum: Momentum within a round; NIID-Bench: 0.9.
        weight_decay: Added to the gradient as weight_decay * w_i; NIID-Bench: 1e-5.
        local_epochs: Passes over the client's examples in a round; NIID-Bench: 10.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self, layout: Layout, lr: float, momentum: float, weight_decay: float, local_epochs: int
    ) -> None:
        checks.positive("lr", lr)
        checks.decay("momentum", momentum)
        checks.not_negative("weight_decay", weight_decay)
        checks.whole("local_epochs", local_epochs, 1)
        self.layout = layout
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.local_epochs = local_epochs

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """Run the local epochs; see the module's equations."""
        mu = real(instruction.config, "proximal-mu", 0.0)
        done = self.descend(stack, instruction.arrays[WEIGHTS], self.lr, mu)
        return Update({WEIGHTS: done.weights}, done.loss)

    def reach(self, steps: Sequence[int], lr: float, mu: float) -> Tensor:
        """What each client's steps amount to in steps without momentum and proximal term, (C,), double precision."""
        moved, buffer, reached = 0.0, 0.0, [0.0]
        for _ in range(max(steps)):
            buffer = self.momentum * buffer + 1 - lr * mu * moved  # the loop below, its gradients all one
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
        differentiate: Callable[[Tensor, Batch], tuple[Tensor, Tensor]] | None = None,
        epochs: int | None = None,
        fixed: Tensor | None = None,
    ) -> Descent:
        """The local epochs, on F_i(w_i) + (weight_decay/2)|w_i|^2 + <slope_i, w_i> + (mu/2)|w_i - start|^2.

        Args:
            stack: The clients.
            start: Where they begin, (d,) or (C, d).
            lr: Learning rate.
            mu: Weight of the proximal term.
            slope: A linear term of each client's, (C, d), or None.
            differentiate: Gradients (C, d) and losses (C,) of a batch at the clients' weights, of another objective
                than F_i; None: `stack.gradient`.
            epochs: Passes over the examples; None: `local_epochs`.
            fixed: Which weights stay as they are, (d,); None: none of them.
        """
        differentiate = differentiate or stack.gradient
        weights = start.expand(len(stack.clients), -1).clone()
        buffer = torch.zeros_like(weights) if self.momentum else None
        loss = weights.new_zeros(len(stack.clients))
        examples = torch.zeros_like(loss)
        steps = [0] * len(stack.clients)
        for batch in stack.batches(self.local_epochs if epochs is None else epochs):
            gradient, batch_loss = differentiate(weights, batch)
            if self.weight_decay:
                gradient.add_(weights, alpha=self.weight_decay)
            if slope is not None:
                gradient.add_(slope)
            if mu:
                gradient.add_(weights - start, alpha=mu)
            step = gradient if buffer is None else buffer.mul_(self.momentum).add_(gradient)
            if len(stack.clients) > 1:  # some may have no batch any more
                step = step * batch.active[:, None]
            weights.sub_(step, alpha=lr)
            if fixed is not None:
                weights = torch.where(fixed, start, weights)
            seen = torch.tensor(batch.examples, dtype=loss.dtype, device=loss.device)
            loss += batch_loss * seen
            examples += seen
            steps = [count + (n > 0) for count, n in zip(steps, batch.examples, strict=True)]
        return Descent(weights, loss / examples, steps)
