"""PISA's server half: the ledger's steps, the consensus, and the clients' common Q; equations in `strategies.pisa`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from strategies.base import checks
from strategies.base.averaging import Answers, messages
from strategies.base.layout import Layout
from strategies.base.messages import (
    DUAL,
    GRADIENT,
    MEASURE,
    ROUND,
    WEIGHTS,
    RoundError,
    out_of_range,
    record,
    squared,
    tensor,
    vectors,
)
from strategies.base.server import ServerHalf
from strategies.base.threads import in_threads, one_thread
from strategies.pisa.bound import bounded
from strategies.pisa.ledger import Ledger, Observed
from strategies.pisa.penalty import Penalty
from strategies.pisa.primal_step import PrimalStep
from strategies.pisa.trim import trimmed
from strategies.pisa.wire import (
    COMMON,
    KNOWN,
    OFFSET,
    Wire,
    accumulated,
    by_gradient,
    check_alignment,
    common_of,
    difference_of,
    limited,
    measures,
    statistic_of,
    suited,
)
from strategies.preconditioners import Preconditioner


@checks.literals
class Pisa(ServerHalf):
    """Server half: the ledger's steps, the consensus, and the clients' common Q.

    Args:
        layout: Layout of the model's parameters.
        preconditioner: Q, given its layout.
        penalty: sigma and rho.
        lambda_: Weight of (lambda/2)|w|^2; the authors' federated setting: 5e-3. With an automatic penalty, in each
            tensor no more than `difference` times the greatest q so far: where gradients are small, lambda / (sigma +
            lambda) of the weights would be taken away in a round, and they would be gone before anything was learnt.
        align_every: Rounds between exchanges of the statistic; 0 leaves every client its own.
        alpha: `examples` (n_i/n, the paper) or `uniform` (1/N).
        state: Where the ledger's rows are kept: in `memory`, or on `disk` (`strategies.base.rows.zeros`).
        forget_after: Rounds without an accepted reply after which a client leaves the sums, to begin anew with its
            next; None: never.
        lag: Rounds by which the common Q is older than the gradients that it is applied to, 0 or 1.
        local_steps: As the clients'.
        wire: `primal` or `gradient`; `auto`: `gradient` where that is possible.
        consensus: `all` (the paper) or `fresh`; see `strategies.pisa.ledger`.
        bound: Sum of the shares by which all matrices may move in a round (`strategies.pisa.bound`), times the
            preconditioner's `trust` if Q is of that round; None for no bound.
        friction: Share of the duals' average that a round takes away, in [0, 1); 0 in the paper.
        difference: Weight of what a client's gradient differs by from the federation's in the step that it takes, in
            (0, 1]; 1, the paper's; None: the root of the participation, where the federation's is known.
        trim: Share of the clients that answer whose gradients are moved to the nearest others', at either end of every
            element (`strategies.pisa.trim`), in [0, 1/2]; 0 for none, the paper's; 1/2 leaves the median.
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
        lag: Literal[0, 1] = 1,
        local_steps: int = 1,
        wire: Wire = "primal",
        consensus: Literal["all", "fresh"] = "all",
        bound: float | None = None,
        friction: float = 0.0,
        trim: float = 0.0,
        difference: float | None = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        checks.not_negative("lambda_", lambda_)
        checks.whole("align_every", align_every, 0)
        checks.decay("friction", friction)
        if bound is not None:
            checks.positive("bound", bound)
        if forget_after is not None:
            checks.whole("forget_after", forget_after, 1)
        self.layout, self.preconditioner = layout, preconditioner(layout)
        self.penalty = suited(penalty, self.preconditioner)
        self.lambda_, self.align_every, self.lag = lambda_, align_every, lag
        trust = self.preconditioner.trust if align_every == 1 and lag == 0 else 1.0
        self.bound = None if bound is None else bound * trust
        self.by_gradient = by_gradient(wire, align_every, local_steps, self.preconditioner)
        check_alignment(align_every, penalty, self.preconditioner)
        self.difference = difference_of(difference, self.penalty, align_every, lag, self.preconditioner)
        checks.fraction("trim", trim)
        if trim > 0.5:
            raise ValueError(f"trim must be 0.5, which leaves the median, or less, got {trim}")
        if trim and not self.by_gradient:
            raise ValueError(
                "trim looks at gradients, which clients do not send: set wire=gradient, or trim=0"
            )
        self.forget_after, self.trim = forget_after, trim
        statistic = sum(field.size for field in self.preconditioner.statistic_fields().values())
        table = None if consensus == "all" else statistic if align_every else 0
        self.friction = friction
        self.ledger = Ledger(layout, alpha == "uniform", state == "disk", table, friction)
        self.device = device
        self._shared = self.preconditioner.nothing(device)
        always = align_every == 1 and not lag
        self._kept = self.preconditioner.memory_fields() if always else self.preconditioner.state_fields()
        self._largest = torch.zeros(len(layout.shapes))
        self._consensus = torch.empty(0)
        self._asked: tuple[dict[str, Tensor], Observed] | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the consensus, and whatever else the wire takes, to every node of the grid."""
        sent = vectors(arrays)
        self._consensus, self._asked = sent[WEIGHTS], None
        nodes, said = list(grid.get_node_ids()), dict(config) | {ROUND: server_round}
        if self.by_gradient:
            return messages(nodes, sent, said)
        if self.friction:
            sent |= {OFFSET: self.ledger.offset}
        shared = self._shared
        if self.lag == 0 and self._measures(server_round):
            first = messages(nodes, sent, said | {MEASURE: True})
            heard = Answers.of(grid.send_and_receive(first))
            if not heard.arrays:
                return []
            self._asked = self._observed(server_round, heard.arrays, heard.examples)
            shared, nodes = self._asked[0], list(heard.arrays)
            if self.difference < 1:
                sent |= {COMMON: common_of(self.preconditioner, self._asked[1].average)}
        if self.align_every:
            sent |= {name: shared[name][0].float() for name in self.preconditioner.solver_fields()}
        return messages(nodes, sent, said)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The statistic, primal and dual step of every client that answered, then the consensus."""
        heard = Answers.of(replies)
        if not heard.arrays:
            return None, None
        answers = heard.arrays
        with one_thread():
            if self.trim:
                gradients = trimmed({node: said[GRADIENT] for node, said in answers.items()}, self.trim)
                answers = {node: said | {GRADIENT: gradients[node]} for node, said in answers.items()}
            return self._aggregate(server_round, answers, heard.examples)

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
        common = None
        if observed is not None and self.difference < 1:
            common = common_of(self.preconditioner, observed.average)[None].to(self.device)
        step = PrimalStep.of_round(
            *(self.preconditioner, self.penalty, held, server_round, self.lag, self.device),
            *(common, self.difference),
        )
        sigma = following = self.penalty.sigma_at(server_round, None) if step is None else step.sigma.cpu()
        scale = None if step is None else step.scale
        if self.lag:
            scale = self.preconditioner.scale(shared)
            following = self.penalty.sigma_at(server_round + 1, scale)
            following = None if following is None else following.cpu()
        weights = self._weights(server_round, held, step, sigma, answers)
        gone = self._gone(server_round, answers)
        self.ledger.begin(server_round, weights, examples, self._consensus, sigma, following, gone, observed)
        consensus = self._consensus
        lambda_, largest = limited(
            self.lambda_, self.difference, self._largest, scale, self.penalty, self.layout
        )
        if following is not None:
            consensus = self.ledger.consensus(following, lambda_)
        if wrong := out_of_range({WEIGHTS: consensus, DUAL: self.ledger.largest_dual}):
            self.ledger.undo()
            raise RoundError(f"{wrong} of the server")
        self.ledger.commit()
        self._largest = largest
        if self.bound is not None:
            consensus = bounded(consensus, self._consensus, self.bound, self.layout)
        kept, moved = {name: shared[name] for name in self._kept}, (consensus - self._consensus)[None]
        self._shared = dict(self.preconditioner.moved(kept, moved.to(self.device)))
        metrics = MetricRecord(
            {
                "primal-residual": self.ledger.primal_residual(consensus),
                "dual-residual": self.ledger.dual_residual(consensus, lambda_),
            }
        )
        return record({WEIGHTS: consensus}), metrics

    def _measures(self, server_round: int) -> bool:
        return measures(self.preconditioner, server_round, self.align_every)

    def _observed(
        self, server_round: int, answers: Mapping[int, dict[str, Tensor]], examples: Mapping[int, int]
    ) -> tuple[dict[str, Tensor], Observed]:
        """The common state with the statistic of those who answered, and what the ledger is to keep of it."""
        fields = self.preconditioner.statistic_fields()

        def statistic(node: int) -> Tensor:
            said: Mapping[str, Tensor] = answers[node]
            if self.by_gradient:
                said = {name: row[0] for name, row in self._statistic(node, said).items()}
            return said[next(iter(fields))] if len(fields) == 1 else torch.cat([said[n] for n in fields])

        rows = dict(zip(answers, in_threads(statistic, answers), strict=True))
        observed = self.ledger.observe(rows, examples, self._gone(server_round, answers))
        with one_thread():
            return accumulated(self.preconditioner, self._shared, observed.average, self.device), observed

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
            step = common or PrimalStep.with_own(
                *(self.preconditioner, self.penalty, held, server_round),
                {name: rows.to(self.device) for name, rows in self._statistic(node, answers[node]).items()},
            )
            return self._consensus - step.solve(step.residual(gradient, dual))[0].cpu()

        weights = dict(zip(answers, in_threads(solve, answers), strict=True))
        for node, row in weights.items():
            if not float(row.abs().max()) <= squared(1).largest:
                raise RoundError(f"{WEIGHTS} of client {node}")
        return weights

    def _statistic(self, node: int, said: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a client observed, from the gradient that it sent and what its probe saw, a single row."""
        rows = {name: row[None] for name, row in said.items()}
        return statistic_of(self.preconditioner, rows[GRADIENT], self._dual(node)[None], rows)

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
        """The dual of a client that lost it, from the ledger; None for a client that has none."""
        if self.by_gradient or not self.ledger.accepted_round(client):
            return None
        known = {KNOWN: torch.ones(1)} if self.friction else {}
        return record({DUAL: self.ledger.row(client).clone()} | known)

    def begins_anew(self, client: int) -> bool:
        """Whether the ledger does not know the client, or has forgotten it."""
        return not self.ledger.accepted_round(client)

    def length(self, client: int, arrays: ArrayRecord) -> float | None:
        """Size of a client's residual g_i + pi_i, if a gradient is what it sends; None: look at its weights."""
        if GRADIENT not in arrays:
            return None
        return float(torch.linalg.vector_norm(tensor(arrays[GRADIENT]) + self._dual(client)))

    def state_dict(self) -> dict[str, Tensor]:
        """The ledger and the common Q, for a checkpoint."""
        return (
            {f"ledger.{name}": v for name, v in self.ledger.state_dict().items()}
            | {f"shared.{name}": v.cpu() for name, v in self._shared.items()}
            | {"server.largest": self._largest}
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        parts: dict[str, dict[str, Tensor]] = {"ledger": {}, "shared": {}, "server": {}}
        for name, value in state.items():
            part, _, key = name.partition(".")
            parts[part][key] = value
        self._largest = parts["server"]["largest"].clone()
        self.ledger.load_state_dict(parts["ledger"])
        self._shared = {name: v.to(self.device) for name, v in parts["shared"].items()}
