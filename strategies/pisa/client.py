"""PISA's client half: the gradient, or the local steps and the replica of the dual; equations in `strategies.pisa`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.client import ClientHalf, Instruction, Stack, Update
from strategies.base.layout import Layout
from strategies.base.messages import DUAL, GRADIENT, MEASURE, ROUND, WEIGHTS, Field, integer, squared
from strategies.base.threads import one_thread
from strategies.pisa.penalty import Penalty
from strategies.pisa.primal_step import PrimalStep
from strategies.pisa.wire import (
    COMMON,
    KNOWN,
    OFFSET,
    Wire,
    by_gradient,
    check_alignment,
    difference_of,
    measures,
    probed_fields,
    restored,
    statistic_of,
    suited,
)
from strategies.preconditioners import Preconditioner
from strategies.preconditioners.base import LOSS, PROBED
from strategies.transforms.compression import SchemeName
from strategies.transforms.compression import compression as compression_of


@checks.literals
class PisaClient(ClientHalf):
    """Client half: the gradient and, on the wire `primal`, the preconditioned local steps and the replica of the dual.

    Args:
        layout: Layout of the model's parameters.
        preconditioner: Q, given its layout; the server's.
        penalty: sigma and rho; the server's.
        align_every: As the server's.
        local_steps: K; the paper: 1.
        gradient: `mean`: of the loss over all the client's examples; `sum`: the sum of its mini-batches'
            mean gradients (the authors' federated code); `batch`: of one mini-batch a step.
        lag: As the server's.
        wire: As the server's.
        compression: How gradients are sent: `none`, as they are, or in fewer bytes as `bfloat16`, `int8` or `topk`.
        keep: Share of the elements that `topk` sends.
        friction: As the server's.
        difference: As the server's.

    Raises:
        ValueError: A value is outside its range, the automatic penalty is asked for without alignment, or the wire
            cannot do it.
    """

    def __init__(
        self,
        layout: Layout,
        preconditioner: Callable[[Layout], Preconditioner],
        penalty: Penalty,
        align_every: int,
        local_steps: int,
        gradient: Literal["mean", "sum", "batch"],
        lag: Literal[0, 1] = 1,
        wire: Wire = "primal",
        compression: SchemeName = "none",
        keep: float = 0.1,
        friction: float = 0.0,
        difference: float | None = 1.0,
    ) -> None:
        checks.whole("local_steps", local_steps, 1)
        checks.whole("align_every", align_every, 0)
        self.layout, self.preconditioner = layout, preconditioner(layout)
        self.penalty = suited(penalty, self.preconditioner)
        self.align_every, self.local_steps, self.gradient, self.lag = align_every, local_steps, gradient, lag
        self.friction = friction
        self.by_gradient = by_gradient(wire, align_every, local_steps, self.preconditioner)
        self.transforms = compression_of(compression, keep, layout, self.by_gradient)
        check_alignment(align_every, penalty, self.preconditioner)
        self.difference = difference_of(difference, self.penalty, align_every, lag, self.preconditioner)

    def state_sizes(self) -> dict[str, int]:
        """The dual and, unaligned, the client's own Q; nothing if it only sends gradients."""
        if self.by_gradient:
            return {}
        own = {} if self.align_every else self.preconditioner.memory_fields()
        known = {KNOWN: 1} if self.friction else {}
        return {DUAL: self.layout.size} | known | {name: field.size for name, field in own.items()}

    def instruction_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The weights and, aligned, what it takes of the common Q to solve with it."""
        fields = super().instruction_fields(config)
        if self.by_gradient:
            return fields
        if self.friction:
            fields |= {OFFSET: Field(self.layout.size)}
        if config.get(MEASURE) or not self.align_every:
            return fields
        common = {COMMON: Field(self.layout.size)} if self.difference < 1 else {}
        return fields | common | self.preconditioner.solver_fields()

    def reply_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The gradient or the weights, of which the dual is made, and in rounds that measure what they do not tell."""
        if self.by_gradient:
            told = probed_fields(self.preconditioner) if self._measures(config) else {}
            return {GRADIENT: squared(self.layout.size)} | told
        if config.get(MEASURE):
            return self.preconditioner.statistic_fields()
        fields = {WEIGHTS: squared(self.layout.size)}
        if self.lag and self._measures(config):
            fields |= self.preconditioner.statistic_fields()
        return fields

    def prepare(self, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> PrimalStep | None:
        """The step with the common Q and penalty; None without a common Q, or if nothing was observed of it yet."""
        own = not self.align_every and self.preconditioner.state_fields()
        if self.by_gradient or own or config.get(MEASURE):
            return None
        held = {name: arrays[name][None] for name in self.preconditioner.solver_fields() if self.align_every}
        with one_thread():
            return PrimalStep.of_round(
                *(self.preconditioner, self.penalty, held, integer(config, ROUND), self.lag),
                *(
                    arrays[WEIGHTS].device,
                    arrays[COMMON][None] if COMMON in arrays else None,
                    self.difference,
                ),
            )

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """The gradient, or K local steps and the dual step; see the module's equations."""
        consensus, config = instruction.arrays[WEIGHTS], instruction.config
        gradients = gradients_of(stack, self.gradient, self.local_steps)
        gradient, loss, probed = self._probed(stack, config, gradients, consensus)
        if self.by_gradient:
            return Update({GRADIENT: gradient} | probed, loss)
        row = dual = state[DUAL]
        known: dict[str, Tensor] = {}
        if self.friction:
            row, dual, known = restored(row, state, instruction.arrays)
        statistic = statistic_of(self.preconditioner, gradient, dual, probed)
        if config.get(MEASURE):
            return Update(statistic, loss, lambda _: state)
        step: PrimalStep | None = instruction.common
        measured = self.lag and self._measures(config)
        announced = statistic if measured else {}
        if step is None and self.penalty.sigma is None:
            weights = consensus.repeat(len(stack.clients), 1)
            return Update({WEIGHTS: weights} | announced, loss, lambda _: {DUAL: row} | known)
        if step is None:  # everyone's own Q begins with the gradient at hand, and so does a common one
            held = self.preconditioner.nothing(consensus.device) if self.align_every else state
            step = self._own_step(config, held, statistic)
        weights = consensus - step.solve(step.residual(gradient, dual))
        for _ in range(1, self.local_steps):
            if self.align_every:
                gradient, _ = gradients(weights)
            else:
                gradient, _, probed = self._probed(stack, config, gradients, weights)
                statistic = statistic_of(self.preconditioner, gradient, dual, probed)
                step = self._own_step(config, step.held, statistic)
            residual = step.residual(gradient, dual) + step.sigma * (weights - consensus)
            weights = weights - step.solve(residual)
        own = {} if self.align_every else self.preconditioner.memory_fields()
        kept = {name: step.held[name] for name in own}
        sigma = step.sigma

        def following(sent: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            # the ledger's own operations in their order, so that its dual has the same bits
            return {DUAL: row + (sent[WEIGHTS] - consensus).mul_(sigma)} | known | kept

        return Update({WEIGHTS: weights} | announced, loss, following)

    def _own_step(
        self, config: Mapping[str, Any], held: Mapping[str, Tensor], statistic: Mapping[str, Tensor]
    ) -> PrimalStep:
        return PrimalStep.with_own(
            *(self.preconditioner, self.penalty, held, integer(config, ROUND), statistic)
        )

    def _measures(self, config: Mapping[str, Any]) -> bool:
        return measures(self.preconditioner, integer(config, ROUND), self.align_every)

    def _probed(
        self,
        stack: Stack,
        config: Mapping[str, Any],
        gradients: Callable[[Tensor], tuple[Tensor, Tensor]],
        weights: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Gradients and losses and, where it is taken, what is told of a statistic beside them."""
        probe = self.preconditioner.probe
        if probe is None or not self._observes(config):
            return *gradients(weights), {}
        with stack.probed(probe) as sums:
            gradient, loss = gradients(weights)
        made = torch.cat([sums[layer] for layer in probe.sizes()], dim=-1)
        told = {PROBED: made, LOSS: loss.unsqueeze(-1)}
        return gradient, loss, {name: told[name] for name in probed_fields(self.preconditioner)}

    def _observes(self, config: Mapping[str, Any]) -> bool:
        """Whether it is a statistic of this gradient that is sent, or kept."""
        if not self.align_every or config.get(MEASURE):
            return True
        return (self.by_gradient or self.lag == 1) and self._measures(config)


def gradients_of(
    stack: Stack, gradient: Literal["mean", "sum", "batch"], steps: int
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The stochastic gradient, for so many steps: at weights (d,) or (C, d), gradients (C, d) and losses (C,)."""
    if gradient != "batch":
        return lambda weights: stack.full_gradient(weights, gradient)
    batches = stack.batches(epochs=steps)
    return lambda weights: stack.gradient(weights, next(batches))
