"""The run directory: every file of a run, and how each is written.

config.yaml           the resolved configuration
partition.json        {"0": [indices], ...}; readable by partition=from_file
partition.png         clients x classes, drawn after the first round
initial.safetensors   weights of round 0, by PyTorch's names; readable by init=
model.safetensors     final weights
metrics.jsonl         one line a round, round 0 being the untrained model
failures.jsonl        one line a reply that was refused: round, client, reason; only if there was one
summary.json          final and best accuracy, what each target cost, time, memory, versions
curves.png            accuracy and loss against rounds, passes and bytes
events.out.tfevents.* the same for TensorBoard
checkpoint/           to resume from
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import resource
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from pisa_fl.config import ConfigurationError
from pisa_fl.files import write

if TYPE_CHECKING:
    from torch import Tensor

Metrics = dict[str, float | int]
"""One line of metrics.jsonl."""

PACKAGES = ("pisa-fl", "flwr", "flwr-datasets", "hydra-core", "torch", "torchvision", "numpy")


@contextmanager
def claimed(directory: Path | None) -> Iterator[None]:
    """Nobody else writes the run directory meanwhile.

    Raises:
        ConfigurationError: Somebody does.
    """
    if directory is None:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"resume: {directory} is being written by a run that goes on: stop it first (touch {directory}/stop)"
            ) from None
        yield
    finally:
        os.close(handle)


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write weights as safetensors, complete or not at all."""
    from safetensors.torch import save  # brings PyTorch, which reading metrics needs not

    write(path, save(dict(state)))


def write_config(path: Path, config: DictConfig) -> None:
    """Write the resolved configuration."""
    write(path, OmegaConf.to_yaml(config))


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one line of JSON; values that are not finite become null, which JSON can hold."""
    with path.open("a") as file:
        file.write(json.dumps(_finite(values)) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; an incomplete last line, left by a kill, is dropped."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def read_metrics(directory: Path) -> list[Metrics]:
    """The lines of metrics.jsonl."""
    return read_lines(directory / "metrics.jsonl")


def rewind(directory: Path, last: int) -> None:
    """Take the lines of the rounds after `last` out of metrics.jsonl and failures.jsonl."""
    for path in directory.glob("*.jsonl"):
        kept = [line for line in read_lines(path) if line["round"] <= last]
        write(path, "".join(json.dumps(line) + "\n" for line in kept))


def summarise(metrics: Sequence[Metrics], targets: Iterable[float], seed: int) -> dict[str, Any]:
    """What summary.json holds."""
    last = metrics[-1]
    best = max(metrics, key=lambda m: m["test_accuracy"])
    return {
        "rounds": last["round"],
        "final_accuracy": last["test_accuracy"],
        "final_loss": last["test_loss"],
        "best_accuracy": best["test_accuracy"],
        "best_round": best["round"],
        "passes": last["passes"],
        "bytes_up": last["bytes_up"],
        "bytes_down": last["bytes_down"],
        "targets": {str(target): _reached(metrics, target) for target in targets},
        "seconds": last["seconds"],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "git_commit": git_commit(),
        "seed": seed,
    }


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json."""
    write(path, json.dumps(_finite(summary), indent=2) + "\n")


def write_events(directory: Path, metrics: Sequence[Metrics]) -> None:
    """Write every metric as a TensorBoard curve over the rounds, in place of what was there."""
    from torch.utils.tensorboard import SummaryWriter

    for old in directory.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(directory)) as writer:
        for line in metrics:
            for key, value in line.items():
                if key != "round" and value is not None:
                    writer.add_scalar(key, value, int(line["round"]))


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """With null for numbers that JSON cannot hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _reached(metrics: Sequence[Metrics], target: float) -> dict[str, float] | None:
    """Rounds, passes and bytes up to the first round at the target, or None if it was never reached."""
    for line in metrics:
        if line["test_accuracy"] >= target:
            return {
                "round": line["round"],
                "passes": line["passes"],
                "bytes": line["bytes_up"] + line["bytes_down"],
                "seconds": line["seconds"],
            }
    return None


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, or None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None  # a checkout may have no commit yet
