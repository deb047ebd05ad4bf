"""Finished runs, read from their directories; what cannot be used is told in a note, and left out."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pisa_fl.metric import TRAIN_LOSS, Measures, Metrics
from pisa_fl.results.claim import SWEEP
from pisa_fl.results.run_directory import of_clients, read_metrics

LEFT_OUT = " is left out: "
"""What a note on a run that is not counted has between its directory and the reason."""

COUNTS = ("round", "passes", "bytes_up", "bytes_down")
"""What every line of metrics.jsonl has as a number; metrics and losses may be null."""


@dataclass(frozen=True)
class Run:
    """A finished run, as its directory tells it.

    Attributes:
        directory: The run directory.
        config: Its configuration.
        metrics: The lines of metrics.jsonl.
        summary: The contents of summary.json.
        targets: Values of its quality whose cost it was asked for.
        measures: What was measured.
        clients: Client number -> metrics on its own examples at the end; None if they were not measured then.
        chance: Quality of whoever always gives the same answer, if it ended no better than that.
    """

    directory: Path
    config: Mapping[str, Any]
    metrics: Sequence[Metrics]
    summary: Mapping[str, Any]
    targets: Sequence[float]
    measures: Measures
    clients: Mapping[int, Mapping[str, float]] | None = None
    chance: float | None = None

    @property
    def seed(self) -> int:
        """What every random draw follows from."""
        return int(self.config["seed"])

    @cached_property
    def deal(self) -> str | None:
        """Digest of what was dealt to each client; None if its directory does not say."""
        path = self.directory / "partition.json"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    @property
    def diverged(self) -> bool:
        """Whether it ended with a metric that is no number."""
        last = self.metrics[-1]
        others = (metric.key for metric in self.measures.all)
        return not (
            _is_number(last[self.measures.quality.key]) and all(_is_number(last.get(k, 0)) for k in others)
        )

    def repeats(self, other: Run) -> bool:
        """Whether its numbers are those of another run."""
        keys = ("round", *(metric.key for metric in self.measures.all), TRAIN_LOSS)
        mine, others = ([[line.get(key) for key in keys] for line in r.metrics] for r in (self, other))
        return mine == others


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs below the folders, in the order of their paths, and notes on what was left out.

    Raises:
        ValueError: There is no such folder, or no finished run in any.
    """
    if missing := next((folder for folder in folders if not folder.is_dir()), None):
        raise ValueError(f"{missing} is not a folder: give a run directory or a sweep's")
    runs, notes, seen = [], [], set()
    for folder in folders:
        found = {path.parent for name in ("config.yaml", "summary.json") for path in folder.rglob(name)}
        for directory in sorted(found, key=natural):
            if directory.resolve() in seen:
                notes.append(f"{directory} was given twice and is counted once")
                continue
            seen.add(directory.resolve())
            try:
                runs.append(read(directory))
            except (ValueError, OSError) as error:
                notes.append(f"{directory}{LEFT_OUT}{error}")
    if not runs:
        reasons = f" ({'; '.join(notes)})" if notes else ""
        raise ValueError(
            f"no finished run below {', '.join(map(str, folders))}{reasons}: give a run directory or a sweep's"
        )
    return runs, notes


def read(directory: Path) -> Run:
    """Read a run directory.

    Raises:
        ValueError: The run is not finished, or one of its files is damaged.
        OSError: A file cannot be read.
    """
    for name in ("summary.json", "config.yaml", "metrics.jsonl"):
        if not (directory / name).is_file():
            raise ValueError(_unfinished(directory) if name == "summary.json" else f"it has no {name}")
    with _damaged("config.yaml"):
        config = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
        if not isinstance(config, dict) or not isinstance(config["seed"], int):
            raise ValueError
        measures = Measures.read(config.get("metrics"))
        quality = measures.quality
    with _damaged("metrics.jsonl"):
        metrics = read_metrics(directory)
        rounds = [line["round"] for line in metrics]
        numbers = [line[key] for line in metrics for key in COUNTS]
        numbers += [line[quality.key] for line in metrics if line.get(quality.key) is not None]
        if not rounds or rounds != sorted(set(rounds)) or not all(_is_number(number) for number in numbers):
            raise ValueError
    with _damaged("summary.json"):
        summary = json.loads((directory / "summary.json").read_text())
        targets = [float(target) for target in summary["targets"]]
        ended = summary["rounds"], summary[f"final_{quality.name}"]
        chance = float(summary["chance"]) if summary.get("at_chance") else None
    if ended != (rounds[-1], metrics[-1][quality.key]):
        raise ValueError("its summary.json is not of the run in metrics.jsonl")
    with _damaged("clients.jsonl"):
        clients = of_clients(directory, rounds[-1])
    own = {str(key): value for key, value in config.items()}
    return Run(directory, own, metrics, summary, targets, measures, clients, chance)


def _unfinished(directory: Path) -> str:
    """That a run is not finished, and why, if its sweep knows."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        entries = json.loads((directory.parent / SWEEP).read_text())["entries"]
        for entry in entries:
            if entry["directory"] == directory.name and entry["failed"]:
                return f"it ended in an error: {entry['failed']}"
    return "it is not finished"


@contextmanager
def _damaged(name: str) -> Iterator[None]:
    """Say of which file it is that its content, whatever it is, could not be used.

    Raises:
        ValueError: It could not.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"{name} cannot be read, {error.strerror}") from error
    except Exception as error:
        raise ValueError(f"{name} is damaged") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def natural(path: Path) -> list[tuple[int, str]]:
    """Sort key of paths by which run 10 of a sweep follows run 9."""
    return [(int(part) if part.isdecimal() else -1, part) for part in path.parts]
