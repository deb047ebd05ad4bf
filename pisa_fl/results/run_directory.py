"""The run directory: every file of a run, and how each is written.

config.yaml           the resolved configuration, and the id of the run
partition.json        {"0": [indices], ...}; readable by partition=from_file
partition.csv         client, class, examples: how many of each class every client has
partition.png         clients x classes, drawn after the first round
initial.safetensors   weights of round 0, by PyTorch's names; readable by init=
model.safetensors     final weights
best.safetensors      those of the best round (checkpoint.best)
metrics.jsonl         one line a round, round 0 being the untrained model
clients.jsonl         every client's metrics on its own examples, one line an evaluation (evaluate_clients_every)
failures.jsonl        one line a reply that was refused: round, client, reason; only if there was one
summary.json          final and best metrics, what each target cost, time, memory, versions
curves.png            quality and losses against rounds, drawn anew from time to time
checkpoint/           to resume from; each holds the model so far, under the names of model.safetensors
events.out.tfevents.* metrics.jsonl for TensorBoard     (tracker=tensorboard)
metrics.csv           metrics.jsonl as a table          (tracker=csv)
tracker-*.json        where a tracker elsewhere keeps the run, to go on there
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from pisa_fl.config import ConfigurationError, literal, located, own_folders
from pisa_fl.metric import Measures, Metric, Metrics
from pisa_fl.system.files import append, write
from pisa_fl.system.resources import peak_memory

if TYPE_CHECKING:
    from torch import Tensor

OUTCOME = ".outcome.json"
"""Name of a file in the run directory by which a run elsewhere tells why it ended before its time."""

WAITING = ".waiting"
"""Name of a file in the run directory with a line about the clients for which a run elsewhere waits."""

STOP = "stop"
"""Name of a file in the run directory that asks the run to stop after its round."""

FLOWER_LOG = "flower.log"
"""Name of a file in the run directory with what Flower said; a launcher leaves it before its run begins elsewhere."""

ALWAYS = ("passes", "bytes_up", "bytes_down", "seconds")
"""What every line of metrics.jsonl has, as a number."""

ASKED = "asked.json"
"""Which client was asked for updates how often, where each answer is drawn anew (`pisa_fl.privacy.Account`)."""

BEST = "best.safetensors"
"""Name of the file in the run directory, and in each checkpoint, with the weights of the best round so far."""

KEPT = ("run_id", "imports", "metrics")
"""Keys of config.yaml that only a run directory has."""

PACKAGES = ("pisa-fl", "flwr", "flwr-datasets", "hydra-core", "torch", "torchvision", "numpy")


def write_weights(path: Path, state: Mapping[str, Tensor], said: Mapping[str, str] | None = None) -> None:
    """Write weights as safetensors, complete or not at all; in its header what is said of them."""
    from safetensors.torch import save  # brings PyTorch, which reading metrics needs not

    write(path, save(dict(state), dict(said) if said else None))


def write_config(path: Path, config: DictConfig, run_id: str, measures: Measures) -> None:
    """Write the resolved configuration, with what only a run directory says: its id, modules, measures."""
    stored = located(config)
    OmegaConf.set_struct(stored, False)
    stored.run_id, stored.imports = run_id, [literal(folder) for folder in own_folders(config)]
    stored.metrics = measures.described()
    write(path, OmegaConf.to_yaml(stored))


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one line of JSON; values that are not finite become null, which JSON can hold."""
    append(path, json.dumps(_finite(values)) + "\n")


def read_lines(path: Path, last: float = math.inf) -> list[dict[str, Any]]:
    """The lines of a .jsonl file up to a round; a damaged end, as a kill leaves it, is dropped.

    Raises:
        ConfigurationError: A line before the end is damaged.
    """
    read = [_line(text) for text in path.read_bytes().split(b"\n")]
    end = max((i + 1 for i, line in enumerate(read) if line and line["round"] <= last), default=0)
    kept = []
    for number, line in enumerate(read[:end], start=1):
        if line is None:
            raise _damaged(path, number)
        if line["round"] <= last:
            kept.append(line)
    return kept


def _line(text: bytes) -> dict[str, Any] | None:
    """One line, or None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("round")) is int else None


def read_metrics(directory: Path) -> list[Metrics]:
    """The lines of metrics.jsonl; none of a run that ended before it measured anything."""
    path = directory / "metrics.jsonl"
    return read_lines(path) if path.exists() else []


def rewind(directory: Path, last: int, run_id: str) -> list[Metrics]:
    """Take the lines of the rounds after `last` out of metrics.jsonl and its like; the metrics that are left.

    Raises:
        ConfigurationError: Lines of rounds up to it are damaged or missing, or of another run; nothing is changed.
    """
    metrics, *beside = (directory / f"{name}.jsonl" for name in ("metrics", "failures", "clients"))
    kept = {path: read_lines(path, last) for path in (metrics, *beside) if path.exists()}
    lines = kept.get(metrics, [])
    if others := {str(line["run_id"]) for line in lines if "run_id" in line} - {run_id}:
        raise ConfigurationError(
            f"resume: {metrics} has lines of run {', '.join(sorted(others))} and config.yaml is of run {run_id}:"
            " put the files of one run together"
        )
    for number, line in enumerate(lines):
        if line["round"] != number:
            raise _damaged(metrics, number + 1)
    if len(lines) <= last:
        raise _damaged(metrics, len(lines) + 1)
    for path, left in kept.items():
        write(path, "".join(json.dumps(line) + "\n" for line in left))
    return kept.get(metrics, [])


def of_clients(directory: Path, round_number: int) -> dict[int, dict[str, float]] | None:
    """What clients.jsonl tells of a round, as `Federation.of_clients`; None if nothing was measured then."""
    path = directory / "clients.jsonl"
    for line in read_lines(path) if path.exists() else ():
        if line["round"] == round_number:
            return {int(client): own for client, own in line["clients"].items()}
    return None


def check_numbers(directory: Path, metrics: Sequence[Metrics], quality: Metric) -> None:
    """Check that lines of metrics.jsonl hold what a summary is made of.

    Raises:
        ConfigurationError: One does not.
    """
    for number, line in enumerate(metrics, start=1):
        numbers = [*(line.get(key) for key in ALWAYS), line.get(quality.key, 0.0)]
        if any(type(value) not in (int, float) for value in numbers):
            raise _damaged(directory / "metrics.jsonl", number)


def _damaged(path: Path, number: int) -> ConfigurationError:
    return ConfigurationError(
        f"resume: line {number} of {path} is damaged or missing: restore the file from a copy, or run anew in"
        " another directory"
    )


class NewLines:
    """The lines of a .jsonl file as they come, each once; all of them again if the file is replaced.

    Args:
        path: The file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._read = path, 0, 0

    def read(self) -> list[dict[str, Any]]:
        """The lines since the last time; one that is incomplete waits for the next."""
        try:
            with self._path.open("rb") as file:
                if (number := os.fstat(file.fileno()).st_ino) != self._file:
                    self._file, self._read = number, 0
                file.seek(self._read)
                whole, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._read += len(whole) + len(end)
        return [json.loads(line) for line in whole.splitlines()]


def summarise(
    metrics: Sequence[Metrics],
    targets: Iterable[float],
    seed: int,
    measures: Measures,
    chance: float | None = None,
) -> dict[str, Any]:
    """What summary.json holds, but for the clients; a run that trained is told from `chance` (`Task.chance`)."""
    quality = measures.quality
    last = metrics[-1]
    best = quality.best(metrics)
    return {
        "run_id": last.get("run_id"),
        "rounds": last["round"],
        **{f"final_{metric.name}": last[metric.key] for metric in measures.all},
        "compared_by": quality.name,
        f"best_{quality.name}": best[quality.key],
        "best_round": best["round"],
        "chance": chance,
        "at_chance": last["round"] > 0 and quality.at_chance(last[quality.key], chance),
        "passes": last["passes"],
        "bytes_up": last["bytes_up"],
        "bytes_down": last["bytes_down"],
        "targets": {str(target): _reached(metrics, target, quality) for target in targets},
        "seconds": last["seconds"],
        "peak_memory_bytes": peak_memory(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "git_commit": git_commit(),
        "seed": seed,
    }


def summarise_own(
    found: Mapping[int, Mapping[str, float]], measures: Measures
) -> dict[str, dict[str, float]]:
    """What summary.json says of a model on the clients' own examples, as every client counts the same.

    Args:
        found: Client number -> metrics.
        measures: What they are.

    Returns:
        Name of each metric -> `mean`, `worst_10_percent`, the mean over the tenth of the clients that are worst
        off, and `spread`, the standard deviation over clients.
    """
    summary = {}
    for metric in measures.all:
        values = sorted((own[metric.name] for own in found.values()), reverse=metric.better == "lower")
        worst = values[: max(1, len(values) // 10)]
        summary[metric.name] = {
            "mean": statistics.fmean(values),
            "worst_10_percent": statistics.fmean(worst),
            "spread": statistics.pstdev(values),
        }
    return summary


def summarise_clients(metrics: Sequence[Metrics], turned_away: Sequence[str]) -> dict[str, Any]:
    """What summary.json says of the clients: the fewest that were there and answered, failures in all, who was refused.

    Args:
        metrics: The run's.
        turned_away: Who was not admitted, and why.
    """
    trained = metrics[1:] or metrics
    return {
        "clients_expected": metrics[-1]["clients_expected"],
        "clients_reachable": min(line["clients_reachable"] for line in trained),
        "clients_ok": min(line["clients_ok"] for line in trained),
        "clients_failed": sum(line["clients_failed"] for line in metrics),
        "clients_turned_away": max(line["clients_turned_away"] for line in metrics),
        "turned_away": list(turned_away),
    }


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json."""
    write(path, json.dumps(_finite(summary), indent=2) + "\n")


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """With null for numbers that JSON cannot hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _reached(metrics: Sequence[Metrics], target: float, quality: Metric) -> dict[str, float] | None:
    """Rounds, passes and bytes up to the first round at the target, or None if it was never reached."""
    for line in metrics:
        if quality.key in line and quality.reaches(line[quality.key], target):
            return {
                "round": line["round"],
                "passes": line["passes"],
                "bytes": line["bytes_up"] + line["bytes_down"],
                "seconds": line["seconds"],
            }
    return None


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, or None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None  # a checkout may have no commit yet
