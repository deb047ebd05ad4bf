"""SISA, FedAvg and FedProx on one federation, by the same number of passes over the data: a picture and a table.

    make compare
    make compare ARGS="partition.classes_per_client=1 seed=0,1,2"

By default SISA's round is one pass and the others' ten, as they are usually run, and they get a tenth of the rounds;
the picture draws all three against rounds, passes and bytes. Arguments are overrides, given to all three.
"""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path

from pisa_fl.report import report

METHODS = "sisa,fedavg,fedprox"


def main(overrides: list[str]) -> None:
    """Run the three and report."""
    folder = Path("runs", f"{datetime.now():%Y-%m-%d}", f"{datetime.now():%H-%M-%S}-compare")
    sweep = ["--multirun", f"strategy={METHODS}", f"hydra.sweep.dir={folder}", *overrides]
    finished = subprocess.run([sys.executable, "-m", "pisa_fl.main", *sweep])
    if finished.returncode:
        sys.exit(finished.returncode)
    print(report([folder], folder, "Same data, model and initial weights"))
    print(f"{folder / 'comparison.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
