"""FedNova: the mean of the clients' updates, each divided by the number of steps that it is worth.

Wang et al. 2020, arXiv 2007.07481, equations 6 to 9. Clients with more examples take more steps, and FedAvg gives
their losses more weight than n_i/n for it: it finds the solution of another problem. A round:

    w_i   = local SGD from w on F_i + (weight_decay/2)|w_i|^2 + (mu/2)|w_i - w|^2        (client)
    d_i   = (w - w_i) / (lr a_i)
    w    -= server_lr lr t (mean of those present of d_i),     t = mean of a_i           (server)

Symbols: w the server's weights, w_i the client's, d_i its mean gradient, a_i the `reach` of its steps: how often its
gradients count together, |a_i|_1 in the paper, t tau_eff. Means are weighted by `alpha`. With tau_i steps, momentum m
and learning rate lr,

    a_i = tau_i                                           without either
    a_i = (tau_i - m (1 - m^tau_i) / (1 - m)) / (1 - m)   with momentum m
    a_i = (1 - (1 - lr mu)^tau_i) / (lr mu)               with the proximal term

and with both, what the loop itself makes of gradients that are all one (`strategies.local_sgd`). If all a_i are equal,
it is FedAvg, or FedProx. The clients send w_i and a_i: FedAvg's bytes and a number.

Authors' code, where it differs: with momentum *and* a proximal term it applies both recursions one after the other,
which is not what the loop does; with a proximal term t is the mean of tau_i, not of a_i, which steps further than
FedProx would. Its server momentum is left out here; so are local learning rates that fall within a round.

On stability: as FedAvg's. The updates are not longer than FedAvg's but for clients with few steps, whose update is
multiplied by t / a_i: a client with a single mini-batch among others with a hundred counts for a hundred times its
own way, over its share n_i/n. What a_i is a client says itself, and a false one changes the length of everybody's step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, Unpack

from torch import Tensor

from strategies.base import checks
from strategies.base.averaging import Answers, Averaging, mean
from strategies.base.client import Instruction, Stack, Update
from strategies.base.layout import Layout
from strategies.base.messages import WEIGHTS, real
from strategies.local_sgd import Local, LocalSgd

REACH = "reach"
"""a_i in a reply."""


@checks.literals
class FedNova(Averaging):
    """Server half: the mean of the normalised updates.

    Args:
        layout: Layout of the model's parameters.
        server_lr: Learning rate of the server; the paper: 1.
        alpha: Weights of the clients: `examples` (n_i/n, the paper) or `uniform`.

    Raises:
        ValueError: A value is outside its range.
    """

    def __init__(self, layout: Layout, server_lr: float, alpha: Literal["examples", "uniform"]) -> None:
        checks.positive("server_lr", server_lr)
        self.server_lr = server_lr
        super().__init__(layout, alpha)

    def step(self, answers: Answers, weights: Mapping[int, float]) -> Tensor:
        """Step by the mean of the normalised updates; see the module's equations."""
        # a step at least was taken, whatever a client says
        reach = {node: max(1.0, real(said, REACH)) for node, said in answers.metrics.items()}
        total = sum(weights.values())
        usual = sum(weights[node] * reach[node] for node in reach) / total
        moved = {
            node: (said[WEIGHTS] - self.consensus) * (usual / reach[node])
            for node, said in answers.arrays.items()
        }
        return self.consensus + self.server_lr * mean(moved, weights)


class FedNovaClient(LocalSgd):
    """Client half: local SGD that says what its steps are worth.

    Args:
        layout: Layout of the model's parameters.
        mu: Weight of the proximal term.
        local: As `LocalSgd`'s; the optimizer must be SGD or SAM.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, layout: Layout, mu: float = 0.0, **local: Unpack[Local]) -> None:
        super().__init__(layout, **local)
        self.require_sgd("FedNova counts how often a gradient is in the sum of the steps")
        checks.not_negative("mu", mu)
        self.mu = mu

    def reply_numbers(self, config: Mapping[str, Any]) -> Collection[str]:
        """What the client's steps are worth."""
        return [REACH]

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """The local epochs; see the module's equations."""
        lr = self.lr_now(instruction)
        done = self.descend(stack, instruction.arrays[WEIGHTS], lr, self.mu)
        reach = self.reach(done.steps, lr, self.mu)
        return Update({WEIGHTS: done.weights}, done.loss, numbers={REACH: reach})
