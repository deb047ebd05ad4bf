"""Flower on Ray: Flower's simulation with Flower's FedAvg and a ClientApp, one core and one thread for each client."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache, partial
from typing import TextIO

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor

from experiments.benchmarks.sides.pace import Pace
from experiments.benchmarks.task import LR, Task
from pisa_fl.engines.base import cores
from strategies.base.messages import integer


@cache
def shares(task: Task) -> list[tuple[Tensor, Tensor]]:
    """All clients' data; a process makes them once."""
    torch.set_num_threads(1)
    return task.shares()


def train(task: Task, message: Message, context: Context) -> Message:
    """One epoch on the client's images."""
    images, labels = shares(task)[int(context.node_config["partition-id"])]
    model = task.model()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), LR)
    examples = 0
    for rows in torch.randperm(len(labels)).split(task.batch):
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        examples += len(rows)
    arrays, metrics = ArrayRecord(model.state_dict()), MetricRecord({"num-examples": examples})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def main(task: Task, report: TextIO) -> None:
    """Rounds with as many nodes as the task draws."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    pace, seen = Pace(task, report), [0]
    client, server = ClientApp(), ServerApp()
    client.train()(partial(train, task))

    def count(replies: Sequence[RecordDict], key: str) -> MetricRecord:
        seen[0] = sum(integer(reply.metric_records["metrics"], key) for reply in replies)
        return MetricRecord({key: seen[0]})

    def turn(number: int, arrays: ArrayRecord) -> None:
        """Flower evaluates here, before the first round and after every round."""
        if number:
            pace.done(seen[0], arrays.to_torch_state_dict().values())
        pace.wait()

    @server.main()
    def rounds(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=task.stack / task.clients,
            fraction_evaluate=0.0,
            min_train_nodes=task.stack,
            min_available_nodes=task.clients,
            train_metrics_aggr_fn=count,
        )
        strategy.start(grid, ArrayRecord(task.model().state_dict()), sys.maxsize, evaluate_fn=turn)

    run_simulation(
        server,
        client,
        task.clients,
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": cores()}},
    )
