"""Weights & Biases: a run of its own for every run, with its configuration, and the rounds as steps."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf

from pisa_fl.metric import Metrics
from pisa_fl.results.observer import Observer, Run
from pisa_fl.trackers.elsewhere import need, note, recall
from pisa_fl.trackers.numbers import numbers

if TYPE_CHECKING:
    import wandb


class Wandb(Observer):
    """A run that goes on does so under its old id, with the rounds that the server lacks.

    What was written offline, and not uploaded yet, is written anew: a process that was killed leaves a part of it.

    Args:
        project: Its name.
        entity: User or team; None: the default of who is logged in.
        group: Of runs that belong together; None for none.
        mode: None leaves that to $WANDB_MODE.

    Raises:
        ConfigurationError: It is not installed.
    """

    def __init__(
        self,
        project: str,
        entity: str | None,
        group: str | None,
        mode: Literal["online", "offline", "disabled"] | None,
    ) -> None:
        need("wandb", "Weights & Biases")
        self._settings = {"project": project, "entity": entity, "group": group, "mode": mode}
        self._run: Run | None = None
        self._there: wandb.Run | None = None
        self._id, self._last = "", -1
        self._sent: dict[str, int] = {}  # last round in each folder that was written to its end

    def started(self, run: Run) -> None:
        """Make a run, or go on with it, and send what it lacks."""
        import wandb

        known = recall(run, "wandb")
        self._id, self._sent = known.get("id", f"{run.id}-{secrets.token_hex(4)}"), known.get("sent", {})
        before = (
            [] if run.directory is None else list((run.directory / "wandb").glob(f"offline-run-*-{self._id}"))
        )
        config = OmegaConf.to_container(run.config, resolve=True)
        assert isinstance(config, dict)
        self._there = wandb.init(
            **self._settings,
            id=self._id,
            name=run.name,
            config={str(key): value for key, value in config.items()} | {"run_id": run.id},
            dir=run.directory,
            resume="allow",
            reinit="create_new",  # runs in other threads have theirs
        )
        self._run = run
        note(run, "wandb", id=self._id, sent=self._sent)
        self._last = self._uploaded(before) if self._there.offline else self._there.step - 1
        for line in run.metrics:
            self.round(line)

    def round(self, line: Metrics) -> None:
        """As `Observer.round`."""
        if self._run is not None and self._there is not None and line["round"] > self._last:
            self._last = line["round"]
            self._there.log(numbers(line), step=line["round"], commit=True)  # and not with the next

    def finished(self, summary: Mapping[str, Any]) -> None:
        """As `Observer.finished`."""
        self._end(0)

    def stopped(self, reason: BaseException) -> None:
        """As `Observer.stopped`."""
        self._end(1)

    def _end(self, status: int) -> None:
        if self._there is not None and self._run is not None:
            self._there.finish(exit_code=status)
            self._sent[Path(self._there.dir).parent.name] = self._last
            note(self._run, "wandb", id=self._id, sent=self._sent)

    def _uploaded(self, folders: Sequence[Path]) -> int:
        """The last round in those folders that were uploaded; the others are removed."""
        done = [folder for folder in folders if list(folder.glob("*.synced"))]
        for folder in folders:
            if folder not in done:
                shutil.rmtree(folder)
        return max((self._sent.get(folder.name, -1) for folder in done), default=-1)
