"""Hydra's launcher for the runs of a sweep: side by side on their shares of the cores, and none that is done already.

The same command goes on with a sweep that was interrupted, in the folder that it had: a run is known by its
configuration, whatever its number. What is done is left as it is, what was interrupted goes on from its checkpoint, and
what another process writes is left to that.
"""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from pisa_fl.config import ConfigurationError, imported_folders, literal, settle
from pisa_fl.results import claim
from pisa_fl.sweeps.failure import INTERRUPTED, WRONG, SweepError
from pisa_fl.sweeps.folder import Folder, State, identify, progress, worth
from pisa_fl.sweeps.process import Job, RunProcess
from pisa_fl.sweeps.table import Entry, Sweep, command_in, show
from pisa_fl.system.signals import stop_signals
from pisa_fl.system.text import visible

LOOK = 0.2
"""Seconds between looks whether the sweep is to stop."""

LOCAL = "pisa_fl.engines.local.local_engine"
"""The engine that takes no more than its share of the cores; of others a sweep has one run at a time."""


@dataclass(eq=False)
class Run:
    """A run that a sweep asks for.

    Attributes:
        entry: It in the table.
        overrides: Of its command.
        composed: Its configuration, with Hydra's part.
        config: Settled; None if it is wrong.
        identity: Of its configuration; None if it goes on with a run elsewhere (`resume=`), or is wrong.
        own: Name of the directory that is its own if that is free.
        failure: Why it failed.
        worth: By what runs are compared; None if it is not done, or that is not finite.
        done: Whether it came to its end.
    """

    entry: Entry
    overrides: Sequence[str]
    composed: DictConfig
    config: DictConfig | None
    identity: str | None
    own: str
    failure: SweepError | None = None
    worth: float | None = None
    done: bool = False


class ParallelLauncher(Launcher):
    """Makes the runs of a sweep.

    Args:
        jobs: How many side by side, which share the cores; `auto`: one a core, but one with a GPU.
    """

    def __init__(self, jobs: int | Literal["auto"] = "auto") -> None:
        self._jobs = jobs
        self._sweep = Sweep(_command(), 1, 0)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """As Hydra calls it.

        Raises:
            ConfigurationError: The number of jobs is none.
        """
        jobs = self._jobs
        if jobs != "auto" and (type(jobs) is not int or jobs < 1):
            raise ConfigurationError(
                f"hydra.launcher.jobs must be a whole number of at least 1 or auto, got {jobs}"
            )
        self._context, self._task, self._config = hydra_context, task_function, config
        self._root = Path(os.path.abspath(config.hydra.sweep.dir))
        self._sweep.command = _command(self._root)
        given = OverridesParser.create(hydra_context.config_loader).parse_overrides(
            config.hydra.overrides.task
        )
        # as sweepers write them
        self._fixed = {
            f"{one.get_key_element()}={one.get_value_element_as_str()}"
            for one in given
            if not one.is_sweep_override()
        }

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Make runs, and say how they ended.

        Raises:
            SweepError: Some failed, as has been said.
            SystemExit: It was asked to stop.
        """
        runs = [self.compose(initial_job_idx + i, overrides) for i, overrides in enumerate(job_overrides)]
        self.make(runs)
        self.show()
        if failed := [run.failure for run in runs if run.failure is not None]:
            raise SweepError(failed[0].status) from failed[0]
        return [
            JobReturn(run.overrides, run.config, status=JobStatus.COMPLETED, _return_value=run.worth)
            for run in runs
        ]

    def show(self) -> None:
        """Print the table."""
        show(self._sweep, self._root)

    def compose(self, number: int, overrides: Sequence[str]) -> Run:
        """A run from its overrides; one whose configuration is wrong has failed.

        Args:
            number: Hydra's, from 0 on.
            overrides: Of its command.
        """
        setup_globals()
        composed = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        swept = [text for text in filter_overrides(overrides) if text not in self._fixed]
        entry = Entry(number + 1, " ".join(swept))
        with _chosen(composed):
            own = str(composed.hydra.sweep.subdir)
            try:
                config = settle(composed)
            except ConfigurationError as error:
                return Run(entry, overrides, composed, None, None, own, SweepError(WRONG, str(error)))
        identity = identify(config) if config.resume is None else None
        return Run(entry, overrides, composed, config, identity, own)

    def make(self, runs: Sequence[Run], total: int = 0) -> None:
        """Make runs, each of which then knows how it ended.

        Args:
            runs: They.
            total: How many there are to be in all, if there will be more.

        Raises:
            SystemExit: It was asked to stop; the table has been printed.
        """
        configs = [run.config for run in runs if run.config is not None]
        jobs, cores = share(configs, self._jobs)
        self._sweep.jobs = jobs
        known = {entry.number for entry in self._sweep.entries}
        self._sweep.entries += [run.entry for run in runs if run.entry.number not in known]
        self._sweep.total = max(total, len(self._sweep.entries))
        self._sweep.write(self._root)
        once: dict[str, Run] = {}
        for run in runs:
            if run.failure is not None:
                self._failed(run, run.failure)
            else:
                once.setdefault(run.identity or f"{run.entry.number}", run)
        if once:
            self._make(list(once.values()), jobs, cores, _method(configs))
        for run in runs:  # of which some may be the same
            first = once.get(run.identity or "", run)
            run.worth, run.done, run.failure = first.worth, first.done, first.failure
            run.entry.directory, run.entry.failed = first.entry.directory, first.entry.failed
        self._sweep.write(self._root)

    def _make(self, runs: Sequence[Run], jobs: int, cores: int, method: Literal["fork", "spawn"]) -> None:
        folder, waiting = Folder(self._root), deque(runs)
        running: dict[RunProcess, Run] = {}
        elsewhere: list[Run] = []
        stopping = False
        with stop_signals() as stop:
            try:
                while running or (waiting and not stop):
                    while waiting and len(running) < jobs and not stop:
                        run = waiting.popleft()
                        if (state := self._place(run, folder)) == "running":
                            elsewhere.append(run)
                        elif state == "done":
                            self._ended(run, None, elsewhere)
                        else:
                            running[RunProcess(self._job(run, state, cores), method)] = run
                    ready = wait([process.sentinel for process in running], LOOK) if running else []
                    for process in [process for process in running if process.sentinel in ready]:
                        self._ended(running.pop(process), process.failure(), elsewhere)
                    if stop and not stopping:
                        stopping = True
                        if running:
                            _say(
                                f"{len(running)} runs stop after their present round; once more ends them at once"
                            )
                        for process in running:
                            process.end(at_once=False)
                    if not waiting and not running:  # what others wrote may have come to its end, or theirs
                        waiting.extend(run for run in elsewhere if not self._is_held(run))
                        elsewhere = [run for run in elsewhere if run not in waiting]
            finally:
                for process, run in running.items():
                    process.end(at_once=True)
                    self._ended(run, process.failure(), elsewhere)
            if stop:
                self._sweep.write(self._root)
                self.show()
                raise SystemExit(INTERRUPTED)

    def _place(self, run: Run, folder: Folder) -> State:
        """Give a run its directory; how far it is there."""
        directory = self._root / run.own
        state: State = "left"
        if run.identity is not None:
            directory = folder.find(run.identity, run.own)
            state = progress(directory).state
        run.entry.directory, run.entry.failed = os.path.relpath(directory, self._root), None
        self._sweep.write(self._root)
        return state

    def _job(self, run: Run, state: State, cores: int) -> Job:
        """What begins a run in its directory, or goes on with it there."""
        assert run.config is not None
        assert run.entry.directory is not None
        config = run.composed
        with read_write(config.hydra), open_dict(config):
            config.hydra.sweep.subdir = literal(run.entry.directory)
            if state == "interrupted":
                config.resume = literal(str(self._root / run.entry.directory))
                config.allow = sorted(
                    {*config.allow, *_packages(run.config)}
                )  # what this command names itself
        label = f"run {run.entry.number} of {self._sweep.total}  "
        return Job(label, cores, self._context, self._task, config, list(imported_folders))

    def _ended(self, run: Run, failure: SweepError | None, elsewhere: list[Run]) -> None:
        """Note how a run ended."""
        if failure is None:
            run.done = True
            if run.identity is not None and run.entry.directory is not None:
                run.worth = worth(self._root / run.entry.directory)
        elif failure.status == INTERRUPTED:
            run.failure = None  # it can go on
        elif failure.status == WRONG and self._is_held(run):
            elsewhere.append(run)  # another process was faster
        else:
            self._failed(run, failure)
        self._sweep.write(self._root)

    def _failed(self, run: Run, failure: SweepError) -> None:
        run.failure, run.entry.failed = failure, failure.sentence
        _say(f"run {run.entry.number} of {self._sweep.total} ({run.entry.words}): {failure.sentence}")

    def _is_held(self, run: Run) -> bool:
        return run.entry.directory is not None and claim.is_held(self._root / run.entry.directory)


def share(configs: Sequence[DictConfig], jobs: int | Literal["auto"]) -> tuple[int, int]:
    """How many runs go side by side, and how many cores each has; together no more than there are.

    Raises:
        ConfigurationError: So many would have more.
    """
    from pisa_fl.engines.base import cores

    there = cores()
    needed = max((_needed(config, there) for config in configs), default=1)
    most = max(1, there // needed)
    if jobs == "auto":
        side_by_side = 1 if any(map(_on_gpu, configs)) else most
    elif jobs <= most:
        side_by_side = jobs
    else:
        raise ConfigurationError(
            f"hydra.launcher.jobs={jobs} runs, of which one takes {needed} cores, need more than the {there} there are:"
            f" set it to {most}, or to auto"
        )
    side_by_side = max(1, min(side_by_side, len(configs)))
    return side_by_side, there // side_by_side


def _needed(config: DictConfig, there: int) -> int:
    """Cores that a run takes in any case."""
    if config.engine.get("_target_") != LOCAL:
        return there
    said = (config.engine.get(key) for key in ("workers", "threads"))
    return max(1, *(number for number in said if type(number) is int), 1)


def _on_gpu(config: DictConfig) -> bool:
    import torch

    return str(config.device) != "cpu" and torch.cuda.device_count() > 0


def _method(configs: Sequence[DictConfig]) -> Literal["fork", "spawn"]:
    """How processes are started: forked where engines fork theirs, but not where this one may have touched a GPU."""
    from pisa_fl.engines.workers import start_method

    if start_method() != "fork" or any(map(_on_gpu, configs)):
        return "spawn"
    import pisa_fl.runner  # noqa: F401  once, for all that are forked

    return "fork"


def _packages(config: DictConfig) -> set[str]:
    """Packages and modules in which what a configuration has built lies."""
    names = re.findall(r"^ *_target_: *[\"']?([\w.]+)[.]\w+", OmegaConf.to_yaml(config), re.MULTILINE)
    return set(names)


@contextmanager
def _chosen(config: DictConfig) -> Iterator[None]:
    """What asks for something of Hydra's meanwhile is told of this configuration."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(config)
    try:
        yield
    finally:
        hydra.cfg = before


def _command(folder: Path | None = None) -> str:
    """The command that goes on with this sweep, as it can be pasted into a shell."""
    return command_in(["pisa-fl", *sys.argv[1:]], folder)


def _say(text: str) -> None:
    print(f"pisa-fl: {visible(text)}", file=sys.stderr, flush=True)
