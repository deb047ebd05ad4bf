"""Finished runs together: what they are compared by, as tables, curves, sentences and pages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from pisa_fl.results.finished import LEFT_OUT, Run, find_runs
from pisa_fl.results.report import numbers
from pisa_fl.results.report.notes import missing_and_failed, on_validation
from pisa_fl.results.report.rows import compared_by, lines, numbered, panels, tabulate
from pisa_fl.results.report.verdict import Verdict, verdict

if TYPE_CHECKING:
    import altair


class Runs:
    """Finished runs, grouped by everything but the seed.

    In a notebook it shows itself as a table.

    Args:
        found: Finished runs.
        notes: What was left out of them, and why.

    Attributes:
        notes: On what is missing or failed, and where it lies.
        quality: The metric that they are compared by.
        columns: What tells the rows apart.
        rows: The settings, in the order of their first runs.
        panels: The rows that are compared with each other, by the words for their problem.
        measured: One line a run: its row's number, its seed, and every measure.
    """

    def __init__(self, found: Sequence[Run], notes: Sequence[str] = ()) -> None:
        runs, self.notes = list(found), list(notes)
        self._left_out = [note for note in notes if LEFT_OUT in note]
        self.quality = compared_by(runs, self.notes)
        self.notes += on_validation(runs)
        reserved = ["seeds", *numbers.forms(self.quality)]
        self.columns, self.rows = tabulate(runs, self.notes, reserved)
        self.notes += missing_and_failed(self.columns, self.rows, self.quality)
        self.panels = panels(self.columns, self.rows)
        self.measured = numbers.of_runs(self.rows, self.quality)

    def __len__(self) -> int:
        return len(self.measured)

    @property
    def lines(self) -> list[str]:
        """Names of the lines in all panels."""
        return lines(self.rows)

    @cached_property
    def statistics(self) -> pd.DataFrame:
        """One line a row: medians, ranges, means and standard deviations over its runs."""
        return numbers.of_rows(self.measured)

    @cached_property
    def verdict(self) -> Verdict:
        """What the numbers say, in sentences by heading."""
        return verdict(self.panels, self.rows, self.measured, self.quality, self._left_out)

    def table(self) -> pd.DataFrame:
        """One line a setting: what it is, how many seeds, and the statistics of every measure."""
        names = [c.name for c in self.columns if c.name != "rounds"]  # which has a column anyhow
        told = pd.DataFrame(
            {name: [row.values.get(name) for row in self.rows] for name in names}, dtype=object
        )
        told["seeds"] = [len(row.runs) for row in self.rows]
        return told.join(self.statistics)

    def frame(self) -> pd.DataFrame:
        """One line a run: panel, line, seed, directory, and every measure."""
        told = [(row.panel, row.line, str(run.directory)) for row in self.rows for run in row.runs]
        return pd.DataFrame(told, columns=["panel", "line", "directory"]).join(
            self.measured.drop(columns="row")
        )

    def curves(self) -> pd.DataFrame:
        """Quality against every cost: panel, line, cost, x, median, low, high, seeds."""
        return numbers.curves(self.rows, self.quality)

    def clients(self) -> pd.DataFrame:
        """Final quality on every client's own examples, where it was measured: panel, line, seed, client, value."""
        return numbers.of_clients([row for rows in self.panels.values() for row in rows], self.quality)

    def plot(self, cost: str = "rounds") -> altair.VConcatChart:
        """The curves of every panel against rounds, passes or MB; the pointer shows the numbers.

        Raises:
            ValueError: There is no such cost.
        """
        from pisa_fl.results.report import charts

        return charts.notebook(self.curves(), self.titles(), self.lines, cost, self.quality)

    def titles(self) -> dict[str, str]:
        """What every panel is of, in words: data, skew, clients, model and seeds."""
        return {
            panel: f"{rows[0].title}, {numbered(sorted({seed for row in rows for seed in row.seeds}))}"
            for panel, rows in self.panels.items()
        }

    def words(self) -> str:
        """What all of it is, in one sentence."""
        seeds = sorted({seed for row in self.rows for seed in row.seeds})
        methods = ", ".join(dict.fromkeys(row.method for row in self.rows))
        return (
            f"{_count(len(self), 'finished run')}: {methods}, {_count(len(self.lines), 'setting')} on"
            f" {_count(len(self.panels), 'federation')}, {numbered(seeds)}, compared by {self.quality.name}."
        )

    def _repr_html_(self) -> str:
        return self.table().to_html(index=False)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def load_runs(*folders: Path | str) -> Runs:
    """The finished runs below folders: run directories, or those of sweeps.

    Raises:
        ValueError: There is no such folder, or no finished run in any.
    """
    return Runs(*find_runs([Path(folder) for folder in folders]))
