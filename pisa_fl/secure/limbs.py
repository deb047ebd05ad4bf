"""Real numbers as whole ones that Flower's SecAgg+ can add: two of 30 bits each, whose sums are exact.

A value v is a multiple h of 2^-10, and a rest l of half that at most, told to 2^-40. Flower quantises both to
`LEVELS` steps over [-REACH, REACH], and finds multiples of its step there, so that its random rounding has nothing to
round: a sum is that of its members' values, each to the nearest 2^-40 = 9e-13, whoever drops out, and the same to the
bit whatever the masks were. One number of 30 bits would not do: weights are of the order of 1, elements of gradients
may be less than a millionth, and Q divides by their size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flwr.common.secure_aggregation.quantization import dequantize
from numpy.typing import NDArray

REACH = 2.0**19
"""The greatest size of a value."""

LEVELS = 2**30
"""Steps that [-REACH, REACH] has; Flower's quantised numbers have 31 bits at most."""

MODULUS = 2**48
"""Sums and masks are taken modulo that: of 2^18 clients at most."""

_STEP = 2 * REACH / LEVELS


def whole(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The two whole numbers of each of (L,) values, (2, L).

    Raises:
        ValueError: A value is not finite, or beyond `REACH`.
    """
    if not (np.abs(values) <= REACH).all():
        raise ValueError(f"values that are not finite, or beyond {REACH:g}, cannot be summed exactly")
    high = np.round(values / _STEP)
    low = np.round((values - high * _STEP) * (LEVELS / _STEP))
    return np.stack([high, low]).astype(np.int64)


def values_of(sums: NDArray[np.int64]) -> NDArray[np.float64]:
    """The sum of values, (L,), from the sums of their whole numbers, (2, L)."""
    high, low = sums * _STEP
    return np.asarray(high + low / LEVELS)


def split(values: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Two vectors, multiples of Flower's step, for (L,) values.

    Raises:
        ValueError: As `whole`.
    """
    return list(whole(values) * _STEP)


def joined(sums: Sequence[NDArray[np.int64]], count: int) -> NDArray[np.float64]:
    """The sum of the values of so many clients from the sums of what Flower made of their two vectors, (L,)."""
    high, low = (part - (count - 1) * REACH for part in dequantize(list(sums), REACH, LEVELS))
    return np.asarray(high + low / LEVELS)
