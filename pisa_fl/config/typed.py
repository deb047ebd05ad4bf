"""Which key a user types for a value: what follows another key is traced back to where the value is written."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

_FOLLOWS = re.compile(r"\$\{(?:oc\.select:)?(\.*)([\w.]+)(?:,[^${}]*)?\}")
"""`${key}`, `${..key}` or `${oc.select:key,default}`, and nothing else."""

_NOTHING = object()


def remember(resolved: DictConfig, config: DictConfig) -> None:
    """Note what a configuration followed before its interpolations were replaced.

    OmegaConf keeps its cache, in which the note lies, when a configuration is copied.
    """
    OmegaConf.set_cache(resolved, {"written": _written(config)})


def typed(node: DictConfig, name: str) -> str:
    """The key, from the root, where a value of a node is written.

    Args:
        node: Of a configuration, resolved or not.
        name: A key of the node, or one below it, dotted.
    """
    written = _written(node._get_root())
    path = _parts(node._get_full_key(name))
    while followed := _followed(written, path):
        path = followed
    return ".".join(path)


def _written(config: Any) -> Any:
    """A configuration as it was written, its interpolations in it, in plain containers."""
    return OmegaConf.get_cache(config).get("written") or OmegaConf.to_container(config, resolve=False)


def _followed(written: Any, path: list[str]) -> list[str]:
    """The path that the value at a path, or a group around it, follows; empty if none."""
    node = written
    for depth, name in enumerate(path, start=1):
        node = _below(node, name)
        if isinstance(node, str) and (reference := _FOLLOWS.fullmatch(node)):
            up, key = len(reference[1]), reference[2]  # each dot before the key is a step up
            target = path[: depth - up] * bool(up) + key.split(".")
            return target + path[depth:] if _exists(written, target) else []
    return []


def _exists(written: Any, path: list[str]) -> bool:
    for name in path:
        written = _below(written, name)
    return written is not _NOTHING


def _below(node: Any, name: str) -> Any:
    if isinstance(node, list):
        return node[int(name)] if name.isdigit() and int(name) < len(node) else _NOTHING
    return node.get(name, _NOTHING) if isinstance(node, dict) else _NOTHING


def _parts(key: str) -> list[str]:
    return [part for part in re.split(r"[.\[\]]", key) if part]
