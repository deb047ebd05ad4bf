"""What the root keys and the engine's keys may hold: one line a key."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pisa_fl.config.explain import shown
from pisa_fl.config.typed import typed

Check = Callable[[Any], str | None]
"""What a value must be if it is not that; None if it is."""

_BY_NAME = "choose one by its name, as in strategy=sisa"
GROUPS: Mapping[str, str] = {
    **dict.fromkeys(("strategy", "partition", "data", "model", "engine", "task"), _BY_NAME),
    "strategy.server": "a strategy has a server half, with its _target_",
    "strategy.client": "a strategy has a client half, with its _target_",
    "tracker": "choose some by their names, as in tracker=[csv,tensorboard], or tracker=none",
    "checkpoint": "its keys are checkpoint.every, checkpoint.keep and checkpoint.best",
}
"""Keys that hold other keys, and what to do where one does not."""

LONGEST = 2_000_000
"""Seconds of a time-out at most, 23 days: operating systems wait no longer."""


def whole(least: int, most: int = 10**9, auto: bool = False, null: bool = False) -> Check:
    """A whole number; or `auto`, or null."""
    more = f"{' or auto' if auto else ''}{' or null' if null else ''}"

    def check(value: Any) -> str | None:
        if (auto and value == "auto") or (null and value is None):
            return None
        if type(value) is not int or value < least:
            return f"a whole number of at least {least}{more}"
        return None if value <= most else f"a whole number of at most {most}{more}"

    return check


def number(words: str, admits: Callable[[float], bool]) -> Check:
    """A finite number; booleans are none."""

    def check(value: Any) -> str | None:
        finite = type(value) in (int, float) and math.isfinite(value)
        return None if finite and admits(value) else words

    return check


def one_of(*values: Any) -> Check:
    """One of some values."""
    words = " or ".join(str(value).lower() for value in values)
    return lambda value: (
        None if any(value is v or (type(value) is str and value == v) for v in values) else words
    )


def text(words: str, null: bool = False) -> Check:
    """A text that is not empty and has no control characters; or null."""

    def check(value: Any) -> str | None:
        fits = isinstance(value, str) and value != "" and min(value) >= " "
        return None if fits or (null and value is None) else words

    return check


def _folder_name(value: Any) -> str | None:
    fits = type(value) in (str, int) and str(value) not in ("", ".", "..")
    fits = fits and not {"/", "\0"} & set(str(value)) and len(os.fsencode(str(value))) <= 200
    return None if fits else "a plain folder name of 1 to 200 bytes"


def _packages(value: Any) -> str | None:
    fits = isinstance(value, ListConfig) and all(isinstance(name, str) for name in value)
    return None if fits else "names of packages in a list, such as [mine]"


def _numbers(value: Any) -> str | None:
    finite = number("", lambda v: True)
    fits = isinstance(value, ListConfig) and all(finite(v) is None for v in value)
    return None if fits else "numbers in a list, such as [0.9]"


_SECONDS = number(f"a number of seconds from 0 to {LONGEST}", lambda v: 0 <= v <= LONGEST)

ROOT: Mapping[str, Check] = {
    "name": _folder_name,
    "seed": whole(0, 2**63 - 1),
    "clients": whole(1),
    "rounds": whole(0),
    "participation": number("above 0 and at most 1", lambda v: 0 < v <= 1),
    "min_clients": whole(1, null=True),
    "round_timeout": _SECONDS,
    "patience": _SECONDS,
    "accept_failures": one_of(True, False),
    "batch_size": whole(1),
    "evaluate_every": whole(1),
    "evaluate_clients_every": whole(1, null=True),
    "stop_at_chance": whole(1, null=True),
    "device": text("auto, cpu, cuda or another device of PyTorch's"),
    "state": one_of("memory", "disk"),
    "init": text("the path of a file, or null", null=True),
    "resume": text("the path of a run directory, or null", null=True),
    "allow": _packages,
    "targets": _numbers,
    "redraw": _SECONDS,
    "progress": one_of(True, False, "quiet"),
    "checkpoint.every": whole(1),
    "checkpoint.keep": whole(1),
}
"""What every configuration has."""

OPTIONAL: Mapping[str, Check] = {
    "checkpoint.best": one_of(True, False),
    "stop_at_nan": one_of(True, False),
    "data.client_test": number("at least 0 and below 1", lambda v: 0 <= v < 1),
    "data.fraction": number("above 0 and at most 1", lambda v: 0 < v <= 1),
    "data.validation": number("at least 0 and below 1", lambda v: 0 <= v < 1),
    "secure.threshold": number("above 0.5 and at most 1", lambda v: 0.5 < v <= 1),
    "secure.shares": whole(3, null=True),
    "engine.workers": whole(0, 1024, auto=True),
    "engine.actors": whole(1, 100_000, auto=True),
    "engine.stack": whole(1, auto=True),
    "engine.chunk": whole(1, auto=True),
    "engine.threads": whole(1, 1024, auto=True),
    "engine.compiled": one_of(True, False),
    "engine.sums": one_of(True, False),
    "engine.precision": one_of("float32", "bfloat16"),
    "engine.gpus": number("a number of at least 0", lambda v: 0 <= v <= 1024),
}
"""What data and engine may have, and what runs of earlier versions lack."""

SAME: Mapping[str, str] = {
    "partition.num_partitions": "clients",
    "strategy.penalty.participation": "participation",
}
"""Keys of the groups that must say what a root key says."""

_ABSENT = object()


def problem(config: DictConfig) -> str | None:
    """The first thing that is wrong with a resolved configuration, in one sentence; None if there is none."""
    for key, remedy in GROUPS.items():
        if not isinstance(_select(config, key, None), DictConfig):
            return f"{typed(config, key)} must be a group of keys, got {_value(config, key)}: {remedy}"
    for key, check in {**ROOT, **OPTIONAL}.items():
        value = _select(config, key, _ABSENT)
        if value is _ABSENT and key in OPTIONAL:
            continue
        words = check(None if value is _ABSENT else value)
        if words is not None:
            return f"{typed(config, key)} must be {words}, got {_value(config, key)}"
    drawn = max(1, round(config.participation * config.clients))
    if config.min_clients is not None and config.min_clients > drawn:
        return f"min_clients={config.min_clients} is more than the {drawn} drawn for a round"
    for key, root in SAME.items():
        value = _select(config, key, config[root])
        if value != config[root]:
            return f"{key}={value} and {root}={config[root]} disagree: leave out {key}, which follows {root}"
    return None


def _select(config: DictConfig, key: str, default: Any) -> Any:
    """A key's value; the default where it, or what should hold it, is not there."""
    try:
        return OmegaConf.select(config, key, default=default)
    except OmegaConfBaseException:
        return default


def _value(config: DictConfig, key: str) -> str:
    return shown(_select(config, key, "nothing"))
