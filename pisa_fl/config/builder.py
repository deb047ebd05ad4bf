"""From a node of a configuration to the object that it names."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf

from pisa_fl.config import own_code
from pisa_fl.config.error import ConfigurationError


def build(node: DictConfig, kind: type = object, **available: Any) -> Any:
    """Instantiate a node's `_target_`, handing it those of the available objects that it has a parameter for.

    So a class of the user's may ask for `layout`, `shape` or `classes` by naming it in its signature, or not.

    Args:
        node: Configuration with a `_target_`.
        kind: What it must give.
        available: Objects by parameter name; what the node itself says comes first.

    Raises:
        ConfigurationError: The target cannot be found, refuses its arguments, or gives something else.
    """
    from hydra.utils import instantiate

    if "_target_" not in node:
        raise ConfigurationError(
            f"a part of the configuration names no _target_: {OmegaConf.to_yaml(node).strip()}"
        )
    target = _target(node)
    _check_values(node)
    named = f"{node._get_full_key('_target_')}={node._target_}"
    try:
        parameters = _parameters(target)
        extra = {key: value for key, value in available.items() if key in parameters and key not in node}
        built = instantiate(node, _partial_=True, _convert_="all")(**extra)
    except (Exception, SystemExit) as error:
        raise ConfigurationError(_cause(error, named)) from error
    if not isinstance(built, kind):
        what = f"the class {built.__name__}" if inspect.isclass(built) else f"a {type(built).__name__}"
        raise ConfigurationError(f"{named} must give a {kind.__name__} and gives {what}")
    return built


def makes(node: DictConfig, kind: type) -> bool:
    """Whether a node's target is a class of a kind.

    Raises:
        ConfigurationError: The target cannot be found.
    """
    target = _target(node)
    return inspect.isclass(target) and issubclass(target, kind)


def _parameters(target: Any) -> Collection[str]:
    """Names of a target's parameters, as far as they can be read."""
    try:
        return inspect.signature(target).parameters
    except ValueError:
        return ()


def _target(node: DictConfig) -> Any:
    """What a node's `_target_` names.

    Raises:
        ConfigurationError: It names nothing that can be called.
    """
    from hydra.utils import get_object

    name = node._target_
    named = f"{node._get_full_key('_target_')}={name}"
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"{named} is no name: name a class or a function")
    try:
        target = get_object(name)
    except (Exception, SystemExit) as error:
        _refuse_hidden(name, named)
        raise ConfigurationError(f"{named}: {' '.join(str(error).split())}") from error
    if not callable(target):
        raise ConfigurationError(f"{named} is a {type(target).__name__}: name a class or a function")
    return target


def _refuse_hidden(name: str, named: str) -> None:
    """Say so if a user's module is not found because another one, imported before, has its name."""
    top = name.partition(".")[0]
    found = getattr(sys.modules.get(top), "__file__", None) or "built into Python"
    for path in (folder / entry for folder in own_code.imported_folders for entry in (f"{top}.py", top)):
        if top in sys.modules and path.exists() and not Path(found).is_relative_to(path.parent):
            raise ConfigurationError(f"{named}: {path} is hidden by the module `{top}`, {found}: rename it")


def _check_values(node: DictConfig) -> None:
    """Check, in a node and those below it, what its targets' signatures say of a value.

    Raises:
        ConfigurationError: Something else is there.
    """
    hints = _annotations(_target(node)) if "_target_" in node else {}
    for key in node:
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if key in hints and not any(_fits(value, kind) for kind in _members(hints[key])):
            words = [_words(kind) for kind in _members(hints[key])]
            *others, last = dict.fromkeys(words)
            listed = f"{', '.join(others)} or {last}" if others else last
            raise ConfigurationError(f"{_origin(node, str(key))} must be {listed}, got {value}")
        if isinstance(value, DictConfig):
            _check_values(value)


def _annotations(target: Any) -> dict[Any, Any]:
    """Types of a target's parameters, as far as they can be read."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return {}


def _members(hint: Any) -> tuple[Any, ...]:
    """The kinds that a type allows; a literal's values are kinds of their own."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for member in get_args(hint) for kind in _members(member))
    return get_args(hint) if get_origin(hint) is Literal else (hint,)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; of others than those named here any."""
    if get_origin(kind) is Sequence:
        (inner,) = get_args(kind)
        return isinstance(value, ListConfig) and all(any(_fits(v, k) for k in _members(inner)) for v in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind in (int, bool, NoneType):
        return type(value) is kind
    if kind in (str, Path):
        return type(value) in (str, int, float)  # YAML takes some names for numbers
    if get_origin(kind) is Callable:
        return isinstance(value, DictConfig) and "_target_" in value
    return value == kind if isinstance(kind, str) else True


def _words(kind: Any) -> str:
    if get_origin(kind) is Sequence:
        return f"a list with {_words(get_args(kind)[0])} in each place"
    if get_origin(kind) is Callable:
        return "keys with a _target_"
    names = {float: "a number", int: "a whole number", bool: "true or false", NoneType: "null"}
    names |= {str: "a text", Path: "a text"}
    return kind if isinstance(kind, str) else names.get(kind, getattr(kind, "__name__", str(kind)))


def _origin(node: DictConfig, key: str) -> str:
    """The key that a user sets for this one: the shortest with its value when parts of its path are left out."""
    root, parts = node._get_root(), str(node._get_full_key(key)).split(".")
    cuts = [(i, j) for i in range(len(parts)) for j in range(i, len(parts))]
    names = [".".join(parts[:i] + parts[j:]) for i, j in cuts]
    return min((n for n in names if OmegaConf.select(root, n, default=...) == node[key]), key=len)


def _cause(error: BaseException, named: str) -> str:
    """The sentence of the exception that made a target fail; what it raised by mistake has its name before it."""
    from hydra.errors import InstantiationException

    cause = error
    while isinstance(cause, InstantiationException | KeyError) and cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split())
    if isinstance(cause, ValueError | OSError) and text:
        return text
    return f"{named}: {f'{type(cause).__name__}: {text}' if text else type(cause).__name__}"
