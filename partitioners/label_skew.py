"""Quantity-based label imbalance: every client holds a fixed number of classes."""

import numpy as np
from numpy.typing import NDArray

from partitioners.base import IndexPartitioner, Partition, whole_number


class LabelSkewPartitioner(IndexPartitioner):
    """NIID-Bench's #C=k (Li et al., Federated Learning on Non-IID Data Silos, arXiv 2102.02079).

    With K classes in the data, client i holds class i mod K and k-1 others drawn at random; every class is
    shuffled and split evenly among its holders. The classes held are those that Flower's
    `PathologicalPartitioner(class_assignment_mode="first-deterministic")` draws from the same seed. That
    one does not shuffle a class before splitting it, and with fewer clients than classes it may drop
    classes; here the classes that no client holds first are dealt out before others are drawn.

    Args:
        num_partitions: number of clients.
        seed: of all randomness.
        classes_per_client: k, from 1 to K.

    Raises:
        ValueError: k > K, clients * k < K, or a class has fewer examples than holders.
    """

    def __init__(self, num_partitions: int, seed: int, classes_per_client: int) -> None:
        super().__init__(num_partitions, seed)
        self._classes_per_client = whole_number("classes_per_client", classes_per_client, minimum=1)

    def _deal(self, labels: NDArray[np.int64], rng: np.random.Generator) -> Partition:
        classes, labels = np.unique(labels, return_inverse=True)
        held = self._draw_classes(len(classes), rng)
        parts: list[list[NDArray[np.int64]]] = [[] for _ in held]
        for class_, name in enumerate(classes):
            holders = [client for client, classes_held in enumerate(held) if class_ in classes_held]
            indices = rng.permutation(np.flatnonzero(labels == class_))
            if len(indices) < len(holders):
                raise ValueError(
                    f"class {name} has {len(indices)} examples but {len(holders)} clients hold it: "
                    "lower num_partitions or classes_per_client"
                )
            for client, share in zip(holders, np.array_split(indices, len(holders)), strict=True):
                parts[client].append(share)
        return [np.concatenate(shares) for shares in parts]

    def _draw_classes(self, num_classes: int, rng: np.random.Generator) -> list[set[int]]:
        """The classes 0..num_classes-1 that each client holds; every class has a holder."""
        clients, k = self.num_partitions, self._classes_per_client
        if k > num_classes:
            raise ValueError(
                f"classes_per_client={k} is more than the {num_classes} classes there are: lower it"
            )
        if clients * k < num_classes:
            raise ValueError(
                f"num_partitions={clients} with classes_per_client={k} cannot hold all "
                f"{num_classes} classes: raise num_partitions or classes_per_client"
            )
        unheld = rng.permutation(np.arange(clients, num_classes)).tolist()
        held = [{client % num_classes, *unheld[client::clients]} for client in range(clients)]
        for classes_held in held:
            while len(classes_held) < k:  # redraws duplicates, as NIID-Bench and Flower do
                classes_held.add(int(rng.integers(num_classes)))
        return held
