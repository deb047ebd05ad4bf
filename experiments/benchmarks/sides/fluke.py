"""fluke: FedAVG with its own server and clients, data as tensors, no evaluation, everything in memory.

It chooses among one thread and one per core.
"""

from __future__ import annotations

import sys
from typing import Any, TextIO

import torch
from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.utils import FederationObserver

from experiments.benchmarks.sides.pace import Pace
from experiments.benchmarks.task import CLASSES, LR, Model, Task
from pisa_fl.engines.base import cores


class Turns(FederationObserver):
    """Waits between fluke's rounds."""

    def __init__(self, task: Task, report: TextIO) -> None:
        self._pace = Pace(task, report, "threads", (1, cores()))

    def start_round(self, round: int, global_model: Any) -> None:
        """Before a round."""
        self._model = global_model
        torch.set_num_threads(self._pace.wait())

    def end_round(self, round: int) -> None:
        """After a round."""
        self._pace.done(Model.seen, self._model.parameters())
        Model.seen = 0


def main(task: Task, report: TextIO) -> None:
    """Rounds with as many clients as the task draws."""
    FlukeENV().set_seed(0)
    FlukeENV().set_device("cpu")
    FlukeENV().set_eval_cfg(server=False)
    loaders = [
        FastDataLoader(*share, num_labels=CLASSES, batch_size=task.batch, shuffle=True)
        for share in task.shares()
    ]
    nothing = [None] * task.clients
    data = DataSplitter(DummyDataContainer(loaders, nothing, None, CLASSES))
    settings = {
        "model": task.model(),
        "client": {
            "batch_size": task.batch,
            "local_epochs": 1,
            "loss": "CrossEntropyLoss",
            "optimizer": {"name": "SGD", "lr": LR},
            "scheduler": {"name": "StepLR", "step_size": 1, "gamma": 1},
        },
        "server": {"weighted": True},
    }
    federation = FedAVG(task.clients, data, DDict(settings))
    federation.set_callbacks(Turns(task, report))
    federation.run(sys.maxsize, task.stack / task.clients, finalize=False)
