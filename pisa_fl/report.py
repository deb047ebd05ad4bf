"""`pisa-fl-report FOLDER...`: a finished sweep, or any run directories, as a table and figures.

For every run below the folders it reads config.yaml and metrics.jsonl; what differs between the runs' configurations
becomes the table's columns, runs that differ only in their seed become one row (median and range). Written into the
first folder, or `--output`: `report.md`, `report.csv`, `comparison.png` (accuracy against rounds, passes and bytes)
and, where one parameter was swept, `sweep.png` (final accuracy against it).
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

from omegaconf import OmegaConf

from pisa_fl.files import write
from pisa_fl.plots import draw_comparison, draw_sweep
from pisa_fl.rundir import Metrics, read_metrics

IGNORED = {"seed", "name", "resume", "progress", "checkpoint", "targets"}
"""Keys, of whatever group, that do not tell what a run studies."""


@dataclass(frozen=True)
class Run:
    """A finished run, as its directory tells it.

    Attributes:
        directory: The run directory.
        config: Its configuration by dotted key.
        metrics: The lines of metrics.jsonl.
        summary: The contents of summary.json.
    """

    directory: Path
    config: Mapping[str, Any]
    metrics: Sequence[Metrics]
    summary: Mapping[str, Any]

    @property
    def method(self) -> str:
        """The strategy's name, which is the run's name unless it was given one."""
        return str(self.config["name"])


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed.

    Attributes:
        method: Their strategy's name.
        parameters: What distinguishes them from the other rows.
        runs: One a seed.
    """

    method: str
    parameters: Mapping[str, Any]
    runs: Sequence[Run]

    @property
    def label(self) -> str:
        """Name of the row in a picture."""
        values = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.parameters.items())
        return f"{self.method} ({values})" if values else self.method

    def accuracies(self, which: str) -> list[float]:
        """`final_accuracy` or `best_accuracy` of each run, 0..1."""
        return [float(run.summary[which]) for run in self.runs]


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The finished runs below the folders, in the order of their paths.

    Raises:
        ValueError: There is none.
    """
    runs = []
    for folder in folders:
        for summary in sorted(folder.rglob("summary.json"), key=lambda path: _natural(path)):
            directory = summary.parent
            config = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
            flat = _flat(cast(dict[str, Any], config))
            runs.append(Run(directory, flat, read_metrics(directory), json.loads(summary.read_text())))
    if not runs:
        raise ValueError(
            f"no finished run below {', '.join(map(str, folders))}: give a run directory or a sweep's"
        )
    return runs


def rows(runs: Sequence[Run]) -> list[Row]:
    """Group runs by everything that differs between them but the seed."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    keys = {key: None for key in keys if not IGNORED.intersection(key.split("."))}
    shared = [key for key in keys if not key.startswith("strategy.")]
    differing = [key for key in shared if len({repr(run.config.get(key)) for run in runs}) > 1]
    # a strategy's own numbers tell rows apart only where runs of the same strategy differ in them
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        for key in (k for k in keys if k.startswith("strategy.") and k.count(".") == 1):
            if len({repr(run.config.get(key)) for run in own}) > 1 and key not in differing:
                differing.append(key)
    told = [key for key in differing if key != "rounds"]  # which has a column of its own
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, *(repr(run.config.get(key)) for key in differing)), []).append(run)
    return [
        Row(group[0].method, {k: group[0].config[k] for k in told if k in group[0].config}, group)
        for group in groups.values()
    ]


def report(folders: Sequence[Path], output: Path, title: str) -> str:
    """Write the table and the figures into `output`; the table as Markdown is also returned.

    Raises:
        ValueError: There is no finished run.
    """
    table = rows(find_runs(folders))
    parameters = list(dict.fromkeys(key for row in table for key in row.parameters))
    targets = list(
        dict.fromkeys(target for row in table for run in row.runs for target in run.summary["targets"])
    )
    header = [
        "strategy",
        *parameters,
        "seeds",
        "final accuracy, %",
        "best accuracy, %",
        "rounds",
        "passes",
        "MB",
    ]
    header += [f"rounds to {100 * float(target):g} %" for target in targets]
    lines = [_cells(row, parameters, targets) for row in table]
    text = _markdown(header, lines)
    write(output / "report.md", text)
    with (output / "report.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    curves = {row.label: [run.metrics for run in row.runs] for row in table}
    draw_comparison(curves, title, output / "comparison.png")
    if len(parameters) == 1:
        _draw_sweep(table, parameters[0], output / "sweep.png")
    return text


def _cells(row: Row, parameters: Sequence[str], targets: Sequence[str]) -> list[str]:
    last = row.runs[0].summary
    cells = [row.method, *(str(row.parameters.get(key, "")) for key in parameters), str(len(row.runs))]
    cells += [_percent(row.accuracies("final_accuracy")), _percent(row.accuracies("best_accuracy"))]
    cells += [
        str(last["rounds"]),
        f"{last['passes']:.0f}",
        f"{(last['bytes_up'] + last['bytes_down']) / 1e6:.1f}",
    ]
    for target in targets:
        reached = [run.summary["targets"].get(target) for run in row.runs]
        rounds = [r["round"] for r in reached if r is not None]
        cells.append(f"{median(rounds):g}" if len(rounds) == len(reached) else "-")
    return cells


def _percent(values: Sequence[float]) -> str:
    middle = f"{100 * median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({100 * min(values):.2f}-{100 * max(values):.2f})"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    body = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)]
    return "\n".join(body) + "\n"


def _draw_sweep(table: Sequence[Row], parameter: str, path: Path) -> None:
    points: dict[str, list[tuple[Any, list[float]]]] = {}
    for row in table:
        if parameter in row.parameters:
            points.setdefault(row.method, []).append(
                (row.parameters[parameter], row.accuracies("final_accuracy"))
            )
    ordered = {
        method: sorted(own, key=lambda p: (isinstance(p[0], str), p[0])) for method, own in points.items()
    }
    draw_sweep(ordered, parameter, path)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key by which run 10 of a sweep follows run 9."""
    return [(int(part) if part.isdigit() else -1, part) for part in path.parts]


def main() -> None:
    """Entry point of `pisa-fl-report`."""
    parser = argparse.ArgumentParser(prog="pisa-fl-report", description="Table and figures of finished runs.")
    parser.add_argument("folders", nargs="+", type=Path, help="run directories, or folders of a sweep")
    parser.add_argument("--output", type=Path, help="where to write; the first folder if not given")
    parser.add_argument("--title", default="", help="title of the pictures")
    arguments = parser.parse_args()
    output = arguments.output or arguments.folders[0]
    try:
        output.mkdir(parents=True, exist_ok=True)
        print(report(arguments.folders, output, arguments.title), end="")
    except (ValueError, OSError) as error:
        print(f"pisa-fl-report: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"\nwritten to {output}: report.md, report.csv and the pictures")


if __name__ == "__main__":
    main()
