"""PISA whose rows stay with the clients: the server half needs of a round sums over those who answered alone.

Everybody takes the same step C = (sigma I + rho Q)^-1, which is linear; so the duals' sum follows from the residuals':

    R   = sum_present n_i (g_i + pi_i) / A,     A = sum_present n_i             the clients' mean, in one vector
    S  += sum_present n_i (s_i - what client i had last added of its statistic)             and in another
    Q   = of S / sum n_i, as ever (`strategies.preconditioners`)
    D  -= A sigma C R                                             D = sum_i n_i pi_i over all that ever answered
    w   = (sigma (w - C R) + D / sum n_i) / (sigma + lambda)                            the consensus `fresh`

With friction as in `strategies.pisa.ledger`. Where a client's difference from the federation's gradient h, which is in
S, weighs delta < 1, it is delta g_i that is summed, and (1 - delta) h is added to R. It is the path of `Pisa` with one
local step, `consensus: fresh`, `lag: 0` and the wire `gradient`, but for rounding, whoever drops out. A client keeps
its dual, its last residual and its last statistic; the step that its dual is still to take, that of the round in which
it was last in a sum, is sent to it with its next instruction. So the server keeps the common Q of every round that is
some client's last.

What nobody has is the dual of a client that lost it. D would hold it for ever, as a pull that no data have: so all
duals begin anew then, from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from strategies.base import checks
from strategies.base.averaging import messages
from strategies.base.layout import Layout
from strategies.base.messages import (
    DUAL,
    ROUND,
    WEIGHTS,
    RoundError,
    arrays_of,
    members,
    out_of_range,
    record,
    vectors,
)
from strategies.base.server import ServerHalf
from strategies.pisa.bound import bounded
from strategies.pisa.penalty import Penalty
from strategies.pisa.primal_step import PrimalStep
from strategies.pisa.wire import (
    COMMON,
    OFFSET,
    RESIDUAL,
    STEPPED,
    accumulated,
    added,
    check_alignment,
    check_linear,
    common_of,
    difference_of,
    limited,
    measures,
    suited,
)
from strategies.preconditioners import Preconditioner

State = dict[str, Tensor]


@checks.literals
class PisaSummed(ServerHalf):
    """Server half: sums over all clients, the consensus, and the common Q.

    Args:
        layout: Layout of the model's parameters.
        preconditioner: Q, given its layout.
        penalty: sigma and rho.
        lambda_: As for `Pisa`.
        align_every: Rounds between exchanges of the statistic.
        bound: As for `Pisa`.
        friction: As for `Pisa`.
        difference: As for `Pisa`.
        device: Where Q is kept and solved with.

    Raises:
        ValueError: A value is outside its range, or clients' steps do not add up.
    """

    takes_sums = True
    needs_sums = True

    def __init__(
        self,
        layout: Layout,
        preconditioner: Callable[[Layout], Preconditioner],
        penalty: Penalty,
        lambda_: float,
        align_every: int,
        bound: float | None = None,
        friction: float = 0.0,
        difference: float | None = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        checks.not_negative("lambda_", lambda_)
        checks.whole("align_every", align_every, 0)
        checks.decay("friction", friction)
        if bound is not None:
            checks.positive("bound", bound)
        self.layout, self.preconditioner = layout, preconditioner(layout)
        self.penalty = suited(penalty, self.preconditioner)
        check_alignment(align_every, penalty, self.preconditioner)
        check_linear(self.preconditioner, align_every)
        self.difference = difference_of(difference, self.penalty, align_every, 0, self.preconditioner)
        self.lambda_, self.align_every, self.friction = lambda_, align_every, friction
        self.bound = bound
        self.device = device
        self._shared: State = self.preconditioner.nothing(device)
        self._kept = (
            self.preconditioner.memory_fields() if align_every == 1 else self.preconditioner.state_fields()
        )
        self._largest = torch.zeros(len(layout.shapes))
        self.offset = torch.zeros(layout.size)
        self._consensus = torch.empty(0)
        self._begin()

    def _begin(self) -> None:
        """Know of no client."""
        statistic = sum(field.size for field in self.preconditioner.statistic_fields().values())
        self._rounds: dict[int, int] = {}  # client -> round in which it was last in a sum
        self._examples: dict[int, int] = {}
        self._tabled: dict[int, int] = {}
        # round -> what its steps were taken with: the common Q, and (1 - delta) h
        self._held: dict[int, State] = {}
        self._dual = torch.zeros(self.layout.size, dtype=torch.float64)
        self._table = torch.zeros(statistic, dtype=torch.float64)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the consensus, and to each client the step that its dual is still to take."""
        sent = vectors(arrays)
        self._consensus = sent[WEIGHTS]
        if self.friction:
            sent |= {OFFSET: self.offset}
        groups: dict[int, list[int]] = {}
        for node in grid.get_node_ids():
            groups.setdefault(self._rounds.get(node, 0), []).append(node)
        said = dict(config) | {ROUND: server_round}
        return [
            message
            for stepped, nodes in groups.items()
            for message in messages(nodes, sent | self._held.get(stepped, {}), said | {STEPPED: stepped})
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The sums after a round, Q, and the consensus."""
        heard = [reply for reply in replies if not reply.has_error()]
        if not heard:
            return None, None
        (reply,) = heard
        said, present = vectors(arrays_of(reply.content)), members(reply.content)
        shared, table, tabled = self._observed(server_round, said, present)
        residual, common = said[RESIDUAL], State()
        if self.difference < 1:
            h = common_of(self.preconditioner, self._average(table, tabled))
            common = {COMMON: h * (1 - self.difference)}
            residual = residual + common[COMMON]
        step = PrimalStep.of_round(self.preconditioner, self.penalty, shared, server_round, 0, self.device)
        sigma = self.penalty.sigma_at(server_round, None) if step is None else step.sigma.cpu()
        examples = self._examples | present
        total, gap, dual = sum(examples.values()), torch.zeros(self.layout.size), self._dual
        if step is not None:
            gap = -step.solve(residual[None].to(self.device))[0].cpu()
            dual = dual + sum(present.values()) * (gap * step.sigma.cpu()).double()
        offset = self.offset
        if self.friction:
            offset = offset - (dual * (self.friction / total)).float()
            dual = dual - total * (self.offset.double() - offset)
        scale = None if step is None else step.scale
        lambda_, largest = limited(
            self.lambda_, self.difference, self._largest, scale, self.penalty, self.layout
        )
        consensus = self._consensus
        if sigma is not None:
            primal = consensus.double() + gap
            consensus = ((sigma.double() * primal + dual / total) / (sigma.double() + lambda_)).float()
        if wrong := out_of_range({WEIGHTS: consensus, DUAL: dual / total}):
            raise RoundError(f"{wrong} of the server")
        if self.bound is not None:
            consensus = bounded(consensus, self._consensus, self.bound, self.layout)
        self._dual, self._table, self._tabled, self._examples = dual, table, tabled, examples
        self.offset, self._largest = offset, largest
        self._remember(server_round, shared, common, present)
        moved = (consensus - self._consensus)[None].to(self.device)
        self._shared = dict(self.preconditioner.moved({name: shared[name] for name in self._kept}, moved))
        dual_residual = float((dual / total - lambda_ * consensus).norm())
        return record({WEIGHTS: consensus}), MetricRecord({"dual-residual": dual_residual})

    def _observed(
        self, server_round: int, said: Mapping[str, Tensor], present: dict[int, int]
    ) -> tuple[State, Tensor, dict[int, int]]:
        """The common state, the statistics' sum and who is in it, after a round."""
        if not measures(self.preconditioner, server_round, self.align_every):
            return self._shared, self._table, self._tabled
        new = torch.cat([said[added(name)] for name in self.preconditioner.statistic_fields()]).double()
        table, tabled = self._table + sum(present.values()) * new, self._tabled | present
        average = self._average(table, tabled)
        shared = accumulated(self.preconditioner, self._shared, average, self.device)
        if wrong := out_of_range(shared):
            raise RoundError(f"{wrong} of the server")
        return shared, table, tabled

    @staticmethod
    def _average(table: Tensor, tabled: Mapping[int, int]) -> Tensor:
        return (table / sum(tabled.values())).float()

    def _remember(self, server_round: int, shared: State, common: State, present: Iterable[int]) -> None:
        """Keep what the duals of those who answered are to step with, and no more of what nobody's is."""
        solver = self.preconditioner.solver_fields()
        self._rounds = self._rounds | dict.fromkeys(present, server_round)
        own = {name: shared[name][0].float().cpu() for name in solver}
        held = self._held | {server_round: own | common}
        needed = set(self._rounds.values())
        self._held = {number: own for number, own in held.items() if number in needed}

    def begins_anew(self, client: int) -> bool:
        """Whether the client is in no sum."""
        return client not in self._rounds

    def lost(self, client: int) -> None:
        """A dual is lost, which the sum still holds: all begin anew."""
        self._begin()

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, who is in them, and the common Q, for a checkpoint."""
        clients = list(self._rounds)
        numbers = {
            "clients": clients,
            "rounds": [self._rounds[client] for client in clients],
            "examples": [self._examples[client] for client in clients],
            "tabled": [self._tabled.get(client, 0) for client in clients],
        }
        held = {
            f"held.{number}.{name}": row for number, own in self._held.items() for name, row in own.items()
        }
        return (
            {f"sums.{name}": torch.tensor(values, dtype=torch.int64) for name, values in numbers.items()}
            | {"sums.dual": self._dual, "sums.table": self._table}
            | {"sums.offset": self.offset, "sums.largest": self._largest}
            | {f"shared.{name}": value.cpu().clone() for name, value in self._shared.items()}
            | held
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self._begin()
        clients = state["sums.clients"].tolist()
        self._rounds = dict(zip(clients, state["sums.rounds"].tolist(), strict=True))
        self._examples = dict(zip(clients, state["sums.examples"].tolist(), strict=True))
        tabled = zip(clients, state["sums.tabled"].tolist(), strict=True)
        self._tabled = {client: count for client, count in tabled if count}
        self._dual, self._table = state["sums.dual"].clone(), state["sums.table"].clone()
        self.offset, self._largest = state["sums.offset"].clone(), state["sums.largest"].clone()
        shared = {name.removeprefix("shared."): v for name, v in state.items() if name.startswith("shared.")}
        self._shared = {name: value.to(self.device) for name, value in shared.items()}
        self._held = {number: {} for number in self._rounds.values()}
        for name, value in state.items():
            if name.startswith("held."):
                _, number, key = name.split(".", 2)
                self._held[int(number)][key] = value.clone()
