"""Ranges of the numbers that algorithms are given; each check names the argument and what it may be."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

GREATEST = 1e12
"""No number of an algorithm is greater: sums and squares of such stay finite in single precision."""

Made = TypeVar("Made", bound=Callable[..., Any])


def literals(made: Made) -> Made:
    """Decorator of a class or function: refuse an argument that is none of the values which its `Literal` lists.

    What a configuration gives is checked by the hints anyway; this is for who writes Python.

    Raises:
        ValueError: When it is called with such an argument.
    """
    call: Any = vars(made)["__init__"] if inspect.isclass(made) else made
    signature = inspect.signature(call)

    @wraps(call)
    def checked(*args: Any, **kwargs: Any) -> Any:
        hints = get_type_hints(call)  # which may be of what is defined below it
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if get_origin(hint := hints.get(name)) is Literal:
                one_of(name, value, get_args(hint))
        return call(*args, **kwargs)

    if not inspect.isclass(made):
        return cast(Made, checked)
    made.__init__ = checked  # type: ignore[method-assign]
    return made


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """One of two or more values.

    Raises:
        ValueError: It is none; so for the others.
    """
    if not any(type(value) is type(one) and value == one for one in allowed):
        *others, last = map(str, allowed)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value}")


def positive(name: str, value: Any) -> None:
    """A number above 0."""
    _number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")


def not_negative(name: str, value: Any) -> None:
    """A number of 0 or more."""
    _number(name, value)
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def decay(name: str, value: Any) -> None:
    """A number of 0 or more and below 1, as of a moving average."""
    _number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")


def share(name: str, value: Any) -> None:
    """A number above 0 and at most 1."""
    _number(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}")


def fraction(name: str, value: Any) -> None:
    """A number from 0 to 1."""
    _number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")


def whole(name: str, value: Any, least: int) -> None:
    """A whole number of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= GREATEST:
        raise ValueError(f"{name} must be a whole number of {least} or more, got {value}")


_FLOWERS: dict[str, Callable[[str, Any], None]] = {
    "eta": positive,
    "eta_l": positive,
    "tau": positive,
    "beta_1": decay,
    "beta_2": decay,
    "server_learning_rate": positive,
    "server_momentum": decay,
    "proximal_mu": not_negative,
    "num_malicious_nodes": partial(whole, least=0),
    "num_nodes_to_select": partial(whole, least=1),
}
"""Arguments and attributes of Flower's strategies, and what they may be."""


def flowers_own(strategy: object) -> None:
    """Check the numbers of a strategy of Flower's, which takes whatever it is given."""
    if type(strategy).__module__.startswith("flwr."):
        for name, check in _FLOWERS.items():
            if hasattr(strategy, name):
                check(name, getattr(strategy, name))


def _number(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and abs(value) <= GREATEST):
        raise ValueError(f"{name} must be a number of at most {GREATEST:g}, got {value}")
