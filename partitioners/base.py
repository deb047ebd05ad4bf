"""What every partitioner of this package is: a Flower partitioner that deals indices once, from a seed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner
else:
    # Flower's own takes a second to import, which dealing does not need; `partitioners` registers with it
    Partitioner = ABC

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
        self._dataset: Dataset | None = None
        self._labels: NDArray[np.int64] | None = None
        self._num_partitions = whole_number("num_partitions", num_partitions, minimum=1)
        self._seed = whole_number("seed", seed, minimum=0)

    @property
    def num_partitions(self) -> int:
        """Number of clients."""
        return self._num_partitions

    @property
    def dataset(self) -> Dataset:
        """The assigned data set."""
        if self._dataset is None:
            if self._labels is None:
                raise AttributeError("assign a data set to the partitioner first")
            self._dataset = labelled(self._labels)
        return self._dataset

    @dataset.setter
    def dataset(self, value: Dataset) -> None:
        self._assert_free()
        self._dataset = value

    def assign(self, labels: NDArray[np.integer]) -> None:
        """Assign `labelled(labels)`, which is made only if somebody asks for the data set."""
        self._assert_free()
        self._labels = labels.astype(np.int64)

    def is_dataset_assigned(self) -> bool:
        """Whether a data set was assigned."""
        return self._dataset is not None or self._labels is not None

    @cached_property
    def partition(self) -> Partition:
        """Every client's indices into the assigned data set, shuffled (but as they stand in a file)."""
        labels = self._labels
        if labels is None:
            labels = self.dataset.with_format("numpy")["label"][:]
        if len(labels) < self.num_partitions:
            raise ValueError(
                f"num_partitions={self.num_partitions} is more than the {len(labels)} examples: lower num_partitions"
            )
        rng = np.random.default_rng(self._seed)
        partition = self._deal(labels, rng)
        # mini-batches may be taken in this order, and must not come class by class
        return [rng.permutation(indices) for indices in partition] if self._shuffle else partition

    def load_partition(self, partition_id: int) -> Dataset:
        """The rows of client `partition_id`, 0 <= partition_id < num_partitions."""
        return self.dataset.select(self.partition[partition_id])

    def _assert_free(self) -> None:
        if self.is_dataset_assigned():
            raise ValueError("a data set is assigned to a partitioner only once")

    @abstractmethod
    def _deal(self, labels: NDArray[np.int64], rng: np.random.Generator) -> Partition:
        """Deal examples 0..n-1 with these labels, shape (n,), to `num_partitions` clients."""


def labelled(labels: NDArray[np.integer]) -> Dataset:
    """An in-memory data set of columns `index` and `label`."""
    from datasets import Dataset

    return Dataset.from_dict({"index": np.arange(len(labels)), "label": labels.astype(np.int64)})


def whole_number(name: str, value: int, minimum: int) -> int:
    """`value`, or a ValueError that names the argument unless it is an int >= minimum."""
    if type(value) is not int or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
    return value


def positive(name: str, value: float) -> float:
    """`value`, or a ValueError that names the argument unless it is a finite number > 0."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return value
