"""The tables of a report, as text for people: the same cells become Markdown, LaTeX and HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pisa_fl.metric import Metric
from pisa_fl.results.report import numbers
from pisa_fl.results.report.paired import Finding, differences
from pisa_fl.results.report.rows import COSTS
from pisa_fl.results.report.verdict import difference_in_words
from pisa_fl.results.settings import written
from pisa_fl.system.text import visible

if TYPE_CHECKING:
    import pandas as pd

    from pisa_fl.results.runs import Runs


@dataclass(frozen=True)
class Cell:
    """Text of a cell.

    Attributes:
        text: What it shows.
        best: Whether it is the best of those that it is compared with.
    """

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: What it shows, in a sentence.
        header: Names of the columns.
        body: Its lines.
        names: How many columns from the left say what a line is.
    """

    caption: str
    header: Sequence[str]
    body: Sequence[Sequence[Cell]]
    names: int = 1


def settings(runs: Runs) -> Table:
    """One line a setting: a median, and the range if there is one, of every measure."""
    names = [c.name for c in runs.columns if c.name != "rounds"]  # which has a column anyhow
    forms = numbers.forms(runs.quality)
    marked = {name: _best(runs, name) for name in list(forms)[:2]}
    asked = [numbers.cost_name("rounds", t, runs.quality) for t in numbers.targets(runs.rows)]
    body = []
    for number, row in enumerate(runs.rows):
        cells = [Cell(visible(written(row.values[n])) if n in row.values else "") for n in names]
        cells.append(Cell(str(len(row.runs))))
        for name, form in forms.items():
            cells.append(
                Cell(_range(runs.statistics.loc[number], name, form), number in marked.get(name, ()))
            )
        cells += [Cell(_reached(runs, number, name, "{:g}")) for name in asked]
        body.append(cells)
    caption = f"Median over seeds, and the range; the best {runs.quality.name} of each federation is marked."
    return Table(caption, [*names, "seeds", *forms, *asked], body, len(names))


def pivot(runs: Runs) -> Table:
    """Final quality of every line on every federation: mean and standard deviation over seeds."""
    name = numbers.final(runs.quality)
    marked = _best(runs, name, "mean")
    places = {(row.line, row.panel): number for number, row in enumerate(runs.rows)}
    form = numbers.forms(runs.quality)[name]

    def cell(line: str, panel: str) -> Cell:
        number = places.get((line, panel))
        if number is None:
            return Cell("-")
        return Cell(_mean(runs.statistics.loc[number], name, form), number in marked)

    caption = f"Final {runs.quality.label}: mean and standard deviation over seeds; the best of each column is marked."
    header = ["strategy", *(panel or runs.rows[0].title for panel in runs.panels)]
    return Table(
        caption, header, [[Cell(line), *(cell(line, p) for p in runs.panels)] for line in runs.lines]
    )


def results(runs: Runs, panel: str) -> Table:
    """The rows of a panel: final and best quality, and what they cost."""
    forms = numbers.forms(runs.quality)
    qualities = list(forms)[:2]
    marked = {(n, kind): _best(runs, n, kind) for n in qualities for kind in ("median", "mean")}
    header, body = ["strategy", "seeds"], []
    for name in qualities:
        header += [f"{name}: median (range)", "mean ± sd"]
    for row in runs.panels[panel]:
        number = runs.rows.index(row)
        own = runs.statistics.loc[number]
        cells = [Cell(row.line), Cell(str(len(row.runs)))]
        for name in qualities:
            cells.append(Cell(_range(own, name, forms[name]), number in marked[name, "median"]))
            cells.append(Cell(_mean(own, name, forms[name]), number in marked[name, "mean"]))
        cells += [Cell(_range(own, cost, forms[cost])) for cost in COSTS]
        body.append(cells)
    return Table(
        f"Results, {runs.titles()[panel]}; the best of each column is marked.", [*header, *COSTS], body
    )


def costs(runs: Runs) -> Table | None:
    """What every target cost; None if there are no targets."""
    asked = numbers.targets(runs.rows)
    if not asked:
        return None
    header, body = ["federation", "strategy"], []
    forms = {"rounds": "{:g}", "passes": "{:.3g}", "MB": "{:.3g}"}
    for target in asked:
        header += [f"{numbers.target_name(target, runs.quality)}: {COSTS[0]}", *COSTS[1:]]
    marked = {
        name: _best(runs, name, sign=-1)
        for target in asked
        for name in (numbers.cost_name(cost, target, runs.quality) for cost in COSTS)
    }
    for panel, rows in runs.panels.items():
        for row in rows:
            number = runs.rows.index(row)
            cells = [Cell(panel or "all"), Cell(row.line)]
            for target in asked:
                for cost in COSTS:
                    name = numbers.cost_name(cost, target, runs.quality)
                    cells.append(
                        Cell(_reached(runs, number, name, forms[cost], cost), number in marked[name])
                    )
            body.append(cells)
    caption = (
        "Rounds, passes and MB until a target was first reached: median over seeds, and how many of them reached it if"
        " not all; a dash if half of them did not. The cheapest of each federation is marked."
    )
    return Table(caption, header, body, 2)


def compared(runs: Runs) -> Table | None:
    """How far the leader of each federation is ahead of the others; None if nothing is compared."""
    name = numbers.final(runs.quality)
    found = differences(runs.panels, runs.measured, runs.rows, name, runs.quality)
    body = [
        [
            Cell(panel or "all"),
            Cell(one.ahead.line),
            Cell(one.behind.line),
            Cell(difference_in_words(one, runs.quality) or "-"),
            Cell(str(len(one.values))),
            *(Cell("-" if math.isnan(p) else f"{p:.2g}") for p in (one.p, one.raised)),
            Cell(str(one.finding), one.finding == Finding.BEYOND),
        ]
        for panel, own in found.items()
        for one in own
    ]
    caption = f"Final {runs.quality.name}: how far the best mean of each federation is ahead, seed by seed."
    header = ["federation", "ahead", "behind", "by, mean and range", "pairs", "p", "p, Holm", "finding"]
    return Table(caption, header, body, 3) if body else None


def clients(frame: pd.DataFrame, quality: Metric) -> Table | None:
    """How unequal clients are; None if they were not measured."""
    form = numbers.forms(quality)[numbers.final(quality)]
    body = []
    for (panel, line), own in frame.groupby(["panel", "line"], sort=False):
        values = np.sort(own["value"].to_numpy())[:: 1 if quality.better == "higher" else -1]
        worst = values[: max(1, len(values) // 10)]
        told = (values.mean(), float(np.median(values)), worst.mean(), values[0], values.std())
        body.append(
            [Cell(panel or "all"), Cell(line), Cell(str(len(values))), *(Cell(form.format(x)) for x in told)]
        )
    caption = f"Final {quality.label} on clients' own examples, every client of every seed counting the same."
    header = ["federation", "strategy", "clients x seeds", "mean", "median", "worst tenth", "worst", "sd"]
    return Table(caption, header, body, 2) if body else None


def along(curves: pd.DataFrame, panel: str, title: str, quality: Metric) -> Table:
    """What a panel's curves show: the medians at a few rounds."""
    own = curves[(curves["panel"] == panel) & (curves["cost"] == "rounds")]
    last = own["x"].max()
    at = sorted({round(last * share) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)})
    form = numbers.forms(quality)[numbers.final(quality)]
    body = []
    for line, points in own.groupby("line", sort=False):
        x, y = points["x"].to_numpy(), points["median"].to_numpy()
        cells = [form.format(np.interp(place, x, y)) if place <= x[-1] else "-" for place in at]
        body.append([Cell(str(line)), *map(Cell, cells)])
    return Table(
        f"{quality.label} at some rounds, median over seeds: {title}.",
        ["strategy", *(f"round {x}" for x in at)],
        body,
    )


def markdown(table: Table) -> str:
    """A table in Markdown; what is best is bold."""
    lines = [list(table.header), ["---"] * len(table.header)]
    lines += [[f"**{c.text}**" if c.best else c.text for c in cells] for cells in table.body]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n" for cells in lines)


def _best(runs: Runs, name: str, kind: str = "median", sign: int | None = None) -> set[int]:
    """Numbers of the rows that are best in their panel, where it has several; what is not finite is never best."""
    column = runs.statistics[name if kind == "median" else f"{name}, {kind}"]
    sign = sign or (1 if runs.quality.better == "higher" else -1)
    best: set[int] = set()
    for rows in runs.panels.values():
        values = {number: float(column[number]) for number in map(runs.rows.index, rows)}
        finite = [value for value in values.values() if math.isfinite(value)]
        if len(rows) > 1 and finite and (top := max(finite, key=lambda value: sign * value)) is not None:
            best |= {number for number, value in values.items() if value == top}
    return best


def _range(own: pd.Series, name: str, form: str) -> str:
    middle, low, high = (numbers.shown(own[key], form) for key in (name, f"{name}, min", f"{name}, max"))
    return middle if low == high else f"{middle} ({low}-{high})"


def _mean(own: pd.Series, name: str, form: str) -> str:
    mean, deviation = own[f"{name}, mean"], own[f"{name}, std"]
    return numbers.shown(mean, form) + (f" ± {form.format(deviation)}" if math.isfinite(deviation) else "")


def _reached(runs: Runs, number: int, name: str, form: str, cost: str = "rounds") -> str:
    """Median cost of a target, and how many runs reached it if some did not."""
    own, count = runs.statistics.loc[number], len(runs.rows[number].runs)
    reached = int(own[f"rounds{name.removeprefix(cost)}, reached"])
    middle = "-" if own[name] == math.inf else form.format(own[name])
    return middle if reached in (0, count) else f"{middle} ({reached} of {count})"
