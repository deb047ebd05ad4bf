"""Folders of the user's own modules, which a configuration may name classes of."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

imported_folders: list[Path] = []
"""Folders of the user's own modules, which other hosts need as well."""


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
