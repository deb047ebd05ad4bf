"""PISA: preconditioned inexact stochastic ADMM, and with it SISA and NSISA.

Zhou, Wang, Luo, Zhu, Li, "Preconditioned inexact stochastic ADMM for deep models", Nature Machine Intelligence
2026, doi 10.1038/s42256-026-01182-3, arXiv 2502.10784, Algorithm 1. Problem: min over w of
sum_i alpha_i F_i(w) + (lambda/2)|w|^2. A round, for every client i that takes part:

    g_i      = stochastic gradient of F_i at w                                               (client)
    w_i      = w - (sigma I + rho Q_i)^-1 (P(g_i) + pi_i)         preconditioned primal step
    pi_i    += sigma (w_i - w)                                    dual step
    w        = sum_i alpha_i (sigma w_i + pi_i) / (sigma + lambda)        consensus          (server)

The server's ledger knows pi_i of every client, which stays in the sum while the client is absent, unless
`forget_after` takes it out: who comes back then begins anew, from pi_i = 0. With consensus `fresh` the sum of w_i is
over those who answered, and everybody's last gradient is kept as well (`strategies.ledger`). `preconditioner` decides
the method: `Kronecker` is the project's default, `Identity` PISA without preconditioning, `SecondMoment` SISA,
`NewtonSchulz` and `Spectral` NSISA. sigma and rho come from `penalty`.

Who takes the two steps is a matter of the wire, not of the path. `gradient`: clients send g_i alone, keep nothing, and
the ledger steps for them; with `compression` they send it in fewer bytes, and keep what that leaves out for their next
(`strategies.compression`). `primal`: they take the steps themselves, send w_i, and keep a replica of their dual; that
is needed for more than one local step, or a Q of their own.

Departures from the paper, all an override away from its form (docs/algorithm.md derives them):

*Alignment.* Every `align_every` rounds the statistic that Q is built from is averaged (weights alpha_i), and everybody
has the same Q; `align_every: 0` keeps each client's own. With `lag` 0 it is Q of this round's gradients, for which
the wire `primal` asks twice a round, first for the statistic; with `lag` 1 that of the rounds before: then the
first round only measures, w_i = w and pi_i = 0, if the penalty is automatic.
*Local steps.* `local_steps` K > 1 goes on with the subproblem before the dual step,
w_i -= (sigma I + rho Q)^-1 (P(g_i(w_i)) + pi_i + sigma (w_i - w)), K times in all from w_i = w.
*A bound.* No tensor of the consensus moves by more than `bound` of its size in a round (`strategies.bound`).

Symbols: w `consensus`, w_i `weights`, pi_i `dual`, g_i `gradient`, g_i + pi_i `residual`, lambda `lambda_`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from strategies import checks
from strategies.bound import bounded
from strategies.client import ClientHalf, Cohort, Instruction, Update
from strategies.compression import ERROR, Compression, chosen, with_feedback
from strategies.layout import Layout
from strategies.ledger import Ledger, Observed
from strategies.messages import (
    ACCEPTED,
    ARRAYS,
    CONFIG,
    EXAMPLES,
    GRADIENT,
    MEASURE,
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
    tensor,
    vectors,
)
from strategies.penalty import Penalty
from strategies.preconditioners import Preconditioner
from strategies.primal_step import PrimalStep
from strategies.threads import in_threads, one_thread

DUAL = "dual"

Wire = Literal["auto", "primal", "gradient"]


class Pisa(Strategy):
    """Server half: the ledger's steps, the consensus, and the clients' common Q.

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
        lag: Rounds by which the common Q is older than the gradients that it is applied to, 0 or 1.
        local_steps: As the clients'.
        wire: `primal` or `gradient`; `auto`: `gradient` where that is possible.
        consensus: `all` (the paper) or `fresh`; see `strategies.ledger`.
        bound: Share of its size by which a tensor may move in a round; None for no bound.
        compression: How gradients are sent: `none`, as they are, or in fewer bytes as `bfloat16`, `int8` or `topk`.
        keep: Share of the elements that `topk` sends.
        device: Where Q is kept and solved with; the ledger's rows stay in the CPU's memory.

    Raises:
        ValueError: A value is outside its range, the automatic penalty is asked for without alignment, or the wire
            cannot do it.
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
        lag: int = 1,
        local_steps: int = 1,
        wire: Wire = "primal",
        consensus: Literal["all", "fresh"] = "all",
        bound: float | None = None,
        compression: str = "none",
        keep: float = 0.1,
        device: torch.device | str = "cpu",
    ) -> None:
        checks.not_negative("lambda", lambda_)
        checks.whole("align_every", align_every, 0)
        _check_lag(lag)
        checks.one_of("alpha", alpha, ("examples", "uniform"))
        checks.one_of("consensus", consensus, ("all", "fresh"))
        checks.one_of("state", state, ("memory", "disk"))
        if bound is not None:
            checks.positive("bound", bound)
        if forget_after is not None:
            checks.whole("forget_after", forget_after, 1)
        self.layout, self.preconditioner, self.penalty = layout, preconditioner(layout), penalty
        self.lambda_, self.align_every, self.lag, self.bound = lambda_, align_every, lag, bound
        self.by_gradient = _by_gradient(wire, align_every, local_steps, self.preconditioner)
        self.compression = chosen(compression, keep, layout, self.by_gradient)
        _check_alignment(align_every, penalty, self.preconditioner)
        self.forget_after = forget_after
        statistic = sum(field.size for field in self.preconditioner.statistic_fields().values())
        table = None if consensus == "all" else statistic if align_every else 0
        self.ledger = Ledger(layout, alpha == "uniform", state == "disk", table)
        self.device = device
        self._shared = self.preconditioner.nothing(device)
        self._consensus = torch.empty(0)
        self._asked: tuple[dict[str, Tensor], Observed] | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the consensus, and whatever else the wire takes, to every node of the grid."""
        sent = vectors(arrays)
        self._consensus, self._asked = sent[WEIGHTS], None
        nodes, said = list(grid.get_node_ids()), dict(config) | {ROUND: server_round}
        if self.compression:
            return self._messages(nodes, record(sent), said)
        if self.by_gradient:
            content = RecordDict({ARRAYS: record(sent), CONFIG: ConfigRecord(said)})
            return [Message(content, message_type=MessageType.TRAIN, dst_node_id=node) for node in nodes]
        shared = self._shared
        if self.lag == 0 and self._measures(server_round):
            first = self._messages(nodes, record(sent), said | {MEASURE: True})
            answers, examples = self._answers(grid.send_and_receive(first))
            if not answers:
                return []
            self._asked = self._observed(server_round, answers, examples)
            shared, nodes = self._asked[0], list(answers)
        if self.align_every:
            sent |= {name: shared[name][0].float() for name in self.preconditioner.solver_fields()}
        return self._messages(nodes, record(sent), said)

    def _messages(self, nodes: Iterable[int], arrays: ArrayRecord, said: Mapping[str, Any]) -> list[Message]:
        """The same for all nodes but for the round that the ledger last accepted from each."""
        contents: dict[int, RecordDict] = {}
        messages = []
        for node in nodes:
            accepted = self.ledger.accepted_round(node)
            if accepted not in contents:
                config = ConfigRecord(dict(said) | {ACCEPTED: accepted})
                contents[accepted] = RecordDict({ARRAYS: arrays, CONFIG: config})
            messages.append(Message(contents[accepted], message_type=MessageType.TRAIN, dst_node_id=node))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The statistic, primal and dual step of every client that answered, then the consensus."""
        answers, examples = self._answers(replies)
        if not answers:
            return None, None
        with one_thread():
            return self._aggregate(server_round, answers, examples)

    def _aggregate(
        self, server_round: int, answers: Mapping[int, dict[str, Tensor]], examples: Mapping[int, int]
    ) -> tuple[ArrayRecord, MetricRecord]:
        shared, observed = self._shared, None
        if self._asked is not None:
            shared, observed = self._asked
        elif self._measures(server_round):
            shared, observed = self._observed(server_round, answers, examples)
        if wrong := out_of_range(shared):
            raise RoundError(f"{wrong} of the server")
        held = shared if self.lag == 0 else self._shared
        step = PrimalStep.of_round(
            self.preconditioner, self.penalty, held, server_round, self.lag, self.device
        )
        sigma = following = self.penalty.sigma_at(server_round, None) if step is None else step.sigma.cpu()
        if self.lag:
            following = self.penalty.sigma_at(server_round + 1, self.preconditioner.scale(shared))
            following = None if following is None else following.cpu()
        weights = self._weights(server_round, held, step, sigma, answers)
        gone = self._gone(server_round, answers)
        self.ledger.begin(server_round, weights, examples, self._consensus, sigma, following, gone, observed)
        consensus = self._consensus
        if following is not None:
            consensus = self.ledger.consensus(following, self.lambda_)
        if wrong := out_of_range({WEIGHTS: consensus, DUAL: self.ledger.largest_dual}):
            self.ledger.undo()
            raise RoundError(f"{wrong} of the server")
        self.ledger.commit()
        self._shared = shared
        if self.bound is not None:
            consensus = bounded(consensus, self._consensus, self.bound, self.layout)
        metrics = MetricRecord(
            {
                "primal-residual": self.ledger.primal_residual(consensus),
                "dual-residual": self.ledger.dual_residual(consensus, self.lambda_),
            }
        )
        return record({WEIGHTS: consensus}), metrics

    def _answers(self, replies: Iterable[Message]) -> tuple[dict[int, dict[str, Tensor]], dict[int, int]]:
        """Arrays and examples of those who answered, in the order of their numbers."""
        answers, examples = {}, {}
        for reply in sorted(replies, key=lambda r: r.metadata.src_node_id):
            node = reply.metadata.src_node_id
            if not reply.has_error():
                answers[node] = _read(arrays_of(reply.content), self.compression)
                examples[node] = integer(metrics_of(reply.content), EXAMPLES)
        return answers, examples

    def _measures(self, server_round: int) -> bool:
        return _measures(self.preconditioner, server_round, self.align_every)

    def _observed(
        self, server_round: int, answers: Mapping[int, dict[str, Tensor]], examples: Mapping[int, int]
    ) -> tuple[dict[str, Tensor], Observed]:
        """The common state with the statistic of those who answered, and what the ledger is to keep of it."""
        fields = self.preconditioner.statistic_fields()

        def statistic(node: int) -> Tensor:
            said: Mapping[str, Tensor] = answers[node]
            if self.by_gradient:
                gradient = said[GRADIENT]
                made = self.preconditioner.statistic(gradient[None], (gradient + self._dual(node))[None])
                said = {name: row[0] for name, row in made.items()}
            return said[next(iter(fields))] if len(fields) == 1 else torch.cat([said[n] for n in fields])

        rows = dict(zip(answers, in_threads(statistic, answers), strict=True))
        observed = self.ledger.observe(rows, examples, self._gone(server_round, answers))
        sizes = [field.size for field in fields.values()]
        parts = [
            part.clamp(min=field.minimum).to(self.device)  # a sum with rows taken out may be less by rounding
            for part, field in zip(observed.average[None].split(sizes, dim=-1), fields.values(), strict=True)
        ]
        with one_thread():
            return self.preconditioner.accumulate(
                self._shared, dict(zip(fields, parts, strict=True))
            ), observed

    def _weights(
        self,
        server_round: int,
        held: Mapping[str, Tensor],
        common: PrimalStep | None,
        sigma: Tensor | None,
        answers: Mapping[int, Mapping[str, Tensor]],
    ) -> dict[int, Tensor]:
        """The primal of every client that answered: as it sent it, or as it follows from its gradient."""
        if not self.by_gradient:
            return {node: arrays[WEIGHTS] for node, arrays in answers.items()}
        if sigma is None:
            return dict.fromkeys(answers, self._consensus)

        def solve(node: int) -> Tensor:
            gradient = answers[node][GRADIENT][None].to(self.device)
            dual = self._dual(node)[None].to(self.device)
            step = common or _own_step(self.preconditioner, self.penalty, held, server_round, gradient, dual)
            return self._consensus - step.solve(step.residual(gradient, dual))[0].cpu()

        weights = dict(zip(answers, in_threads(solve, answers), strict=True))
        for node, row in weights.items():
            if not float(row.abs().max()) <= squared(1).largest:
                raise RoundError(f"{WEIGHTS} of client {node}")
        return weights

    def _dual(self, node: int) -> Tensor:
        """A client's dual; zero before its first accepted reply."""
        return self.ledger.dual(node) if self.ledger.accepted_round(node) else torch.zeros(self.layout.size)

    def _gone(self, server_round: int, answers: Collection[int]) -> list[int]:
        """Clients that have not answered for so long that they are forgotten."""
        if self.forget_after is None:
            return []
        last = server_round - self.forget_after
        known = self.ledger.clients
        return [c for c in known if c not in answers and self.ledger.accepted_round(c) <= last]

    def supply(self, client: int) -> ArrayRecord | None:
        """The dual of a client that lost it, from the ledger; None for a client that has none.

        What compression left out only the client knew: it goes on from zero.
        """
        if not self.ledger.accepted_round(client):
            return None
        if self.compression:
            return record({ERROR: torch.zeros(self.layout.size)})
        return record({DUAL: self.ledger.dual(client).clone()})

    def length(self, client: int, arrays: ArrayRecord) -> float | None:
        """Size of a client's residual g_i + pi_i, if a gradient is what it sends; None: look at its weights."""
        if GRADIENT not in arrays:
            return None
        gradient = _read(arrays, self.compression)[GRADIENT]
        return float(torch.linalg.vector_norm(gradient + self._dual(client)))

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
            f"shared.{name}": v.cpu() for name, v in self._shared.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        parts: dict[str, dict[str, Tensor]] = {"ledger": {}, "shared": {}}
        for name, value in state.items():
            part, _, key = name.partition(".")
            parts[part][key] = value
        self.ledger.load_state_dict(parts["ledger"])
        self._shared = {name: v.to(self.device) for name, v in parts["shared"].items()}


@dataclass(frozen=True)
class _Common:
    """What clients have in common in a round.

    Attributes:
        instruction: What it was made of.
        step: The step with the common Q and penalty; None without a common Q, or if nothing was observed of it yet.
    """

    instruction: Instruction
    step: PrimalStep | None


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
        compression: As the server's.
        keep: As the server's.

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
        lag: int = 1,
        wire: Wire = "primal",
        compression: str = "none",
        keep: float = 0.1,
    ) -> None:
        checks.whole("local_steps", local_steps, 1)
        checks.whole("align_every", align_every, 0)
        checks.one_of("gradient", gradient, ("mean", "sum", "batch"))
        _check_lag(lag)
        self.layout, self.preconditioner, self.penalty = layout, preconditioner(layout), penalty
        self.align_every, self.local_steps, self.gradient, self.lag = align_every, local_steps, gradient, lag
        self.by_gradient = _by_gradient(wire, align_every, local_steps, self.preconditioner)
        self.compression = chosen(compression, keep, layout, self.by_gradient)
        self._common: _Common | None = None
        _check_alignment(align_every, penalty, self.preconditioner)

    def state_sizes(self) -> dict[str, int]:
        """The dual and, unaligned, the client's own Q; if it only sends gradients, what was left out of them."""
        if self.by_gradient:
            return {ERROR: self.layout.size} if self.compression else {}
        own = {} if self.align_every else self.preconditioner.state_fields()
        return {DUAL: self.layout.size} | {name: field.size for name, field in own.items()}

    def instruction_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The weights and, aligned, what it takes of the common Q to solve with it."""
        own = self.by_gradient or config.get(MEASURE) or not self.align_every
        return super().instruction_fields(config) | ({} if own else self.preconditioner.solver_fields())

    def reply_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The gradient; or the weights, of which the dual is made, and the statistic in rounds that measure."""
        if self.by_gradient:
            return self.compression.fields() if self.compression else {GRADIENT: squared(self.layout.size)}
        if config.get(MEASURE):
            return self.preconditioner.statistic_fields()
        fields = {WEIGHTS: squared(self.layout.size)}
        if self.lag and self._measures(config):
            fields |= self.preconditioner.statistic_fields()
        return fields

    def solve(self, cohort: Cohort, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """The gradient, or K local steps and the dual step; see the module's equations."""
        consensus, config = instruction.arrays[WEIGHTS], instruction.config
        gradients = self._gradients(cohort)
        gradient, loss = gradients(consensus)
        if self.compression:
            sent, error = with_feedback(self.compression, gradient, state[ERROR])
            return Update(sent, loss, {ERROR: error})
        if self.by_gradient:
            return Update({GRADIENT: gradient}, loss)
        dual = state[DUAL]
        statistic = self.preconditioner.statistic(gradient, gradient + dual)
        if config.get(MEASURE):
            return Update(statistic, loss, {DUAL: dual})
        if self._common is None or self._common.instruction is not instruction:
            self._common = self._prepare(instruction)
        step = self._common.step
        measured = self.lag and self._measures(config)
        announced = statistic if measured else {}
        if step is None and self.penalty.sigma is None:
            weights = consensus.repeat(len(cohort.clients), 1)
            return Update({WEIGHTS: weights} | announced, loss, {DUAL: dual})
        if step is None:  # everyone's own Q begins with the gradient at hand, and so does a common one
            held = self.preconditioner.nothing(consensus.device) if self.align_every else state
            step = self._own_step(config, held, gradient, dual)
        weights = consensus - step.solve(step.residual(gradient, dual))
        for _ in range(1, self.local_steps):
            gradient, _ = gradients(weights)
            if not self.align_every:
                step = self._own_step(config, step.held, gradient, dual)
            residual = step.residual(gradient, dual) + step.sigma * (weights - consensus)
            weights = weights - step.solve(residual)
        # the ledger's own operations in their order, so that its dual has the same bits
        dual = dual + (weights - consensus).mul_(step.sigma)
        kept = {} if self.align_every else dict(step.held)
        return Update({WEIGHTS: weights} | announced, loss, {DUAL: dual} | kept)

    def _prepare(self, instruction: Instruction) -> _Common:
        """What all clients compute alike from an instruction."""
        arrays = instruction.arrays
        if not self.align_every and self.preconditioner.state_fields():
            return _Common(instruction, None)
        held = {name: arrays[name][None] for name in self.preconditioner.solver_fields() if self.align_every}
        round_number = integer(instruction.config, ROUND)
        with one_thread():
            step = PrimalStep.of_round(
                *(self.preconditioner, self.penalty, held, round_number, self.lag), arrays[WEIGHTS].device
            )
        return _Common(instruction, step)

    def _own_step(
        self, config: Mapping[str, Any], held: Mapping[str, Tensor], gradient: Tensor, dual: Tensor
    ) -> PrimalStep:
        return _own_step(self.preconditioner, self.penalty, held, integer(config, ROUND), gradient, dual)

    def _measures(self, config: Mapping[str, Any]) -> bool:
        return _measures(self.preconditioner, integer(config, ROUND), self.align_every)

    def _gradients(self, cohort: Cohort) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The stochastic gradient: at weights (d,) or (C, d), gradients (C, d) and losses (C,)."""
        if self.gradient != "batch":
            return lambda weights: cohort.full_gradient(weights, self.gradient)
        batches = cohort.batches(epochs=self.local_steps)
        return lambda weights: cohort.gradient(weights, next(batches))


def _own_step(
    preconditioner: Preconditioner,
    penalty: Penalty,
    held: Mapping[str, Tensor],
    round_number: int,
    gradient: Tensor,
    dual: Tensor,
) -> PrimalStep:
    """The step with a Q that no others share, once it has taken the gradient in; its penalty is by hand."""
    statistic = preconditioner.statistic(gradient, gradient + dual)
    step = PrimalStep.of_round(
        preconditioner, penalty, preconditioner.accumulate(held, statistic), round_number, 0
    )
    assert step is not None
    return step


def _read(arrays: ArrayRecord, compression: Compression | None) -> dict[str, Tensor]:
    """The vectors of a reply."""
    if compression is None:
        return vectors(arrays)
    return {GRADIENT: compression.decode({name: tensor(array) for name, array in arrays.items()})}


def _measures(preconditioner: Preconditioner, round_number: int, align_every: int) -> bool:
    """Whether a common Q learns from this round (counted from 1)."""
    return (
        align_every > 0 and (round_number - 1) % align_every == 0 and bool(preconditioner.statistic_fields())
    )


def _by_gradient(wire: Wire, align_every: int, local_steps: int, preconditioner: Preconditioner) -> bool:
    """Whether clients send gradients.

    Raises:
        ValueError: They are to, and that is impossible.
    """
    checks.one_of("wire", wire, ("auto", "primal", "gradient"))
    common = align_every > 0 or not preconditioner.state_fields()
    if wire == "gradient" and (local_steps > 1 or not common):
        raise ValueError(
            "strategy.wire=gradient needs one local step and a common Q: set strategy.wire=primal, or"
            f" strategy.{'local_steps=1' if local_steps > 1 else 'align_every=1'}"
        )
    return wire != "primal" and local_steps == 1 and common


def _check_lag(lag: int) -> None:
    checks.whole("lag", lag, 0)
    if lag > 1:
        raise ValueError(f"strategy.lag must be 0 or 1, got {lag}")


def _check_alignment(align_every: int, penalty: Penalty, preconditioner: Preconditioner) -> None:
    if not align_every and penalty.sigma is None and preconditioner.state_fields():
        raise ValueError(
            "strategy.align_every=0 gives every client its own Q, for which there is no common automatic penalty:"
            " set strategy.sigma and strategy.rho by hand, or strategy.align_every=1"
        )
