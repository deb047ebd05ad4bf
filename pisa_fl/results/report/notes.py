"""What is missing among runs that are compared, and which of them failed, with their directories."""

from __future__ import annotations

from collections.abc import Sequence

from pisa_fl.metric import Metric
from pisa_fl.results.finished import Run
from pisa_fl.results.report.rows import Row, words
from pisa_fl.results.settings import METHOD, VERSION, Column


def missing_and_failed(columns: Sequence[Column], rows: Sequence[Row], quality: Metric) -> list[str]:
    """Notes on what rows do not have in common, and on runs that diverged or learnt nothing."""
    notes = []
    seeds = sorted({seed for row in rows for seed in row.seeds})
    for row in rows:
        if lacking := [seed for seed in seeds if seed not in row.seeds]:
            notes.append(f"no run of {row.label} with seed {', '.join(map(str, lacking))}, which others have")
    around = [
        c.name for c in columns if c.name != "rounds" and c.key.partition(".")[0] not in (METHOD, VERSION)
    ]
    tried: dict[str, dict[str, None]] = {}  # what each method was tried with
    for row in rows:
        tried.setdefault(row.method, {})[words(around, row.values)] = None
    for what in dict.fromkeys(what for own in tried.values() for what in own):
        if absent := [method for method, own in tried.items() if what not in own]:
            notes.append(f"no run of {', '.join(absent)} with {what}, which others have")
    notes += [
        f"{run.directory} ({row.label}, seed {run.seed}) diverged, and is counted"
        for row in rows
        for run in row.runs
        if run.diverged
    ]
    notes += [
        f"{run.directory} ({row.label}, seed {run.seed}) ended AT CHANCE: its {quality.name} is no better than"
        f" {quality.shown(run.chance)}, which always giving the same answer has; it is counted"
        for row in rows
        for run in row.runs
        if run.chance is not None and not run.diverged
    ]
    return notes


def on_validation(runs: Sequence[Run]) -> list[str]:
    """A note on the runs whose numbers are not of the test set, if there are any."""
    count = sum(bool(run.config.get("data", {}).get("validation")) for run in runs)
    if not count:
        return []
    which = "all runs are" if count == len(runs) else f"{count} of {len(runs)} runs are"
    return [f"{which} measured on a share of the training examples (data.validation), not on the test set"]
