"""Flower's own strategies, and others written for Flower alone, as server halves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy
from torch import Tensor

from strategies.base.server import ServerHalf

SEPARATOR = "/"
"""Between the name of an attribute that is a dictionary and that of an array in it."""

SUMS = (FedAvg, FedAvgM, FedProx, FedAdam, FedAdagrad, FedYogi)
"""Those of Flower's that take of a round's replies their mean by examples alone."""

PLACE = "@"
"""Between the name of an attribute that is a list and the place of an array in it."""

NUMBER = "#"
"""Before the name of an attribute that is a plain number, to be told from an array without dimensions."""


def server_half(strategy: Strategy) -> ServerHalf:
    """The strategy, or what it keeps read from its attributes."""
    return strategy if isinstance(strategy, ServerHalf) else FlowersOwn(strategy)


class FlowersOwn(ServerHalf):
    """A strategy that does not say what it keeps: attributes that are numbers, arrays, or lists or tables of them.

    Args:
        strategy: The strategy, which does everything else.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.takes_sums = type(strategy) in SUMS

    def state_dict(self) -> dict[str, Tensor]:
        """Those attributes."""
        kept: dict[str, Tensor] = {}
        for name, value in vars(self.strategy).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                kept[NUMBER + name] = torch.tensor(
                    value, dtype=torch.int64 if isinstance(value, int) else torch.float64
                )
            elif isinstance(value, np.ndarray):
                kept[name] = torch.tensor(value)
            elif isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
                kept |= {f"{name}{SEPARATOR}{key}": torch.tensor(v) for key, v in value.items()}
            elif isinstance(value, list) and value and all(isinstance(v, np.ndarray) for v in value):
                kept |= {f"{name}{PLACE}{place}": torch.tensor(v) for place, v in enumerate(value)}
        return kept

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set them."""
        tables: dict[str, dict[str, np.ndarray]] = {}
        lists: dict[str, dict[int, np.ndarray]] = {}
        for name, value in state.items():
            attribute, of_table, key = name.partition(SEPARATOR)
            if of_table:
                tables.setdefault(attribute, {})[key] = value.numpy()
            elif PLACE in name:
                attribute, _, place = name.partition(PLACE)
                lists.setdefault(attribute, {})[int(place)] = value.numpy()
            elif name.startswith(NUMBER):
                setattr(self.strategy, name.removeprefix(NUMBER), value.item())
            else:
                setattr(self.strategy, name, value.numpy())
        for attribute, table in tables.items():
            setattr(self.strategy, attribute, table)
        for attribute, places in lists.items():
            setattr(self.strategy, attribute, [places[place] for place in sorted(places)])

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy does."""
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the strategy does."""
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy does."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the strategy does."""
        return self.strategy.aggregate_evaluate(server_round, replies)
