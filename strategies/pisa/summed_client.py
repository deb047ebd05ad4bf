"""The client half of PISA whose rows stay with the clients; equations in `strategies.pisa.summed`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

from strategies.base import checks
from strategies.base.client import ClientHalf, Instruction, Stack, Update
from strategies.base.layout import Layout
from strategies.base.messages import DUAL, ROUND, WEIGHTS, Field, integer, squared
from strategies.base.threads import one_thread
from strategies.pisa.client import gradients_of
from strategies.pisa.penalty import Penalty
from strategies.pisa.primal_step import PrimalStep
from strategies.pisa.wire import (
    COMMON,
    KNOWN,
    OFFSET,
    RESIDUAL,
    STEPPED,
    added,
    check_alignment,
    check_linear,
    difference_of,
    measures,
    restored,
    suited,
)
from strategies.preconditioners import Preconditioner


@checks.literals
class PisaSummedClient(ClientHalf):
    """Client half: the residual, what is new of the statistic, and a dual that it alone has.

    Args:
        layout: Layout of the model's parameters.
        preconditioner: Q, given its layout; the server's.
        penalty: sigma and rho; the server's.
        align_every: As the server's.
        gradient: As for `PisaClient`.
        friction: As the server's.
        difference: As the server's.

    Raises:
        ValueError: A value is outside its range, or clients' steps do not add up.
    """

    def __init__(
        self,
        layout: Layout,
        preconditioner: Callable[[Layout], Preconditioner],
        penalty: Penalty,
        align_every: int,
        gradient: Literal["mean", "sum", "batch"],
        friction: float = 0.0,
        difference: float | None = 1.0,
    ) -> None:
        checks.whole("align_every", align_every, 0)
        self.layout, self.preconditioner = layout, preconditioner(layout)
        self.penalty = suited(penalty, self.preconditioner)
        check_alignment(align_every, penalty, self.preconditioner)
        check_linear(self.preconditioner, align_every)
        self.difference = difference_of(difference, self.penalty, align_every, 0, self.preconditioner)
        self.align_every, self.gradient, self.friction = align_every, gradient, friction

    def state_sizes(self) -> dict[str, int]:
        """The dual before the step of the round last in a sum, its residual, and the statistic last added."""
        fields = self.preconditioner.statistic_fields()
        statistic = {name: field.size for name, field in fields.items()} if self.align_every else {}
        known = {KNOWN: 1} if self.friction else {}
        return {DUAL: self.layout.size, RESIDUAL: self.layout.size} | known | statistic

    def instruction_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The weights, and what it takes of the Q that the dual is still to step with."""
        offset = {OFFSET: Field(self.layout.size)} if self.friction else {}
        common = {COMMON: Field(self.layout.size)} if self.difference < 1 else {}
        held = self.preconditioner.solver_fields() | common if config.get(STEPPED) else {}
        return super().instruction_fields(config) | offset | held

    def reply_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The residual and, in rounds that measure, the statistic less what was last added of it."""
        fields = {RESIDUAL: squared(self.layout.size)}
        if measures(self.preconditioner, integer(config, ROUND), self.align_every):
            statistic = self.preconditioner.statistic_fields()
            fields |= {added(name): Field(f.size, largest=f.largest) for name, f in statistic.items()}
        return fields

    def prepare(self, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> PrimalStep | None:
        """The step that the duals are still to take; None for those that have taken none yet."""
        stepped = integer(config, STEPPED, 0)
        if not stepped:
            return None
        held = {name: arrays[name][None] for name in self.preconditioner.solver_fields()}
        with one_thread():
            return PrimalStep.of_round(
                self.preconditioner, self.penalty, held, stepped, 0, arrays[WEIGHTS].device
            )

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """The dual step of last time, then the residual of now."""
        consensus = instruction.arrays[WEIGHTS]
        gradient, loss = gradients_of(stack, self.gradient, 1)(consensus)
        row, step = state[DUAL], instruction.common
        if step is not None:
            stepped = state[RESIDUAL]
            if self.difference < 1:
                stepped = stepped + instruction.arrays[COMMON]
            row = row - step.solve(stepped) * step.sigma
        dual, known = row, dict[str, Tensor]()
        if self.friction:
            row, dual, known = restored(row, state, instruction.arrays)
        residual = gradient * self.difference + dual
        kept = {name: rows for name, rows in state.items() if name in self.preconditioner.statistic_fields()}
        new: dict[str, Tensor] = {}
        if measures(self.preconditioner, integer(instruction.config, ROUND), self.align_every):
            statistic = self.preconditioner.statistic(gradient, gradient + dual)
            new = {added(name): rows - kept[name] for name, rows in statistic.items()}
            kept = statistic
        following = {DUAL: row, RESIDUAL: residual} | known | kept
        return Update({RESIDUAL: residual} | new, loss, lambda _: following)
