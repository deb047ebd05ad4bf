"""What the type hint of a parameter lets a configuration say."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, Unpack, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig

_WORDS = {float: "a number", int: "a whole number", bool: "true or false", NoneType: "null"}
_WORDS |= dict.fromkeys((str, Path), "a text")


def hints(target: Any) -> dict[str, Any]:
    """Types of a target's parameters, as far as they can be read."""
    try:
        found = get_type_hints(target.__init__ if inspect.isclass(target) else target)
        for hint in list(found.values()):
            if get_origin(hint) is Unpack:  # keywords that several targets have in common
                found |= get_type_hints(get_args(hint)[0])
        return found
    except (NameError, TypeError, AttributeError):
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a configuration is what a hint says; of hints not named here anything is."""
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(hint))
    if get_origin(hint) in (Sequence, list, tuple):
        return isinstance(value, ListConfig) and all(fits(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is Callable:
        return isinstance(value, DictConfig) and "_target_" in value
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint in (int, bool, NoneType):
        return type(value) is hint
    if hint in (str, Path):
        return type(value) in (str, int, float)  # YAML takes some names for numbers
    plain = not isinstance(value, DictConfig | ListConfig)
    return not (plain and _is_made(hint)) or isinstance(value, hint)


def words(hint: Any) -> str:
    """What a hint asks for, as in `a number or null`."""
    *others, last = dict.fromkeys(_listed(hint))
    return f"{', '.join(others)} or {last}" if others else last


def _listed(hint: Any) -> list[str]:
    if get_origin(hint) in (Union, UnionType):
        return [word for member in get_args(hint) for word in _listed(member)]
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    if get_origin(hint) in (Sequence, list, tuple):
        return [f"a list with {words(get_args(hint)[0])} in each place"]
    if get_origin(hint) is Callable or _is_made(hint):
        return ["keys with a _target_"]
    return [_WORDS.get(hint, getattr(hint, "__name__", str(hint)))]


def _is_made(hint: Any) -> bool:
    """Whether it takes a `_target_` to make one: of a class that is neither Python's own nor a list of names."""
    return inspect.isclass(hint) and hint.__module__ != "builtins" and not issubclass(hint, Enum)
