"""A run of a sweep in a process of its own: it has its share of the cores, and stops when the sweep does.

The process is forked where the engines fork theirs, so that PyTorch is imported once for all runs. It leads a group of
its own: Ctrl-C reaches the sweep, which passes it on. Where the sweep is killed, its runs notice it, and stop with a
checkpoint.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TextIO

from hydra.core.utils import JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from pisa_fl.config import import_from
from pisa_fl.sweeps.failure import FAILED, INTERRUPTED, SweepError

LOOK = 1.0
"""Seconds between a run's looks whether the sweep is still there."""


@dataclass(frozen=True)
class Job:
    """A run that is to be made.

    Attributes:
        label: What each of its lines begins with.
        cores: Its share of them.
        context: Hydra's, of the sweep.
        task: What Hydra has called for a run.
        config: Of the run, with Hydra's part.
        folders: Of the user's own modules.
    """

    label: str
    cores: int
    context: HydraContext
    task: TaskFunction
    config: DictConfig
    folders: Sequence[Path]


class RunProcess:
    """The process of a run.

    Args:
        job: What it does.
        method: How it is started.
    """

    def __init__(self, job: Job, method: Literal["fork", "spawn"]) -> None:
        context: Any = multiprocessing.get_context(method)
        self._receiver, sender = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(target=_serve, args=(job, sender, os.getpid()))
        self._process.start()
        sender.close()

    @property
    def sentinel(self) -> int:
        """What is ready when the process has ended."""
        return self._process.sentinel

    def end(self, at_once: bool) -> None:
        """Have the run stop after its round, or end it at once; it can go on either way."""
        if at_once:
            self._process.kill()
        else:
            self._process.terminate()

    def failure(self) -> SweepError | None:
        """Why the run, whose process has ended, did not come to its end; None if it did."""
        self._process.join()
        said: SweepError | Literal["nothing"] | None = "nothing"
        try:
            if self._receiver.poll():
                said = self._receiver.recv()
        except (EOFError, OSError):
            pass
        self._receiver.close()
        if said != "nothing":
            return said
        code = self._process.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return SweepError(INTERRUPTED if code == -signal.SIGTERM else FAILED, f"its process ended {how}")


def _serve(job: Job, sender: Connection, parent: int) -> None:
    """What the process of a run does."""
    from pisa_fl.engines.base import SHARE

    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):  # until the run listens itself
        signal.signal(number, signal.default_int_handler)
    threading.Thread(target=_stop_with, args=(parent,), daemon=True).start()
    os.environ[SHARE] = str(job.cores)
    sys.stdout = _Labelled(sys.stdout, job.label)
    for folder in job.folders:
        import_from(folder)
    setup_globals()
    try:
        sender.send(_run(job))
    except KeyboardInterrupt:
        sender.send(SweepError(INTERRUPTED, "interrupted"))
    except SystemExit as end:
        sender.send(SweepError(int(end.code or 0), "interrupted"))
    sys.stdout.flush()


def _run(job: Job) -> SweepError | None:
    """Have Hydra make the run; why it failed, if it did."""
    returned = run_job(
        hydra_context=job.context,
        task_function=job.task,
        config=job.config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    if returned.status == JobStatus.COMPLETED:
        return None
    error = returned._return_value
    if isinstance(error, SweepError):
        return error
    traceback.print_exception(error)  # what only its programmer can mend
    return SweepError(FAILED, f"{type(error).__name__}: {error}")


def _stop_with(parent: int) -> None:
    """Stop this process when its parent is no longer there."""
    while os.getppid() == parent and (above := multiprocessing.parent_process()) and above.is_alive():
        time.sleep(LOOK)
    os.kill(os.getpid(), signal.SIGTERM)


class _Labelled(io.TextIOBase):
    """Writes whole lines, each with a label before it.

    Args:
        stream: Where to.
        label: It.
    """

    def __init__(self, stream: TextIO, label: str) -> None:
        self._stream, self._label, self._rest = stream, label, ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's."""
        return self._stream.encoding

    def write(self, text: str) -> int:
        """Write the lines that have come to their end."""
        *lines, self._rest = (self._rest + text).split("\n")
        if lines:
            self._stream.write("".join(f"{self._label}{line}\n" for line in lines))
            self._stream.flush()  # at once, so that lines of several runs do not mix
        return len(text)

    def flush(self) -> None:
        """Nothing is kept but a line that has not come to its end."""
        self._stream.flush()
