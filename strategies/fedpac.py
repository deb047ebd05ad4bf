"""FedPAC and FedMuon: clients' optimizers go on from the mean of their memories, and step along one direction with it.

Liu et al. 2025, arXiv 2510.27403, for Muon (FedMuon); Liu et al. 2026, arXiv 2602.19271, for any optimizer with a
preconditioner (FedPAC). A round, for every client i that takes part:

    w_i, T_i = w, T, then for every mini-batch of `local_epochs` passes      (client)
        d    = direction of the optimizer at grad F_i(w_i; batch), which takes T_i forward
        w_i -= lr (mix d + (1 - mix) v)
    v     = mean of those present of (w - w_i) / (lr K_i)                    (server)
    T     = mean of those present of T_i
    w     = mean of those present of w_i

Symbols: w the server's weights, w_i the client's, T the optimizer's memory (`strategies.optimizers`: Muon's momentum,
AdamW's moments), zero in the first round, v `velocity`: the mean step of the last round, zero in the first; mix the
share of a client's own direction, 1 - alpha of FedMuon, which has 0.5, and 1 - beta of FedPAC; K_i the client's number
of steps. Means are weighted by `alpha`; the papers' are uniform. With SGD without momentum there is no T, and it is
FedCM. Clients keep nothing; the way down carries weights, v and T, the way up weights and T: with Muon three vectors
and two, with AdamW four and three.

What could not be established from public text: the beta of FedPAC's runs (0.5 here, FedMuon's), and what it aligns
beside the preconditioner proper; here it is the whole memory. FedPAC's own optimizers are SOAP, Sophia and Muon, of
which Muon is here. FedMuon's public code aligns the momentum of matrices alone, has AdamW of vectors begin anew in
every round, a momentum of 0.98, and clips gradients to a norm of 10. Local Muon, their baseline, is
`strategy=fedavg strategy/optimizer=muon`.

FedPM (Ishii et al. 2025, arXiv 2511.09100) is a relative whose server takes account of the clients' preconditioners in
the mean: `strategies.fedpm`. `strategy=pisa` with `strategy/preconditioner=kfac` steps by the federation's mean factors
from the start.

On stability. The first round goes but a share mix of the way, for v is zero, and v has a memory of 1 / mix rounds, as
in `strategies.fedcm`. A mean of orthogonal directions is shorter than they are where clients differ, so v is, too: the
more they disagree, the less it counts. Muon's steps do not shrink with the gradient: let lr fall (`lr_decay`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.averaging import Answers, mean
from strategies.base.client import Instruction, Stack, Update
from strategies.base.layout import Layout
from strategies.base.messages import WEIGHTS, Field, averaged
from strategies.fedcm import STEPS, VELOCITY, FedCm
from strategies.local_sgd import Local, LocalSgd, OptimizerFactory
from strategies.optimizers.base import Differentiate, Memory, Optimizer


@checks.literals
class FedPac(FedCm):
    """Server half: FedCM's, and the mean of the optimizers' memories.

    Args:
        layout: Layout of the model's parameters.
        lr: The clients' learning rate.
        alpha: Weights of the clients: `examples` (n_i/n) or `uniform` (the papers).
        momentum: The clients'.
        optimizer: The clients'.
        lr_decay: Factor of lr from round to round.

    Raises:
        ValueError: A value is outside its range.
    """

    def __init__(
        self,
        layout: Layout,
        lr: float,
        alpha: Literal["examples", "uniform"],
        momentum: float,
        optimizer: OptimizerFactory,
        lr_decay: float = 1.0,
    ) -> None:
        super().__init__(layout, lr, alpha, lr_decay)
        fields = optimizer(layout, momentum, 0.0).memory_fields()
        self.memory = {name: field.size for name, field in fields.items()}
        self.kept |= {name: torch.zeros(size) for name, size in self.memory.items()}

    def step(self, answers: Answers, weights: Mapping[int, float]) -> Tensor:
        """FedCM's step, and the mean memory."""
        memory = {
            name: mean({node: said[name] for node, said in answers.arrays.items()}, weights)
            for name in self.memory
        }
        following = super().step(answers, weights)
        self.kept = self.kept | memory
        return following


class Aligned(Optimizer):
    """Steps between an optimizer's own and a velocity, which its memory needs besides.

    Args:
        own: The optimizer.
        mix: Share of its own direction.
    """

    def __init__(self, own: Optimizer, mix: float) -> None:
        super().__init__(own.layout, own.momentum, own.weight_decay)
        self._own, self._mix = own, mix

    def memory_fields(self) -> dict[str, Field]:
        """The optimizer's."""
        return self._own.memory_fields()

    def gradient(
        self, memory: Memory, differentiate: Differentiate, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The optimizer's."""
        return self._own.gradient(memory, differentiate, weights)

    def direction(self, memory: Memory, gradient: Tensor, weights: Tensor) -> Tensor:
        """Between the velocity and the optimizer's direction."""
        return torch.lerp(memory[VELOCITY], self._own.direction(memory, gradient, weights), self._mix)


class FedPacClient(LocalSgd):
    """Client half: local steps along both directions, from the mean memory.

    Args:
        layout: Layout of the model's parameters.
        mix: Share of the client's own direction in a step.
        local: As `LocalSgd`'s; lr, momentum, lr_decay and optimizer are the server's too.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, layout: Layout, mix: float, **local: Unpack[Local]) -> None:
        super().__init__(layout, **local)
        checks.share("mix", mix)
        self.optimizer = Aligned(self.optimizer, mix)

    def instruction_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The weights, the velocity and the memory."""
        shared = {VELOCITY: Field(self.layout.size)} | self.optimizer.memory_fields()
        return super().instruction_fields(config) | shared

    def reply_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The weights and the memory."""
        memory = self.optimizer.memory_fields()
        own = {name: averaged(field.size, field.minimum) for name, field in memory.items()}
        return super().reply_fields(config) | own

    def reply_numbers(self, config: Mapping[str, Any]) -> Collection[str]:
        """The number of steps."""
        return [STEPS]

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """The local epochs; see the module's equations."""
        start, names = instruction.arrays[WEIGHTS], list(self.optimizer.memory_fields())
        memory = {
            name: instruction.arrays[name].expand(len(stack.clients), -1) for name in (VELOCITY, *names)
        }
        done = self.descend(stack, start, self.lr_now(instruction), 0.0, given=memory)
        answer = {WEIGHTS: done.weights} | {name: done.memory[name] for name in names}
        return Update(answer, done.loss, numbers={STEPS: torch.tensor(done.steps)})
