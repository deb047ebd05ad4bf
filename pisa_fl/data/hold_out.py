"""Test examples of the clients' own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pisa_fl.randomness import numpy_generator


def hold_out(
    rows: NDArray[np.integer], groups: NDArray[np.integer], share: float, seed: int, client: int
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Take a stratified share of a client's examples away, to test it on.

    Every group gives as near to its share as whole examples allow, by the largest remainders, so that the whole is
    round(share * n), but the client keeps one example at least.

    Args:
        rows: Positions of the client's examples, (n,).
        groups: Group of every example of the data set.
        share: Of them, in [0, 1).
        seed: Seed of the run.
        client: Client number; with the seed, it says which are drawn.

    Returns:
        Positions of those that stay, in their order, and of those that are taken.
    """
    wanted = min(round(share * len(rows)), len(rows) - 1)
    if wanted < 1:
        return rows, rows[:0]
    draw = numpy_generator(seed, "client test", client)
    own = groups[rows]
    names, counts = np.unique(own, return_counts=True)
    exact = counts * wanted / len(rows)
    takes = np.floor(exact).astype(int)
    largest = np.argsort(-(exact - takes), kind="stable")[: wanted - takes.sum()]
    takes[largest] += 1
    taken = np.zeros(len(rows), bool)
    for name, take in zip(names, takes, strict=True):
        taken[draw.permutation(np.flatnonzero(own == name))[:take]] = True
    return rows[~taken], rows[taken]
