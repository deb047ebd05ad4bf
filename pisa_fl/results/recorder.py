"""Writes the run directory while the run goes on, but for pictures and what trackers write."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import partitioners
from pisa_fl.checkpoint import round_folder, save_checkpoint
from pisa_fl.config.explain import explain
from pisa_fl.federation import DivergedError, TooFewClientsError
from pisa_fl.metric import Metrics
from pisa_fl.results import run_directory
from pisa_fl.results.observer import Observer, Run
from pisa_fl.results.result import Interrupted
from pisa_fl.system import files

log = logging.getLogger(__name__)


class Recorder(Observer):
    """Configuration, deal, weights, metrics, failures, summary and checkpoints.

    Args:
        directory: The run directory.
        every: Rounds between checkpoints.
        keep: Checkpoints kept.
        best: Whether to keep the weights of the best round as well.
    """

    essential = True

    def __init__(self, directory: Path, every: int, keep: int, best: bool = False) -> None:
        self._directory, self._every, self._keep, self._best = directory, every, keep, best
        self._run: Run | None = None
        self._recorded = -1  # last round in metrics.jsonl
        self._saved = True  # whether a checkpoint of it is there

    def started(self, run: Run) -> None:
        """As `Observer.started`."""
        files.sweep(self._directory)
        if run.metrics:
            self._recorded = run.metrics[-1]["round"]
            self._rewind_best(self._recorded)
        else:
            federation = run.federation
            run_directory.write_config(self._directory / "config.yaml", run.config, run.id, run.measures)
            initial = self._directory / "initial.safetensors"
            run_directory.write_weights(initial, federation.model.state_dict())
            if federation.partition:
                partitioners.save(federation.partition, self._directory / "partition.json")
                data = federation.data
                counts = self._directory / "partition.csv"
                partitioners.save_counts(federation.partition, data.groups, data.group_names, counts)
        self._run = run

    def waiting(self, line: str | None) -> None:
        """Whoever follows the run elsewhere is told by a file."""
        if line is not None:
            files.write(self._directory / run_directory.WAITING, line)
            return
        (self._directory / run_directory.WAITING).unlink(missing_ok=True)
        if self._run is not None and self._run.metrics:  # else they are written with round 0
            self._write_failures(self._run.federation.round)

    def round(self, line: Metrics) -> None:
        """As `Observer.round`."""
        assert self._run is not None
        run_directory.append_line(self._directory / "metrics.jsonl", line)
        if (found := self._run.federation.of_clients) is not None:
            run_directory.append_line(
                self._directory / "clients.jsonl", {"round": line["round"], "clients": found}
            )
        quality = self._run.measures.quality
        if self._best and quality.key in line and quality.best(self._run.metrics) is line:
            weights, said = self._run.federation.model.state_dict(), {"round": str(line["round"])}
            run_directory.write_weights(self._directory / run_directory.BEST, weights, said)
        self._recorded = line["round"]
        self._write_failures(line["round"])
        self._saved = line["round"] == self._run.rounds or line["round"] % self._every == 0
        if self._saved:
            self._save()

    def asks_to_stop(self) -> bool:
        """Whether somebody left a file that asks for it."""
        return (self._directory / run_directory.STOP).exists()

    def finished(self, summary: Mapping[str, Any]) -> None:
        """As `Observer.finished`."""
        assert self._run is not None
        if not self._saved:
            self._save()
        weights = self._run.federation.model.state_dict()
        run_directory.write_weights(self._directory / "model.safetensors", weights)
        run_directory.write_summary(self._directory / "summary.json", summary)
        self._forget_stop()

    def stopped(self, reason: BaseException) -> None:
        """Leave a checkpoint of the last whole round, and the failures of the round that ended the run.

        Where it failed while a round's replies were taken in, there is no state to go on from but the checkpoint
        before.
        """
        (self._directory / run_directory.WAITING).unlink(missing_ok=True)
        if self._run is None or not isinstance(reason, Exception):
            return
        federation = self._run.federation
        try:
            if isinstance(reason, TooFewClientsError | DivergedError):
                self._write_failures(federation.round + 1)
            if federation.whole and self._recorded == federation.round:
                self._save()
            self._forget_stop()
        except Exception as another:
            if isinstance(reason, Interrupted):
                raise
            if not isinstance(reason, OSError):  # which has said that nothing can be written
                log.warning("no checkpoint of round %d: %s", federation.round, explain(another))

    def _rewind_best(self, round_number: int) -> None:
        """What was the best after a round takes the place of what later rounds, which are done again, have left."""
        if not self._best:
            return
        best = self._directory / run_directory.BEST
        kept = round_folder(self._checkpoints, round_number) / best.name
        if kept.is_file():
            files.write(best, kept.read_bytes())
        else:
            best.unlink(missing_ok=True)

    def _write_failures(self, round_number: int) -> None:
        assert self._run is not None
        for failure in self._run.federation.gateway.failures:
            told = {key: value for key, value in asdict(failure).items() if value != ""}
            run_directory.append_line(self._directory / "failures.jsonl", {"round": round_number} | told)

    def _save(self) -> None:
        """Write a checkpoint, after the lines that it presumes are on the disk."""
        assert self._run is not None
        for lines in self._directory.glob("*.jsonl"):
            files.sync(lines)
        best = self._directory / run_directory.BEST
        beside = [best] if self._best and best.is_file() else []
        save_checkpoint(self._run.federation, self._checkpoints, self._keep, beside)

    @property
    def _checkpoints(self) -> Path:
        return self._directory / "checkpoint"

    def _forget_stop(self) -> None:
        """What was heard is not to be heard again after a resume."""
        (self._directory / run_directory.STOP).unlink(missing_ok=True)
