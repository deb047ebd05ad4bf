"""From a node of a configuration to the object that it names."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pisa_fl.config import own_code
from pisa_fl.config.error import ConfigurationError
from pisa_fl.config.explain import shown
from pisa_fl.config.hints import fits, hints, words
from pisa_fl.config.typed import typed


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
    with blaming(node):
        parameters = _parameters(target)
        extra = {key: value for key, value in available.items() if key in parameters and key not in node}
        built = instantiate(node, _partial_=True, _convert_="all")(**extra)
    if not isinstance(built, kind):
        what = f"the class {built.__name__}" if inspect.isclass(built) else f"a {type(built).__name__}"
        raise ConfigurationError(f"{_named(node)} must give a {kind.__name__} and gives {what}")
    return built


@contextmanager
def blaming(node: DictConfig) -> Iterator[None]:
    """Say what goes wrong with what a node names in one sentence about the keys that were typed.

    So a class knows its arguments by their names alone: `beta must be below 1`.

    Raises:
        ConfigurationError: Something did.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ConfigurationError(_sentence(error, node)) from error


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

    name, named = node._target_, _named(node)
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
    allowed = hints(_target(node)) if "_target_" in node else {}
    for key in node:
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if key in allowed and not fits(value, allowed[key]):
            raise ConfigurationError(
                f"{typed(node, str(key))} must be {words(allowed[key])}, got {shown(value)}"
            )
        if isinstance(value, DictConfig):
            _check_values(value)


def _sentence(error: BaseException, node: DictConfig) -> str:
    """The sentence of the exception that made a target fail; what it raised by mistake has its name before it."""
    from hydra.errors import InstantiationException

    cause = error
    while isinstance(cause, InstantiationException | KeyError) and cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split())
    if isinstance(cause, ConfigurationError):
        return text
    if isinstance(cause, ValueError | OSError) and text:
        said, place = _with_keys(text, node), str(node._get_full_key(None))
        # another library's, of what it calls by names of its own
        foreign = said == text and place not in text and isinstance(cause, ValueError)
        return f"{place}: {text}" if foreign else said
    return f"{_named(node)}: {f'{type(cause).__name__}: {text}' if text else type(cause).__name__}"


def _with_keys(sentence: str, node: DictConfig) -> str:
    """A sentence about arguments, such as `beta must be below 1` or `set lag=0`, as one about the keys typed for them.

    A name is an argument's where it begins the sentence, is followed by `=`, or holds a dot or an underscore.
    """

    def key(found: re.Match[str]) -> str:
        name, marked = found[0], not found.start() or sentence[found.end() :].startswith("=")
        if not marked and not re.search("[._]", name):
            return name
        places = [group for group in _groups(node) if OmegaConf.select(group, name, default=...) is not ...]
        # two of this name, one below the other: the one whose value is shown
        places.sort(key=lambda group: not sentence.endswith(f" {OmegaConf.select(group, name)}"))
        return typed(places[0], name) if places else name

    return re.sub(r"(?<![\w./-])[A-Za-z_]\w*(?:\.\w+)*", key, sentence)


def _groups(node: DictConfig) -> Iterator[DictConfig]:
    """A node and those below it."""
    yield node
    for value in node.values():
        if isinstance(value, DictConfig):
            yield from _groups(value)


def _named(node: DictConfig) -> str:
    return f"{node._get_full_key('_target_')}={node._target_}"
