"""A federation: data dealt to clients, a model, the two halves of an algorithm, and the rounds.

for metrics in Federation(...).rounds(50):
    print(metrics["round"], metrics["test_accuracy"])
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor, nn

from partitioners import Partition
from pisa_fl.cohort import ClientData, FlatModel
from pisa_fl.data import ImageData
from pisa_fl.engines.local import LocalGrid
from pisa_fl.gateway import Gateway
from pisa_fl.host import ClientHost
from pisa_fl.randomness import numpy_generator
from pisa_fl.rundir import Metrics
from strategies import ClientHalf
from strategies.messages import DIFFERENTIATED, LOSS, WEIGHTS, record, vectors

# Flower's strategies report every round on their own; the run directory and the display do that here
logging.getLogger("flwr").setLevel(logging.ERROR)


class NoReplyError(RuntimeError):
    """No client of a round gave a reply that could be accepted."""


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose random initial weights follow from the seed alone; global random state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(numpy_generator(seed, "initial weights").integers(2**63)))
        return make()


class Federation:
    """A simulated federation on the `local` engine.

    Args:
        data: Training and test images.
        partition: Positions of each client's training examples, one array a client.
        model: The model; its present parameters are the initial weights.
        strategy: Server half, any Flower strategy.
        half: Client half.
        seed: Every random draw of the rounds follows from it.
        batch_size: Examples of a mini-batch.
        participation: Share of the clients drawn for each round, in (0, 1].
        device: Where clients compute and the model is evaluated.
        cohort: Clients that advance together; None: 1 on a CPU or for a model with running statistics, else 32.
        chunk: Examples differentiated at once where the number does not matter to the result.
        noise_std: Standard deviation of the noise on a client's pixels by client number, as
            `partitioners.FeatureNoisePartitioner` gives it; None for none.
    """

    def __init__(
        self,
        data: ImageData,
        partition: Partition,
        model: nn.Module,
        strategy: Strategy,
        half: ClientHalf,
        *,
        seed: int = 0,
        batch_size: int = 64,
        participation: float = 1.0,
        device: str | torch.device = "cpu",
        cohort: int | None = None,
        chunk: int = 250,
        noise_std: Callable[[int], float] | None = None,
    ) -> None:
        device = torch.device(device)
        self.strategy, self.data, self.partition = strategy, data, partition
        self.model = FlatModel(model, device)
        images, labels = _tensor(data.train_images, device), _tensor(data.train_labels, device)
        clients = {
            client: ClientData(images, labels, torch.as_tensor(rows), noise_std(client) if noise_std else 0.0)
            for client, rows in enumerate(partition)
        }
        if cohort is None:
            cohort = 1 if device.type == "cpu" or self.model.buffer_layout.size else 32
        self.host = ClientHost(self.model, half, data, clients, seed, batch_size, chunk, cohort)
        self.gateway = Gateway(LocalGrid(self.host), half, self.model.buffers.cpu(), seed, participation)
        self.arrays = record({WEIGHTS: self.model.weights})
        self.round = 0
        self.seconds = 0.0
        self._examples = sum(len(rows) for rows in partition)
        self._test = (_tensor(data.test_images, device), _tensor(data.test_labels, device))

    def rounds(self, count: int) -> Iterator[Metrics]:
        """Train up to round `count`, yielding the metrics of every round, of round 0 first.

        Raises:
            NoReplyError: No client of a round gave an acceptable reply.
        """
        if self.round == 0:
            yield self._metrics({})
        while self.round < count:
            yield self._metrics(self._train())

    def _train(self) -> Mapping[str, Any]:
        """One round of training; the metrics that the strategy made of it."""
        start = time.perf_counter()
        number = self.round + 1
        self.gateway.begin(number)
        messages = self.strategy.configure_train(number, self.arrays, ConfigRecord(), self.gateway)
        replies = self.gateway.send_and_receive(messages)
        if not self.gateway.traffic.clients_ok:
            client, reason = (*self.gateway.traffic.failures, (None, "the strategy asked none"))[0]
            raise NoReplyError(
                f"no client gave an acceptable reply in round {number}; client {client}: {reason}"
            )
        arrays, metrics = self.strategy.aggregate_train(number, replies)
        if arrays is not None:
            # Flower's adaptive servers answer in float64
            self.arrays = record(vectors(arrays))
        self._evaluate_on_clients(number)
        self.round = number
        self.seconds += time.perf_counter() - start
        return metrics or {}

    def _evaluate_on_clients(self, number: int) -> None:
        """Flower's own evaluation, for a strategy that asks for it."""
        messages = list(self.strategy.configure_evaluate(number, self.arrays, ConfigRecord(), self.gateway))
        if messages:
            self.strategy.aggregate_evaluate(number, self.gateway.send_and_receive(messages))

    def _metrics(self, reported: Mapping[str, Any]) -> Metrics:
        """This round's line of metrics.jsonl; what the strategy reports beside it is added."""
        self.load_weights()
        images, labels = self._test
        accuracy, loss = self.model.evaluate(images, labels, torch.arange(len(labels)), self.data, 1000)
        traffic = self.gateway.traffic
        metrics: Metrics = {
            "round": self.round,
            "test_accuracy": accuracy,
            "test_loss": loss,
            "train_loss": traffic.loss_sum / traffic.examples if traffic.examples else loss,
            "passes": traffic.differentiated / self._examples,
            "bytes_up": traffic.bytes_up,
            "bytes_down": traffic.bytes_down,
            "seconds": self.seconds,
            "clients_ok": traffic.clients_ok,
            "clients_failed": traffic.clients_failed,
        }
        # what Flower's strategies average of the clients' replies is here already
        added = {key: value for key, value in reported.items() if key not in (LOSS, DIFFERENTIATED)}
        named = {key.replace("-", "_"): value for key, value in added.items()}
        return {key: float(value) for key, value in named.items() if isinstance(value, int | float)} | metrics

    def load_weights(self) -> None:
        """Put the server's present weights and running statistics into the model."""
        weights = vectors(self.arrays, self.model.device)[WEIGHTS]
        self.model.load(weights, self.gateway.buffers.to(self.model.device))


def _tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor on the device; on the CPU it shares the (perhaps memory-mapped) array's pages."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it
        return torch.from_numpy(array).to(device)
