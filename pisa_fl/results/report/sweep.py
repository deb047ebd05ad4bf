"""What was swept, and final quality against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pisa_fl.metric import Metric
from pisa_fl.results.figures import draw_sweep, qualities
from pisa_fl.results.report.rows import Row, differing, words
from pisa_fl.results.settings import Column, order, written


def sweep(columns: Sequence[Column], rows: Sequence[Row], quality: Metric) -> Callable[[Path], None] | None:
    """What draws final quality against the parameter that was swept; of several, the one with the most values."""
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
        finals = [float(qualities(run.metrics, quality)[-1]) for run in row.runs]
        if parameter in row.values:
            lines.setdefault(label, []).append((row.values[parameter], finals))
        else:
            level[label] = finals
    return lambda path: draw_sweep(lines, level, parameter, path, quality)
