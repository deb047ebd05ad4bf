"""Differences between two rows seed by seed, and whether the luck of the seeds explains them.

The test is the exact sign-flip permutation test. Both runs of a pair have the same seed, and so the same deal and the
same initial weights. If the two settings were alike, each pair's difference could as well have had the other sign: p is
the share of all 2^n choices of signs whose mean is at least as far from 0 as the one that was measured. Of n pairs none
can give less than 2 / 2^n. Of several tests, p is raised as Holm's method has it, so that the chance to find any
difference where there is none stays below the level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd

from pisa_fl.metric import Metric
from pisa_fl.results.report.rows import Row

LEVEL = 0.05
"""Of p below which a difference is called proven."""

EXACT = 20
"""Pairs up to which all choices of signs are tried; beyond, as many are drawn."""


class Finding(StrEnum):
    """What is found of a difference."""

    BEYOND = "beyond seed noise"
    AGREED = "every seed agrees, but too few seeds to prove it"
    WITHIN = "within seed noise"
    UNTOLD = "one seed, not to be told from seed noise"
    UNPAIRED = "not tested, no seed with the same deal"
    DIVERGED = "not tested, a run diverged"


@dataclass(frozen=True)
class Difference:
    """How far one row is ahead of another.

    Attributes:
        ahead: The row with the better mean.
        behind: The other.
        values: By how much the first is better, seed by seed.
        p: Of the test alone; NaN where there was none.
        raised: p, raised for the number of tests.
        finding: What follows.
    """

    ahead: Row
    behind: Row
    values: Sequence[float]
    p: float
    raised: float
    finding: Finding


def differences(
    panels: dict[str, list[Row]], runs: pd.DataFrame, rows: Sequence[Row], measure: str, quality: Metric
) -> dict[str, list[Difference]]:
    """In every panel, how far the row of the best mean is ahead of each of the others; the nearest first."""
    values = {rows[number].label: own.set_index("seed")[measure] for number, own in runs.groupby("row")}
    sign = 1 if quality.better == "higher" else -1
    found: list[tuple[str, Row, Row, list[float], bool]] = []
    for panel, members in panels.items():
        ranked = ranking(members, values, sign)
        for other in ranked[1:]:
            seeds = [
                seed
                for seed in ranked[0].seeds
                if seed in other.by_seed and ranked[0].by_seed[seed].deal == other.by_seed[seed].deal
            ]
            pair = values[ranked[0].label], values[other.label]
            with np.errstate(invalid="ignore"):
                own = [sign * float(pair[0][seed] - pair[1][seed]) for seed in seeds]
            diverged = any(row.by_seed[seed].diverged for row in (ranked[0], other) for seed in seeds)
            found.append((panel, ranked[0], other, own, diverged))
    tested = [len(own) > 1 and not diverged for *_, own, diverged in found]
    ps = [sign_flip(f[3]) for f, is_tested in zip(found, tested, strict=True) if is_tested]
    results = iter(zip(ps, holm(ps), strict=True))
    result: dict[str, list[Difference]] = {panel: [] for panel in panels}
    for (panel, ahead, behind, own, diverged), is_tested in zip(found, tested, strict=True):
        p, raised = next(results) if is_tested else (math.nan, math.nan)
        finding = Finding.DIVERGED if diverged else _finding(own, raised, len(ps))
        result[panel].append(Difference(ahead, behind, own, p, raised, finding))
    return result


def ranking(rows: Sequence[Row], values: dict[str, pd.Series], sign: int) -> list[Row]:
    """Rows by the mean over their seeds, the best first."""
    return sorted(rows, key=lambda row: -sign * float(values[row.label].mean()))


def sign_flip(values: Sequence[float]) -> float:
    """Two-sided p of the mean of paired differences, under all choices of their signs."""
    own = np.asarray(values, dtype=np.float64)
    n = len(own)
    if n <= EXACT:
        sums = np.zeros(1)
        for value in own:
            sums = np.concatenate([sums + value, sums - value])
    else:
        drawn = np.random.default_rng(0).integers(0, 2, (2**16, n)) * 2 - 1
        sums = np.concatenate([drawn @ own, [own.sum()]])  # the one that was measured is one of them
    least = abs(own.sum()) - 1e-9 * np.abs(own).sum()  # sums that differ by rounding are the same
    return float((np.abs(sums) >= least).mean())


def holm(ps: Sequence[float]) -> list[float]:
    """Each p raised for the number of tests (Holm 1979), in the order in which they were given."""
    raised, highest = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        raised[index] = highest
    return raised


def least_p(pairs: int) -> float:
    """The least p that so many pairs can give."""
    return min(1.0, 2.0 / 2**pairs)


def fewest_pairs(tests: int = 1) -> int:
    """The fewest pairs with which the smallest of so many tests' p can be below the level."""
    return next(n for n in range(1, 64) if tests * least_p(n) < LEVEL)


def _finding(values: Sequence[float], raised: float, tests: int) -> Finding:
    if len(values) < 2:
        return Finding.UNTOLD if values else Finding.UNPAIRED
    if raised < LEVEL:
        return Finding.BEYOND
    agreed = min(values) > 0 or max(values) < 0
    return Finding.AGREED if agreed and len(values) < fewest_pairs(tests) else Finding.WITHIN
