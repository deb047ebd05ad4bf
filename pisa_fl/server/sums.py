"""Training by sums: a round's replies as one, of all who answered.

The server half is given a single reply in place of its members': the mean of their updates by examples, the sum of
their examples, and who they are. What is told openly is how many examples a client has and differentiated; its loss,
and what it has of a model's running statistics, are summed as its update is. Only clients can check updates here.

Sums come from messages that hide each update (secure aggregation), or from the hosts of many clients, as one each.
Both are of the same whole numbers, and have the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Stage

from pisa_fl.config import ConfigurationError
from pisa_fl.engines.host_sum import HostSum
from pisa_fl.secure.limbs import values_of
from pisa_fl.secure.summand import HEAVIEST, OPEN
from pisa_fl.secure.summing import LEAST, Fault, SecAgg, SumError, Summed, summed
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

SECAGG, HOSTS = "secure=secagg", "engine.sums=true"
"""What has a round's updates summed before the server sees them."""


def check_sums(
    how: str | None, server: ServerHalf, name: str, drawn: int, max_update: float | None, private: bool
) -> None:
    """Check that a server half, and what is to be checked of clients, go with sums, or without.

    Args:
        how: `SECAGG`, `HOSTS`, or None where the server is given every client's update.
        server: The server half.
        name: Its name.
        drawn: Clients of a round.
        max_update: See `Gateway`.
        private: Whether there is differential privacy.

    Raises:
        ConfigurationError: They do not.
    """
    if how is None:
        if server.needs_sums:
            raise ConfigurationError(
                f"{name} leaves every client's dual with the client, and works with sums alone: set secure=secagg, or"
                " engine=ray engine.sums=true, or use strategy=pisa"
            )
        return
    if not server.takes_sums:
        raise ConfigurationError(
            f"{how} gives the server sums over clients alone, and {name} needs every client's own message: use"
            " strategy=pisa_summed in place of pisa; or fedavg, fedprox, fedavgm, fedadam, fedyogi, fedadagrad"
        )
    if private:
        raise ConfigurationError(
            f"{how} and privacy do not go together: what is accounted for is of replies that the server sees;"
            " leave out one of them"
        )
    if max_update is not None:
        raise ConfigurationError(
            f"max_update={max_update:g} compares clients' updates, which {how} hides: set max_update=null"
        )
    if how == SECAGG and drawn < LEAST:
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
class SummedRound(ABC):
    """The training exchange of one round.

    Attributes:
        number: The round.
        sent: What each client is to do, as it would be sent openly.
        sizes: Examples of each client, as far as they are known.
        fields: What an update holds.
        lost: Called with clients that have lost their state, before all are asked again.
        faults: Client number -> its reply or None, and why it is not in the sum.
        bytes_up: Bytes that came.
    """

    number: int
    sent: Mapping[int, Message]
    sizes: Mapping[int, int]
    fields: Mapping[str, Field]
    lost: Callable[[Sequence[int]], None]
    faults: dict[int, tuple[Message | None, str]] = field(default_factory=dict, kw_only=True)
    bytes_up: int = field(default=0, kw_only=True)
    _metrics: dict[int, Mapping[str, Any]] = field(default_factory=dict, kw_only=True)

    def reply(self) -> Message:
        """The one reply in place of all.

        Raises:
            SumError: There is none.
        """
        names = sorted(self.fields)
        sizes = [self.fields[name].size for name in names]
        total = self._sum(sum(sizes) + 1)
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

    @abstractmethod
    def _sum(self, length: int) -> Summed:
        """The sum of what clients add (`pisa_fl.secure.summand`), so many values each.

        Raises:
            SumError: There is none.
        """

    @cached_property
    def _heaviest(self) -> int:
        return max(self.sizes.get(node, 1) for node in self.sent)

    def _unfit(self, node: int, metrics: Mapping[str, Any]) -> str | None:
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


@dataclass
class SecureRound(SummedRound):
    """A round whose updates nobody sees.

    Attributes:
        settings: How sums are taken.
        order: The clients, in an order that makes neighbours.
        exchange: Sends messages, and gives the first reply to each.
    """

    settings: SecAgg
    order: Sequence[int]
    exchange: Callable[[Mapping[int, Message]], Mapping[int, Message]]

    def _sum(self, length: int) -> Summed:
        return summed(self.settings, self.order, length, self._ask)

    def _ask(self, stage: str, said: Mapping[int, ConfigRecord], fault: Fault) -> dict[int, ConfigRecord]:
        """One exchange; whoever is at fault, but for one that is in the sum already, is noted."""
        answers = self.exchange(self._messages(stage, said))
        lost = [n for n, reply in answers.items() if reply.has_error() and reply.error.code == STATE_LOST]
        if stage == Stage.SETUP and lost:
            self.lost(lost)
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


@dataclass
class HostRound(SummedRound):
    """A round of which every host of clients answers one sum.

    Attributes:
        ask: Sends messages, and gives the hosts' sums.
    """

    ask: Callable[[Mapping[int, Message]], Iterable[HostSum]]

    def _sum(self, length: int) -> Summed:
        parts = self._asked()
        if lost := [n for part in parts for n, (code, _) in part.errors.items() if code == STATE_LOST]:
            self.lost(lost)
            parts = self._asked()
        errors = {node: error for part in parts for node, error in part.errors.items()}
        total = np.zeros((2, length), np.int64)
        for part in parts:
            for node, told in part.told.items():
                if reason := self._unfit(node, told):
                    raise SumError(f"client {node}: {reason}")
            if part.told and part.whole.shape != total.shape:
                raise SumError(f"a host's sum has {part.whole.shape[1]} values where {length} were expected")
            if part.told:
                total += part.whole
                self.bytes_up += part.bytes
        for node in sorted(self.sent.keys() - self._metrics.keys()):
            self.faults[node] = None, "no reply"
            if node in errors:
                code, reason = errors[node]
                error = Message(Error(code, reason), reply_to=self.sent[node])
                self.faults[node] = error, reason.strip() or f"error {code} without a reason"
        if not self._metrics:
            raise SumError("no client answered")
        return Summed(values_of(total), sorted(self._metrics))

    def _asked(self) -> Sequence[HostSum]:
        contents: dict[int, RecordDict] = {}
        messages = {}
        for node, message in self.sent.items():
            whole = message.content
            if id(whole) not in contents:
                config = config_of(whole) | {HEAVIEST: self._heaviest}
                contents[id(whole)] = RecordDict({**whole, CONFIG: ConfigRecord(config)})
            messages[node] = Message(contents[id(whole)], node, MessageType.TRAIN)
        return list(self.ask(messages))
