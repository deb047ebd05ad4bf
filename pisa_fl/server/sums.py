"""Training under secure aggregation: a round's replies as one, of all who answered, from messages that hide each.

The server half is given a single reply in place of its members': the mean of their updates by examples, the sum of
their examples, and who they are. What is told openly is how many examples a client has and differentiated; its loss,
and what it has of a model's running statistics, are summed as its update is. Only clients can check updates here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Stage

from pisa_fl.config import ConfigurationError
from pisa_fl.secure.masking import HEAVIEST, OPEN
from pisa_fl.secure.summing import LEAST, Fault, SecAgg, SumError, summed
from strategies.base.messages import (
    ARRAYS,
    CLIENTS,
    CONFIG,
    DIFFERENTIATED,
    EXAMPLES,
    LOSS,
    METRICS,
    ROUND,
    STATE_LOST,
    Field,
    config_of,
    integer,
    metrics_of,
    problem,
    record,
)
from strategies.base.server import ServerHalf


def check_secure(
    secure: SecAgg | None, server: ServerHalf, name: str, drawn: int, max_update: float | None, private: bool
) -> None:
    """Check that a server half, and what is to be checked of clients, go with sums, or without.

    Raises:
        ConfigurationError: They do not.
    """
    if secure is None:
        if server.needs_sums:
            raise ConfigurationError(
                f"{name} leaves every client's dual with the client, and works with sums alone: set secure=secagg, or"
                " use strategy=pisa"
            )
        return
    if not server.takes_sums:
        raise ConfigurationError(
            f"secure=secagg shows the server sums over clients alone, and {name} needs every client's own message: use"
            " strategy=pisa_summed in place of pisa; or fedavg, fedprox, fedavgm, fedadam, fedyogi, fedadagrad"
        )
    if private:
        raise ConfigurationError(
            "secure=secagg and privacy do not go together: what is accounted for is of replies that the server sees;"
            " leave out one of them"
        )
    if max_update is not None:
        raise ConfigurationError(
            f"max_update={max_update:g} compares clients' updates, which secure=secagg hides: set max_update=null"
        )
    if drawn < LEAST:
        raise ConfigurationError(
            f"secure=secagg takes {LEAST} clients of a round or more, and clients and participation make {drawn}"
        )


def carried(content: RecordDict) -> int:
    """Bytes of keys, shares and masked vectors in a message."""
    said = content.get(RECORD_KEY_CONFIGS)
    if not isinstance(said, ConfigRecord):
        return 0
    lists = (value if isinstance(value, list) else [value] for value in said.values())
    return sum(len(one) for values in lists for one in values if isinstance(one, bytes))


@dataclass
class SecureRound:
    """The training exchange of one round.

    Attributes:
        settings: How sums are taken.
        number: The round.
        sent: What each client is to do, as it would be sent openly.
        sizes: Examples of each client, as far as they are known.
        fields: What an update holds.
        exchange: Sends messages, and gives the first reply to each.
        lost: Called with a client that has lost its state, before all are asked again.
        faults: Client number -> its reply or None, and why it is not in the sum.
        bytes_up: Bytes that came.
    """

    settings: SecAgg
    number: int
    sent: Mapping[int, Message]
    sizes: Mapping[int, int]
    fields: Mapping[str, Field]
    exchange: Callable[[Mapping[int, Message]], Mapping[int, Message]]
    lost: Callable[[int], None]
    faults: dict[int, tuple[Message | None, str]] = field(default_factory=dict)
    bytes_up: int = 0
    _metrics: dict[int, MetricRecord] = field(default_factory=dict)

    def reply(self, order: list[int]) -> Message:
        """The one reply in place of all.

        Args:
            order: The clients, in an order that makes neighbours.

        Raises:
            SumError: There is none.
        """
        names = sorted(self.fields)
        sizes = [self.fields[name].size for name in names]
        total = summed(self.settings, order, sum(sizes) + 1, self._ask)
        examples = {node: integer(self._metrics[node], EXAMPLES) for node in total.members}
        mean = torch.from_numpy(total.values) * (self._heaviest / sum(examples.values()))
        *rows, loss = mean.split([*sizes, 1])
        arrays = record(dict(zip(names, rows, strict=True)))
        if reason := problem(arrays, self.fields):
            raise SumError(f"the mean of the updates cannot be used: {reason}")
        done = sum(integer(self._metrics[node], DIFFERENTIATED) for node in total.members)
        counts = {ROUND: self.number, EXAMPLES: sum(examples.values()), DIFFERENTIATED: done}
        who = ConfigRecord({CLIENTS: list(examples), EXAMPLES: list(examples.values())})
        metrics = MetricRecord({**counts, LOSS: float(loss)})
        content = RecordDict({ARRAYS: arrays, METRICS: metrics, CONFIG: who})
        return Message(content, reply_to=self.sent[total.members[0]])

    @property
    def _heaviest(self) -> int:
        return max(self.sizes.get(node, 1) for node in self.sent)

    def _ask(self, stage: str, said: Mapping[int, ConfigRecord], fault: Fault) -> dict[int, ConfigRecord]:
        """One exchange; whoever is at fault, but for one that is in the sum already, is noted."""
        answers = self.exchange(self._messages(stage, said))
        lost = [n for n, reply in answers.items() if reply.has_error() and reply.error.code == STATE_LOST]
        if stage == Stage.SETUP and lost:
            for node in lost:
                self.lost(node)
            answers = self.exchange(self._messages(stage, said))
        good: dict[int, ConfigRecord] = {}
        for node in sorted(said):
            reply = answers.get(node)
            reason = self._reason(stage, node, reply, fault)
            if reason is None and reply is not None:
                self.bytes_up += carried(reply.content)
                good[node] = reply.content.config_records[RECORD_KEY_CONFIGS]
            elif stage != Stage.UNMASK:
                self.faults[node] = reply, str(reason)
        return good

    def _messages(self, stage: str, said: Mapping[int, ConfigRecord]) -> dict[int, Message]:
        """Messages of a stage; what is to be done is told where the update is asked for."""
        messages = {}
        for node, one in said.items():
            whole, config = self.sent[node].content, config_of(self.sent[node].content)
            content = RecordDict({CONFIG: ConfigRecord(config)})
            if stage == Stage.COLLECT_MASKED_VECTORS:
                content = RecordDict({**whole, CONFIG: ConfigRecord(config | {HEAVIEST: self._heaviest})})
            content[RECORD_KEY_CONFIGS] = one
            messages[node] = Message(content, node, MessageType.TRAIN)
        return messages

    def _reason(self, stage: str, node: int, reply: Message | None, fault: Fault) -> str | None:
        if reply is None:
            return "no reply"
        if reply.has_error():
            return (reply.error.reason or "").strip() or f"error {reply.error.code} without a reason"
        try:
            content = reply.content
            told = stage == Stage.COLLECT_MASKED_VECTORS
            if set(content) != {RECORD_KEY_CONFIGS, *([METRICS] if told else [])}:
                return f"records {sorted(content)} are not those of secure aggregation"
            if told and (reason := self._unfit(node, metrics_of(content))):
                return reason
            return fault(node, content.config_records[RECORD_KEY_CONFIGS])
        except Exception as error:  # whatever a stranger's message makes the checks raise
            return f"cannot be read: {type(error).__name__}: {error}"

    def _unfit(self, node: int, metrics: MetricRecord) -> str | None:
        """Why what a client tells openly cannot be so, or None; what is fit is kept."""
        if set(metrics) != set(OPEN) or not all(type(value) is int for value in metrics.values()):
            return f"metrics {dict(metrics)} are not those of a masked reply"
        if metrics[ROUND] != self.number:
            return f"of round {metrics[ROUND]}, expected {self.number}"
        examples = integer(metrics, EXAMPLES)
        if examples != self.sizes.get(node, examples) or not 1 <= examples <= self._heaviest:
            return f"{examples} examples where {self.sizes.get(node)} were expected"
        if not 0 <= integer(metrics, DIFFERENTIATED) < 2**40:
            return f"impossible number of examples: {DIFFERENTIATED} {metrics[DIFFERENTIATED]}"
        self._metrics[node] = metrics
        return None
