"""The pathological deal of the first federated learning paper."""

import numpy as np
from numpy.typing import NDArray

from partitioners.base import IndexPartitioner, Partition, whole_number


class ShardsPartitioner(IndexPartitioner):
    """Sorted by label, cut into clients * s shards, s of them at random to each client.

    From McMahan et al. (arXiv 1602.05629). Shard sizes differ by at most one, so that every example is
    dealt; where they are all equal, this is Flower's `ShardPartitioner`.

    Args:
        num_partitions: number of clients.
        seed: of the shards' order.
        shards_per_client: s, at least 1.

    Raises:
        ValueError: there are more shards than examples.
    """

    def __init__(self, num_partitions: int, seed: int, shards_per_client: int) -> None:
        super().__init__(num_partitions, seed)
        self._shards_per_client = whole_number("shards_per_client", shards_per_client, minimum=1)

    def _deal(self, labels: NDArray[np.int64], rng: np.random.Generator) -> Partition:
        clients, each = self.num_partitions, self._shards_per_client
        if clients * each > len(labels):
            raise ValueError(
                f"num_partitions={clients} with shards_per_client={each} need more than the "
                f"{len(labels)} examples there are: lower num_partitions or shards_per_client"
            )
        shards = np.array_split(np.argsort(labels, kind="stable"), clients * each)
        dealt = rng.permutation(clients * each).reshape(clients, each)
        return [np.concatenate([shards[shard] for shard in row]) for row in dealt]
