"""The gateway: every message between a server half and its clients passes here.

What every strategy needs, and therefore none should do itself: the clients of a round are drawn by client number
from the run's seed; replies are checked before the strategy sees them, and refused if they are not what was asked for,
and asked for now, or if their update is out of all proportion to the others'; what was done to an update on its way is
undone; replies are put in the order of the clients, so that sums do not depend on who answered first; every client that
remembers something is told which of its replies was accepted last, one that lost it is supplied by the strategy, or
begins anew, and is asked again; payload, examples and failures are counted; and a model's running statistics
(BatchNorm), which are no optimisation variables, are sent along and averaged by examples.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from torch import Tensor

from pisa_fl.clients.host import CLIENT_FAILED, printable
from pisa_fl.engines.base import ClientGrid, TurnedAway
from pisa_fl.engines.host_sum import HostSum
from pisa_fl.metric import Metric
from pisa_fl.randomness import numpy_generator
from pisa_fl.secure.summing import SecAgg, SumError
from pisa_fl.server.sums import HostRound, SecureRound, SummedRound, carried
from pisa_fl.system.text import listed
from strategies.base.client import ClientHalf
from strategies.base.messages import (
    ACCEPTED,
    ARRAYS,
    BUFFERS,
    CONFIG,
    DIFFERENTIATED,
    EXAMPLES,
    LARGEST,
    LOSS,
    MEASURE,
    METRICS,
    ROUND,
    STATE,
    STATE_LOST,
    WEIGHTS,
    Field,
    TensorArray,
    arrays_of,
    averaged,
    config_of,
    integer,
    members,
    metrics_of,
    payload,
    problem,
    real,
    record,
    tensor,
    vectors,
)
from strategies.base.server import ServerHalf

log = logging.getLogger(__name__)

REFUSED = 1002
"""Code of the error that takes the place of a reply that was refused."""

COMPARED = 5
"""Replies that it takes to tell what is usual."""

_ANSWERS = (CLIENT_FAILED, STATE_LOST)


@dataclass(frozen=True)
class Failure:
    """Why a reply was not accepted, or a client not admitted.

    Attributes:
        client: Client number; None for a client that was turned away before it said a number, or for all of a sum.
        reason: One line.
        traceback: Of the client's own code; empty if there is none, or if it was reported before.
    """

    client: int | None
    reason: str
    traceback: str = ""

    def __str__(self) -> str:
        return f"{'a client' if self.client is None else f'client {self.client}'}: {self.reason}"


@dataclass
class Traffic:
    """What has passed so far, and what passed in the present round.

    Attributes:
        bytes_up: Array bytes that clients sent, cumulative.
        bytes_down: Array bytes sent to clients, cumulative.
        differentiated: Examples differentiated by accepted clients, cumulative.
        clients_ok: Clients accepted in this round.
        clients_failed: Clients refused, in error or silent in this round.
        examples: Examples of the clients accepted in this round.
        loss_sum: Sum of their training losses, each times its examples.
        silent: Clients that did not answer; they might another time, while one that answered would do so again.
        clients_reachable: Clients that could be reached when the round began.
        clients_turned_away: Those that wanted to take part then and were not admitted.
        usual_length: Of an update: the greatest median of a round so far.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    differentiated: int = 0
    clients_ok: int = 0
    clients_failed: int = 0
    examples: int = 0
    loss_sum: float = 0.0
    silent: int = 0
    clients_reachable: int = 0
    clients_turned_away: int = 0
    usual_length: float = 0.0


class Gateway(Grid):
    """A grid around an engine's.

    Args:
        grid: The engine's grid.
        half: The client half, which knows what a reply must hold.
        buffers: The model's running statistics, (b,), empty for a model without.
        seed: Seed of the run.
        participation: Share of the clients that takes part in a round, in (0, 1].
        server: The server half, which knows what clients that lost their state are to go on from.
        max_update: How many times as long as the greatest median of a round so far an update |w_i - w| may be, with
            `COMPARED` replies or more; None: as long as it likes.
        timeout: Seconds that an exchange waits for replies if it does not say; None: without end.
        chances: From a round to a number from [0, 1) for each client, which takes part if that is below
            `participation`; None: a fixed share of the clients is drawn.
        secure: How the server half is given sums in place of clients' updates; None: it is given those.
        measures: What clients tell of an evaluation, beside how many examples it had.

    Attributes:
        failures: Of the present round.
        turned_away: All who were, so far.
        accepted: Client number -> round of its last reply that was accepted, for clients that remember something.

    Raises:
        ValueError: max_update is impossible.
    """

    def __init__(
        self,
        grid: ClientGrid,
        half: ClientHalf,
        buffers: Tensor,
        seed: int,
        participation: float,
        server: ServerHalf | None = None,
        max_update: float | None = None,
        timeout: float | None = None,
        chances: Callable[[int], Tensor] | None = None,
        secure: SecAgg | None = None,
        measures: Sequence[Metric] = (),
    ) -> None:
        number = isinstance(max_update, int | float) and not isinstance(max_update, bool)
        if max_update is not None and not (number and 1 < max_update <= LARGEST):
            raise ValueError(f"max_update must be a number above 1, or null, got {max_update}")
        self._max_update = max_update
        self.traffic = Traffic()
        self.failures: list[Failure] = []
        self.turned_away: list[TurnedAway] = []
        self.buffers = buffers
        self._grid, self._half, self._server, self._timeout = grid, half, server, timeout
        self.accepted: dict[int, int] = {}
        self._remembers = bool(half.kept_sizes())
        self._answered: list[int] = []
        self._seed, self._participation, self._chances = seed, participation, chances
        self._chance = torch.empty(0, dtype=torch.float64)
        self._secure, self._measures = secure, measures
        self._round = 0
        self._before = (buffers, self.traffic)
        self._nodes: list[int] = []
        self._tracebacks: set[int] = set()
        self._asked: dict[
            int, dict[str, Field]
        ] = {}  # what is expected in answer to a content, by its identity

    def begin(self, round_number: int) -> None:
        """Start a round: other clients are drawn, the round's counters are cleared."""
        self._round = round_number
        if self._chances is not None:
            self._chance = self._chances(round_number)
        self._before = (self.buffers, replace(self.traffic))
        self.failures = []
        self._clear()

    def begin_again(self) -> None:
        """Start the round once more; of what it gave, only the bytes that passed and the failures are kept."""
        self.buffers = self._before[0]
        self.traffic.differentiated = self._before[1].differentiated
        self.traffic.usual_length = self._before[1].usual_length
        self._clear()

    def commit(self) -> None:
        """The round's replies have been taken in: what those clients remember of it counts from now on."""
        if self._remembers:
            self.accepted |= dict.fromkeys(self._answered, self._round)
        self._answered = []

    def undo(self) -> None:
        """Go back to where the round began; its failures are kept."""
        self._answered = []
        self.buffers, self.traffic = self._before

    def _clear(self) -> None:
        self.traffic.clients_ok = self.traffic.clients_failed = self.traffic.silent = 0
        self.traffic.examples, self.traffic.loss_sum = 0, 0.0
        self._answered = []
        self._nodes = self._draw()

    def look(self) -> list[int]:
        """See which clients can be reached, in order, and note who was turned away, once each."""
        nodes = sorted(self._grid.get_node_ids())
        away = self._grid.turned_away
        self.traffic.clients_reachable, self.traffic.clients_turned_away = len(nodes), len(away)
        for one in away:
            if one not in self.turned_away:
                self.turned_away.append(one)
                self.failures.append(Failure(one.client, f"turned away: {one.reason}"))
        return nodes

    def _draw(self) -> list[int]:
        nodes = self.look()
        if self._participation >= 1 or not nodes:
            return nodes
        if self._chances is not None:
            return [node for node in nodes if self._chance[node] < self._participation]
        draw = numpy_generator(self._seed, "participation", self._round)
        count = max(1, round(self._participation * len(nodes)))
        return sorted(int(n) for n in draw.choice(nodes, count, replace=False))

    @property
    def draws_by_chance(self) -> bool:
        """Whether each client is drawn by itself, so that a round may have none."""
        return self._chances is not None

    def get_node_ids(self) -> list[int]:
        """The clients drawn for this round, in order; at least one if there are any and a fixed share is drawn."""
        return self._nodes

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send, receive, check, count, put in order; a client that stayed silent counts as failed."""
        timeout = self._timeout if timeout is None else timeout
        sent = {message.metadata.dst_node_id: message for message in messages}
        self._add_buffers(sent.values())
        self._acknowledge(sent)
        self._asked = {}
        if (self._secure is not None or self._grid.sums) and any(map(_trains, sent.values())):
            return self._summed(sent, timeout)
        answers = self._exchange(sent, timeout)
        if again := self._with_state(sent, answers):
            sent |= again
            answers |= self._exchange(again, timeout)
        accepted = []
        reasons = {node: self._fault(node, sent[node], answers.get(node)) for node in sorted(sent)}
        sizes = {
            node: self._receive(sent[node], answers[node]) for node, why in reasons.items() if why is None
        }
        reasons |= self._too_long(sent, {node: answers[node] for node, why in reasons.items() if why is None})
        for node, reason in reasons.items():
            if sent[node].metadata.message_type == MessageType.TRAIN:
                self._count(node, answers.get(node), reason, _trains(sent[node]), sizes.get(node, 0))
            elif reason is not None:
                self._refuse(node, reason)
            if node in answers:
                accepted.append(
                    answers[node] if reason is None else _refusal(sent[node], answers[node], reason)
                )
        self._take_buffers(accepted, all(map(_trains, sent.values())))
        return accepted

    def _summed(self, sent: Mapping[int, Message], timeout: float | None) -> list[Message]:
        """One reply for all whose updates are in the sum (`pisa_fl.server.sums`); none if there is no sum."""
        if not sent:
            return []

        def lost(clients: Sequence[int]) -> None:
            for client in clients:
                self.accepted.pop(client, None)
                if self._server is not None:
                    self._server.lost(client)
            who = f"client {clients[0]} has" if len(clients) == 1 else f"clients {listed(clients)} have"
            log.warning("round %d: %s lost what they remembered: all begin anew", self._round, who)
            self._acknowledge(sent)

        def ask(messages: Mapping[int, Message]) -> Iterable[HostSum]:
            self._count_down(messages)
            return self._grid.summed(messages.values(), timeout=timeout)

        first = next(iter(sent.values())).content
        fields = dict(self._half.reply_fields(config_of(first)))
        if len(self.buffers):
            fields[BUFFERS] = averaged(len(self.buffers))
        common = (self._round, sent, self._grid.sizes, fields, lost)
        done: SummedRound
        if self._secure is None:
            done = HostRound(*common, ask)
        else:
            draw = numpy_generator(self._seed, "neighbours", self._round)
            order = [int(node) for node in draw.permutation(sorted(sent))]
            done = SecureRound(*common, self._secure, order, lambda one: self._exchange(one, timeout))
        try:
            reply = done.reply()
        except SumError as error:
            self.failures.append(Failure(None, f"no sum: {error}"))
            log.warning("round %d: no sum: %s", self._round, error)
            reply = None
        self.traffic.bytes_up += done.bytes_up
        for node, (answer, reason) in done.faults.items():
            self._count(node, answer, reason, True, 0)
        if reply is None:
            return []
        self._answered = list(members(reply.content))
        self.traffic.clients_ok += len(self._answered)
        metrics = metrics_of(reply.content)
        self.traffic.examples += integer(metrics, EXAMPLES)
        self.traffic.loss_sum += real(metrics, LOSS) * integer(metrics, EXAMPLES)
        self.traffic.differentiated += integer(metrics, DIFFERENTIATED)
        self._take_buffers([reply], True)
        return [reply]

    def _acknowledge(self, sent: Mapping[int, Message]) -> None:
        """Tell every client that remembers something which of its replies was accepted last; 0: none, begin anew.

        So is an evaluation of weights of the clients' own. Messages that shared their content and say the same still
        share it.
        """
        if not self._remembers:
            return
        contents: dict[tuple[int, int], RecordDict] = {}
        before = [message.content for message in sent.values()]  # whose identities are in use meanwhile
        for (node, message), content in zip(sent.items(), before, strict=True):
            if message.metadata.message_type != MessageType.TRAIN and not self._half.personal:
                continue
            void = self._server is not None and self._server.begins_anew(node)
            key = id(content), 0 if void else self.accepted.get(node, 0)
            if key not in contents:
                said = ConfigRecord({**content.config_records.get(CONFIG, {}), ACCEPTED: key[1]})
                contents[key] = RecordDict({**content, CONFIG: said})
            message.content = contents[key]

    def _receive(self, instruction: Message, reply: Message) -> int:
        """Undo what was done to an update on its way; the bytes that it took."""
        if instruction.metadata.message_type != MessageType.TRAIN:
            return 0
        arrays = arrays_of(reply.content)
        if self._half.transforms and WEIGHTS in instruction.content.array_records[ARRAYS]:
            read = {name: tensor(array) for name, array in arrays.items()}
            reply.content[ARRAYS] = record(self._half.received(read))
        return payload(arrays)

    def _exchange(self, sent: Mapping[int, Message], timeout: float | None) -> dict[int, Message]:
        """The first reply to each message; whatever else comes is refused."""
        self._count_down(sent)
        replies = self._grid.send_and_receive(sent.values(), timeout=timeout)
        asked = {message.metadata.message_id: node for node, message in sent.items()}
        answers: dict[int, Message] = {}
        for reply in replies:
            node, sender = asked.get(reply.metadata.reply_to_message_id), reply.metadata.src_node_id
            if node is None or (node != sender and not reply.has_error()):  # a SuperLink may err in its place
                self._refuse(sender, "a reply to something that was not asked of it now")
            elif node in answers:
                self._refuse(node, "a second reply to one message")
            else:
                answers[node] = reply
        return answers

    def _count_down(self, sent: Mapping[int, Message]) -> None:
        """Count the bytes that are sent."""
        sizes: dict[int, int] = {}
        for message in sent.values():
            content = message.content
            if id(content) not in sizes:
                sizes[id(content)] = sum(map(payload, content.array_records.values())) + carried(content)
            self.traffic.bytes_down += sizes[id(content)]

    def _with_state(self, sent: Mapping[int, Message], answers: Mapping[int, Message]) -> dict[int, Message]:
        """Messages for those who lost their state: with what the server half has for them, or to begin anew."""
        again = {}
        for node, reply in answers.items():
            if self._remembers and reply.has_error() and reply.error.code == STATE_LOST:
                content = RecordDict({**sent[node].content})
                state = self._server.supply(node) if self._server else None
                if state is not None:
                    content[STATE] = state
                else:
                    content[CONFIG] = ConfigRecord({**config_of(content), ACCEPTED: 0})
                    log.warning(
                        "round %d: client %d has lost what it remembered, and begins anew", self._round, node
                    )
                again[node] = Message(content, node, sent[node].metadata.message_type)
        return again

    def _add_buffers(self, messages: Iterable[Message]) -> None:
        """Send the running statistics beside flat weights; arrays that messages share stay shared."""
        if not len(self.buffers):
            return
        extended: dict[int, ArrayRecord] = {}
        for message in messages:
            arrays = message.content.array_records[ARRAYS]
            if WEIGHTS in arrays and BUFFERS not in arrays:
                with_buffers = ArrayRecord(dict(arrays) | dict(record({BUFFERS: self.buffers})))
                message.content[ARRAYS] = extended.setdefault(id(arrays), with_buffers)

    def _take_buffers(self, replies: Iterable[Message], trained: bool) -> None:
        """Average the running statistics of the accepted replies to training, and take them out of all."""
        if not len(self.buffers):
            return
        total, examples = torch.zeros_like(self.buffers, dtype=torch.float64), 0
        for reply in replies:
            if reply.has_error() or BUFFERS not in reply.content.array_records.get(ARRAYS, {}):
                continue
            weight = integer(reply.content.metric_records[METRICS], EXAMPLES)
            total += weight * vectors(reply.content.array_records[ARRAYS])[BUFFERS].double()
            examples += weight
            del reply.content.array_records[ARRAYS][BUFFERS]
        if examples and trained:
            self.buffers = (total / examples).float()

    def _fault(self, client: int, instruction: Message, reply: Message | None) -> str | None:
        """Why a reply is not what was asked for, or None."""
        if reply is None:
            return "no reply"
        try:
            return self._fault_of(client, instruction, reply)
        except Exception as error:  # whatever a stranger's message makes the checks raise
            return f"cannot be read: {type(error).__name__}: {error}"

    def _fault_of(self, client: int, instruction: Message, reply: Message) -> str | None:
        if reply.has_error():
            return (reply.error.reason or "").strip() or f"error {reply.error.code} without a reason"
        content = reply.content
        train = instruction.metadata.message_type == MessageType.TRAIN
        for kind, records, expected in (
            ("metric", MetricRecord, [METRICS]),
            ("array", ArrayRecord, [ARRAYS] if train else []),
            ("config", ConfigRecord, []),
        ):
            names = sorted(name for name, one in content.items() if isinstance(one, records))
            if names != expected:
                return f"{kind} records {names}, expected {expected}"
        metrics = metrics_of(content)
        if not train:
            return self._fault_of_evaluation(metrics)
        numbers = self._half.reply_numbers(config_of(instruction.content))
        if set(metrics) != {ROUND, EXAMPLES, LOSS, DIFFERENTIATED, *numbers}:
            return f"metrics {sorted(metrics)} are not those of a training reply"
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in metrics.values()):
            return f"metrics hold NaN, infinite values or lists: {dict(metrics)}"
        if abs(real(metrics, LOSS)) > LARGEST:
            return f"a training loss of {metrics[LOSS]}"
        if wrong := [name for name in numbers if not 0 < real(metrics, name) <= LARGEST]:
            return f"{wrong[0]} of {metrics[wrong[0]]}"
        if metrics[ROUND] != self._round:
            return f"of round {metrics[ROUND]}, expected {self._round}"
        if metrics[EXAMPLES] != self._grid.sizes.get(client, metrics[EXAMPLES]):
            return f"{metrics[EXAMPLES]} examples where {self._grid.sizes[client]} were expected"
        for name, least in ((EXAMPLES, 1), (DIFFERENTIATED, 0)):
            if not (isinstance(metrics[name], int) and least <= integer(metrics, name) < 2**40):
                return f"impossible number of examples: {name} {metrics[name]}"
        if id(instruction.content) not in self._asked:
            self._asked[id(instruction.content)] = self._expected(instruction.content)
        return problem(arrays_of(content), self._asked[id(instruction.content)])

    def _fault_of_evaluation(self, metrics: MetricRecord) -> str | None:
        expected = {EXAMPLES, *(metric.name for metric in self._measures)}
        if set(metrics) != expected:
            return f"metrics {sorted(metrics)}, expected {sorted(expected)}"
        if not all(isinstance(value, int | float) for value in metrics.values()):
            return f"metrics hold lists: {dict(metrics)}"
        if not (isinstance(metrics[EXAMPLES], int) and 1 <= integer(metrics, EXAMPLES) < 2**40):
            return f"impossible number of examples: {EXAMPLES} {metrics[EXAMPLES]}"
        # an honest one may be NaN, as r2 of targets that are all alike, or infinite
        for metric in self._measures:
            value = real(metrics, metric.name)
            too_good = metric.most is not None and value > metric.most * (1 + 1e-6)
            if too_good or (metric.better == "higher" and value < metric.worst):
                return f"{metric.name} of {metrics[metric.name]}"
        return None

    def _too_long(self, sent: Mapping[int, Message], replies: Mapping[int, Message]) -> dict[int, str]:
        """Those whose update is out of all proportion to the others', and why they are refused.

        The present round alone would not do as a measure: where most clients have learnt what they can, an honest one
        that is drawn for the first time, or whose class is rare, may have a hundred times more to say.
        """
        trained = {n: r for n, r in replies.items() if _trains(sent[n])}
        if self._max_update is None or len(trained) < COMPARED:
            return {}
        lengths = {
            node: self._length_of(node, arrays_of(reply.content), arrays_of(sent[node].content))
            for node, reply in trained.items()
        }
        usual = max(self.traffic.usual_length, statistics.median(lengths.values()))
        self.traffic.usual_length = usual
        return {
            node: f"its update is {length / usual:.3g} times as long as the greatest median of a round,"
            f" max_update={self._max_update:g}"
            for node, length in lengths.items()
            if length > self._max_update * usual > 0
        }

    def _length_of(self, client: int, arrays: ArrayRecord, start: ArrayRecord) -> float:
        """How long a client's update is."""
        own = self._server.length(client, arrays) if self._server else None
        return _distance(arrays, start) if own is None else own

    def _expected(self, instruction: RecordDict) -> dict[str, Field]:
        """What the arrays of a reply must be: flat vectors, or the tensors by name as they were sent."""
        arrays = instruction.array_records[ARRAYS]
        if WEIGHTS not in arrays:
            return {name: Field(tuple(a.shape)) for name, a in arrays.items()}
        fields = self._half.sent_fields(config_of(instruction))
        return fields | ({BUFFERS: averaged(len(self.buffers))} if len(self.buffers) else {})

    def _count(self, client: int, reply: Message | None, reason: str | None, trains: bool, size: int) -> None:
        """Add a reply to the counters; one that only measures is no answer of the client's to the round."""
        traffic = self.traffic
        if reply is None or reason is not None:
            traffic.clients_failed += 1
            traffic.silent += reply is None or (reply.has_error() and reply.error.code not in _ANSWERS)
            self._refuse(client, str(reason))
            return
        metrics = metrics_of(reply.content)
        if trains:
            self._answered.append(client)
            traffic.clients_ok += 1
            traffic.examples += integer(metrics, EXAMPLES)
            traffic.loss_sum += real(metrics, LOSS) * integer(metrics, EXAMPLES)
        traffic.differentiated += integer(metrics, DIFFERENTIATED)
        traffic.bytes_up += size

    def _refuse(self, client: int, reason: str) -> None:
        """Note a failure, with the traceback of the client's code if it is a new one."""
        line, _, traceback = printable(reason).partition("\n")
        if hash(traceback) in self._tracebacks:
            traceback = ""
        elif traceback:
            self._tracebacks.add(hash(traceback))
        self.failures.append(Failure(client, line, traceback))
        log.warning(
            "round %d: client %d failed: %s%s", self._round, client, line, traceback and f"\n{traceback}"
        )

    def set_run(self, run: Run) -> None:
        """Hand a run's description to the engine's grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to a client."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send without waiting; such messages are neither checked nor counted."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Receive what was sent for without waiting."""
        return self._grid.pull_messages(message_ids)


def _trains(instruction: Message) -> bool:
    """Whether a message asks for an update."""
    train = instruction.metadata.message_type == MessageType.TRAIN
    return train and not config_of(instruction.content).get(MEASURE)


def _distance(arrays: ArrayRecord, start: ArrayRecord) -> float:
    """|w_i - w| of flat weights, or of tensors by name."""
    if isinstance(flat := arrays.get(WEIGHTS), TensorArray) and flat.moved is not None:
        return flat.moved
    names = [WEIGHTS] if WEIGHTS in arrays else list(arrays)
    gaps = (tensor(arrays[name]).float() - tensor(start[name]).float() for name in names)
    return math.hypot(*(float(torch.linalg.vector_norm(gap)) for gap in gaps))


def _refusal(instruction: Message, reply: Message, reason: str) -> Message:
    """An error in place of a reply; a client's own error stays as it is."""
    return reply if reply.has_error() else Message(Error(REFUSED, reason), reply_to=instruction)
