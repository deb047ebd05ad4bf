"""Imports flow one way: no module imports another in a circle, nor does a package."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("experiments", "pisa_fl", "strategies", "partitioners")


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imported(path):
    """Modules of ours that one imports when it is imported itself; those of a function's body do not count."""
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            for alias in statement.names:
                inside = f"{statement.module}.{alias.name}"
                yield inside if inside in MODULES else statement.module
        elif isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)


GRAPH = {name: {other for other in imported(path) if other in MODULES} for name, path in MODULES.items()}


def room(name):
    """A package of `pisa_fl` or a module beside them; the other packages are one room each."""
    return ".".join(name.split(".")[: 2 if name.startswith("pisa_fl.") else 1])


def test_no_module_imports_another_in_a_circle():
    assert len(list(TopologicalSorter(GRAPH).static_order())) == len(MODULES)


def test_no_two_rooms_import_each_other():
    arrows = {(room(a), room(b)) for a, others in GRAPH.items() for b in others if room(a) != room(b)}
    assert not [pair for pair in arrows if pair[::-1] in arrows]
    assert ("pisa_fl.runner", "pisa_fl.results") in arrows  # they are found


def test_packages_import_only_those_below_them():
    arrows = {(a.split(".")[0], b.split(".")[0]) for a, others in GRAPH.items() for b in others}
    assert {(a, b) for a, b in arrows if a != b} == {
        ("experiments", "pisa_fl"),
        ("experiments", "partitioners"),
        ("experiments", "strategies"),
        ("pisa_fl", "partitioners"),
        ("pisa_fl", "strategies"),
    }
