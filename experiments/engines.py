"""Is it the same run on every engine? Every strategy on each of them, killed and resumed too: a table of who differs.

    python -m experiments.engines
    python -m experiments.engines rounds=5 model=mlp --only pisa pisa/kfac scaffold --engines workers ray

`pisa/NAME` is PISA with another preconditioner. Each run is a command of its own: six clients of two classes, half of
them in a round, 20 rounds of which one reply in ten is lost where the engine can lose some. `same` says that the final
weights, and every round's metrics but seconds, are those of `engine.workers=0` to the bit. `killed` gets SIGKILL after
half of its rounds and is resumed. Further arguments are overrides, given to all; they come first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pisa_fl.config import CONF


def _names(folder: str) -> list[str]:
    return sorted(path.stem for path in (CONF / folder).glob("*.yaml"))


CASES = {
    **{name: [f"strategy={name}"] for name in _names("strategy")},
    **{
        f"pisa/{name}": ["strategy=pisa", f"strategy/preconditioner={name}"]
        for name in _names("strategy/preconditioner")
    },
    # there must be a layer below the client's own
    "fedper": ["strategy=fedper", "model=mlp"],
    "fedrep": ["strategy=fedrep", "model=mlp"],
    # two of three clients make no sum
    "pisa_summed": ["strategy=pisa_summed", "secure=secagg", "participation=1"],
}
"""All strategies and preconditioners."""

RUN = [
    *("clients=6", "participation=0.5", "rounds=20", "model=logistic", "batch_size=250", "progress=false"),
    *("tracker=none", "checkpoint.every=3", "engine.threads=1"),
]
LOSING = ["engine.lost=0.1"]
ENGINES = {
    "workers": ["engine.workers=2"],
    "killed": ["engine.workers=0"],
    "ray": ["engine=ray"],
    "flower": ["engine=flower"],
}
"""What is compared with this process's own engine."""


def main(arguments: list[str] | None = None) -> int:
    """Run all, print a row for each strategy; returns the number of runs that differ or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    chosen, overrides = parser.parse_known_args(arguments)
    wrong = 0
    print(f"| strategy | {' | '.join(chosen.engines)} |\n{'| --- ' * (1 + len(chosen.engines))}|")
    for name in chosen.only:
        with tempfile.TemporaryDirectory() as folder:
            own = {engine: compared(Path(folder), name, engine, overrides) for engine in chosen.engines}
        wrong += sum(said != "same" for said in own.values())
        print(f"| {name} | {' | '.join(own.values())} |", flush=True)
    return wrong


def compared(folder: Path, name: str, engine: str, overrides: Sequence[str]) -> str:
    """How a run on an engine compares with the one in this process that loses as many replies."""
    losing = LOSING if engine in ("workers", "killed") else []
    common = [*RUN, *CASES[name], *losing]
    reference, other = folder / f"reference{len(losing)}", folder / engine
    if not reference.exists() and (failed := ended(reference, [*common, "engine.workers=0", *overrides])):
        return failed
    line = [*common, *ENGINES[engine], *overrides]
    if engine == "killed":
        kill(other, line)
        line = [f"resume={other}"]
    return ended(other, line) or difference(reference, other)


def command(directory: Path, overrides: Sequence[str]) -> list[str]:
    """The command line of a run."""
    return [sys.executable, "-m", "pisa_fl", f"hydra.run.dir={directory}", *overrides]


def ended(directory: Path, overrides: Sequence[str]) -> str | None:
    """Run to the end; the last line of what was said if it failed."""
    run = subprocess.run(command(directory, overrides), capture_output=True, text=True, check=False)
    return None if run.returncode == 0 else (run.stderr.strip().splitlines() or ["failed"])[-1]


def kill(directory: Path, overrides: Sequence[str]) -> None:
    """Run until half of the rounds are written, and no further."""
    metrics = directory / "metrics.jsonl"
    with subprocess.Popen(command(directory, overrides), stdout=subprocess.DEVNULL) as run:
        while run.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) > 10):
            time.sleep(0.01)
        run.kill()


def difference(one: Path, other: Path) -> str:
    """`same`, or what is not."""
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, other)
    ]
    for first, second in zip(*lines, strict=True):
        for key in first:
            if key not in ("seconds", "run_id") and first[key] != second.get(key):
                return f"round {first['round']}: {key}"
    weights = [(folder / "model.safetensors").read_bytes() for folder in (one, other)]
    return "same" if weights[0] == weights[1] else "weights"


if __name__ == "__main__":
    sys.exit(min(main(), 1))
