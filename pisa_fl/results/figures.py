"""Pictures of runs: their metrics against what they cost, and comparisons of several runs.

Names and values come from users, and may hold what a picture would take for a formula: `plain` is for all of them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from partitioners.picture import plain
from pisa_fl.metric import TRAIN_LOSS, Measures, Metric
from pisa_fl.results.settings import order, written
from pisa_fl.system.files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Mapping[str, Any]
Column = NDArray[np.float64]

COSTS = {"round": "rounds", "passes": "passes over the data", "megabytes": "megabytes, both ways"}
"""What quality is drawn against: a communication, a computation and a payload."""

STYLES = ("-", "--", ":", "-.")
"""Of lines: the next one when the ten colours are used up."""


def draw_curves(metrics: Sequence[Metrics], title: str, path: Path, measures: Measures) -> None:
    """One run: its quality against rounds, losses, and for ADMM methods the residuals."""
    quality, loss = measures.quality, measures.loss
    has_residuals = any("primal_residual" in m for m in metrics)
    figure, (axes,) = _grid(1, 2 + has_residuals, title, 3.6)
    rounds = _column(metrics, "round")
    evaluated = tested(metrics, quality)
    x = _column(evaluated, "round")
    axes[0].plot(x, quality.factor * _column(evaluated, quality.key), color="C0")
    _label(axes[0], "rounds", f"test {quality.label}")
    axes[1].plot(x, _column(evaluated, loss.key), color="C0", label="test")
    axes[1].plot(rounds, _column(metrics, TRAIN_LOSS), color="C1", label="training")
    axes[1].set_yscale("log")
    axes[1].legend(frameon=False)
    _label(axes[1], "rounds", loss.label)
    if has_residuals:
        later = [m for m in metrics if m.get("dual_residual")]  # not before the duals have moved
        for key, color in (("primal_residual", "C2"), ("dual_residual", "C3")):
            axes[2].plot(_column(later, "round"), _column(later, key), color=color, label=key.split("_")[0])
        axes[2].set_yscale("log")
        axes[2].legend(frameon=False)
        _label(axes[2], "rounds", "residual")
    _save(figure, path)


def draw_comparison(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[Metrics]]]], title: str, path: Path, quality: Metric
) -> None:
    """Several methods: quality against rounds, passes and bytes, one row a federation.

    Args:
        panels: Title of each federation -> name of each method -> the metrics of its runs (seeds); a line is their
            median, a band their range, as far as all of them go. A method has its colour everywhere.
        title: Of the picture.
        path: Where to write it.
        quality: What they are compared by.
    """
    figure, rows = _grid(len(panels), len(COSTS), title, 3.6 if len(panels) == 1 else 2.9)
    numbers = _numbers(panels.values())
    for axes, (what, runs) in zip(rows, panels.items(), strict=True):
        if len(panels) > 1:
            axes[0].set_title(plain(what, 160), loc="left", fontsize="medium")
        for ax, (cost, label) in zip(axes, COSTS.items(), strict=True):
            for name, seeds in runs.items():
                x, table = together(seeds, cost, quality)
                look = _line(numbers[name])
                ax.plot(x, np.median(table, axis=0), **look)
                if len(seeds) > 1:
                    low, high = table.min(axis=0), table.max(axis=0)
                    ax.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
            _label(ax, label, f"test {quality.label}")
            if cost != "round":
                ax.set_xscale("symlog", linthresh=1)
    counts = {name: {len(runs[name]) for runs in panels.values() if name in runs} for name in numbers}
    several = any(count != {1} for count in counts.values())
    _legend(figure, {n: f", n={max(c)}" if several and len(c) == 1 else "" for n, c in counts.items()})
    _save(figure, path)


def draw_federations(
    panels: Mapping[str, Mapping[str, Sequence[float]]], title: str, path: Path, quality: Metric
) -> None:
    """Final quality of several methods on several federations, side by side: medians of the seeds, and their range.

    Args:
        panels: Words for each federation -> name of each method -> final values of its seeds.
        title: Of the picture.
        path: Where to write it.
        quality: What they are compared by.
    """
    figure, ((ax,),) = _grid(1, 1, title, 4.2, 2 + 1.2 * len(panels))
    numbers = _numbers(panels.values())
    for name, number in numbers.items():
        shift = 0.6 * ((number + 0.5) / len(numbers) - 0.5)
        points = [
            (place + shift, quality.factor * np.array(finals[name]))
            for place, finals in enumerate(panels.values())
            if name in finals
        ]
        places = [place for place, _ in points]
        look = _line(number)
        ax.vlines(places, [v.min() for _, v in points], [v.max() for _, v in points], color=look["color"])
        ax.plot(places, [np.median(v) for _, v in points], marker="o", markersize=5, linewidth=0.8, **look)
    ax.set_xticks(
        range(len(panels)),
        [fill(plain(text, 60), 18, break_long_words=False) for text in panels],
        fontsize="small",
    )
    _label(ax, "", f"final test {quality.label}")
    _legend(figure, dict.fromkeys(numbers, ""))
    _save(figure, path)


def draw_sweep(
    swept: Mapping[str, Sequence[tuple[Any, Sequence[float]]]],
    without: Mapping[str, Sequence[float]],
    parameter: str,
    path: Path,
    quality: Metric,
) -> None:
    """Final quality of several methods against a swept parameter: numbers to scale, else all values side by side.

    Args:
        swept: Name of each method -> (value of the parameter, final values of its seeds).
        without: Name of each method that has no such parameter -> its final values: a level line.
        parameter: Name of the parameter.
        path: Where to write the picture.
        quality: What they are compared by.
    """
    figure, ((ax,),) = _grid(1, 1, "", 3.6)
    values = sorted({written(v): v for points in swept.values() for v, _ in points}.values(), key=order)
    to_scale = all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    places = {written(v): float(v) if to_scale else i for i, v in enumerate(values)}
    numbers = {name: number for number, name in enumerate([*swept, *without])}
    for name, points in swept.items():
        points = sorted(points, key=lambda point: places[written(point[0])])
        table = [quality.factor * np.array(finals) for _, finals in points]
        middle = np.array([np.median(column) for column in table])
        with np.errstate(invalid="ignore"):  # of values that are not finite, which are not drawn
            low = middle - [column.min() for column in table]
            high = [column.max() for column in table] - middle
        ax.errorbar(
            [places[written(value)] for value, _ in points],
            middle,
            yerr=(low, high),
            marker="o",
            capsize=3,
            **_line(numbers[name]),
        )
    for name, finals in without.items():
        ax.axhline(quality.factor * float(np.median(finals)), **_line(numbers[name]))
    if to_scale and values[0] > 0 and values[-1] >= 10 * values[0]:
        ax.set_xscale("log")
    ax.set_xticks(list(places.values()), [plain(text, 24) for text in places])
    ax.set_xticks([], minor=True)
    _label(ax, parameter, f"final test {quality.label}")
    _legend(figure, dict.fromkeys(numbers, ""))
    _save(figure, path)


def tested(metrics: Sequence[Metrics], quality: Metric) -> list[Metrics]:
    """The rounds that were evaluated."""
    return [line for line in metrics if quality.key in line]


def qualities(metrics: Sequence[Metrics], quality: Metric) -> Column:
    """What runs are compared by, of every round that was evaluated; what is no number counts as nothing learnt."""
    found = _column(tested(metrics, quality), quality.key)
    return np.where(np.isnan(found), quality.worst, found)


def megabytes(metrics: Sequence[Metrics]) -> Column:
    """Payload of both directions up to every round, in MB."""
    return (_column(metrics, "bytes_up") + _column(metrics, "bytes_down")) / 1e6


def together(seeds: Sequence[Sequence[Metrics]], cost: str, quality: Metric) -> tuple[Column, Column]:
    """Common points of a cost, as far as all seeds go, and the quality of every seed (rows) there, as people see it."""
    seeds = [tested(metrics, quality) for metrics in seeds]
    x = [megabytes(metrics) if cost == "megabytes" else _column(metrics, cost) for metrics in seeds]
    points = np.unique(np.concatenate(x))
    points = points[points <= min(own[-1] for own in x)]
    table = [
        np.interp(points, own, quality.factor * qualities(metrics, quality))
        for own, metrics in zip(x, seeds, strict=True)
    ]
    return points, np.array(table)


def _column(metrics: Sequence[Metrics], key: str) -> Column:
    """One value of every round; NaN where it is null."""
    return np.array([m[key] for m in metrics], dtype=np.float64)


def _line(index: int) -> dict[str, Any]:
    """How the line of a method looks."""
    return {"color": f"C{index}", "linestyle": STYLES[index // 10 % len(STYLES)]}


def _numbers(panels: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Names of the methods of all panels, numbered."""
    return {name: i for i, name in enumerate(dict.fromkeys(name for panel in panels for name in panel))}


def _legend(figure: Figure, names: Mapping[str, str]) -> None:
    """What every line is, beside the axes; names that look the same are numbered.

    Args:
        figure: The picture.
        names: Name of each line, in their order -> what is said of it besides.
    """
    from matplotlib.lines import Line2D

    shown = [plain(name) for name in names]
    labels = [
        f"{name if shown.count(name) == 1 else f'{name} [{i + 1}]'}{more}"
        for i, (name, more) in enumerate(zip(shown, names.values(), strict=True))
    ]
    handles = [Line2D([], [], **_line(i)) for i in range(len(labels))]
    figure.set_figwidth(figure.get_figwidth() + 0.6 + 0.07 * max(map(len, labels)))  # inches of small letters
    figure.legend(handles, labels, frameon=False, loc="outside right upper", fontsize="small")


def _grid(
    rows: int, columns: int, title: str, height: float, width: float = 4.6
) -> tuple[Figure, list[list[Axes]]]:
    """A picture of so many axes, each so high and wide, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow imports, that only pictures need
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(plain(title, 100))
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _label(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(plain(x))
    ax.set_ylabel(y)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write(path, drawn.getvalue())
