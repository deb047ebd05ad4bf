"""PISA and SISA beside FedAvg and FedProx, each at its best: a picture and a table for each of two federations.

    make compare
    make compare ARGS="seed=0,1,2"
    make compare ARGS="--only part"

`whole`: ten clients of one class each, everybody in every round. `part`: 100 clients of two classes, ten a round. A
PISA or SISA round is one pass and is run with its defaults. FedAvg and FedProx are run with as many passes in two ways,
as many short rounds and few long ones, each with two learning rates; in `part` FedAvg makes five passes a round in
batches of ten (PISA one pass, a fifth of its budget), with two learning rates and two momenta. The report keeps the
setting of the best final test accuracy: more than a fair share for them. Further arguments are overrides, given to all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

from pisa_fl.results.report import report

FEDERATIONS = {
    "whole": ["clients=10", "partition=label_skew", "partition.classes_per_client=1"],
    "part": [
        "clients=100",
        "participation=0.1",
        "partition=label_skew",
        "partition.classes_per_client=2",
        "batch_size=10",
    ],
}
OURS = {"pisa": ["strategy=pisa"], "sisa": ["strategy=sisa"]}
TUNED = {
    "whole": ["strategy.lr=0.01,0.03"],
    "part": ["strategy.lr=0.01,0.03", "strategy.momentum=0,0.9"],
}
RIVALS = {
    "whole": {
        f"{name}-{rounds}": [f"strategy={name}", f"rounds={rounds}", f"strategy.local_epochs={100 // rounds}"]
        for name in ("fedavg", "fedprox")
        for rounds in (100, 10)
    },
    "part": {"fedavg": ["strategy=fedavg", "rounds=100", "strategy.local_epochs=5"]},
}


def sweep(folder: Path, overrides: Sequence[str]) -> None:
    """Run a sweep into a folder."""
    command = [
        sys.executable,
        "-m",
        "pisa_fl",
        "--multirun",
        f"hydra.sweep.dir={folder}",
        *overrides,
    ]
    if (status := subprocess.run(command).returncode) != 0:
        sys.exit(status)


def keep_best(folder: Path) -> None:
    """Keep the runs of the learning rate and momentum whose final accuracy is best, on average over the seeds."""
    finals: dict[tuple[float, float], list[float]] = {}
    runs: dict[tuple[float, float], list[Path]] = {}
    for path in sorted(folder.glob("*/summary.json")):
        strategy = OmegaConf.load(path.parent / "config.yaml").strategy
        setting = strategy.lr, strategy.momentum
        finals.setdefault(setting, []).append(json.loads(path.read_text())["final_accuracy"])
        runs.setdefault(setting, []).append(path.parent)
    best = max(finals, key=lambda setting: sum(finals[setting]) / len(finals[setting]))
    for setting, directories in runs.items():
        if setting != best:
            for directory in directories:
                name = "-".join([folder.name, *map(str, setting), directory.name])
                shutil.move(directory, folder.parent / "other-settings" / name)


def main(arguments: list[str]) -> None:
    """Run both federations, or one, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=FEDERATIONS)
    chosen, overrides = parser.parse_known_args(arguments)
    start = Path("runs", f"{datetime.now():%Y-%m-%d}", f"{datetime.now():%H-%M-%S}-compare")
    for name, federation in FEDERATIONS.items():
        if chosen.only not in (None, name):
            continue
        folder = start / name
        (folder / "other-settings").mkdir(parents=True)
        for method, own in OURS.items():
            sweep(folder / method, [*federation, *own, *overrides])
        for method, own in RIVALS[name].items():
            sweep(folder / method, [*federation, *own, *TUNED[name], *overrides])
            keep_best(folder / method)
        kept = [folder / method for method in (*OURS, *RIVALS[name])]
        print(report(kept, folder, "Same data, deal, model and initial weights"))
        print(folder / "comparison.png")


if __name__ == "__main__":
    main(sys.argv[1:])
