"""Configuration: where it lies, how it is composed from Python, and how objects are built from it."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pisa_fl.checks import fault
from pisa_fl.explain import explain, first_line, mistake_in

_PACKAGE = Path(__file__).resolve().parent
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
"""The configuration groups: beside the package in a checkout, inside it when installed from a wheel."""


_COMPOSING = threading.RLock()

PATHS = ("init", "data.root", "data.path", "data.cache", "partition.path")
"""Keys that name files or folders."""

imported_folders: list[Path] = []
"""Folders of the user's own modules, which other hosts need as well."""


class ConfigurationError(ValueError):
    """Something that the user can mend; its text is one sentence that names the key and the remedy."""


def import_from(folder: str | Path) -> None:
    """Let configuration in a user's folder name classes that lie beside it; what is installed is found first."""
    path = Path(folder).resolve()
    if path not in imported_folders:
        imported_folders.append(path)
    if str(path) not in sys.path:
        sys.path.append(str(path))


def own_modules() -> set[str]:
    """Names of the modules and packages that lie in those folders."""
    return {
        path.stem
        for folder in imported_folders
        if folder.is_dir()  # a process that lives on may outlive it
        for path in folder.iterdir()
        if path.suffix == ".py" or path.is_dir()
    }


def own_folders(config: DictConfig) -> list[str]:
    """Folders of the user's from which the configuration takes modules; as its run found them, if it says so."""
    if "imports" in config:
        return [str(folder) for folder in config.imports]
    found = set(re.findall(r"^ *_target_: *[\"']?(\w+)", OmegaConf.to_yaml(config), re.MULTILINE))
    return [str(folder) for folder in imported_folders if any(_lies_in(folder, name) for name in found)]


def _lies_in(folder: Path, name: str) -> bool:
    """Whether it is from this folder that Python takes this module."""
    spec = sys.modules[name].__spec__ if name in sys.modules else importlib.util.find_spec(name)
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    return any(place is not None and folder in Path(place).parents for place in places)


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
    if (words := fault(config)) is not None:
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
    for path in (folder / entry for folder in imported_folders for entry in (f"{top}.py", top)):
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
