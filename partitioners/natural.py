"""Nothing is drawn: examples stay with whom they come from."""

import numpy as np
from numpy.typing import NDArray

from partitioners.base import IndexPartitioner, Partition


class NaturalPartitioner(IndexPartitioner):
    """Every group whole to one client: a speaker's lines, a writer's digits, a class's images.

    With as many clients as groups each has one, in the order of their numbers. With fewer, the groups are dealt by
    size, the largest first, each to the client that has the fewest examples so far (Graham's rule, SIAM J. Appl. Math.
    1969), so that sizes are about as even as whole groups allow.

    Args:
        num_partitions: number of clients.
        seed: of the order of a client's examples.

    Raises:
        ValueError: there are more clients than groups.
    """

    def _deal(self, labels: NDArray[np.int64], rng: np.random.Generator) -> Partition:
        groups, members, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        clients = self.num_partitions
        if clients > len(groups):
            raise ValueError(
                f"clients={clients} is more than the {len(groups)} groups that partition=natural keeps whole:"
                f" set clients={len(groups)} or fewer"
            )
        owner = np.arange(len(groups))
        if clients < len(groups):
            held = np.zeros(clients, np.int64)
            for group in np.argsort(-sizes, kind="stable"):
                owner[group] = np.argmin(held)
                held[owner[group]] += sizes[group]
        return [np.flatnonzero(owner[members] == client) for client in range(clients)]
