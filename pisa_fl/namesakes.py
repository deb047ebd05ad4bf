"""The packages installed beside this one, `strategies` and `partitioners`, found whatever else has their names."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

PACKAGES = ("strategies", "partitioners")
HOME = Path(__file__).resolve().parents[1]


class OwnFirst:
    """Finds our packages where this one lies, before anything that is searched for their names."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where one of our packages lies; None of anything else."""
        return PathFinder.find_spec(name, [str(HOME)], target) if name in PACKAGES else None


def find_own_first() -> None:
    """Have our packages found; who has a module of that name is told that it is hidden.

    Raises:
        ImportError: Such a module was imported before.
    """
    for name in PACKAGES:
        imported = sys.modules.get(name)
        spec = imported.__spec__ if imported is not None else PathFinder.find_spec(name)
        found = (
            None if spec is None else spec.origin or next(iter(spec.submodule_search_locations or ()), None)
        )
        if found is None or Path(found).resolve().is_relative_to(HOME / name):
            continue
        if imported is not None:
            raise ImportError(f"{found} hides pisa-fl's package `{name}`: rename it")
        warnings.warn(f"{found} is hidden by pisa-fl's package `{name}`: rename it", stacklevel=3)
    if OwnFirst not in sys.meta_path:
        sys.meta_path.insert(0, OwnFirst)
