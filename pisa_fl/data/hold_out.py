"""Examples that are taken away to measure on: of each client, or of the whole training set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pisa_fl.randomness import numpy_generator


def hold_out(
    rows: NDArray[np.integer], groups: NDArray[np.integer], share: float, seed: int, client: int
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Take a stratified share of a client's examples away, to test it on; it keeps one at least.

    Args:
        rows: Positions of the client's examples, (n,).
        groups: Group of every example of the data set.
        share: Of them, in [0, 1).
        seed: Seed of the run.
        client: Client number; with the seed, it says which are drawn.

    Returns:
        Positions of those that stay, in their order, and of those that are taken.
    """
    taken = stratified(groups[rows], share, numpy_generator(seed, "client test", client))
    return rows[~taken], rows[taken]


def stratified(groups: NDArray[np.integer], share: float, draw: np.random.Generator) -> NDArray[np.bool_]:
    """Which examples a stratified share is, but for one example at least.

    Every group gives as near to its share as whole examples allow, by the largest remainders, so that the whole is
    round(share * n).

    Args:
        groups: Group of every example, (n,).
        share: Of them, in [0, 1).
        draw: Which are drawn.
    """
    taken = np.zeros(len(groups), bool)
    wanted = min(round(share * len(groups)), len(groups) - 1)
    if wanted < 1:
        return taken
    names, counts = np.unique(groups, return_counts=True)
    exact = counts * wanted / len(groups)
    takes = np.floor(exact).astype(int)
    largest = np.argsort(-(exact - takes), kind="stable")[: wanted - takes.sum()]
    takes[largest] += 1
    for name, take in zip(names, takes, strict=True):
        taken[draw.permutation(np.flatnonzero(groups == name))[:take]] = True
    return taken


def share_of(rows: int, share: float, key: str) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Positions of the test rows of a data set that has none of its own, drawn by a fixed seed, and of the others.

    Args:
        rows: How many there are.
        share: Of them that are for testing.
        key: Of the configuration, that says so.

    Raises:
        ValueError: It is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"{key}={share} must be where the test examples are, or a share between 0 and 1")
    order = np.random.default_rng(0).permutation(rows)
    count = max(1, round(share * rows))
    return np.sort(order[:count]), np.sort(order[count:])
