"""What a client adds to a sum of updates."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from strategies.base.client import ClientHalf
from strategies.base.messages import (
    DIFFERENTIATED,
    EXAMPLES,
    LOSS,
    ROUND,
    arrays_of,
    integer,
    metrics_of,
    problem,
    real,
    record,
    tensor,
)

HEAVIEST = "heaviest"
"""Greatest number of examples of a client of the round, by which what is summed is divided, to stay in reach."""

OPEN = (ROUND, EXAMPLES, DIFFERENTIATED)
"""Numbers of a reply that are told openly; its loss is summed."""


def summand(half: ClientHalf, update: Message, config: Mapping[str, object]) -> NDArray[np.float64]:
    """What a client adds: all arrays of its update by their names, then the loss, times n_i / heaviest.

    Args:
        half: The client half, which knows how the server would read an update.
        update: What the client would have answered.
        config: What it was told with the instruction.

    Raises:
        ValueError: The update is not what the server would take.
    """
    metrics, arrays = metrics_of(update.content), arrays_of(update.content)
    read = {name: tensor(array) for name, array in arrays.items()}
    if half.transforms:
        read = half.received(read)
    expected = half.reply_fields(config)
    checked = record({name: row for name, row in read.items() if name in expected})
    if reason := problem(checked, expected):  # which the server cannot see
        raise ValueError(reason)
    heaviest = integer(config, HEAVIEST)
    weight = integer(metrics, EXAMPLES) / heaviest
    if not 0 < weight <= 1:
        raise ValueError(f"{HEAVIEST} is {heaviest}")
    rows = [read[name].double().numpy() for name in sorted(read)]
    return np.concatenate([*rows, [real(metrics, LOSS)]]) * weight
