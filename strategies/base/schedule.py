"""How a number falls over the rounds."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def share_left(schedule: Schedule, round_number: int, horizon: int, final: float) -> float:
    """What is left of it in a round (counted from 1), as a share of its first value.

    Args:
        schedule: How it falls.
        round_number: The round.
        horizon: Round at which the schedule ends.
        final: What is left there, and stays.
    """
    if schedule == "constant":
        return 1.0
    done = 1.0 if horizon <= 1 else min(1.0, (round_number - 1) / (horizon - 1))
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return final + (1 - final) * left
