"""`pisa-fl-report FOLDER...`: a finished sweep, or any run directories, as a table and figures.

Runs whose configurations differ only in the seed become one row (median and range); what else differs between them
becomes a column. Written into the first folder, or `--output`: `report.md`, with notes on what is missing or unequal
below the table, `report.csv`, one plain number a column, `comparison.png` (quality against rounds, passes and bytes)
and, where something was swept, `sweep.png` (final quality against it).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pisa_fl.config.explain import explain
from pisa_fl.metric import Metric
from pisa_fl.results.finished import Run, find_runs
from pisa_fl.results.settings import METHOD, Column, describe, identify, order, written
from pisa_fl.system.files import write
from pisa_fl.system.text import tolerate_any_text, visible

if TYPE_CHECKING:
    import pandas as pd  # slow to import, as are the pictures: `--help` needs neither


def _columns(quality: Metric) -> dict[str, str]:
    """Columns of every report, and how their numbers are shown."""
    form = f"{{:.{quality.digits}f}}"
    costs = {"rounds": "{:g}", "passes": "{:.0f}", "MB": "{:.1f}"}
    return {f"final {quality.label}": form, f"best {quality.label}": form} | costs


@dataclass(frozen=True)
class Row:
    """Runs of one setting.

    Attributes:
        values: What distinguishes the setting from the others, by the column's name.
        label: Name of the row in a picture and in notes, no other row's.
        runs: One a seed.
    """

    values: Mapping[str, Any]
    label: str
    runs: Sequence[Run]

    @property
    def method(self) -> str:
        """What was chosen as the strategy."""
        return written(self.values[METHOD])

    @property
    def seeds(self) -> list[int]:
        """The runs' seeds in order."""
        return sorted(run.seed for run in self.runs)

    @property
    def final(self) -> list[float]:
        """Final quality of each run."""
        from pisa_fl.results.figures import qualities

        return [float(qualities(run.metrics, run.measures.quality)[-1]) for run in self.runs]


def report(folders: Sequence[Path], output: Path, title: str) -> str:
    """Write the table and the figures into `output`; the table and its notes as Markdown are also returned.

    Raises:
        ValueError: There is no finished run.
        OSError: A file cannot be written.
    """
    from pisa_fl.results.figures import draw_comparison

    runs, notes = find_runs(folders)
    quality = _compared_by(runs, notes)
    notes += _on_validation(runs)
    columns, rows = tabulate(runs, notes, quality)
    notes += _unequal(columns, rows, quality)
    numbers = _numbers(rows, quality)
    output.mkdir(parents=True, exist_ok=True)
    curves = {row.label: [run.metrics for run in row.runs] for row in rows}
    _draw(output / "comparison.png", lambda path: draw_comparison(curves, title, path, quality), notes)
    _draw(output / "sweep.png", _sweep(columns, rows, quality), notes)
    settings = _settings([c for c in columns if c.name != "rounds"], rows)  # which has a column anyhow
    text = _markdown(_table(settings, numbers, quality), notes)
    write(output / "report.md", text)
    write(output / "report.csv", settings.join(numbers.round(6)).to_csv(index=False))
    return text


def _compared_by(runs: list[Run], notes: list[str]) -> Metric:
    """What the first run is judged by; runs that are judged by something else are left out, with a note."""
    quality = runs[0].measures.quality
    for run in [run for run in runs if run.measures.quality != quality]:
        notes.append(
            f"{run.directory} is left out: it is judged by {run.measures.quality.name} and {runs[0].directory} by"
            f" {quality.name}"
        )
        runs.remove(run)
    return quality


def _on_validation(runs: Sequence[Run]) -> list[str]:
    """A note on the runs whose numbers are not of the test set, if there are any."""
    count = sum(bool(run.config.get("data", {}).get("validation")) for run in runs)
    if not count:
        return []
    which = "all runs are" if count == len(runs) else f"{count} of {len(runs)} runs are"
    return [f"{which} measured on a share of the training examples (data.validation), not on the test set"]


def tabulate(runs: Sequence[Run], notes: list[str], quality: Metric) -> tuple[list[Column], list[Row]]:
    """Group runs by everything but the seed.

    Args:
        runs: Finished runs.
        notes: Where is told which runs repeat others.
        quality: What they are compared by.

    Returns:
        What tells the rows apart, and the rows in the order of their first runs.
    """
    settings: dict[str, dict[int, Run]] = {}
    for run, setting in zip(runs, identify([run.config for run in runs]), strict=True):
        first = settings.setdefault(setting, {}).setdefault(run.seed, run)
        if first is not run:
            notes.append(
                f"{run.directory} is {first.directory} again, and is not counted"
                if run.repeats(first)
                else f"{run.directory} has the seed and the configuration of {first.directory}, but OTHER NUMBERS;"
                " only the latter is counted"
            )
    groups = [list(by_seed.values()) for by_seed in settings.values()]
    # older runs do not tell what was chosen; one of the same setting may
    spokesmen = [max(group, key=lambda run: "choices" in run.config).config for group in groups]
    columns, values = describe(spokesmen, reserved=["seeds", *_columns(quality)])
    return columns, [
        Row(own, _label(columns, own, values), group) for own, group in zip(values, groups, strict=True)
    ]


def _label(columns: Sequence[Column], own: Mapping[str, Any], values: Sequence[Mapping[str, Any]]) -> str:
    """The method, and what tells the setting from others of the same method."""
    peers = [other for other in values if other[METHOD] == own[METHOD]]
    words = _words(_differing(columns, peers), own)
    return f"{written(own[METHOD])} ({words})" if words else written(own[METHOD])


def _differing(columns: Sequence[Column], values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the columns in which settings differ."""
    return [c.name for c in columns if len({written(v[c.name]) if c.name in v else "" for v in values}) > 1]


def _unequal(columns: Sequence[Column], rows: Sequence[Row], quality: Metric) -> list[str]:
    """Notes on what rows of one picture do not have in common, and on runs that diverged or learnt nothing."""
    notes = []
    seeds = sorted({seed for row in rows for seed in row.seeds})
    for row in rows:
        if lacking := [seed for seed in seeds if seed not in row.seeds]:
            notes.append(f"no run of {row.label} with seed {', '.join(map(str, lacking))}, which others have")
    around = [c.name for c in columns if c.name != "rounds" and c.key.partition(".")[0] != METHOD]
    tried: dict[str, dict[str, None]] = {}  # what each method was tried with
    for row in rows:
        tried.setdefault(row.method, {})[_words(around, row.values)] = None
    for words in dict.fromkeys(words for own in tried.values() for words in own):
        if absent := [method for method, own in tried.items() if words not in own]:
            notes.append(f"no run of {', '.join(absent)} with {words}, which others have")
    rounds = {row.label: row.runs[0].metrics[-1]["round"] for row in rows}
    if len(set(rounds.values())) > 1:
        notes.append(
            "numbers of rounds differ: " + ", ".join(f"{label} {count}" for label, count in rounds.items())
        )
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


def _words(names: Sequence[str], values: Mapping[str, Any]) -> str:
    """Some of a setting's values in words."""
    return ", ".join(f"{name} {written(values[name])}" for name in names if name in values)


def _settings(columns: Sequence[Column], rows: Sequence[Row]) -> pd.DataFrame:
    """The columns that say what a row is."""
    import pandas as pd

    table = {c.name: [_cell(row.values, c.name) for row in rows] for c in columns}
    return pd.DataFrame(table | {"seeds": [len(row.runs) for row in rows]})


def _cell(values: Mapping[str, Any], name: str) -> str:
    return visible(written(values[name])) if name in values else ""


def _numbers(rows: Sequence[Row], quality: Metric) -> pd.DataFrame:
    """Median, least and greatest of every measure for each row, and after how many rounds targets were reached.

    Targets that less than half of the runs reached have no median: infinitely many rounds.
    """
    import pandas as pd

    from pisa_fl.results.figures import megabytes, qualities, tested

    targets = sorted({target for row in rows for run in row.runs for target in run.targets})
    lines = []
    for number, row in enumerate(rows):
        for run in row.runs:
            values, last = qualities(run.metrics, quality), run.metrics[-1]
            best = values.max() if quality.better == "higher" else values.min()
            measured = (quality.factor * values[-1], quality.factor * best, last["round"], last["passes"])
            line = dict(zip(_columns(quality), (*measured, megabytes(run.metrics)[-1]), strict=True))
            for target in targets:
                line[_rounds_to(target, quality)] = next(
                    (
                        m["round"]
                        for m, q in zip(tested(run.metrics, quality), values, strict=True)
                        if quality.reaches(q, target)
                    ),
                    math.inf,
                )
            lines.append({"row": number} | line)
    groups = pd.DataFrame(lines).groupby("row", sort=False)
    numbers = groups.agg(["median", "min", "max"])
    numbers.columns = [name if kind == "median" else f"{name}, {kind}" for name, kind in numbers.columns]
    for target in targets:
        name = _rounds_to(target, quality)
        numbers[f"{name}, reached"] = groups[name].agg(lambda rounds: int((rounds < math.inf).sum()))
    return numbers


def _rounds_to(target: float, quality: Metric) -> str:
    return f"rounds to {quality.factor * target:g} {quality.unit or quality.name}"


def _table(settings: pd.DataFrame, numbers: pd.DataFrame, quality: Metric) -> list[list[str]]:
    """The table's cells as text, the header first: a median, and the range if there is one."""
    measures = _columns(quality)
    formats = measures | {c: "{:g}" for c in numbers if c.startswith("rounds to ") and "," not in c}
    lines = [[*settings.columns, *formats]]
    for (_, setting), (_, number) in zip(settings.iterrows(), numbers.iterrows(), strict=True):
        cells = [str(value) for value in setting]
        for name, form in formats.items():
            middle, low, high = (form.format(number[key]) for key in (name, f"{name}, min", f"{name}, max"))
            if name in measures:
                cells.append(middle if low == high else f"{middle} ({low}-{high})")
            else:
                reached, count = int(number[f"{name}, reached"]), setting["seeds"]
                middle = "-" if number[name] == math.inf else middle
                cells.append(middle if reached in (0, count) else f"{middle} ({reached} of {count})")
        lines.append(cells)
    return lines


def _markdown(lines: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    header, *body = lines
    text = ""
    for cells in (header, ["---"] * len(header), *body):
        text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text + "".join(f"\n* {visible(note)}" for note in notes) + ("\n" if notes else "")


def _sweep(columns: Sequence[Column], rows: Sequence[Row], quality: Metric) -> Callable[[Path], None] | None:
    """What draws final quality against the parameter that was swept; of several, the one with the most values."""
    from pisa_fl.results.figures import draw_sweep

    swept: dict[str, None] = {}
    for row in rows:
        swept |= dict.fromkeys(_differing(columns, [r.values for r in rows if r.method == row.method]))
    if not swept:
        return None
    counts = {name: len({_cell(row.values, name) for row in rows if name in row.values}) for name in swept}
    numeric = [n for n in swept if all(order(row.values[n])[0] == 0 for row in rows if n in row.values)]
    parameter = max(numeric or swept, key=lambda name: counts[name])
    others = [name for name in swept if name != parameter]
    lines: dict[str, list[tuple[Any, list[float]]]] = {}
    level = {}
    for row in rows:
        words = _words(others, row.values)
        label = f"{row.method} ({words})" if words else row.method
        if parameter in row.values:
            lines.setdefault(label, []).append((row.values[parameter], row.final))
        else:
            level[label] = row.final
    return lambda path: draw_sweep(lines, level, parameter, path, quality)


def _draw(path: Path, draw: Callable[[Path], None] | None, notes: list[str]) -> None:
    """Draw a picture in place of an earlier one; one that cannot be drawn is a note."""
    path.unlink(missing_ok=True)
    try:
        if draw is not None:
            draw(path)
    except Exception as error:
        notes.append(f"{path.name} is missing, it could not be drawn: {explain(error)}")


def main() -> None:
    """Entry point of `pisa-fl-report`."""
    parser = argparse.ArgumentParser(prog="pisa-fl-report", description="Table and figures of finished runs.")
    parser.add_argument("folders", nargs="+", type=Path, help="run directories, or folders of a sweep")
    parser.add_argument("--output", type=Path, help="where to write; the first folder if not given")
    parser.add_argument("--title", default="", help="title of the pictures")
    arguments = parser.parse_args()
    tolerate_any_text()
    output = arguments.output or arguments.folders[0]
    try:
        print(report(arguments.folders, output, arguments.title), end="")
    except (ValueError, OSError) as error:
        print(f"pisa-fl-report: {visible(explain(error))}", file=sys.stderr)
        sys.exit(2)
    print(f"\nwritten to {visible(str(output))}: report.md, report.csv and the pictures")


if __name__ == "__main__":
    main()
