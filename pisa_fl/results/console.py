"""The live display of a run, and its final table."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pisa_fl.metric import Measures, Metrics
from pisa_fl.results.observer import Observer, Run
from pisa_fl.system.text import visible

log = logging.getLogger(__name__)

console = Console(highlight=False, markup=False, emoji=False)
"""Prints text as it is: a user's name or path may look like markup."""


class Display(Observer):
    """One bar with round, metrics and time left; without a terminal, one line a round. At its end, a table.

    Args:
        live: Draw the bar if there is a terminal; `quiet`: nothing but the run directory, at the end.
    """

    def __init__(self, live: bool | Literal["quiet"]) -> None:
        # a terminal has room for one bar: runs in other threads print lines
        alone = threading.current_thread() is threading.main_thread()
        self._quiet = live == "quiet"
        self._live = live is True and console.is_terminal and alone
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._rounds, self._directory = 0, ""
        self._measures = Measures.read(None)

    def started(self, run: Run) -> None:
        """Start drawing."""
        self._rounds, self._directory = run.rounds, str(run.directory or "")
        self._measures = run.measures
        done = run.metrics[-1]["round"] if run.metrics else 0
        self._progress.add_task(_shown(run.name), total=run.rounds, completed=done, status="")
        self._progress.start()

    def waiting(self, line: str | None) -> None:
        """Say who is missing."""
        if line is not None:
            log.warning("%s", line)

    def round(self, line: Metrics) -> None:
        """Show a round's metrics."""
        status = "  ".join(
            f"{metric.name} {metric.shown(line[metric.key])}"
            for metric in self._measures.all
            if metric.key in line
        )
        if "epsilon" in line:
            status += f"  epsilon {line['epsilon']:.3g}"
        status += f"  {clients_in(line)}" if status else clients_in(line)
        for task in self._progress.task_ids:
            self._progress.update(task, completed=line["round"], status=status)
        if not self._live and not self._quiet:
            failed = f"  failed {line['clients_failed']}" if line["clients_failed"] else ""
            console.print(f"round {line['round']:>{len(str(self._rounds))}}/{self._rounds}  {status}{failed}")

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Show the table, if there is a directory that it is of."""
        self._progress.stop()
        if self._quiet and self._directory:
            print(_shown(self._directory))
        elif self._directory:
            show_summary(summary, self._directory, self._measures)

    def stopped(self, reason: BaseException) -> None:
        """Stop drawing."""
        self._progress.stop()


def clients_in(metrics: Metrics) -> str:
    """How many clients a round had: `2/3 clients`, or of a share that was drawn `5/5 clients of 40/50`."""
    ok, reachable, expected = (metrics[f"clients_{key}"] for key in ("ok", "reachable", "expected"))
    asked = ok + metrics["clients_failed"]
    if asked in (0, reachable):
        return f"{ok if asked else reachable}/{expected} clients"
    return f"{ok}/{asked} clients of {'' if reachable == expected else f'{reachable}/'}{expected}"


def show_summary(summary: Mapping[str, Any], directory: str, measures: Measures) -> None:
    """Print the final table."""
    quality = measures.quality
    on = "validation" if summary.get("validation") else "test"
    table = Table(show_header=False, title="Result", title_justify="left")
    final, best = (quality.shown(summary[f"{which}_{quality.name}"]) for which in ("final", "best"))
    table.add_row(f"final {on} {quality.name}", final)
    table.add_row(f"best {on} {quality.name}", f"{best} (round {summary['best_round']})")
    if kept := summary.get("best_weights"):
        table.add_row("best weights", f"{kept['file']}, chosen by {kept['chosen_by']}")
    if summary.get("at_chance"):
        table.add_row("at chance", f"always giving the same answer has {quality.shown(summary['chance'])}")
    for metric in measures.metrics[1:]:
        table.add_row(f"final {on} {metric.name}", metric.shown(summary[f"final_{metric.name}"]))
    for row in _privacy_rows(summary.get("privacy")):
        table.add_row(*row)
    for name, spread in (summary.get("clients") or {}).items():
        if name == quality.name:
            words = (f"{key.replace('_', ' ')} {quality.shown(value)}" for key, value in spread.items())
            table.add_row(f"{name} on clients' own", ", ".join(words))
    for target, cost in summary["targets"].items():
        reached = "not reached" if cost is None else f"round {cost['round']}, {cost['passes']:.0f} passes"
        table.add_row(f"{quality.factor * float(target):g} {quality.unit or quality.name} reached", reached)
    counts = f"{summary['clients_ok']} answered, {summary['clients_reachable']} of {summary['clients_expected']} there"
    table.add_row("clients, at the fewest", f"{counts}; failures: {summary['clients_failed']}")
    for who in summary["turned_away"]:
        table.add_row("turned away", who)
    table.add_row("rounds / passes", f"{summary['rounds']} / {summary['passes']:.0f}")
    table.add_row(
        "payload up / down", f"{_megabytes(summary['bytes_up'])} / {_megabytes(summary['bytes_down'])}"
    )
    table.add_row("training time", f"{math.ceil(summary['seconds'])} s")
    console.print(table)
    console.print(f"run directory: {_shown(directory)}", soft_wrap=True)


def _privacy_rows(told: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the table says of privacy."""
    if told is None:
        return []
    epsilon = "none" if told["epsilon"] is None else f"{told['epsilon']:.3g} at delta {told['delta']:g}"
    test = f"{told['advantage_at_least']:.2g} to {told['advantage']:.2g} (hits less false alarms, in the worst case)"
    rows = [(f"epsilon ({told['adjacency']})", epsilon), ("a test for one's data gains", test)]
    if told["noise_floor"] is not None and told["noise"] < told["noise_floor"]:
        limit = (
            f"{told['noise']:g} is below {told['noise_floor']:.2g}, the limit of DP-SGD (arXiv 2601.10237)"
        )
        rows.append(("noise", limit))
    rows.append(("protects", told["protects"]))
    return rows + ([("but", told["note"])] if "note" in told else [])


def _shown(text: str) -> str:
    """A user's text in one line, with what this terminal cannot show escaped."""
    return visible(text).encode(console.encoding, "backslashreplace").decode(console.encoding)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
