"""The folders of the command line: Hydra makes them before the run begins, with or without a name of their own."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from pisa_fl.config import literal
from pisa_fl.results import claim


class Folders(Callback):
    """Hydra's callback that makes a command's folder in its place, so that it is known which were there before.

    A folder whose name is made of the time belongs to one command: who comes in the same second gets another.
    """

    def __init__(self) -> None:
        self._root = Path()
        self._before: set[Path] = set()

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Make the run directory."""
        self._make(config, "run")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Make the folder of a sweep."""
        self._make(config, "sweep")

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Note what Hydra has made below it, for a run of a sweep."""
        directory = Path(config.hydra.runtime.output_dir)
        below = {folder for folder in (directory, *directory.parents) if self._root in folder.parents}
        claim.note_made(below - self._before)

    def _make(self, config: DictConfig, mode: str) -> None:
        with suppress(OSError, OmegaConfBaseException):  # Hydra meets it next, and says so
            self._root = _resolved(config, mode)
            node = config.hydra[mode]
            if "${now:" in str(OmegaConf.to_container(node, resolve=False)["dir"]):  # type: ignore[index, call-overload]
                self._root = claim.make_new(self._root)
                with read_write(config.hydra):
                    node.dir = literal(str(self._root))
                    # the configuration of every run of a sweep is composed anew
                    overrides = config.hydra.overrides.hydra
                    overrides.append(f"hydra.{mode}.dir={claim.quoted(str(self._root))}")
            else:
                claim.make(self._root)
            self._before = {path for path in self._root.rglob("*") if path.is_dir()}


def _resolved(config: DictConfig, mode: str) -> Path:
    """The folder that Hydra would make, whose name may ask for what was chosen."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(config)
    try:
        return Path(os.path.abspath(config.hydra[mode].dir))
    finally:
        hydra.cfg = before
