"""Distribution-based label imbalance and quantity skew: shares drawn from a Dirichlet distribution."""

import numpy as np
from numpy.typing import NDArray

from partitioners.base import IndexPartitioner, Partition, positive, whole_number


class DirichletPartitioner(IndexPartitioner):
    """Every class is divided among the clients in proportions drawn from Dirichlet(alpha).

    From Yurochkin et al. (arXiv 1905.12022), with NIID-Bench's numbers (arXiv 2102.02079). All proportions
    are redrawn until every client has `min_examples`. The numbers of examples are, but for rounding, those
    of Flower's `DirichletPartitioner` with the same seed, which however gives up after 10 redraws.

    Args:
        num_partitions: number of clients.
        seed: of all randomness.
        alpha: concentration; the smaller, the more skewed.
        min_examples: fewest examples a client may have.
        self_balancing: give no more of the following classes to a client that already has its even share.
            NIID-Bench's code always does this, though its paper does not say so.
        max_redraws: give up after so many.

    Raises:
        ValueError: clients * min_examples > examples, or no draw gave every client `min_examples`.
    """

    def __init__(
        self,
        num_partitions: int,
        seed: int,
        alpha: float,
        min_examples: int,
        self_balancing: bool,
        max_redraws: int,
    ) -> None:
        super().__init__(num_partitions, seed)
        self._alpha = positive("alpha", alpha)
        self._min_examples = whole_number("min_examples", min_examples, minimum=1)
        self._self_balancing = self_balancing
        self._max_redraws = whole_number("max_redraws", max_redraws, minimum=0)

    def _deal(self, labels: NDArray[np.int64], rng: np.random.Generator) -> Partition:
        classes, class_sizes = np.unique(labels, return_counts=True)
        counts = self._draw_counts(class_sizes, rng)
        shares = [
            np.split(rng.permutation(np.flatnonzero(labels == class_)), np.cumsum(row)[:-1])
            for class_, row in zip(classes, counts, strict=True)
        ]
        return [np.concatenate(parts) for parts in zip(*shares, strict=True)]

    def _draw_counts(self, class_sizes: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """How many examples of each class each client gets, shape (classes, clients)."""
        clients, examples = self.num_partitions, int(class_sizes.sum())
        if clients * self._min_examples > examples:
            raise ValueError(
                f"num_partitions={clients} with min_examples={self._min_examples} need more than the "
                f"{examples} examples there are: lower num_partitions or min_examples"
            )
        for _ in range(1 + self._max_redraws):
            counts = self._draw_once(class_sizes, rng)
            if counts.sum(axis=0).min() >= self._min_examples:
                return counts
        raise ValueError(
            f"{1 + self._max_redraws} draws never gave each of num_partitions={clients} "
            f"its min_examples={self._min_examples}: raise alpha={self._alpha} or max_redraws, or "
            "lower num_partitions or min_examples"
        )

    def _draw_once(self, class_sizes: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """As `_draw_counts`, without its promise; all zero if a class finds no client to go to."""
        clients, examples = self.num_partitions, class_sizes.sum()
        counts = np.zeros((len(class_sizes), clients), dtype=np.int64)
        proportions = rng.dirichlet(np.full(clients, self._alpha), size=len(class_sizes))
        for row, share, size in zip(counts, proportions, class_sizes, strict=True):
            if self._self_balancing:
                share = share * (counts.sum(axis=0) < examples / clients)
            upto = np.cumsum(share)
            if upto[-1] == 0:  # a tiny alpha gave the whole class to a client that already has its share
                return np.zeros_like(counts)
            row[:] = np.diff((upto[:-1] / upto[-1] * size).astype(np.int64), prepend=0, append=size)
        return counts


class QuantityPartitioner(DirichletPartitioner):
    """Client sizes ~ Dirichlet(alpha), labels iid: NIID-Bench's quantity skew (arXiv 2102.02079).

    The same deal as `DirichletPartitioner`'s with all examples taken for one class.

    Args:
        num_partitions: number of clients.
        seed: of all randomness.
        alpha: concentration; the smaller, the more skewed.
        min_examples: fewest examples a client may have.
        max_redraws: give up after so many.

    Raises:
        ValueError: clients * min_examples > examples, or no draw gave every client `min_examples`.
    """

    def __init__(
        self, num_partitions: int, seed: int, alpha: float, min_examples: int, max_redraws: int
    ) -> None:
        super().__init__(
            num_partitions, seed, alpha, min_examples, self_balancing=False, max_redraws=max_redraws
        )

    def _deal(self, labels: NDArray[np.int64], rng: np.random.Generator) -> Partition:
        return super()._deal(np.zeros_like(labels), rng)
