"""FedAvg as a plain PyTorch loop over the clients, in one thread."""

from __future__ import annotations

from typing import TextIO

import torch
import torch.nn.functional as F

from experiments.benchmarks.sides.pace import Pace
from experiments.benchmarks.task import LR, Task


def main(task: Task, report: TextIO) -> None:
    """Rounds of one epoch with the first clients."""
    torch.set_num_threads(1)
    pace, model = Pace(task, report), task.model()
    shares = task.shares()[: task.stack]
    optimizer = torch.optim.SGD(model.parameters(), LR)
    server = [p.detach().clone() for p in model.parameters()]
    while True:
        pace.wait()
        total = [torch.zeros_like(p) for p in server]
        for images, labels in shares:
            with torch.no_grad():
                for p, q in zip(model.parameters(), server, strict=True):
                    p.copy_(q)
            order = torch.randperm(len(labels))
            for rows in order.split(task.batch):
                optimizer.zero_grad()
                F.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
            for p, sum_ in zip(model.parameters(), total, strict=True):
                sum_ += p.detach()
        server = [sum_ / len(shares) for sum_ in total]
        pace.done(task.stack * task.images, server)
