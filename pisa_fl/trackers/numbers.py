"""What of a round's line is a number to be tracked."""

from __future__ import annotations

from pisa_fl.metric import Metrics


def numbers(line: Metrics) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl but the round's."""
    return {key: value for key, value in line.items() if key != "round" and isinstance(value, int | float)}
