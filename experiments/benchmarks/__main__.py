"""Measure and report; experiments/benchmarks/README.md says what.

make bench
make bench ARGS="--only device silo --peers PATH/TO/python"
"""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from experiments.benchmarks.outcome import load, save
from experiments.benchmarks.report import draw, markdown
from experiments.benchmarks.works import WORKS, Bench
from pisa_fl.engines.base import cores


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for, and report all that has been measured."""
    defaults = Bench()
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), help="what to measure")
    parser.add_argument("--repeats", type=int, default=defaults.repeats, help="turns of every side")
    parser.add_argument("--peers", default=defaults.peers, help="Python that has the other frameworks")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=defaults.sizes, help="of clients and memory"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the results")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        print(f"{name} ...", file=sys.stderr)
        outcomes = list(WORKS[name](Bench(given.repeats, given.peers, tuple(given.clients))))
        save(outcomes, given.out / f"{name}.json")
    report(given.out)


def report(folder: Path) -> None:
    """Write `results.md` and `results.png` from what is in the folder, and print the table."""
    files = [path for name in WORKS if (path := folder / f"{name}.json").is_file()]
    outcomes = [outcome for file in files for outcome in load(file)]
    table = f"{machine()}\n\n{markdown(outcomes)}"
    (folder / "results.md").write_text(table)
    draw(outcomes, folder / "results.png")
    print(table)


def machine() -> str:
    """What was measured with."""
    python, system = platform.python_version(), f"{platform.system()} {platform.machine()}"
    return (
        f"{cores()} cores, {system}, Python {python}, PyTorch {torch.__version__}, Flower {version('flwr')}"
    )


if __name__ == "__main__":
    main()
