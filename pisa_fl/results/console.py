"""The live display of a run, and its final table."""

from __future__ import annotations

import math
import threading
from typing import Any

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

from pisa_fl.system.text import visible

console = Console(highlight=False, markup=False, emoji=False)
"""Prints text as it is: a user's name or path may look like markup."""


class Display:
    """One bar with round, accuracy, loss and time left; without a terminal, one line a round.

    Args:
        name: Of the run.
        rounds: How many rounds it has.
        done: Rounds done before it began.
        live: Draw the bar if there is a terminal.
    """

    def __init__(self, name: str, rounds: int, done: int, live: bool) -> None:
        # a terminal has room for one bar: runs in other threads print lines
        alone = threading.current_thread() is threading.main_thread()
        self._live = live and console.is_terminal and alone
        self._rounds = rounds
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
        self._task = self._progress.add_task(_shown(name), total=rounds, completed=done, status="")

    def __enter__(self) -> Display:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self._progress.stop()

    def show(self, metrics: dict[str, Any]) -> None:
        """Show a round's metrics."""
        loss = "not finite" if metrics["test_loss"] is None else f"{metrics['test_loss']:.4f}"
        status = f"accuracy {100 * metrics['test_accuracy']:.2f} %  loss {loss}"
        status += f"  {clients_in(metrics)}"
        self._progress.update(self._task, completed=metrics["round"], status=status)
        if not self._live:
            failed = f"  failed {metrics['clients_failed']}" if metrics["clients_failed"] else ""
            console.print(
                f"round {metrics['round']:>{len(str(self._rounds))}}/{self._rounds}  {status}{failed}"
            )


def clients_in(metrics: dict[str, Any]) -> str:
    """How many clients a round had: `2/3 clients`, or of a share that was drawn `5/5 clients of 40/50`."""
    ok, reachable, expected = (metrics[f"clients_{key}"] for key in ("ok", "reachable", "expected"))
    asked = ok + metrics["clients_failed"]
    if asked in (0, reachable):
        return f"{ok if asked else reachable}/{expected} clients"
    return f"{ok}/{asked} clients of {'' if reachable == expected else f'{reachable}/'}{expected}"


def show_summary(summary: dict[str, Any], directory: str) -> None:
    """Print the final table."""
    table = Table(show_header=False, title="Result", title_justify="left")
    table.add_row("final test accuracy", f"{100 * summary['final_accuracy']:.2f} %")
    table.add_row(
        "best test accuracy", f"{100 * summary['best_accuracy']:.2f} % (round {summary['best_round']})"
    )
    for target, cost in summary["targets"].items():
        reached = "not reached" if cost is None else f"round {cost['round']}, {cost['passes']:.0f} passes"
        table.add_row(f"{100 * float(target):g} % reached", reached)
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


def _shown(text: str) -> str:
    """A user's text in one line, with what this terminal cannot show escaped."""
    return visible(text).encode(console.encoding, "backslashreplace").decode(console.encoding)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
