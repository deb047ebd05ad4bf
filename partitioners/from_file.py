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
        ValueError: the file is missing, is not a partition, is of another number of clients, or (when
            dealing) does not deal every example of the data set exactly once.
    """

    _shuffle = False  # the file's order is kept

    def __init__(self, num_partitions: int, path: str | Path) -> None:
        super().__init__(num_partitions, seed=0)
        self._path = path
        self._loaded = load(path)
        if len(self._loaded) != num_partitions:
            raise ValueError(
                f"{path} is a partition among {len(self._loaded)} clients but clients={num_partitions}: "
                f"set clients={len(self._loaded)}"
            )

    def _deal(self, labels: NDArray[np.int64], rng: np.random.Generator) -> Partition:
        check(self._loaded, len(labels), source=str(self._path))
        return self._loaded
