"""A configuration: where it lies, how it is composed from Python, and what a run goes by."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pisa_fl.config.error import ConfigurationError
from pisa_fl.config.explain import explain, first_line, mistake_in
from pisa_fl.config.own_code import import_from
from pisa_fl.config.root_keys import problem
from pisa_fl.config.typed import remember

_PACKAGE = Path(__file__).resolve().parents[1]
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
"""The configuration groups: beside the package in a checkout, inside it when installed from a wheel."""


_COMPOSING = threading.RLock()

PATHS = ("init", "data.root", "data.path", "data.test", "data.cache", "partition.path")
"""Keys that name files or folders."""


def located(config: DictConfig) -> DictConfig:
    """The configuration with the paths in it from the root, so that it holds from every working directory."""
    config = config.copy()
    for key in PATHS:
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and not value.startswith("~"):
            OmegaConf.update(config, key, literal(os.path.abspath(value)))
    return config


def literal(text: str) -> str:
    """A text in which OmegaConf finds no interpolation."""
    return re.sub(r"(\\*)\$\{", lambda found: f"{2 * found[1]}\\${{", text)


def compose(*overrides: str, config_dir: str | Path | None = None) -> DictConfig:
    """The configuration that `pisa-fl <overrides>` would run.

    What follows from other keys does so until the run begins: `config.clients = 5` deals to five clients.

    Args:
        overrides: As on the command line, `"strategy=fedavg"`, `"rounds=5"`.
        config_dir: A folder of your own groups, as `--config-dir`; modules in it can be imported.

    Raises:
        ConfigurationError: An override names something that does not exist, there is no such folder, a file in it
            cannot be read, or a mandatory value is missing.
    """
    from hydra import compose as hydra_compose
    from hydra.core.hydra_config import HydraConfig

    searched = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigurationError(f"config_dir={config_dir} is not a folder")
        import_from(config_dir)
        searched = [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"]
    with _hydra():
        try:
            config = hydra_compose("config", [*overrides, *searched], return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            own = _own_part(config)
        except Exception as error:
            raise ConfigurationError(explain_composition(error, overrides, config_dir)) from error
    resolve(own)
    return own


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra with our groups, for one thread at a time; an application around gets back the state that it had."""
    from hydra import initialize_config_dir, version
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    with _COMPOSING:
        application, chosen = GlobalHydra.instance(), HydraConfig.instance()
        hydra, settings, base = application.hydra, chosen.cfg, version.VersionBase.instance().getbase()
        application.clear()
        try:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                yield
        finally:
            GlobalHydra.set_instance(application)
            application.hydra, chosen.cfg = hydra, settings
            version.VersionBase.instance().version_base = base


def _own_part(config: DictConfig) -> DictConfig:
    """A composed configuration without Hydra's part, and with what asks for that replaced; other keys do not fit."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    _replace_hydras(own)
    OmegaConf.set_struct(own, True)
    return own


def _replace_hydras(node: DictConfig) -> None:
    """Replace the values that ask for something of Hydra's, which only a configuration just composed can answer."""
    for key, value in OmegaConf.to_container(node).items():  # type: ignore[union-attr]
        if isinstance(value, dict):
            _replace_hydras(node[key])
        elif isinstance(value, str) and "${hydra:" in value:
            node[key] = node[key]


def settle(config: DictConfig) -> DictConfig:
    """The configuration that a run goes by: resolved, and found possible.

    Raises:
        ConfigurationError: It is not.
    """
    config = resolve(config)
    if (words := problem(config)) is not None:
        raise ConfigurationError(words)
    return config


def resolve(config: DictConfig) -> DictConfig:
    """A copy without Hydra's own part and with every interpolation replaced.

    Raises:
        ConfigurationError: A mandatory value is missing, or an interpolation leads nowhere.
    """
    try:
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        if missing := sorted(OmegaConf.missing_keys(own)):
            raise ConfigurationError(f"{missing[0]} has no default: give it as {missing[0]}=...")
        OmegaConf.resolve(own)
        remember(own, config)
        return own
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{error.full_key or 'configuration'}: {first_line(error)}") from error
    except RecursionError as error:
        raise ConfigurationError(explain(error)) from error


def explain_composition(
    error: Exception, overrides: Iterable[str], config_dir: str | Path | None = None
) -> str:
    """One sentence for what composing a configuration raised: a mistake in a file of the user's is named."""
    if isinstance(error, ConfigurationError):
        return str(error)
    if config_dir is not None and Path(config_dir).is_dir() and (words := mistake_in(Path(config_dir))):
        return words
    if str(error).startswith("Config group override must be"):
        from hydra.core.override_parser.overrides_parser import OverridesParser

        for override in OverridesParser.create().parse_overrides(list(overrides)):
            group, value = override.key_or_group, override.value()
            if not isinstance(value, str | list) and (
                not group or (CONF / group).is_dir() or group == "hydra"
            ):
                return f"{override.input_line}: a group is chosen by its name, as in strategy=sisa"
    return explain(error)
