"""The table and the picture of all outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt

from experiments.benchmarks.measure import Round
from experiments.benchmarks.outcome import Figure, Outcome

LEAST = 0.01
"""Smaller shares are drawn as this one."""


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The figures, then the times behind them, then where the time goes."""
    lines = [_row("work", "figure", "median", "from .. to", "turns", "target", "met"), "| --- " * 7 + "|"]
    for outcome in outcomes:
        rows = [[figure.name, *_cells(figure)] for figure in outcome.figures]
        lines += _block(outcome, rows + [[note, *[""] * 5] for note in outcome.notes])
    lines += ["", _row("work", "side", "ms a round, median", "it chose"), "| --- " * 4 + "|"]
    for outcome in outcomes:
        lines += _block(
            outcome, [[name, *_times(rounds)] for name, rounds in outcome.rounds.items() if rounds]
        )
    for outcome in outcomes:
        if outcome.parts:
            lines += ["", _row(_title(outcome), "share of the time"), "| --- | --- |"]
            lines += [_row(name, f"{share:.1%}") for name, share in outcome.parts.items()]
    return "\n".join(lines) + "\n"


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Every figure that has a target by its distance from it: median and range, good to the right of 1."""
    measured = [(o, f) for o in outcomes for f in o.figures if f.values and f.target is not None]
    canvas, axes = plt.subplots(figsize=(10, 1 + 0.35 * len(measured)), layout="constrained")
    for height, (_, figure) in enumerate(measured):
        margins = sorted(_margin(figure, value) for value in figure.values)
        colour = "tab:green" if figure.met else "tab:red"
        axes.plot([margins[0], margins[-1]], [height, height], color=colour, alpha=0.5, linewidth=4)
        axes.plot(_margin(figure, figure.median), height, "o", color=colour)
    labels = [f"{o.name}, {o.title}: {f.name} {f.median:.2f} ({_target(f)})" for o, f in measured]
    axes.set_yticks(range(len(measured)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    for write in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        write("{x:g}")
    axes.set_xlabel("times better than the target")
    canvas.savefig(path, dpi=150)
    plt.close(canvas)


def _margin(figure: Figure, value: float) -> float:
    """How many times better than the target a value is."""
    if figure.at_least is not None:
        return value / figure.at_least
    assert figure.at_most is not None
    return figure.at_most / max(value, LEAST)


def _cells(figure: Figure) -> list[str]:
    """A figure's columns behind its name."""
    if not figure.values:
        return ["not installed", "", "", _target(figure), ""]
    span = f"{min(figure.values):.2f} .. {max(figure.values):.2f}"
    met = "" if figure.target is None else "yes" if figure.met else "no"
    return [f"{figure.median:.2f}", span, str(len(figure.values)), _target(figure), met]


def _target(figure: Figure) -> str:
    """A figure's target in words."""
    if figure.target is None:
        return ""
    return f"{'at most' if figure.at_least is None else 'at least'} {figure.target:g}"


def _times(rounds: Sequence[Round]) -> list[str]:
    """A side's columns behind its name."""
    milliseconds = 1000 * median(one["seconds"] for one in rounds)
    chosen = [f"{key} {rounds[-1][key]}" for key in ("threads", "batch") if key in rounds[-1]]
    return [f"{milliseconds:,.0f}", "".join(chosen)]


def _title(outcome: Outcome) -> str:
    return f"**{outcome.name}** {outcome.title}"


def _block(outcome: Outcome, rows: Sequence[Sequence[str]]) -> list[str]:
    """An outcome's rows, the first of which names it."""
    return [_row("" if i else _title(outcome), *row) for i, row in enumerate(rows)]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
