"""Configuration: where it lies, how it is composed from Python, and how objects are built from it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

_PACKAGE = Path(__file__).resolve().parent
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
"""The configuration groups: beside the package in a checkout, inside it when installed from a wheel."""


class ConfigurationError(ValueError):
    """Something that the user can mend; its text is one sentence that names the key and the remedy."""


def compose(*overrides: str, config_dir: str | Path | None = None) -> DictConfig:
    """The configuration that `pisa-fl <overrides>` would run.

    Args:
        overrides: As on the command line, `"strategy=fedavg"`, `"rounds=5"`.
        config_dir: A folder of your own groups, as `--config-dir`.

    Raises:
        hydra.errors.HydraException: An override names something that does not exist.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    searched = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
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
    if not all(isinstance(t, int | float) and 0 <= t <= 1 for t in config.targets):
        raise ConfigurationError(f"targets must be accuracies between 0 and 1, got {list(config.targets)}")
    for key in ("engine.cohort", "engine.chunk", "engine.threads"):
        value = OmegaConf.select(config, key)
        automatic = value == "auto" and key != "engine.chunk"
        if not automatic and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigurationError(
                f"{key} must be a whole number of at least 1 (or auto, but for chunk), got {value}"
            )


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
        parameters = inspect.signature(get_object(node._target_)).parameters
        extra = {key: value for key, value in available.items() if key in parameters and key not in node}
        return instantiate(node, _partial_=True, _convert_="all")(**extra)
    except InstantiationException as error:
        raise ConfigurationError(_cause(error)) from error
    except (TypeError, ImportError, AttributeError) as error:
        raise ConfigurationError(f"{node._target_}: {first_line(error)}") from error


def explain(error: BaseException) -> str:
    """One sentence for an exception that a wrong configuration raised."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file'}: {error.strerror}"
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
