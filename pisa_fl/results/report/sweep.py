"""What was swept, and final quality against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pisa_fl.metric import Metric
from pisa_fl.results.figures import draw_federations, draw_sweep, qualities
from pisa_fl.results.report.rows import Row, differing, of_problem, words
from pisa_fl.results.settings import order, written

if TYPE_CHECKING:
    from pisa_fl.results.runs import Runs


def sweep(runs: Runs, title: str) -> Callable[[Path], None] | None:
    """What draws final quality against what was swept: federations that differ in several ways, or a parameter; of
    several parameters, the one with the most values.
    """
    columns, rows, quality = runs.columns, runs.rows, runs.quality
    if sum(of_problem(column) for column in columns) > 1 and len(runs.panels) > 1:
        finals = {
            name: {row.line: _finals(row, quality) for row in there} for name, there in runs.panels.items()
        }
        return lambda path: draw_federations(finals, title, path, quality)
    swept: dict[str, None] = {}
    for row in rows:
        swept |= dict.fromkeys(differing(columns, [r.values for r in rows if r.method == row.method]))
    if not swept:
        return None
    counts = {name: len({written(row.values[name]) for row in rows if name in row.values}) for name in swept}
    numeric = [n for n in swept if all(order(row.values[n])[0] == 0 for row in rows if n in row.values)]
    parameter = max(numeric or swept, key=lambda name: counts[name])
    others = [name for name in swept if name != parameter]
    lines: dict[str, list[tuple[Any, list[float]]]] = {}
    level = {}
    for row in rows:
        what = words(others, row.values)
        label = f"{row.method} ({what})" if what else row.method
        if parameter in row.values:
            lines.setdefault(label, []).append((row.values[parameter], _finals(row, quality)))
        else:
            level[label] = _finals(row, quality)
    return lambda path: draw_sweep(lines, level, parameter, path, quality)


def _finals(row: Row, quality: Metric) -> list[float]:
    return [float(qualities(run.metrics, quality)[-1]) for run in row.runs]
