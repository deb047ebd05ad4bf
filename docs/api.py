"""Pages of the API, made from the docstrings: `python docs/api.py FOLDER [PACKAGE ...]`, by default of all packages."""

import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pdoc


def show_all(name: str) -> None:
    """Have pdoc show a package's modules and its public names, even those that are imported only when asked for."""
    package = import_module(name)
    inside = [module for module in iter_modules(package.__path__) if module.name != "__main__"]
    public = getattr(package, "__all__", [])
    vars(package).update({name: getattr(package, name) for name in public})
    package.__all__ = [*public, *(module.name for module in inside)]
    for module in inside:
        if module.ispkg:
            show_all(f"{name}.{module.name}")


if __name__ == "__main__":
    folder, *chosen = sys.argv[1:]
    packages = chosen or ["pisa_fl", "strategies", "partitioners"]
    for package in packages:
        show_all(package)
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*packages, output_directory=Path(folder))
