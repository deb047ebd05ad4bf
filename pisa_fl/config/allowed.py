"""What a configuration of somebody else's may have this machine build: a configuration is code.

A client gets its configuration from a server, `resume=` finds one in a directory. Before anything of it is built,
every `_target_` is looked up: it must be a class, or a function that says what it returns, defined in the packages
of its part of the configuration (`PARTS`) and making what that part is made of. So `pisa_fl.system.files.write` is no
model, and an attribute of a module that only imports it (`torch.nn.modules.module.os`) is not found at all. Whoever
owns the machine may allow other packages, from which anything defined there may be built.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf

from pisa_fl.config.error import ConfigurationError
from pisa_fl.config.explain import first_line


@dataclass(frozen=True)
class Part:
    """What may be built in a part of a configuration.

    Attributes:
        keys: Regular expression of the keys of its nodes.
        packages: Where its classes and functions are defined.
        kinds: Full names of the classes one of which they are, derive from or return.
    """

    keys: str
    packages: tuple[str, ...]
    kinds: tuple[str, ...]


PARTS = (
    Part("data", ("pisa_fl.data",), ("pisa_fl.data.data_set.DataSet",)),
    Part("data[.]augment", ("pisa_fl.data.augment",), ("builtins.object",)),
    Part(
        "model([.].*)?",
        ("pisa_fl.models", "torch.nn", "torchvision.models"),
        ("torch.nn.modules.module.Module",),
    ),
    Part(
        "partition",
        ("partitioners", "flwr_datasets.partitioner"),
        ("partitioners.base.IndexPartitioner", "flwr_datasets.partitioner.partitioner.Partitioner"),
    ),
    Part(
        "strategy[.].*",
        ("strategies", "flwr.serverapp.strategy"),
        (
            "strategies.base.client.ClientHalf",
            "strategies.preconditioners.base.Preconditioner",
            "strategies.optimizers.base.Optimizer",
            "strategies.pisa.penalty.Penalty",
            "flwr.serverapp.strategy.strategy.Strategy",
        ),
    ),
    Part("privacy", ("pisa_fl.privacy",), ("pisa_fl.privacy.base.Privacy",)),
    Part("task", ("pisa_fl.tasks",), ("pisa_fl.tasks.base.Task",)),
    Part(
        "engine",
        ("pisa_fl.engines", "pisa_fl.flower.launcher"),
        ("pisa_fl.engines.base.ClientGrid", "pisa_fl.engines.base.Launcher"),
    ),
    Part("tracker[.].*", ("pisa_fl.trackers",), ("pisa_fl.results.observer.Observer",)),
)

CLIENT = ("data", "partition", "model", "strategy.client", "task", "privacy")
"""The parts that a client builds."""

SIMULATION = "PISA_FL_SIMULATION"
"""Environment variable by which `pisa-fl` tells the clients that it simulates on this machine that the configuration
is their own user's. It comes by no message: no server can set it."""

NAME = r"[A-Za-z]\w*([.][A-Za-z]\w*)+"
"""A module's name, or a target's; nothing in it is private."""


LONGEST, DEEPEST = 2**20, 100
"""Characters of a configuration, and how deep it may be nested."""


def parsed(text: str) -> DictConfig:
    """A configuration of somebody else's, of which nothing takes a parser's time or memory without end.

    Raises:
        ValueError: The text is none; why, in a line.
    """
    try:
        if len(text) > LONGEST:
            raise ValueError(f"it has more than {LONGEST} characters")
        depth = 0
        for event in yaml.parse(text):
            if isinstance(event, yaml.AliasEvent):  # written once, it stands for much
                raise ValueError("it has YAML aliases")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} deep")
        config = OmegaConf.create(text)
    except Exception as error:  # whatever the text makes the YAML parser raise
        raise ValueError(first_line(error)) from error
    if not isinstance(config, DictConfig) or "engine" not in config:
        raise ValueError("it is no configuration")
    for key in sorted(OmegaConf.missing_keys(config))[:1]:
        raise ValueError(f"{key} is missing")
    return config


def check_targets(
    config: DictConfig, allowed: Collection[str] = (), parts: Collection[str] | None = None
) -> None:
    """Check what a configuration would build; nothing of it is built, and only packages that are allowed are imported.

    Args:
        config: The configuration.
        allowed: Packages and modules of which anything may be built.
        parts: Keys of the nodes that will be built; None: all.

    Raises:
        ConfigurationError: It has something else built, or an interpolation, which could read the environment.
    """
    try:
        for key, node in nodes("", OmegaConf.to_container(config, resolve=False)):
            if isinstance(node, str) and "${" in node:
                raise ConfigurationError(
                    f"{key}={node} is an interpolation: a configuration must be resolved"
                )
            built = parts is None or any(key == part or key.startswith(f"{part}.") for part in parts)
            named = isinstance(node, Mapping) and "_target_" in node
            if built and named and (why := _objection(key, node, allowed)):
                raise ConfigurationError(f"{key}._target_={node['_target_']} must not be built: {why}")
    except RecursionError:
        raise ConfigurationError("the configuration is nested too deeply") from None


def nodes(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    """A node and all below it, with their keys."""
    yield key, node
    below = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, child in below:
        yield from nodes(f"{key}.{name}" if key else str(name), child)


def _objection(key: str, node: Mapping[Any, Any], allowed: Collection[str]) -> str | None:
    """Why a node's target must not be built, or None."""
    target = node["_target_"]
    if not isinstance(target, str) or not re.fullmatch(NAME, target):
        return "that is no name of a class"
    part = next((part for part in PARTS if re.fullmatch(part.keys, key)), Part("", (), ()))
    module = target.rpartition(".")[0]
    if not _lies_in(module, allowed) and not _lies_in(module, part.packages):
        ours = ", ".join(part.packages)
        return f"its package is none of those allowed{f' ({ours})' if ours else ''}: add it to `allow` if you trust it"
    try:
        found = getattr(importlib.import_module(module), target.rpartition(".")[2])
    except Exception as error:  # whatever a module raises when it is imported
        return " ".join(str(error).split())
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return "it is neither a class nor a function"
    if _lies_in(found.__module__, allowed):
        return None
    public = re.fullmatch(NAME, found.__module__) and _lies_in(found.__module__, part.packages)
    if not (public and _kinds(found) & set(part.kinds)):
        kinds = " or ".join(kind.rpartition(".")[2] for kind in part.kinds)
        return f"it must give a {kinds} of {', '.join(part.packages)}"
    if "_args_" in node and not (inspect.isclass(found) and _lies_in(found.__module__, ("torch.nn",))):
        return "give its arguments by their names"
    if _lies_in(found.__module__, ("torchvision",)) and _downloads(found, node):
        return "it would download weights, which come from the server: leave them out"
    return None


def _lies_in(module: str, packages: Collection[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _kinds(target: Any) -> set[str]:
    """Full names of the classes that what a target makes is of."""
    try:
        made = target if inspect.isclass(target) else get_type_hints(target).get("return")
    except (NameError, TypeError, AttributeError):
        return set()
    return {f"{c.__module__}.{c.__qualname__}" for c in made.__mro__} if inspect.isclass(made) else set()


def _downloads(target: Any, node: Mapping[Any, Any]) -> bool:
    """Whether one of torchvision's functions would fetch weights."""
    values = {name: p.default for name, p in inspect.signature(target).parameters.items()} | dict(node)
    named = {key: value for key, value in values.items() if str(key).startswith(("weights", "pretrained"))}
    return any(value not in (None, False, inspect.Parameter.empty) for value in named.values())
