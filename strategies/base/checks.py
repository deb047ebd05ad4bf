"""Ranges of the numbers that algorithms are given; each check names the key and what it may be."""

from __future__ import annotations

from typing import Any

GREATEST = 1e12
"""No number of an algorithm is greater: sums and squares of such stay finite in single precision."""


def positive(key: str, value: Any) -> None:
    """A number above 0.

    Raises:
        ValueError: It is none; so for the others.
    """
    _number(key, value)
    if value <= 0:
        raise ValueError(f"strategy.{key} must be positive, got {value}")


def not_negative(key: str, value: Any) -> None:
    """A number of 0 or more."""
    _number(key, value)
    if value < 0:
        raise ValueError(f"strategy.{key} must not be negative, got {value}")


def decay(key: str, value: Any) -> None:
    """A number of 0 or more and below 1, as of a moving average."""
    _number(key, value)
    if not 0 <= value < 1:
        raise ValueError(f"strategy.{key} must be at least 0 and below 1, got {value}")


def share(key: str, value: Any) -> None:
    """A number above 0 and at most 1."""
    _number(key, value)
    if not 0 < value <= 1:
        raise ValueError(f"strategy.{key} must be above 0 and at most 1, got {value}")


def whole(key: str, value: Any, least: int) -> None:
    """A whole number of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= GREATEST:
        raise ValueError(f"strategy.{key} must be a whole number of {least} or more, got {value}")


def one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    """One of some words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"strategy.{key} must be one of {', '.join(allowed)}, got {value}")


_FLOWERS = {
    "eta": ("eta", positive),
    "eta_l": ("lr", positive),
    "tau": ("tau", positive),
    "beta_1": ("beta_1", decay),
    "beta_2": ("beta_2", decay),
    "server_learning_rate": ("server_lr", positive),
    "server_momentum": ("server_momentum", decay),
    "proximal_mu": ("mu", not_negative),
}
"""Attributes of Flower's strategies -> their keys in conf/strategy, and what they may be."""


def flowers_own(strategy: object) -> None:
    """Check the numbers of a strategy of Flower's, which takes whatever it is given."""
    if type(strategy).__module__.startswith("flwr."):
        for attribute, (key, check) in _FLOWERS.items():
            if hasattr(strategy, attribute):
                check(key, getattr(strategy, attribute))


def fraction(key: str, value: Any) -> None:
    """A number from 0 to 1."""
    _number(key, value)
    if not 0 <= value <= 1:
        raise ValueError(f"strategy.{key} must be from 0 to 1, got {value}")


def _number(key: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and abs(value) <= GREATEST):
        raise ValueError(f"strategy.{key} must be a number of at most {GREATEST:g}, got {value}")
