"""Makes this package's launcher and sweeper known to Hydra.

Hydra takes plugins from a namespace package `hydra_plugins` alone, of which the folder beside this file is a part.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path


def register() -> None:
    """Let configurations name what `hydra_plugins.pisa_fl` holds."""
    from hydra.core.plugins import Plugins
    from hydra.plugins.plugin import Plugin

    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    module = import_module("hydra_plugins.pisa_fl")
    for kind in vars(module).values():
        if isinstance(kind, type) and issubclass(kind, Plugin) and kind.__module__ == module.__name__:
            Plugins.instance().register(kind)  # which may have looked for plugins before
