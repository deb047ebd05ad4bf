"""PISA and SISA beside their rivals, each at its best: a picture and a table for each of two federations.

    make compare
    make compare ARGS="seed=0,1,2"
    make compare ARGS="--only part"

`whole`: ten clients of one class each, everybody in every round. `part`: 100 clients of two classes, ten a round. A
PISA or SISA round is one pass and is run with its defaults. In `whole`, FedAvg, FedProx, SCAFFOLD, FedDyn and FedADMM
are run with as many passes in two ways, as many short rounds and few long ones, each with two learning rates; in `part`
they make five passes a round in batches of ten (PISA one pass, a fifth of that), with two learning rates and two
momenta. FedDyn and FedADMM are also run with two penalties. The report keeps the setting of the best final test
accuracy: more than a fair share for the rivals. Further arguments are overrides, given to all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from itertools import product
from pathlib import Path
from statistics import mean

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
RIVALS = {
    "fedavg": [],
    "fedprox": [],
    "scaffold": [],
    "feddyn": ["strategy.penalty=0.01,0.1"],
    "fedadmm": ["strategy.rho=0.01,0.1"],
}
TUNED = {
    "whole": ["strategy.lr=0.01,0.03"],
    "part": ["strategy.lr=0.01,0.03", "strategy.momentum=0,0.9"],
}
BUDGETS = {"whole": [(100, 1), (10, 10)], "part": [(100, 5)]}
"""Rounds, and local epochs of each."""


def sweep(folder: Path, overrides: Sequence[str]) -> None:
    """Run a sweep into a folder; a run of it may end in error, as one that diverges does, but not all of them."""
    command = [
        sys.executable,
        "-m",
        "pisa_fl",
        "--multirun",
        f"hydra.sweep.dir={folder}",
        *overrides,
    ]
    status = subprocess.run(command).returncode
    if status not in (0, 1) or not any(folder.glob("*/summary.json")):
        sys.exit(status or 1)


def keep_best(folder: Path, tuned: Sequence[str]) -> None:
    """Keep the runs of the values of some keys whose final accuracy is best, on average over the seeds.

    Values with which a seed did not come to its end are behind all others.
    """
    finals: dict[tuple[float, ...], list[float]] = {}
    runs: dict[tuple[float, ...], list[Path]] = {}
    for path in sorted(folder.glob("*/summary.json")):
        config = OmegaConf.load(path.parent / "config.yaml")
        setting = tuple(OmegaConf.select(config, key) for key in tuned)
        finals.setdefault(setting, []).append(json.loads(path.read_text())["final_accuracy"])
        runs.setdefault(setting, []).append(path.parent)
    best = max(finals, key=lambda setting: (len(finals[setting]), mean(finals[setting])))
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
        kept = [folder / method for method in OURS]
        for (method, own), (rounds, epochs) in product(RIVALS.items(), BUDGETS[name]):
            kept.append(folder / f"{method}-{rounds}")
            tried = [*TUNED[name], *own]
            budget = [f"strategy={method}", f"rounds={rounds}", f"strategy.local_epochs={epochs}"]
            sweep(kept[-1], [*federation, *budget, *tried, *overrides])
            keep_best(kept[-1], [override.split("=")[0] for override in tried])
        print(report(kept, folder, "Same data, deal, model and initial weights"))
        print(folder / "comparison.png")


if __name__ == "__main__":
    main(sys.argv[1:])
