"""What tells runs apart: where their configurations differ, in as few and as short words as are unambiguous.

Two runs have the same setting if their configurations agree in everything that can matter to the numbers, the seed
apart. What a run chose of a configuration group (`partition=dirichlet`) stands for all keys below it: those are told
only where runs with the same choice differ in them. Keys that one version of this package has and another lacks are
not told one by one, but by the version.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IGNORED = {
    "seed",  # in which the runs of one setting differ
    *("name", "run_id", "choices", "imports"),  # how a run is called, and where its classes were found
    # how it is watched and goes on
    *("resume", "allow", "checkpoint", "progress", "targets", "tracker", "redraw"),
    "metrics",  # what its task measures
    *("data.cache", "state", "strategy.server.state"),  # where arrays are kept
    "strategy.rounds",  # suggests `rounds`, which counts
    # the same bits on every engine, however many processes and threads it has
    *(
        "engine._target_",
        "engine.workers",
        "engine.actors",
        "engine.stack",
        "engine.chunk",
        "engine.threads",
    ),
    *("engine.cpus", "engine.gpus", "engine.state", "engine.address"),
    *("engine.connection", "engine.experiment", "engine.directory"),
}
"""Keys, with all below them, that cannot matter to the numbers; whatever else differs makes another setting."""

UNLESS_SAID = {
    "engine.precision": "float32",
    "engine.compiled": False,
    "engine.sums": False,
    "engine.lost": 0.0,
    "engine.stragglers": 0.0,
    "data.validation": 0,
    "data.fraction": 1,
}
"""What holds where there is no such key: of engines that lack it, and in runs of earlier versions."""

APART = ("engine", "tracker")
"""Groups of which it does not matter what was chosen."""

METHOD = "strategy"
"""Key of the group by whose choice a method is called."""

VERSION = "version"
"""Key and name of the column that stands for all keys that follow from the version."""

_MISSING = object()


@dataclass(frozen=True)
class Column:
    """Something in which settings differ.

    Attributes:
        key: Its dotted key; that of a group for what was chosen of it.
        name: The shortest unambiguous end of the key.
    """

    key: str
    name: str


def identify(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A text for every run's configuration, the same for the same setting; keys that say what holds anyhow are none of
    it, so that it stays the same when there are more of them.
    """
    usual = {key: _comparable(value) for key, value in UNLESS_SAID.items()}
    return [
        _canonical({k: v for k, v in items.items() if usual.get(k) != _comparable(v)})
        for items in _relevant(configs)
    ]


def describe(
    configs: Sequence[Mapping[str, Any]], versions: Sequence[str], reserved: Sequence[str] = ()
) -> tuple[list[Column], list[dict[str, Any]]]:
    """What tells settings apart.

    Args:
        configs: A configuration of each setting.
        versions: Of this package, that the runs of each setting ran with, in words.
        reserved: Names that no column may have.

    Returns:
        The columns, the method first, and for every setting its values by column name: without those of keys that it
        does not have. No two settings have the same values.
    """
    choices = [_choices(config) for config in configs]
    told = [items | chosen for items, chosen in zip(_relevant(configs), choices, strict=True)]
    keys = [key for key in dict.fromkeys(key for items in told for key in items) if key != METHOD]
    differing = [METHOD, *(key for key in keys if _tells(key, told, choices))]
    if aged := [key for key in differing[1:] if _follows(key, told, choices, versions)]:
        differing = [key for key in differing if key not in aged] + [VERSION]
        told = [dict(items) | {VERSION: version} for items, version in zip(told, versions, strict=True)]
    columns = [Column(key, name) for key, name in _short(differing, reserved).items()]
    values = [{c.name: items[c.key] for c in columns if c.key in items} for items in told]
    for column in columns:
        if column.key.endswith("._target_"):
            _shorten_targets(values, column.name)
    return columns, values


def written(value: Any) -> str:
    """A value as it is written in YAML: `null`, and "1" with its quotes where that is text."""
    if isinstance(value, str):
        words = (
            value not in ("", "null", "true", "false") and value[0] not in "[{\"'" and value == value.strip()
        )
        return value if words and not _is_number(value) else json.dumps(value)
    return json.dumps(value, default=str)


def order(value: Any) -> tuple[int, float, str]:
    """Sort key of values: numbers, then text, then null."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0, value, ""
    return (2, 0, "") if value is None else (1, 0, written(value))


def _tells(key: str, told: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, Any]]) -> bool:
    """Whether settings with the same choices above a key differ in it, and do so in no shorter key alike."""
    for peers in _alike(key, told, choices):
        own = [_comparable(items.get(key, _MISSING)) for items in peers]
        if len(set(own)) > 1 and not any(
            other.count(".") < key.count(".")
            and all(
                _comparable(items.get(other, _MISSING)) == value
                for items, value in zip(peers, own, strict=True)
            )
            for other in peers[0]
        ):
            return True
    return False


def _follows(
    key: str,
    told: Sequence[Mapping[str, Any]],
    choices: Sequence[Mapping[str, Any]],
    versions: Sequence[str],
) -> bool:
    """Whether settings with the same choices above a key that differ in it do so as their versions do.

    Of some versions it is missing, or its class lies elsewhere, and all others have the same value.
    """
    aged = [dict(items) | {VERSION: version} for items, version in zip(told, versions, strict=True)]
    for peers in _alike(key, aged, choices):
        found = {(items[VERSION], _comparable(items.get(key, _MISSING))) for items in peers}
        values = {_comparable(items[key]) for items in peers if key in items}
        if key.endswith("._target_"):
            values = {value.rpartition(".")[2] for value in values}
        if len(values) > 1 or len({version for version, _ in found}) < len(found):
            return False
    return True


def _alike(
    key: str, told: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, Any]]
) -> Iterable[list[Mapping[str, Any]]]:
    """Settings in groups of those that have the same choices above a key."""
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for items, chosen in zip(told, choices, strict=True):
        alike.setdefault(_canonical(_above(key, items, chosen)), []).append(items)
    return alike.values()


def _above(key: str, items: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen of the groups that a key lies in: the group's file, else the class."""
    parts = key.split(".")
    above = {}
    for path in (".".join(parts[:i]) for i in range(1, len(parts))):
        target = f"{path}._target_"
        if path in chosen:
            above[path] = chosen[path]
        elif target in items and target != key:
            above[path] = items[target]
    return above


def _choices(config: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen of each group, by the key of its place; of a strategy at least its class or the run's name."""
    chosen = {}
    listed = config.get("choices")
    for group, choice in listed.items() if isinstance(listed, Mapping) else ():
        place = str(group).rpartition("@")[2].replace("/", ".")
        if choice is not None and place not in APART and isinstance(_at(config, place), Mapping):
            chosen[place] = choice
    if METHOD not in chosen:
        targets = (_at(config, f"{METHOD}{half}._target_") for half in ("", ".server"))
        target = next((str(t) for t in targets if t), "")
        chosen[METHOD] = target.rpartition(".")[2] or config.get("name")
    return chosen


def _at(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _relevant(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What can matter to the numbers, by dotted key."""
    flat = [_flat(config) for config in configs]
    seeds = {key for items in flat for key in items if "seed" in key.rpartition(".")[2]}
    # those that follow from the run's seed
    ignored = IGNORED | {k for k in seeds if all(i.get(k, i.get("seed")) == i.get("seed") for i in flat)}
    return [
        UNLESS_SAID
        | {key: value for key, value in items.items() if not ignored.intersection(_with_parents(key))}
        for items in flat
    ]


def _with_parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _flat(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _canonical(items: Mapping[str, Any]) -> str:
    return json.dumps({key: _comparable(value) for key, value in items.items()}, sort_keys=True)


def _comparable(value: Any) -> str:
    """Text that is the same for the same value: 1 and 1.0 are, 1 and true are not."""
    return "missing" if value is _MISSING else json.dumps(_number(value), sort_keys=True, default=str)


def _number(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_number(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _short(keys: Sequence[str], reserved: Sequence[str]) -> dict[str, str]:
    """For every key the shortest end of it that is no other's and not reserved."""
    paths = {key: key.removesuffix("._target_").split(".") for key in keys}
    used = dict.fromkeys(keys, 1)
    while True:
        names = {key: ".".join(parts[-used[key] :]) for key, parts in paths.items()}
        taken = [*names.values(), *reserved]
        longer = [k for k, name in names.items() if taken.count(name) > 1 and used[k] < len(paths[k])]
        if not longer:
            return {key: name if taken.count(name) == 1 else key for key, name in names.items()}
        for key in longer:
            used[key] += 1


def _shorten_targets(values: Sequence[dict[str, Any]], name: str) -> None:
    """Call classes by their last name where that is unambiguous."""
    whole = {items[name] for items in values if name in items}
    if len({str(target).rpartition(".")[2] for target in whole}) == len(whole):
        for items in values:
            if name in items:
                items[name] = str(items[name]).rpartition(".")[2]
