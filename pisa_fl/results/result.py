"""What a run gives back, or raises when it was asked to stop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pisa_fl.metric import Metrics


@dataclass(frozen=True)
class Result:
    """What a run gives back.

    Attributes:
        metrics: The lines of metrics.jsonl.
        summary: The contents of summary.json.
        model: The trained model.
        directory: The run directory, or None if nothing was written.
    """

    metrics: list[Metrics]
    summary: dict[str, Any]
    model: nn.Module
    directory: Path | None

    @property
    def worth(self) -> float | None:
        """Final value of the metric by which runs are compared; None if it is not finite."""
        worth: float | None = self.summary[f"final_{self.summary['compared_by']}"]
        return worth


class Interrupted(Exception):
    """The run was asked to stop, by Ctrl-C or SIGTERM, and has left a checkpoint."""
