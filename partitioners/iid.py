"""No skew: the homogeneous setting other partitions are compared with."""

import numpy as np
from numpy.typing import NDArray

from partitioners.base import IndexPartitioner, Partition


class IidPartitioner(IndexPartitioner):
    """Shuffled, then split evenly: client sizes differ by at most one.

    Flower's own `IidPartitioner` takes contiguous blocks of the data set as it lies, which on data sorted
    by label is the opposite of iid.
    """

    def _deal(self, labels: NDArray[np.int64], rng: np.random.Generator) -> Partition:
        return np.array_split(rng.permutation(len(labels)), self.num_partitions)
