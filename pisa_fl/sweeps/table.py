"""The table of a sweep: what is done, running and left, what failed, how long it took and is likely to take.

`pisa-fl-sweep FOLDER` prints it, while the sweep runs or afterwards.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

from pisa_fl.results.claim import SWEEP, quoted
from pisa_fl.sweeps.folder import Progress, progress
from pisa_fl.system.files import write
from pisa_fl.system.text import tolerate_any_text, visible


@dataclass
class Entry:
    """A run of a sweep.

    Attributes:
        number: From 1 on.
        words: What tells it from the others.
        directory: Of the run, below the sweep's folder; None before its turn.
        failed: Why it failed the last time, if it did.
    """

    number: int
    words: str
    directory: str | None = None
    failed: str | None = None


@dataclass
class Sweep:
    """What a sweep's folder says of it.

    Attributes:
        command: What goes on with it.
        jobs: Runs side by side.
        total: How many runs there are to be.
        entries: Those that are known.
    """

    command: str
    jobs: int
    total: int
    entries: list[Entry] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write it into the folder."""
        write(folder / SWEEP, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """Read it.

        Raises:
            ValueError: There is none, or it is damaged.
        """
        try:
            said = json.loads((folder / SWEEP).read_text())
            entries = [Entry(**entry) for entry in said.pop("entries")]
            return cls(**said, entries=entries)
        except OSError as error:
            raise ValueError(f"{folder} has no {SWEEP}: give the folder of a sweep") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder / SWEEP} is damaged") from error


def command_in(words: Sequence[str], folder: Path | None) -> str:
    """A sweep's command with another folder, or none, as it can be pasted into a shell."""
    given = [text for text in words if not text.startswith("hydra.sweep.dir=")]
    there = [] if folder is None else [f"hydra.sweep.dir={quoted(str(folder))}"]
    return shlex.join([*given, *there])


def show(sweep: Sweep, folder: Path) -> None:
    """Print the table of a sweep, and how to go on with it if something is left."""
    from rich.table import Table  # not for commands that run nothing

    from pisa_fl.results.console import console

    found = [
        Progress("left") if entry.directory is None else progress(folder / entry.directory)
        for entry in sweep.entries
    ]
    left = estimate(found)
    table = Table(title=f"Sweep {visible(str(folder))}", title_justify="left")
    for column in ("run", "setting", "state", "round", "quality", "trained", "left"):
        table.add_column(column, overflow="fold")
    counts: Counter[str] = Counter()
    for entry, run, seconds in zip(sweep.entries, found, left, strict=True):
        failed = entry.failed is not None and run.state in ("interrupted", "left")
        counts["failed" if failed else run.state] += 1
        table.add_row(
            str(entry.number),
            visible(entry.words),
            visible(f"failed: {entry.failed}") if failed else run.state,
            "" if run.rounds is None else f"{run.round}/{run.rounds}",
            run.quality,
            _time(run.seconds) if run.rounds is not None else "",
            "" if run.state == "done" or seconds is None else _time(seconds),
        )
    console.print(table)
    counts["left"] += sweep.total - len(sweep.entries)
    console.print(visible(_sum(sweep, counts, found, left)), soft_wrap=True)
    if counts["done"] < sweep.total:
        command = command_in(shlex.split(sweep.command), folder.absolute())  # which may have been moved
        console.print(f"go on with: {visible(command)}", soft_wrap=True)


def estimate(runs: Sequence[Progress]) -> list[float | None]:
    """Seconds of training that are likely left of each run: by its own pace, else the mean of the others' whole time.

    None where no run tells.
    """
    paced = [
        run.seconds if run.state == "done" else run.seconds * run.rounds / run.round
        for run in runs
        if run.rounds and run.round
    ]
    mean = fmean(paced) if paced else None
    left: list[float | None] = []
    for run in runs:
        if run.state == "done":
            left.append(0.0)
        elif run.rounds and run.round:
            left.append(run.seconds * (run.rounds - run.round) / run.round)
        else:
            left.append(mean)
    return left


def _sum(sweep: Sweep, counts: Counter[str], runs: Sequence[Progress], left: Sequence[float | None]) -> str:
    """The last line."""
    states = ("done", "running", "interrupted", "failed", "left")
    text = f"{sweep.total} runs: " + ", ".join(
        f"{counts[state]} {state}" for state in states if counts[state]
    )
    text += f"; {_time(sum(run.seconds for run in runs))} of training"
    known = [seconds for seconds in left if seconds is not None]
    if counts["done"] < sweep.total and known:
        unseen = (sweep.total - len(runs)) * fmean(run.seconds for run in runs)
        rest = (sum(known) + unseen) / sweep.jobs
        text += f", about {_time(rest)} left with {sweep.jobs} side by side"
    return text


def _time(seconds: float) -> str:
    """A time for people: 12 s, 3 min, 1.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main() -> None:
    """Entry point of `pisa-fl-sweep`."""
    parser = argparse.ArgumentParser(prog="pisa-fl-sweep", description="How far a sweep is.")
    parser.add_argument("folder", type=Path, help="the sweep's folder")
    folder = parser.parse_args().folder
    tolerate_any_text()
    try:
        show(Sweep.read(folder), folder)
    except (ValueError, OSError) as error:
        print(f"pisa-fl-sweep: {visible(str(error))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
