"""pisa-fl, through its Python interface; options are overrides."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from safetensors.torch import save_file

from experiments.benchmarks.sides.pace import Pace
from experiments.benchmarks.task import Task
from pisa_fl import Federation, compose, prepare

CONF = Path(__file__).resolve().parents[1] / "conf"


def federation(task: Task, *overrides: str) -> Federation:
    """The task's federation, with the initial weights that all sides have."""
    with TemporaryDirectory() as folder:
        initial = Path(folder, "initial.safetensors")
        save_file(task.model().state_dict(), initial)
        sizes = [
            f"data.examples={task.examples}",
            f"clients={task.clients}",
            f"batch_size={task.batch}",
            f"participation={task.stack / task.clients}",
        ]
        groups = ["data=noise", "partition=iid", "device=cpu"]
        return prepare(compose(*groups, *sizes, f"init={initial}", *overrides, config_dir=CONF))


def main(task: Task, report: TextIO, *overrides: str) -> None:
    """Rounds whose time is that of training alone, as `metrics.jsonl` has it."""
    pace, own = Pace(task, report), federation(task, *overrides)
    try:
        rounds = own.rounds(sys.maxsize)
        before = next(rounds)
        while True:
            pace.wait()
            metrics = next(rounds)
            pace.done(
                round((metrics["passes"] - before["passes"]) * task.examples),
                own.model.module.parameters(),
                metrics["seconds"] - before["seconds"],
            )
            before = metrics
    finally:
        own.grid.close()
