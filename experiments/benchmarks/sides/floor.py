"""What nothing can be faster than: one forward and backward pass over the task's images, already normalised.

Options: the number of processes, which share the cores and the images out among them, and the batch sizes to
choose from.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import TextIO

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks.sides.pace import Pace
from experiments.benchmarks.task import Task
from pisa_fl.engines.base import cores


def main(task: Task, report: TextIO, processes: str, *batches: str) -> None:
    """Passes over the images of all clients."""
    count = int(processes)
    torch.set_num_threads(1)  # a process with threads cannot be forked
    images, labels = task.tensors()
    fork = multiprocessing.get_context("fork")
    ends = []
    for own_images, own_labels in zip(images.chunk(count), labels.chunk(count), strict=True):
        end, other = fork.Pipe()
        work = (task, own_images, own_labels, max(1, cores() // count), other)
        fork.Process(target=differentiate, args=work, daemon=True).start()
        ends.append(end)
    pace = Pace(task, report, "batch", [int(batch) for batch in batches])
    while True:
        batch = pace.wait()
        for end in ends:
            end.send(batch)
        pace.done(sum(end.recv() for end in ends))


def differentiate(task: Task, images: Tensor, labels: Tensor, threads: int, orders: Connection) -> None:
    """In a process: pass over the images in batches of the size that comes, and answer how many they were."""
    torch.set_num_threads(threads)
    model = task.model()
    while True:
        batch = orders.recv()
        for x, y in zip(images.split(batch), labels.split(batch), strict=True):
            F.cross_entropy(model(x), y).backward()
        orders.send(len(labels))
