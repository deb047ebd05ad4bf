"""What server halves that average have in common: the same message to everybody, who answered what, means by weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import (
    ARRAYS,
    CONFIG,
    EXAMPLES,
    ROUND,
    WEIGHTS,
    RoundError,
    arrays_of,
    integer,
    metrics_of,
    out_of_range,
    record,
    vectors,
)
from strategies.base.server import ServerHalf
from strategies.base.table import Table


@dataclass(frozen=True)
class Answers:
    """What clients answered, in the order of their numbers.

    Attributes:
        arrays: Client number -> its arrays, not to be written to.
        examples: Client number -> its examples.
        metrics: Client number -> all numbers of its reply.
    """

    arrays: dict[int, dict[str, Tensor]]
    examples: dict[int, int]
    metrics: dict[int, MetricRecord]

    @classmethod
    def of(cls, replies: Iterable[Message]) -> Answers:
        """Those of the replies that are no errors."""
        heard = sorted((r for r in replies if not r.has_error()), key=lambda r: r.metadata.src_node_id)
        metrics = {reply.metadata.src_node_id: metrics_of(reply.content) for reply in heard}
        return cls(
            {reply.metadata.src_node_id: vectors(arrays_of(reply.content)) for reply in heard},
            {node: integer(said, EXAMPLES) for node, said in metrics.items()},
            metrics,
        )


def messages(nodes: Iterable[int], sent: Mapping[str, Tensor], said: Mapping[str, Any]) -> list[Message]:
    """The same for all nodes."""
    content = RecordDict({ARRAYS: record(dict(sent)), CONFIG: ConfigRecord(dict(said))})
    return [Message(content, message_type=MessageType.TRAIN, dst_node_id=node) for node in nodes]


def mean(rows: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    """Weighted mean of one vector (d,) of each of some clients; the operations of Flower's FedAvg, to the bit."""
    total = sum(weights[client] for client in rows)
    result: Tensor | None = None
    for client, row in rows.items():
        part = row * (weights[client] / total)
        result = part if result is None else result.add_(part)
    assert result is not None
    return result


@checks.literals
class Averaging(ServerHalf):
    """A server half that sends the weights to everybody drawn, and makes the next of means of what comes back.

    What its tables are given in a round, and what it keeps beside them, is written only when the round's result is one
    that messages may hold.

    Args:
        layout: Layout of the model's parameters.
        alpha: Weights of the clients: `examples` (n_i/n) or `uniform`.
        tables: Names of the vectors that are kept of every client.
        clients: N, over all of whom the tables average.
        state: Where the tables are kept: in `memory`, or on `disk`.

    Attributes:
        kept: Vectors of the server's own that it keeps from round to round, by name; `step` may replace them.
    """

    remembered: ClassVar[Collection[str]] = ()
    """Those of the tables that clients have a row of: one that lost it is supplied."""

    def __init__(
        self,
        layout: Layout,
        alpha: Literal["examples", "uniform"],
        tables: Collection[str] = (),
        clients: int = 0,
        state: Literal["memory", "disk"] = "memory",
    ) -> None:
        self.layout, self.uniform = layout, alpha == "uniform"
        self.tables = {name: Table(layout.size, clients, state == "disk") for name in tables}
        self.kept: dict[str, Tensor] = {}
        self.consensus, self.round_number = torch.empty(0), 0

    def shared(self) -> dict[str, Tensor]:
        """Vectors that are sent to everybody beside the weights."""
        return {}

    @abstractmethod
    def step(self, answers: Answers, weights: Mapping[int, float]) -> Tensor:
        """The next weights, (d,); `consensus` are those that the clients were sent, in `round_number`.

        Args:
            answers: Of one client or more.
            weights: Client number -> its weight, not normalised.
        """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the weights, and what is shared beside them, to every node of the grid."""
        self.consensus, self.round_number = vectors(arrays)[WEIGHTS], server_round
        sent = {WEIGHTS: self.consensus} | self.shared()
        return messages(grid.get_node_ids(), sent, dict(config) | {ROUND: server_round})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Make the step of those who answered; nothing if nobody did."""
        answers = Answers.of(replies)
        if not answers.arrays:
            return None, None
        weights = {node: 1.0 if self.uniform else float(n) for node, n in answers.examples.items()}
        before = dict(self.kept)
        following = self.step(answers, weights)
        averages = {name: table.begun for name, table in self.tables.items()}
        if wrong := out_of_range({WEIGHTS: following} | averages | self.kept):
            self.kept = before
            raise RoundError(f"{wrong} of the server")
        for table in self.tables.values():
            table.commit()
        return record({WEIGHTS: following}), MetricRecord()

    def supply(self, client: int) -> ArrayRecord | None:
        """The rows of a client that lost them."""
        rows = {name: self.tables[name] for name in self.remembered if client in self.tables[name]}
        return record({name: table[client].clone() for name, table in rows.items()}) if rows else None

    def begins_anew(self, client: int) -> bool:
        """Whether the tables do not know the client."""
        return any(client not in table for table in self.tables.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The tables and what is kept beside them, for a checkpoint."""
        return self.kept | {
            f"{name}.{key}": value
            for name, table in self.tables.items()
            for key, value in table.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self.kept = {name: state[name].clone() for name in self.kept}
        for name, table in self.tables.items():
            own = f"{name}."
            table.load_state_dict({k.removeprefix(own): v for k, v in state.items() if k.startswith(own)})
