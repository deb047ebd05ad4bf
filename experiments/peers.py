"""The rivals beside another framework's: fluke 0.8.1 on the same deal, initial weights, batches and numbers.

    pip install fluke-fl
    python -m experiments.peers
    python -m experiments.peers --rounds 20 --momentum 0.9

Ten clients of two classes, everybody in every round, five local epochs of *one batch each*: without batches nothing is
left to chance, and where two frameworks mean the same method, weights agree to rounding. Prints the test accuracy of
both after the last three rounds, and how far the weights are apart at the end, as a share of how far they have come.
docs/fidelity.md says what agrees, and why the others do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pisa_fl import compose, prepare
from pisa_fl.federation import Federation

CLIENTS, EPOCHS, LR = 10, 5, 0.1
METHODS: Mapping[str, tuple[str, dict[str, Any], list[str]]] = {
    "fedavg": ("FedAVG", {}, []),
    "fedprox": ("FedProx", {"mu": 0.1}, ["strategy.mu=0.1"]),
    "scaffold": ("SCAFFOLD", {}, ["strategy.alpha=uniform"]),
    "fednova": ("FedNova", {}, []),
    "feddyn": ("FedDyn", {"alpha": 0.1}, ["strategy.penalty=0.1", "strategy.alpha=uniform"]),
    "moon": ("MOON", {"mu": 1.0, "tau": 0.5}, ["strategy.mu=1", "strategy.temperature=0.5"]),
}
"""Ours, and fluke's module -> fluke's class, its clients' numbers, our overrides."""


class Parts(nn.Module):
    """A network as fluke's MOON asks for it: all but the last layer, and the last."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        *body, self.head = network
        self.encoder = nn.Sequential(*body)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.head(self.encoder(inputs))


def ours(name: str, overrides: list[str]) -> Federation:
    """The federation, not begun."""
    settings = [f"clients={CLIENTS}", "partition.classes_per_client=2", "model=mlp", "batch_size=10000"]
    local = [f"strategy.local_epochs={EPOCHS}", f"strategy.lr={LR}", "strategy.weight_decay=0"]
    return prepare(compose(*settings, f"strategy={name}", *local, "progress=false", *overrides))


def _network(federation: Federation) -> nn.Sequential:
    network = federation.model.module
    assert isinstance(network, nn.Sequential)
    return network


def theirs(federation: Federation, name: str, momentum: float) -> Any:
    """fluke's federation of the same clients and initial weights."""
    method, numbers, overrides = METHODS[name]
    loader = import_module("fluke.data").FastDataLoader
    configurator = import_module("fluke.config").OptimizerConfigurator
    algorithm = getattr(import_module(f"fluke.algorithms.{name}"), method)
    inputs, targets = (torch.as_tensor(federation.data.train[key]) for key in ("inputs", "targets"))
    ready = federation.data.ready({"inputs": inputs, "targets": targets})
    federation.load_weights()
    model = Parts(deepcopy(_network(federation)))
    optimizer = configurator({"name": "SGD", "lr": LR, "momentum": momentum})
    blank = algorithm.__new__(algorithm)
    clients = [
        blank.get_client_class()(
            index=index,
            train_set=loader(
                ready["inputs"][rows], ready["targets"][rows], num_labels=10, batch_size=len(rows)
            ),
            test_set=None,
            optimizer_cfg=optimizer,
            loss_fn=nn.CrossEntropyLoss(),
            local_epochs=EPOCHS,
            clipping=0,
            **numbers,
        )
        for index, rows in enumerate(federation.partition)
    ]
    weighted = "strategy.alpha=uniform" not in overrides
    server = blank.get_server_class()(model=model, test_set=None, clients=clients, weighted=weighted)
    return algorithm(CLIENTS, None, {}, clients=clients, server=server)


def accuracy(federation: Federation, model: nn.Module) -> float:
    """On the test set."""
    test = federation.data.ready({key: torch.as_tensor(v) for key, v in federation.data.test.items()})
    with torch.no_grad():
        return float((model(test["inputs"]).argmax(dim=1) == test["targets"]).float().mean())


def compared(name: str, rounds: int, momentum: float) -> tuple[list[float], list[float], float]:
    """Accuracies of both after each round, and the distance of the weights at the end."""
    federation = ours(name, [f"strategy.momentum={momentum}", *METHODS[name][2]])
    algorithm = theirs(federation, name, momentum)
    start = nn.utils.parameters_to_vector(algorithm.server.model.parameters()).detach().clone()
    found = [line["test_accuracy"] for line in federation.rounds(rounds)][1:]
    server, peers = algorithm.server, []
    algorithm._round_zero()
    for number in range(1, rounds + 1):
        server.broadcast_model(algorithm.clients)
        for client in algorithm.clients:
            client.local_update(number)
        server.aggregate(algorithm.clients, server.receive_client_models(algorithm.clients, state_dict=False))
        peers.append(accuracy(federation, server.model))
    federation.load_weights()
    own, other = (
        nn.utils.parameters_to_vector(model.parameters()).detach()
        for model in (Parts(_network(federation)), server.model)
    )
    return found, peers, float((own - other).norm() / (own - start).norm())


def main(arguments: list[str] | None = None) -> None:
    """Compare all methods and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--momentum", type=float, default=0.0)
    chosen = parser.parse_args(arguments)
    print("| method | ours, % | fluke's, % | weights apart |\n| --- | --- | --- | --- |")
    for name in METHODS:
        found, peers, apart = compared(name, chosen.rounds, chosen.momentum)
        shown = (" ".join(f"{100 * value:.2f}" for value in values[-3:]) for values in (found, peers))
        print("| " + " | ".join([name, *shown, f"{apart:.1e}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
