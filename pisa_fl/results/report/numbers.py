"""What was measured of every run, and what the runs of a row have in common: medians, ranges, means and deviations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from pisa_fl.metric import Metric
from pisa_fl.results.figures import COSTS as DRAWN
from pisa_fl.results.figures import megabytes, qualities, together
from pisa_fl.results.finished import Run
from pisa_fl.results.report.rows import COSTS, Row

STATISTICS = ("median", "min", "max", "mean", "std")
"""Of the runs of a row; the standard deviation is that of a sample, and of one run not a number."""

POINTS = 200
"""Of a curve, at most: as many as a picture can show."""


def final(quality: Metric) -> str:
    """Name of the measure by which runs are compared."""
    return f"final {quality.label}"


def best(quality: Metric) -> str:
    """Name of the measure of the round with the best quality."""
    return f"best {quality.label}"


def forms(quality: Metric) -> dict[str, str]:
    """The measures that every report has, and how their numbers are shown."""
    form = f"{{:.{quality.digits}f}}"
    costs = {"rounds": "{:g}", "passes": "{:.0f}", "MB": "{:.1f}"}
    return {final(quality): form, best(quality): form} | costs


def shown(value: float, form: str) -> str:
    """A number for people."""
    return form.format(value) if math.isfinite(value) else "not finite"


def targets(rows: Sequence[Row]) -> list[float]:
    """The values whose cost runs were asked for."""
    return sorted({target for row in rows for run in row.runs for target in run.targets})


def target_name(target: float, quality: Metric) -> str:
    """A target for people."""
    return f"{quality.factor * target:g} {quality.unit or quality.name}"


def cost_name(cost: str, target: float, quality: Metric) -> str:
    """Name of the measure of what a target cost."""
    return f"{cost} to {target_name(target, quality)}"


def of_runs(rows: Sequence[Row], quality: Metric) -> pd.DataFrame:
    """One line a run: its row's number, its seed, and every measure; targets that were not reached cost infinity."""
    asked = targets(rows)
    return pd.DataFrame(
        {"row": number, "seed": run.seed} | _measured(run, quality, asked)
        for number, row in enumerate(rows)
        for run in row.runs
    )


def of_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """One line a row: the statistics of every measure, and how many of its runs reached each target."""
    groups = runs.drop(columns="seed").groupby("row", sort=False)
    with np.errstate(invalid="ignore"):  # the mean of what is infinite is, its deviation is no number
        numbers = groups.agg(list(STATISTICS))
    numbers.columns = [name if kind == "median" else f"{name}, {kind}" for name, kind in numbers.columns]
    for name in (name for name in runs if name.startswith("rounds to ")):
        numbers[f"{name}, reached"] = groups[name].agg(lambda rounds: int((rounds < math.inf).sum()))
    return numbers


def curves(rows: Sequence[Row], quality: Metric) -> pd.DataFrame:
    """Quality of every row against every cost: panel, line, cost, x, median, low, high, seeds.

    As far as all seeds of a row go, at their tests' common points.
    """
    parts = []
    for row in rows:
        metrics = [run.metrics for run in row.runs]
        for key, cost in zip(DRAWN, COSTS, strict=True):
            x, table = together(metrics, key, quality)
            chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))
            table = np.where(np.isfinite(table), table, np.nan)[:, chosen]
            parts.append(
                pd.DataFrame(
                    {
                        "panel": row.panel,
                        "line": row.line,
                        "cost": cost,
                        "x": x[chosen],
                        "median": np.median(table, axis=0),
                        "low": table.min(axis=0),
                        "high": table.max(axis=0),
                        "seeds": len(row.runs),
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def of_clients(rows: Sequence[Row], quality: Metric) -> pd.DataFrame:
    """Final quality on every client's own examples, where it was measured: panel, line, seed, client, value."""
    columns = ["panel", "line", "seed", "client", "value"]
    return pd.DataFrame(
        [
            (row.panel, row.line, run.seed, client, quality.factor * own[quality.name])
            for row in rows
            for run in row.runs
            for client, own in (run.clients or {}).items()
            if quality.name in own
        ],
        columns=columns,
    )


def at_cost(row: Row, cost: str, most: float, quality: Metric) -> float:
    """Mean over the runs of the quality that they had when they had cost so much, as people see it."""
    key = dict(zip(COSTS, DRAWN, strict=True))[cost]
    x, table = together([run.metrics for run in row.runs], key, quality)
    return float(np.mean(table[:, x <= most][:, -1]))


def _measured(run: Run, quality: Metric, asked: Sequence[float]) -> dict[str, float]:
    """Every measure of a run."""
    values, last = qualities(run.metrics, quality), run.metrics[-1]
    top = values.max() if quality.better == "higher" else values.min()
    ended = (quality.factor * values[-1], quality.factor * top, last["round"], last["passes"])
    measured = dict(zip(forms(quality), (*ended, megabytes(run.metrics)[-1]), strict=True))
    costs = np.array(
        [[m["round"], m["passes"], mb] for m, mb in zip(run.metrics, megabytes(run.metrics), strict=True)]
    )
    costs = costs[[quality.key in line for line in run.metrics]]
    for target in asked:
        reached = [quality.reaches(value, target) for value in values]
        spent = costs[reached.index(True)] if any(reached) else [math.inf] * len(COSTS)
        measured |= {cost_name(cost, target, quality): x for cost, x in zip(COSTS, spent, strict=True)}
    return measured
