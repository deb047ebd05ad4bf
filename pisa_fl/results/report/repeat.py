"""The command that repeats a run, found from the configuration in its directory.

The run's choices of configuration groups are composed anew; whatever then differs from what is stored becomes an
override. A command is given only if composing it gives the stored configuration, in all that can matter to the numbers.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pisa_fl.config import ConfigurationError, compose, resolve
from pisa_fl.results.report.rows import Row
from pisa_fl.results.run_directory import KEPT
from pisa_fl.results.settings import APART, IGNORED

OMITTED = {*KEPT, *IGNORED}
"""Keys that a command leaves out: what only a run directory says, and what cannot matter to the numbers. Seeds stand at
its end."""


def command(row: Row) -> str | None:
    """The command that repeats a row's runs; None if they cannot be composed from this package's files."""
    seeds = ",".join(map(str, row.seeds))
    own = _overrides(row.runs[0].config)  # those of the others differ in the seed alone
    if own is None:
        return None
    return f"pisa-fl {'--multirun ' if len(row.runs) > 1 else ''}{shlex.join([*own, f'seed={seeds}'])}"


def _overrides(config: Mapping[str, Any]) -> list[str] | None:
    """What to tell `pisa-fl` beside the seed; None if that cannot be found."""
    choices = config.get("choices")
    if not isinstance(choices, Mapping) or config.get("imports"):
        return None
    try:
        groups = _chosen(choices)
        composed = _composed(tuple(groups)).copy()
        OmegaConf.set_struct(composed, False)
        composed.seed = config["seed"]
        said, stored = _flat(OmegaConf.to_container(composed)), _kept(config)
        more: list[str] = []
        while differing := _differing(composed, stored):
            # what is said first; then, of what follows from other keys, what others follow from
            literal = [key for key in differing if "${" not in _said(key, said)]
            for key in literal or [min(differing, key=lambda key: key.count("."))]:
                more.append(f"{'' if _said(key, said) else '+'}{key}={_written(stored[key])}")
                OmegaConf.update(composed, key, stored[key], force_add=True)
                said[key] = stored[key]
    except (ConfigurationError, ValueError, KeyError):
        return None
    return [*groups, *more]


def _said(key: str, said: Mapping[str, Any]) -> str:
    """What is said of a key or, where that follows from another node, of those above it; empty if nothing is."""
    parts = key.split(".")
    above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((repr(said[name]) for name in above if name in said), "")


def _differing(composed: DictConfig, stored: Mapping[str, Any]) -> list[str]:
    """Keys in which a configuration is not what is stored.

    Raises:
        KeyError: It has one that is not stored.
    """
    now = _kept(OmegaConf.to_container(resolve(composed)))
    if extra := now.keys() - stored.keys():
        raise KeyError(sorted(extra)[0])
    return [key for key, value in stored.items() if key not in now or now[key] != value]


def _chosen(choices: Mapping[str, Any]) -> list[str]:
    """Overrides of the groups in which the choice is not what it would be; outer groups first."""
    chosen: list[str] = []
    for inner in (False, True):
        usual = _composed(tuple(chosen)).choices
        chosen += [
            f"{group}={choice}"
            for group, choice in choices.items()
            if ("/" in str(group)) == inner
            and choice is not None
            and not str(group).startswith("hydra/")
            and group not in APART
            and usual.get(group) != choice
        ]
    return chosen


@lru_cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    return compose(*overrides)


def _kept(config: Any) -> dict[str, Any]:
    """What a command has to give again, by dotted key."""
    return {
        key: value
        for key, value in _flat(config).items()
        if not any(key == omitted or key.startswith(f"{omitted}.") for omitted in OMITTED)
    }


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    """Values by dotted key; lists are values."""
    if not isinstance(node, Mapping) or (key and not node):
        return {key: node}
    below = (_flat(value, f"{key}.{name}" if key else str(name)) for name, value in node.items())
    return {name: value for own in below for name, value in own.items()}


def _written(value: Any) -> str:
    """A value as Hydra reads it in an override."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        from hydra.core.override_parser.types import Quote, QuotedString

        return value if value.isidentifier() else QuotedString(value, Quote.single).with_quotes()
    return repr(value)
