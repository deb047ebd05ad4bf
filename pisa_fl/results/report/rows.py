"""Finished runs, grouped by everything but the seed: a row of a table, a line of a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pisa_fl.metric import Metric
from pisa_fl.results.finished import Run
from pisa_fl.results.settings import METHOD, VERSION, Column, describe, identify, order, written

PROBLEM = ("data", "partition", "clients", "participation", "model", "task", "init")
"""First parts of the keys that say what is to be learnt, and by whom: settings that differ in none of them are compared
in one panel. All other keys say how, and tell its lines apart."""

COSTS = ("rounds", "passes", "MB")
"""What a run costs: communications, computation and payload, both ways."""


@dataclass(frozen=True)
class Row:
    """Runs of one setting.

    Attributes:
        values: What distinguishes the setting from the others, by the column's name.
        label: Name of the row, no other row's.
        line: What it is called within its panel: the method, and what tells it from others of the same method.
        panel: Where the problem differs from others, in words; the same for all that are compared with each other.
        title: The problem in words: data, skew, clients and model.
        runs: One a seed.
    """

    values: Mapping[str, Any]
    label: str
    line: str
    panel: str
    title: str
    runs: Sequence[Run]

    @property
    def method(self) -> str:
        """What was chosen as the strategy."""
        return written(self.values[METHOD])

    @property
    def seeds(self) -> list[int]:
        """The runs' seeds in order."""
        return sorted(self.by_seed)

    @property
    def by_seed(self) -> dict[int, Run]:
        """The run of each seed."""
        return {run.seed: run for run in self.runs}


def compared_by(runs: list[Run], notes: list[str]) -> Metric:
    """What the first run is judged by; runs that are judged by something else are left out, with a note."""
    quality = runs[0].measures.quality
    for run in [run for run in runs if run.measures.quality != quality]:
        notes.append(
            f"{run.directory} is left out: it is judged by {run.measures.quality.name} and {runs[0].directory} by"
            f" {quality.name}"
        )
        runs.remove(run)
    return quality


def tabulate(
    runs: Sequence[Run], notes: list[str], reserved: Sequence[str]
) -> tuple[list[Column], list[Row]]:
    """Group runs by everything but the seed.

    Args:
        runs: Finished runs.
        notes: Where is told which runs repeat others.
        reserved: Names that no column may have.

    Returns:
        What tells the rows apart, and the rows in the order of their first runs.
    """
    settings: dict[str, dict[int, Run]] = {}
    for run, setting in zip(runs, identify([run.config for run in runs]), strict=True):
        first = settings.setdefault(setting, {}).setdefault(run.seed, run)
        if first is not run:
            notes.append(
                f"{run.directory} is {first.directory} again, and is not counted"
                if run.repeats(first)
                else f"{run.directory} has the seed and the configuration of {first.directory}, but OTHER NUMBERS;"
                " only the latter is counted"
            )
    groups = [list(by_seed.values()) for by_seed in settings.values()]
    # older runs do not tell what was chosen; one of the same setting may
    spokesmen = [max(group, key=lambda run: "choices" in run.config).config for group in groups]
    columns, values = describe(spokesmen, [_version(group) for group in groups], reserved)
    how = [column for column in columns if not of_problem(column)]
    what = [column for column in columns if of_problem(column)]
    titles = [_title(config, what, own) for config, own in zip(spokesmen, values, strict=True)]
    names = _names(what, values, titles)
    within: dict[str, list[Mapping[str, Any]]] = {}
    for own, name in zip(values, names, strict=True):
        within.setdefault(name, []).append(own)
    for own, name, title in zip(values, names, titles, strict=True):
        # what all do alike here, and others elsewhere, is said once
        alike = [n for n in differing(how, values) if n not in (METHOD, *differing(how, within[name]))]
        title += [words(alike, own)] if words(alike, own) else []
    return columns, [
        Row(
            own,
            _label(columns, own, [values]),
            _label(how, own, list(within.values())),
            name,
            ", ".join(title),
            group,
        )
        for own, name, title, group in zip(values, names, titles, groups, strict=True)
    ]


def _version(runs: Sequence[Run]) -> str:
    """What runs ran with, in words: a commit or a release of this package."""
    told = dict.fromkeys(
        str(run.summary.get("git_commit") or (run.summary.get("versions") or {}).get("pisa-fl"))[:7]
        for run in runs
    )
    first, *others = told
    return f"{first} and {len(others)} more" if others else first


def panels(columns: Sequence[Column], rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that are compared with each other, by the words for their problem, in the order of its values."""
    what = [column.name for column in columns if of_problem(column)]
    in_order = sorted(rows, key=lambda row: [order(row.values.get(name, "")) for name in what])
    return {
        name: [row for row in rows if row.panel == name] for name in dict.fromkeys(r.panel for r in in_order)
    }


def lines(rows: Sequence[Row]) -> list[str]:
    """Names of the lines in all panels."""
    return list(dict.fromkeys(row.line for row in rows))


def of_problem(column: Column) -> bool:
    """Whether a column says what is to be learnt, and not how."""
    return column.key.partition(".")[0] in PROBLEM


def differing(columns: Sequence[Column], values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the columns in which settings differ."""
    return [c.name for c in columns if len({written(v[c.name]) if c.name in v else "" for v in values}) > 1]


def words(names: Sequence[str], values: Mapping[str, Any]) -> str:
    """Some of a setting's values in words."""
    return ", ".join(f"{name} {written(values[name])}" for name in names if name in values)


def numbered(seeds: Sequence[int]) -> str:
    """Seeds in words."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    gapless = list(seeds) == list(range(seeds[0], seeds[-1] + 1)) and len(seeds) > 2
    return f"seeds {seeds[0]} to {seeds[-1]}" if gapless else f"seeds {', '.join(map(str, seeds))}"


def _label(
    columns: Sequence[Column], own: Mapping[str, Any], groups: Sequence[Sequence[Mapping[str, Any]]]
) -> str:
    """The method, and what tells the setting from others of the same method in any of some groups."""
    peers = [[other for other in group if other[METHOD] == own[METHOD]] for group in groups]
    differ = {name for group in peers for name in differing(columns, group)} - {METHOD}
    names = [column.name for column in columns if column.name in differ]
    short = [name for name in names if name != VERSION]
    if all(len({words(short, p) for p in group}) == len({words(names, p) for p in group}) for group in peers):
        names = short  # the version tells nothing that they do not
    what = words(names, own)
    return f"{written(own[METHOD])} ({what})" if what else written(own[METHOD])


def _names(
    what: Sequence[Column], values: Sequence[Mapping[str, Any]], titles: Sequence[Sequence[str]]
) -> list[str]:
    """For every setting, where its problem differs from others: in values, or, of several, in parts of its title."""
    differences = [words([column.name for column in what], own) for own in values]
    common = set.intersection(*map(set, titles))
    shorter = [", ".join(part for part in title if part not in common) for title in titles]
    several = len(what) > 1 and len(set(shorter)) == len(set(differences))
    return shorter if several else differences


def _title(config: Mapping[str, Any], columns: Sequence[Column], own: Mapping[str, Any]) -> list[str]:
    """The problem in words, whether or not others differ in it."""
    choices = config.get("choices") or {}
    skew = config.get("partition") or {}
    # what a partitioner's file names first, beside how many clients there are, is how skewed they are
    parameter = next((key for key in skew if key not in ("_target_", "num_partitions", "seed", "own")), None)
    told = ["data", "partition", f"partition.{parameter}", "clients", "model", "participation"]
    parts = [str(choices["data"])] if choices.get("data") else []
    if choices.get("partition"):
        detail = f" ({parameter} {written(skew[parameter])})" if parameter is not None else ""
        parts.append(f"{choices['partition']}{detail}")
    if "clients" in config:
        parts.append(f"{config['clients']} clients")
    share = config.get("participation", 1)
    if isinstance(share, int | float) and share < 1:
        parts.append(f"{100 * share:g} % of them a round")
    if choices.get("model"):
        parts.append(str(choices["model"]))
    rest = words([c.name for c in columns if c.key not in told], own)
    return [*parts, *([rest] if rest else [])]
