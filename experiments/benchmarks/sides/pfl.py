"""pfl-research: FederatedAveraging on its SimulatedBackend, users' data as tensors, no evaluation.

It chooses among one thread and one per core. Under torchrun it is pfl's distributed simulation: a process on every
core, each with its part of the stack.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from experiments.benchmarks.sides.pace import Pace
from experiments.benchmarks.task import LR, Model, Task
from pisa_fl.engines.base import cores

DISTRIBUTED = "RANK" in os.environ


class Net(nn.Module):
    """The model with the loss beside it, as pfl wants it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net = task.model()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the clients minimise."""
        return F.cross_entropy(self.net(images), labels)

    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Nothing is evaluated, but in pfl's first round."""
        return {}


class Turns(TrainingProcessCallback):
    """Waits between pfl's central iterations."""

    def __init__(self, task: Task, report: TextIO) -> None:
        self._pace = Pace(task, report, "threads", (1,) if DISTRIBUTED else (1, cores()))
        self._first = os.environ.get("RANK", "0") == "0"

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Before the first round."""
        self._wait()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Between two rounds."""
        seen = torch.tensor(Model.seen)
        Model.seen = 0
        if DISTRIBUTED:
            torch.distributed.all_reduce(seen)
        if self._first:
            self._pace.done(int(seen), model.pytorch_model.parameters())
        self._wait()
        return False, Metrics()

    def _wait(self) -> None:
        if self._first:
            torch.set_num_threads(self._pace.wait())
        if DISTRIBUTED:
            torch.distributed.barrier()


def main(task: Task, report: TextIO) -> None:
    """Rounds with as many users as the task draws."""
    shares = task.shares()
    users = [PyTorchTensorDataset(share) for share in shares]
    data = FederatedDataset(users.__getitem__, MinimizeReuseUserSampler(range(task.clients)))
    net = Net(task)
    FederatedAveraging().run(
        NNAlgorithmParams(sys.maxsize, sys.maxsize, task.stack, None),
        SimulatedBackend(data, data, [WeightByDatapoints()]),
        PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0)),
        NNTrainHyperParams(local_batch_size=task.batch, local_num_epochs=1, local_learning_rate=LR),
        callbacks=[Turns(task, report)],
    )
