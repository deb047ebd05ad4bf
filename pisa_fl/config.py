"""Configuration: where it lies, how it is composed from Python, and how objects are built from it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

_PACKAGE = Path(__file__).resolve().parent
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
"""The configuration groups: beside the package in a checkout, inside it when installed from a wheel."""


imported_folders: list[Path] = []
"""Folders of the user's own modules, which other hosts need as well."""


class ConfigurationError(ValueError):
    """Something that the user can mend; its text is one sentence that names the key and the remedy."""


def import_from(folder: str | Path) -> None:
    """Let configuration in a user's folder name classes that lie beside it."""
    path = Path(folder).resolve()
    if path not in imported_folders:
        imported_folders.append(path)
        sys.path.insert(0, str(path))


def compose(*overrides: str, config_dir: str | Path | None = None) -> DictConfig:
    """The configuration that `pisa-fl <overrides>` would run.

    Args:
        overrides: As on the command line, `"strategy=fedavg"`, `"rounds=5"`.
        config_dir: A folder of your own groups, as `--config-dir`; modules in it can be imported.

    Raises:
        hydra.errors.HydraException: An override names something that does not exist.
        ConfigurationError: There is no such folder, or a mandatory value is missing.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    searched = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigurationError(f"config_dir={config_dir} is not a folder")
        import_from(config_dir)
        searched = [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra_compose("config", [*overrides, *searched], return_hydra_config=True)
    HydraConfig.instance().set_config(config)  # `name` asks for the strategy that was chosen
    return resolve(config)


def resolve(config: DictConfig) -> DictConfig:
    """The configuration without Hydra's own part and with every interpolation replaced.

    Raises:
        ConfigurationError: A mandatory value is missing, or an interpolation leads nowhere.
    """
    try:
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        if missing := sorted(OmegaConf.missing_keys(own)):
            raise ConfigurationError(f"{missing[0]} has no default: give it as {missing[0]}=...")
        OmegaConf.resolve(own)
        return own
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{error.full_key or 'configuration'}: {first_line(error)}") from error


def check(config: DictConfig) -> None:
    """Check the root keys.

    Raises:
        ConfigurationError: One of them has an impossible value.
    """
    whole = {
        "seed": 0,
        "clients": 1,
        "rounds": 0,
        "batch_size": 1,
        "min_clients": 1,
        "checkpoint.every": 1,
        "checkpoint.keep": 1,
    }
    for key, least in whole.items():
        value = OmegaConf.select(config, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigurationError(f"{key} must be a whole number of at least {least}, got {value}")
    share = config.participation
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ConfigurationError(f"participation must be above 0 and at most 1, got {share}")
    for key in ("progress", "accept_failures"):
        if not isinstance(config[key], bool):
            raise ConfigurationError(f"{key} must be true or false, got {config[key]}")
    for key in ("round_timeout", "patience"):
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ConfigurationError(f"{key} must be a number of seconds, got {value}")
    drawn = max(1, round(share * config.clients))
    if config.min_clients > drawn:
        raise ConfigurationError(
            f"min_clients={config.min_clients} is more than the {drawn} drawn for a round"
        )
    if not all(isinstance(t, int | float) and 0 <= t <= 1 for t in config.targets):
        raise ConfigurationError(f"targets must be accuracies between 0 and 1, got {list(config.targets)}")
    if config.state not in ("memory", "disk"):
        raise ConfigurationError(f"state must be memory or disk, got {config.state}")
    for key in ("engine.cohort", "engine.chunk", "engine.threads"):
        value = OmegaConf.select(config, key, default=1)
        automatic = value == "auto"
        if not automatic and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigurationError(f"{key} must be a whole number of at least 1 or auto, got {value}")


def build(node: DictConfig, **available: Any) -> Any:
    """Instantiate a node's `_target_`, handing it those of the available objects that it has a parameter for.

    So a class of the user's may ask for `layout`, `shape` or `classes` by naming it in its signature, or not.

    Args:
        node: Configuration with a `_target_`.
        available: Objects by parameter name; what the node itself says comes first.

    Raises:
        ConfigurationError: The target cannot be found, or refuses its arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import get_object, instantiate

    if "_target_" not in node:
        raise ConfigurationError(
            f"a part of the configuration names no _target_: {OmegaConf.to_yaml(node).strip()}"
        )
    try:
        _check_numbers(node)
        parameters = inspect.signature(get_object(node._target_)).parameters
        extra = {key: value for key, value in available.items() if key in parameters and key not in node}
        return instantiate(node, _partial_=True, _convert_="all")(**extra)
    except InstantiationException as error:
        raise ConfigurationError(_cause(error)) from error
    except (TypeError, ImportError, AttributeError) as error:
        target = f"{node._get_full_key('_target_')}={node._target_}"
        raise ConfigurationError(f"{target}: {' '.join(str(error).split())}") from error


def _check_numbers(node: DictConfig) -> None:
    """Check, in a node and those below it, what its targets' signatures say is a number.

    Raises:
        ConfigurationError: Something else is there.
    """
    from hydra.utils import get_object

    hints = _annotations(get_object(node._target_)) if "_target_" in node else {}
    for key in node:
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(value, DictConfig):
            _check_numbers(value)
        elif key in hints and not any(_fits(value, kind) for kind in _members(hints[key])):
            words = " or ".join(_words(kind) for kind in _members(hints[key]))
            raise ConfigurationError(f"{_origin(node, str(key))} must be {words}, got {value}")


def _annotations(target: Any) -> dict[Any, Any]:
    """Types of a target's parameters, as far as they can be read."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return {}


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; kinds other than numbers, lists of them and null are not judged."""
    if get_origin(kind) is Sequence:
        (inner,) = get_args(kind)
        return isinstance(value, ListConfig) and all(_fits(v, inner) for v in value)
    if kind is float:
        return isinstance(value, int | float)
    return not (kind is int or kind is NoneType) or isinstance(value, kind)


def _words(kind: Any) -> str:
    if get_origin(kind) is Sequence:
        return f"a list with {_words(get_args(kind)[0])} in each place"
    return {float: "a number", int: "a whole number", NoneType: "null"}.get(kind, str(kind))


def _origin(node: DictConfig, key: str) -> str:
    """The key that a user sets for this one: the shortest with its value when parts of its path are left out."""
    root, parts = node._get_root(), str(node._get_full_key(key)).split(".")
    cuts = [(i, j) for i in range(len(parts)) for j in range(i, len(parts))]
    names = [".".join(parts[:i] + parts[j:]) for i, j in cuts]
    return min((n for n in names if OmegaConf.select(root, n, default=...) == node[key]), key=len)


def explain(error: BaseException) -> str:
    """One sentence for an exception that a wrong configuration raised."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file'}: {error.strerror}"
    if override := getattr(error, "override", None):
        return f"{override} cannot be read as key=value: quote a value that holds special characters"
    if text.startswith("Ambiguous value"):
        return f"{lines[0]}: add --multirun to sweep over it, or quote it"
    if match := re.match(r"Could not override '(.+?)'", text):
        return f"{match[1]} is no key of the configuration: `pisa-fl --cfg job` prints those there are"
    if match := re.search(r"Could not find '(.+?)/([^/]+?)'", text):
        options = ", ".join(
            line for line in lines[lines_after(lines, "Available options") :] if " " not in line
        )
        return f"{match[1]}={match[2]} does not exist: choose one of {options}"
    return " ".join(lines[0].split()) if lines else type(error).__name__


def lines_after(lines: list[str], start: str) -> int:
    """Position behind the first line that starts so; the end if none does."""
    return next((i + 1 for i, line in enumerate(lines) if line.startswith(start)), len(lines))


def first_line(error: BaseException) -> str:
    """An exception's text up to its first line break."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _cause(error: BaseException) -> str:
    """The sentence of the exception that made Hydra's instantiation fail."""
    cause = error.__cause__
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, ValueError | OSError):
        return " ".join(str(cause).split())
    return " ".join(f"{first_line(error)} {first_line(cause) if cause else ''}".split())
