"""PISA: preconditioned inexact stochastic ADMM, and with it SISA and NSISA.

Zhou, Wang, Luo, Zhu, Li, "Preconditioned inexact stochastic ADMM for deep models", Nature Machine Intelligence
2026, doi 10.1038/s42256-026-01182-3, arXiv 2502.10784, Algorithm 1. Problem: min over w of
sum_i alpha_i F_i(w) + (lambda/2)|w|^2. A round, for every client i that takes part:

    g_i      = stochastic gradient of F_i at w
    w_i      = w - (sigma I + rho Q_i)^-1 (P(g_i) + pi_i)         preconditioned primal step     (client)
    pi_i    += sigma (w_i - w)                                    dual step            (client and server)
    w        = sum_i alpha_i (sigma w_i + pi_i) / (sigma + lambda)        consensus              (server)

The server keeps w_i and pi_i of every client in its ledger; absent clients' rows stay in the sum, unless
`forget_after` takes them out: who comes back then begins anew, from pi_i = 0. The client
keeps a replica of its own dual. `preconditioner` decides the method: `Identity` is PISA, `SecondMoment` SISA,
`NewtonSchulz` and `Spectral` NSISA. sigma and rho come from `penalty`.

Two departures from the paper, both one override away from its form (docs/algorithm.md derives them):

*Alignment.* Every `align_every` rounds the clients send the statistic that Q is built from, the server averages
it (weights alpha_i) and sends everyone the same Q, a round later; `align_every: 0` keeps each client's own.
*Local steps.* `local_steps` K > 1 goes on with the subproblem before the dual step,
w_i -= (sigma I + rho Q)^-1 (P(g_i(w_i)) + pi_i + sigma (w_i - w)), K times in all from w_i = w.

With an automatic penalty and a Q that was never observed, the first round only measures: w_i = w, pi_i = 0.

Symbols: w `consensus`, w_i `weights`, pi_i `dual`, g_i `gradient`, g_i + pi_i `residual`, lambda `lambda_`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from strategies import checks
from strategies.client import ClientHalf, Cohort, Instruction, Update
from strategies.layout import Layout
from strategies.ledger import Ledger
from strategies.messages import (
    ACCEPTED,
    ARRAYS,
    CONFIG,
    EXAMPLES,
    ROUND,
    WEIGHTS,
    Field,
    RoundError,
    arrays_of,
    integer,
    metrics_of,
    out_of_range,
    record,
    squared,
    vectors,
)
from strategies.penalty import Penalty
from strategies.preconditioners import Preconditioner

DUAL = "dual"


class Pisa(Strategy):
    """Server half: the ledger's dual step, the consensus, and the clients' common Q.

    Args:
        layout: Layout of the model's parameters.
        preconditioner: Q, given its layout.
        penalty: sigma and rho.
        lambda_: Weight of (lambda/2)|w|^2; the authors' federated setting: 5e-3.
        align_every: Rounds between exchanges of the statistic; 0 leaves every client its own.
        alpha: `examples` (n_i/n, the paper) or `uniform` (1/N).
        state: Where the ledger's rows are kept: in `memory`, or on `disk` (`strategies.memory.zeros`).
        forget_after: Rounds without an accepted reply after which a client leaves the sums, to begin anew with its
            next; None: never.

    Raises:
        ValueError: A value is outside its range, or the automatic penalty is asked for without alignment.
    """

    def __init__(
        self,
        layout: Layout,
        preconditioner: Callable[[Layout], Preconditioner],
        penalty: Penalty,
        lambda_: float,
        align_every: int,
        alpha: Literal["examples", "uniform"],
        state: Literal["memory", "disk"] = "memory",
        forget_after: int | None = None,
    ) -> None:
        checks.not_negative("lambda", lambda_)
        checks.whole("align_every", align_every, 0)
        if alpha not in ("examples", "uniform"):
            raise ValueError(f"strategy.alpha must be examples or uniform, got {alpha}")
        if state not in ("memory", "disk"):
            raise ValueError(f"state must be memory or disk, got {state}")
        if forget_after is not None:
            checks.whole("forget_after", forget_after, 1)
        self.preconditioner, self.penalty = preconditioner(layout), penalty
        self.lambda_, self.align_every = lambda_, align_every
        _check_alignment(align_every, penalty, self.preconditioner)
        self.forget_after = forget_after
        self.ledger = Ledger(layout, alpha == "uniform", state == "disk")
        self._shared = {
            name: torch.zeros(1, field.size) for name, field in self.preconditioner.state_fields().items()
        }
        self._consensus = torch.empty(0)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the consensus, the common Q and the round last accepted to every node of the grid."""
        sent = vectors(arrays)
        self._consensus = sent[WEIGHTS]
        if self.align_every:
            sent |= {name: row[0] for name, row in self._shared.items()}
        payload = record(sent)
        contents: dict[int, RecordDict] = {}
        for node in grid.get_node_ids():
            accepted = self.ledger.accepted_round(node)
            if accepted not in contents:
                said = ConfigRecord(dict(config) | {ROUND: server_round, ACCEPTED: accepted})
                contents[accepted] = RecordDict({ARRAYS: payload, CONFIG: said})
            yield Message(contents[accepted], message_type=MessageType.TRAIN, dst_node_id=node)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Dual step of every client that answered, then the statistic, then the consensus."""
        answers, examples = {}, {}
        for reply in sorted(replies, key=lambda r: r.metadata.src_node_id):
            node = reply.metadata.src_node_id
            if not reply.has_error():
                answers[node] = vectors(arrays_of(reply.content))
                examples[node] = integer(metrics_of(reply.content), EXAMPLES)
        if not answers:
            return None, None
        weights = {node: arrays.pop(WEIGHTS) for node, arrays in answers.items()}
        shared = self._shared
        if _measures(server_round, self.align_every):
            statistic = {
                name: self.ledger.average({n: arrays[name] for n, arrays in answers.items()}, examples)[None]
                for name in self.preconditioner.statistic_fields()
            }
            shared = self.preconditioner.accumulate(shared, statistic)
        if wrong := out_of_range(shared):
            raise RoundError(f"{wrong} of the server")
        sigma = self._sigma(server_round)
        following = self.penalty.sigma_at(server_round + 1, self.preconditioner.scale(shared))
        gone = self._gone(server_round, answers)
        self.ledger.begin(server_round, weights, examples, self._consensus, sigma, following, gone)
        consensus = self._consensus if following is None else self.ledger.consensus(following, self.lambda_)
        if wrong := out_of_range({WEIGHTS: consensus, DUAL: self.ledger.largest_dual}):
            self.ledger.undo()
            raise RoundError(f"{wrong} of the server")
        self.ledger.commit()
        self._shared = shared
        metrics = MetricRecord(
            {
                "primal-residual": self.ledger.primal_residual(consensus),
                "dual-residual": self.ledger.dual_residual(consensus, self.lambda_),
            }
        )
        return record({WEIGHTS: consensus}), metrics

    def _gone(self, server_round: int, answers: Collection[int]) -> list[int]:
        """Clients that have not answered for so long that they are forgotten."""
        if self.forget_after is None:
            return []
        last = server_round - self.forget_after
        known = self.ledger.clients
        return [c for c in known if c not in answers and self.ledger.accepted_round(c) <= last]

    def supply(self, client: int) -> ArrayRecord | None:
        """The dual of a client that lost it, from the ledger; None for a client that has none."""
        return (
            record({DUAL: self.ledger.dual(client).clone()}) if self.ledger.accepted_round(client) else None
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nothing of the clients: the consensus is evaluated on the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked."""
        return None

    def summary(self) -> None:
        """Say nothing: the run directory holds the configuration."""

    def state_dict(self) -> dict[str, Tensor]:
        """The ledger and the common Q, for a checkpoint."""
        return {f"ledger.{name}": v for name, v in self.ledger.state_dict().items()} | {
            f"shared.{name}": v for name, v in self._shared.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        parts: dict[str, dict[str, Tensor]] = {"ledger": {}, "shared": {}}
        for name, value in state.items():
            part, _, key = name.partition(".")
            parts[part][key] = value
        self.ledger.load_state_dict(parts["ledger"])
        self._shared = parts["shared"]

    def _sigma(self, round_number: int) -> Tensor | None:
        return self.penalty.sigma_at(round_number, self.preconditioner.scale(self._shared))


@dataclass(frozen=True)
class _Common:
    """What clients have in common in a round.

    Attributes:
        instruction: What it was made of.
        held: The state of the common Q; empty if every client has its own.
        observed: Whether anything was observed of it yet.
        sigma: The penalty; None in a round that only measures.
        size: Norm of each tensor if its elements are q, (T,), the size that an automatic penalty follows; None for
            one by hand.
    """

    instruction: Instruction
    held: Mapping[str, Tensor]
    observed: bool
    sigma: Tensor | None
    size: Tensor | None


class PisaClient(ClientHalf):
    """Client half: the preconditioned local steps and the replica of the dual.

    Args:
        layout: Layout of the model's parameters.
        preconditioner: Q, given its layout; the server's.
        penalty: sigma and rho; the server's.
        align_every: As the server's.
        local_steps: K; the paper: 1.
        gradient: `mean`: of the loss over all the client's examples; `sum`: the sum of its mini-batches'
            mean gradients (the authors' federated code); `batch`: of one mini-batch a step.

    Raises:
        ValueError: A value is outside its range, or the automatic penalty is asked for without alignment.
    """

    def __init__(
        self,
        layout: Layout,
        preconditioner: Callable[[Layout], Preconditioner],
        penalty: Penalty,
        align_every: int,
        local_steps: int,
        gradient: Literal["mean", "sum", "batch"],
    ) -> None:
        checks.whole("local_steps", local_steps, 1)
        checks.whole("align_every", align_every, 0)
        if gradient not in ("mean", "sum", "batch"):
            raise ValueError(f"strategy.gradient must be mean, sum or batch, got {gradient}")
        self.layout, self.preconditioner, self.penalty = layout, preconditioner(layout), penalty
        self.align_every, self.local_steps, self.gradient = align_every, local_steps, gradient
        self._common: _Common | None = None
        _check_alignment(align_every, penalty, self.preconditioner)

    def state_sizes(self) -> dict[str, int]:
        """The dual and, unaligned, the client's own Q."""
        own = {} if self.align_every else self.preconditioner.state_fields()
        return {DUAL: self.layout.size} | {name: field.size for name, field in own.items()}

    def instruction_fields(self) -> dict[str, Field]:
        """The weights and, aligned, the common Q."""
        return super().instruction_fields() | (self.preconditioner.state_fields() if self.align_every else {})

    def reply_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The weights, of which the dual is made, and, in rounds that measure, the statistic."""
        fields = {WEIGHTS: squared(self.layout.size)}
        if _measures(integer(config, ROUND), self.align_every):
            fields |= self.preconditioner.statistic_fields()
        return fields

    def solve(self, cohort: Cohort, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """K local steps and the dual step; see the module's equations."""
        if self._common is None or self._common.instruction is not instruction:
            self._common = self._prepare(instruction)
        sigma, rho = self._common.sigma, self.penalty.rho_value
        believed = partial(self.penalty.believed, size=self._common.size, layout=self.layout)
        preconditioner, aligned = self.preconditioner, self.align_every > 0
        consensus, dual = instruction.arrays[WEIGHTS], state[DUAL]
        held: Mapping[str, Tensor] = self._common.held if aligned else state
        gradients = self._gradients(cohort)
        gradient, loss = gradients(consensus)
        residual = gradient + dual
        statistic = preconditioner.statistic(gradient, residual)
        announced = statistic if _measures(integer(instruction.config, ROUND), self.align_every) else {}
        if sigma is None:
            weights = consensus.repeat(len(cohort.clients), 1)
            return Update({WEIGHTS: weights} | announced, loss, {DUAL: dual})
        if not (aligned and self._common.observed):
            held = preconditioner.accumulate(held, statistic)
        direction = preconditioner.direction(held, gradient)
        residual = residual if direction is gradient else direction + dual
        weights = consensus - preconditioner.solve(held, believed(residual), sigma, rho)
        for _ in range(1, self.local_steps):
            gradient, _ = gradients(weights)
            if not aligned:
                held = preconditioner.accumulate(held, preconditioner.statistic(gradient, gradient + dual))
            direction = preconditioner.direction(held, gradient)
            residual = direction + dual + sigma * (weights - consensus)
            weights = weights - preconditioner.solve(held, believed(residual), sigma, rho)
        # the ledger's own operations in their order, so that its dual has the same bits
        dual = dual + (weights - consensus).mul_(sigma)
        kept = {} if aligned else dict(held)
        return Update({WEIGHTS: weights} | announced, loss, {DUAL: dual} | kept)

    def _prepare(self, instruction: Instruction) -> _Common:
        """What all clients compute alike from an instruction."""
        preconditioner, arrays = self.preconditioner, instruction.arrays
        held = {name: arrays[name][None] for name in preconditioner.state_fields() if self.align_every}
        scale = preconditioner.scale(held) if self.penalty.sigma is None else None
        sigma = self.penalty.sigma_at(integer(instruction.config, ROUND), scale)
        if sigma is not None:
            sigma = sigma.to(arrays[WEIGHTS].device)
        size = None if scale is None else self.layout.norms(scale.to(arrays[WEIGHTS].device))
        return _Common(instruction, held, any(vector.any() for vector in held.values()), sigma, size)

    def _gradients(self, cohort: Cohort) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The stochastic gradient: at weights (d,) or (C, d), gradients (C, d) and losses (C,)."""
        if self.gradient != "batch":
            return lambda weights: cohort.full_gradient(weights, self.gradient)
        batches = cohort.batches(epochs=self.local_steps)
        return lambda weights: cohort.gradient(weights, next(batches))


def _measures(round_number: int, align_every: int) -> bool:
    """Whether clients send the statistic in this round (counted from 1)."""
    return align_every > 0 and (round_number - 1) % align_every == 0


def _check_alignment(align_every: int, penalty: Penalty, preconditioner: Preconditioner) -> None:
    if not align_every and penalty.sigma is None and preconditioner.state_fields():
        raise ValueError(
            "strategy.align_every=0 gives every client its own Q, for which there is no common automatic penalty:"
            " set strategy.sigma and strategy.rho by hand, or strategy.align_every=1"
        )
