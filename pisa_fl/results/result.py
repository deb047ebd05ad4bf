"""What a run gives back, or raises when it was asked to stop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pisa_fl.metric import Metrics

if TYPE_CHECKING:
    import altair
    import pandas as pd


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

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The metrics, one line a round."""
        import pandas as pd

        return pd.DataFrame(self.metrics)

    def plot(self) -> altair.Chart:
        """The metric by which runs are compared against rounds."""
        from pisa_fl.results.report import charts

        return charts.run(self.frame, self.summary["compared_by"])

    def _repr_html_(self) -> str:
        import pandas as pd

        told = {key: value for key, value in self.summary.items() if not isinstance(value, dict | list)}
        return pd.Series(told, name="").to_frame().to_html(header=False)


class Interrupted(Exception):
    """The run was asked to stop, by Ctrl-C or SIGTERM, and has left a checkpoint."""
