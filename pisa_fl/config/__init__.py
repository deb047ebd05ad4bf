"""Configuration: composed, checked, explained, and built from."""

from pisa_fl.config.builder import blaming, build
from pisa_fl.config.composer import (
    CONF,
    PATHS,
    compose,
    explain_composition,
    literal,
    located,
    resolve,
    settle,
)
from pisa_fl.config.error import ConfigurationError
from pisa_fl.config.own_code import import_from, imported_folders, own_folders, own_modules

__all__ = [
    "CONF",
    "PATHS",
    "ConfigurationError",
    "blaming",
    "build",
    "compose",
    "explain_composition",
    "import_from",
    "imported_folders",
    "literal",
    "located",
    "own_folders",
    "own_modules",
    "resolve",
    "settle",
]
