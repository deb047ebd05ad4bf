"""Where the time of a round goes, by the profiler.

Time is booked on the file of the Python code that spends it, and so is what that code spends in compiled functions;
but the model, its layers and the backward pass are gradients, and of what others wrote only the package is named.
"""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from pathlib import Path

from experiments.benchmarks.sides.pisa import federation
from experiments.benchmarks.task import Task

ROUNDS = 3
"""Profiled, after one that is not."""

GRADIENTS = (
    "torch/nn",
    "torch/autograd",
    "torch/_tensor.py",
    "torch/func",
    "torch/_functorch",
    "pisa_fl/models",
)
"""Files of the forward and backward pass."""

ROOT = Path(__file__).resolve().parents[2]


def shares(task: Task, *overrides: str, top: int = 8) -> dict[str, float]:
    """Share of the time of those places that take most of it, the rest together as `other`."""
    own = federation(task, *overrides)
    rounds = own.rounds(1 + ROUNDS)
    next(rounds), next(rounds)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in rounds:
        pass
    profiler.disable()
    own.grid.close()
    spent: Counter[str] = Counter()
    for (file, _, _), (_, _, own_time, _, callers) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        if file == "~":  # compiled
            for (caller, _, _), (_, _, time, _) in callers.items():
                spent[place(caller)] += time
        else:
            spent[place(file)] += own_time
    whole = spent.total()
    largest = {name: time / whole for name, time in spent.most_common(top)}
    return largest | {"other": 1 - sum(largest.values())}


def place(file: str) -> str:
    """Where a file's time is booked."""
    path = Path(file)
    parts = path.parts
    if "site-packages" in parts:  # before anything else: an environment may lie within the checkout
        name = "/".join(parts[parts.index("site-packages") + 1 :])
    elif path.is_relative_to(ROOT):
        name = str(path.relative_to(ROOT))
    else:
        return "Python"
    if name.startswith(GRADIENTS) or name == "experiments/benchmarks/task.py":
        return "gradients"
    return name.split("/")[0] if "site-packages" in parts else name
