"""The server, which is trusted, noises the sum of all updates: what it makes public tells little of any one client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)
from torch import Tensor

from pisa_fl.models.examination import Findings
from pisa_fl.privacy.accounting import Release
from pisa_fl.privacy.base import Privacy, only_array
from pisa_fl.privacy.clipping import clipped
from strategies import Pisa
from strategies.base.averaging import Answers
from strategies.base.client import ClientHalf
from strategies.base.messages import (
    ARRAYS,
    DIFFERENTIATED,
    EXAMPLES,
    GRADIENT,
    LOSS,
    METRICS,
    ROUND,
    WEIGHTS,
    record,
    vectors,
)
from strategies.base.server import ServerHalf

CHOOSERS = (FedMedian, FedTrimmedAvg, Krum, MultiKrum, Bulyan, QFedAvg)
"""Strategies that compare replies of clients with each other."""

EVERYBODY = 0
"""Number of the one client that a server half sees."""


class Central(Privacy):
    """The server adds N(0, (z C)^2 I) to the sum of the clipped updates, and divides by the number that is expected.

    The server half is shown one client, `everybody`, whose reply is that noised mean: all that it computes follows from
    it. Clients count alike, whatever their number of examples. They are drawn each by itself with the chance
    `participation`, which hides who was there; one that was lost is a zero in the sum.
    """

    protects = "all examples of a client, from who sees the model, in every round"
    poisson = True

    def check(self, half: ClientHalf, model: Findings) -> None:
        """One vector a client is all that leaves it."""
        super().check(half, model)
        only_array(half, "central")

    def check_server(self, half: ClientHalf, strategy: Strategy) -> None:
        """Clients that keep nothing, and a server half that averages."""
        if isinstance(strategy, Pisa):
            averages = not strategy.trim
        else:
            averages = isinstance(strategy, FedAvg) and not isinstance(strategy, CHOOSERS)
        if half.state_sizes() or half.personal or not averages:
            raise ValueError(
                f"privacy=central gives the server one noised mean, and {type(strategy).__name__} works with what"
                " single clients send or keep: use strategy=fedavg, fedprox, fedavgm, fedadam, fedyogi, fedadagrad or"
                " pisa, or privacy=local"
            )

    def release(self, half: ClientHalf, participation: float) -> tuple[Release, int]:
        """One noised sum a round."""
        return Release(self.noise, float(participation), self.adjacency), 1

    def around(self, server: ServerHalf, expected: float) -> ServerHalf:
        """A server half that shows the other one everybody's mean."""
        return NoisedMean(server, self, expected)


class NoisedMean(ServerHalf):
    """Stands between a server half and its clients, and shows it a single one.

    Args:
        server: The server half.
        privacy: Clipping and noise.
        expected: Clients that are expected to answer in a round: q N.
    """

    def __init__(self, server: ServerHalf, privacy: Central, expected: float) -> None:
        self.server, self._privacy, self._expected = server, privacy, expected
        self._sent: Message | None = None
        if isinstance(server, Pisa):  # whose ledger holds one row, of a client that is always there
            server.penalty = replace(server.penalty, participation=1.0)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the server half tells its one client, to everybody who was drawn."""
        [self._sent] = self.server.configure_train(server_round, arrays, config, cast(Grid, _Everybody()))
        content = self._sent.content
        return [
            Message(content, message_type=MessageType.TRAIN, dst_node_id=node) for node in grid.get_node_ids()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The noised mean, which there is also if nobody was drawn, as the reply of one."""
        assert self._sent is not None
        weights = vectors(cast(ArrayRecord, self._sent.content[ARRAYS]))[WEIGHTS]
        name = GRADIENT if isinstance(self.server, Pisa) else WEIGHTS
        centre = weights if name == WEIGHTS else torch.zeros_like(weights)
        total = torch.zeros(len(weights), dtype=torch.float64)
        for arrays in Answers.of(replies).arrays.values():
            total += clipped(arrays[name] - centre, self._privacy.clip)
        if self._privacy.noise:
            draws = self._privacy.random.at("central noise", server_round)
            total += self._privacy.deviation * draws.normal(len(total))
        mean = (centre + total / self._expected).float()
        said: dict[str, Any] = {ROUND: server_round, EXAMPLES: 1, LOSS: 0.0, DIFFERENTIATED: 0}
        content = RecordDict({ARRAYS: record({name: mean}), METRICS: MetricRecord(said)})
        return self.server.aggregate_train(server_round, [Message(content, reply_to=self._sent)])

    def state_dict(self) -> dict[str, Tensor]:
        """The server half's."""
        return self.server.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The server half's."""
        self.server.load_state_dict(state)


class _Everybody:
    """What a server half sees of the grid."""

    def get_node_ids(self) -> list[int]:
        return [EVERYBODY]
