"""What every partitioner of this package is: a Flower partitioner that deals indices once, from a seed."""

import math
from abc import abstractmethod
from functools import cached_property

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import Partitioner
from numpy.typing import NDArray

Partition = list[NDArray[np.int64]]
"""The indices (int64, one dimension) of the examples of client 0, client 1, ..."""


class IndexPartitioner(Partitioner):
    """A `flwr_datasets` partitioner that is one function from labels to a partition.

    A subclass says in `_deal` who gets which examples. The assigned data set needs a column `label` of
    integers. The same seed and labels give the same partition, whatever ran before.

    Args:
        num_partitions: number of clients, at least 1.
        seed: of all randomness of the deal, at least 0.

    Raises:
        ValueError: an argument is impossible, or (when dealing) there are fewer examples than clients.
    """

    _shuffle = True

    def __init__(self, num_partitions: int, seed: int) -> None:
        super().__init__()
        self._num_partitions = whole_number("clients", num_partitions, minimum=1)
        self._seed = whole_number("seed", seed, minimum=0)

    @property
    def num_partitions(self) -> int:
        """Number of clients."""
        return self._num_partitions

    @cached_property
    def partition(self) -> Partition:
        """Every client's indices into the assigned data set, shuffled (but as they stand in a file)."""
        labels = self.dataset.with_format("numpy")["label"][:]
        if len(labels) < self.num_partitions:
            raise ValueError(
                f"clients={self.num_partitions} is more than the {len(labels)} examples: lower clients"
            )
        rng = np.random.default_rng(self._seed)
        partition = self._deal(labels, rng)
        # mini-batches may be taken in this order, and must not come class by class
        return [rng.permutation(indices) for indices in partition] if self._shuffle else partition

    def load_partition(self, partition_id: int) -> Dataset:
        """The rows of client `partition_id`, 0 <= partition_id < num_partitions."""
        return self.dataset.select(self.partition[partition_id])

    @abstractmethod
    def _deal(self, labels: NDArray[np.int64], rng: np.random.Generator) -> Partition:
        """Deal examples 0..n-1 with these labels, shape (n,), to `num_partitions` clients."""


def whole_number(key: str, value: int, minimum: int) -> int:
    """`value`, or a ValueError that names the configuration key unless it is an int >= minimum."""
    if type(value) is not int or value < minimum:
        raise ValueError(f"{key} must be a whole number of at least {minimum}, got {value!r}")
    return value


def positive(key: str, value: float) -> float:
    """`value`, or a ValueError that names the configuration key unless it is a finite number > 0."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{key} must be positive, got {value!r}")
    return value
