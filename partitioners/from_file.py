"""A deal that was made before."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partitioners.base import IndexPartitioner, Partition
from partitioners.partition import check, load


class FromFilePartitioner(IndexPartitioner):
    """The deal written in a `partition.json`, such as every run leaves in its directory.

    Args:
        num_partitions: number of clients, which the file must agree with.
        path: the file, {"0": [indices], "1": [...], ...}.

    Raises:
        ValueError: (when dealing) the file is missing, is not a partition, is of another number of clients,
            or deals an example twice, or one that the data set does not have. It need not deal all of them.
    """

    _shuffle = False  # the file's order is kept

    def __init__(self, num_partitions: int, path: str | Path) -> None:
        super().__init__(num_partitions, seed=0)
        self._path = path

    def _deal(self, labels: NDArray[np.int64], rng: np.random.Generator) -> Partition:
        dealt = load(self._path)
        if len(dealt) != self.num_partitions:
            raise ValueError(
                f"path={self._path} is a partition among {len(dealt)} clients but num_partitions="
                f"{self.num_partitions}: set num_partitions={len(dealt)}"
            )
        check(dealt, len(labels), source=f"path={self._path}")
        return dealt
