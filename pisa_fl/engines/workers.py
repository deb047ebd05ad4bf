"""Resident worker processes: copies of an executor that take jobs, on one core each.

Workers share memory with this process, so that no arrays are ever pickled: they read what the server sent and what
clients remember from it, and write there what clients answer and are to remember next. On Linux they are forked, and
begin with all that this process has; elsewhere they start anew, and are sent the executor. A worker itself remembers
nothing from job to job: which worker takes a job, and how many there are, makes no difference to its outcome, and one
that dies, or is stopped and does not go on, is replaced without anything being lost. What workers do not get done, for
they are killed from outside again and again or cannot be started, this process does.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from pisa_fl.clients.executor import Executor, Job, Outcome
from pisa_fl.clients.host import ClientState
from pisa_fl.engines.packing import pack
from pisa_fl.engines.solver import Lent, Slots, Solver, serve, serve_anew
from strategies.base.rows import zeros

log = logging.getLogger(__name__)

QUEUED = 2
"""Tasks that a worker has at once: it goes on with the second while the outcome of the first is on its way."""

LARGEST_TASK = 100
"""Jobs of a task at most."""


LOOK = 1.0
"""Seconds between looks for workers that are stopped."""

STOPPED = 5
"""Looks in a row after which a stopped worker is replaced; one that was stopped with this process goes on at once."""

FROM_OUTSIDE = {signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)}
"""Signals that come from outside: the job at which they ended a worker has not caused them."""


def start_method() -> Literal["fork", "spawn"] | None:
    """How worker processes are started here; None where this process may have no children.

    They are forked on Linux, unless the program has called `multiprocessing.set_start_method("spawn")`. macOS has the
    call too, and libraries that do not survive it.
    """
    if multiprocessing.current_process().daemon:  # as those of `multiprocessing.Pool` are
        return None
    chosen = multiprocessing.get_start_method(allow_none=True)
    forks = sys.platform == "linux" and hasattr(os, "fork")
    return "fork" if forks and chosen != "spawn" else "spawn"


@dataclass(eq=False)
class _Worker:
    """A process, the tasks that it has, in their order, and how many looks in a row found it stopped."""

    process: BaseProcess
    connection: Connection
    tasks: list[list[int]] = field(default_factory=list)
    stopped: int = 0


@dataclass
class _Crashes:
    """How many workers ended at a job, by its position, and the jobs at which one did so by itself."""

    count: Counter[int] = field(default_factory=Counter)
    own: set[int] = field(default_factory=set)


class Workers:
    """Runs jobs on worker processes, which start with the first job.

    Args:
        executor: What every worker is a copy of; on the CPU.
        count: Number of workers.
        on_disk: Keep clients' states in a file for which memory is only a cache (`strategies.base.rows.zeros`); where
            workers are forked.

    Raises:
        PackingError: Workers start anew here, and the executor cannot be sent to them.
    """

    def __init__(self, executor: Executor, count: int, on_disk: bool = False) -> None:
        self._count, method = count, start_method()
        self._context: Any = multiprocessing.get_context(method)
        self._packed = pack(executor, executor.read_only()) if method == "spawn" else None
        self._zeros = partial(zeros, on_disk=on_disk) if self._packed is None else _shared_zeros
        slots = Slots(executor.clients, executor.half.kept_sizes(), self._zeros)
        self._solver = Solver(executor, slots, torch.empty(0))
        self._workers: list[_Worker] = []
        self._serial = 0

    def run(
        self, jobs: Sequence[Job], timeout: float | None = None, finish: bool = False
    ) -> Iterator[tuple[int, Outcome | str]]:
        """The outcome of each job by its position, or why there is none, in the order in which they are done.

        What outcomes hold lies in memory that the next run uses again.

        Args:
            jobs: The jobs.
            timeout: Seconds after which the others are given up.
            finish: Have this process do the others then.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._serial += 1
        lent = self._share(jobs)
        examples = [self._solver.executor.examples(job) for job in jobs]
        # the largest first, so that no worker is left with a large one in the end
        waiting = sorted(range(len(jobs)), key=lambda position: examples[position])
        crashes = _Crashes()
        looked = time.monotonic()
        try:
            while waiting or any(worker.tasks for worker in self._workers):
                for worker in self._workers:
                    while waiting and len(worker.tasks) < QUEUED:
                        self._send(worker, self._cut(waiting, examples, alone=bool(crashes.count)), lent)
                if not self._workers:
                    position = waiting.pop()
                    yield position, self._here(lent[position])
                    continue
                busy = {w.connection: w for w in self._workers if w.tasks}
                ready = wait(list(busy), max(0.0, min(LOOK, deadline - time.monotonic())))
                if not ready and time.monotonic() >= deadline:
                    break
                for connection in ready:
                    worker = busy[connection]  # type: ignore[index]
                    try:
                        results = worker.connection.recv()
                    except (EOFError, OSError):
                        yield from self._replace(worker, waiting, crashes, lent)
                        continue
                    worker.tasks.pop(0)
                    for position, result in results:
                        failed = isinstance(result, str)
                        yield position, result if failed else self._solver.outcome(lent[position], result)
                if time.monotonic() - looked >= LOOK:
                    looked = time.monotonic()
                    for worker in self._stopped():
                        worker.process.kill()
                        yield from self._replace(worker, waiting, crashes, lent)
            if finish:
                for position in waiting + self._end_busy():
                    yield position, self._here(lent[position])
        finally:
            self._end_busy()
            self._fill()

    def keep(self, client: int, state: ClientState) -> ClientState:
        """A state, in the memory that the workers share."""
        slots = self._solver.slots
        accepted, pending = slots.put(client, 0, state.accepted), slots.put(client, 1, state.pending)
        return ClientState(state.round, accepted, state.pending_round, pending)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.connection.close()
        for worker in list(self._workers):
            worker.process.join(1.0)
            self._end(worker)

    def _share(self, jobs: Sequence[Job]) -> list[Lent]:
        """Put what the jobs hold into shared memory; start the workers."""
        end = 0
        sent: dict[int, tuple[Mapping[str, Tensor], dict[str, tuple[int, int]]]] = {}
        for job in jobs:
            if id(job.arrays) not in sent:
                spans = {}
                for name, array in job.arrays.items():
                    spans[name] = (end, end + len(array))
                    end += len(array)
                sent[id(job.arrays)] = job.arrays, spans
        widths: dict[int, int] = {}
        lent = []
        for position, job in enumerate(jobs):
            if id(job.config) not in widths:
                widths[id(job.config)] = self._width(job) if job.kind == "train" else 0
            slots = [
                self._solver.slots.place(c, state) for c, state in zip(job.clients, job.state, strict=False)
            ]
            spans = sent[id(job.arrays)][1]
            lent.append(
                Lent(position, replace(job, arrays={}, state=()), spans, slots, end, widths[id(job.config)])
            )
            end += len(job.clients) * widths[id(job.config)]
        if end > len(self._solver.exchange):
            self._grow(end)
        self._fill()
        for arrays, spans in sent.values():
            for name, (start, stop) in spans.items():
                self._solver.exchange[start:stop] = arrays[name]
        return lent

    def _grow(self, size: int) -> None:
        """Make room in the exchanged memory; no worker is at anything."""
        if self._packed is None:
            self.close()  # others are forked, and have what this process has
        self._solver.exchange = self._zeros(size)
        for worker in self._workers:
            with suppress(OSError):  # it has died: that is noticed when it is sent a task
                worker.connection.send(self._solver.exchange)

    def _width(self, job: Job) -> int:
        fields = self._solver.executor.half.sent_fields(job.config)
        return sum(field.size for field in fields.values()) + self._solver.executor.model.buffer_layout.size

    def _cut(self, waiting: list[int], examples: Sequence[int], alone: bool) -> list[int]:
        """Take the next task from the jobs: a share of what is left, so that tasks become shorter to the end."""
        share = sum(examples[position] for position in waiting) / (2 * QUEUED * self._count)
        task = [waiting.pop()]
        total = examples[task[0]]
        while waiting and not alone and len(task) < LARGEST_TASK and total + examples[waiting[-1]] <= share:
            task.append(waiting.pop())
            total += examples[task[-1]]
        return task

    def _send(self, worker: _Worker, task: list[int], lent: Sequence[Lent]) -> None:
        worker.tasks.append(task)
        try:
            worker.connection.send((self._serial, [lent[position] for position in task]))
        except OSError:  # it has died: that is noticed where its answer is waited for
            log.debug("a worker takes no tasks any more")

    def _here(self, lent: Lent) -> Outcome | str:
        """The outcome of a job that this process does, as a worker would; PyTorch is left as it was."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.random.fork_rng(devices=[]):
                written = self._solver.solve(lent, self._solver.read(lent))
        finally:
            torch.set_num_threads(threads)
        return written if isinstance(written, str) else self._solver.outcome(lent, written)

    def _stopped(self) -> list[_Worker]:
        """Look which workers have been stopped for a while."""
        for worker in self._workers:
            worker.stopped = worker.stopped + 1 if worker.tasks and _is_stopped(worker.process) else 0
        return [worker for worker in self._workers if worker.stopped >= STOPPED]

    def _fill(self) -> None:
        """Start the workers that are missing, as far as the system lets."""
        try:
            while len(self._workers) < self._count:
                self._start()
        except OSError as error:
            log.warning("a worker process cannot be started, so that others do its work: %s", error)

    def _start(self) -> None:
        """Start a worker.

        Raises:
            OSError: The system does not let it.
        """
        ours, theirs = self._context.Pipe()
        solver, process = self._solver, self._context.Process
        try:
            if self._packed is None:
                worker = process(target=serve, args=(theirs, ours, solver), daemon=True)
                worker.start()
            else:
                own = (theirs, self._packed, solver.slots, solver.exchange)
                worker = process(target=serve_anew, args=own, daemon=True)
                with _without_main():
                    worker.start()
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._workers.append(_Worker(worker, ours))

    def _end_busy(self) -> list[int]:
        """End the workers that are at something, too slow or no longer wanted; what they were at."""
        busy = [worker for worker in self._workers if worker.tasks]
        for worker in busy:
            self._end(worker)
        return [position for worker in busy for task in worker.tasks for position in task]

    def _end(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)

    def _replace(
        self, worker: _Worker, waiting: list[int], crashes: _Crashes, lent: Sequence[Lent]
    ) -> Iterator[tuple[int, Outcome | str]]:
        """Replace a worker that died; its jobs are done again, each alone.

        One at which a second worker ends is done by this process where both were killed from outside; else it fails.
        """
        worker.process.join()
        code = worker.process.exitcode or 0
        why = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        log.warning("a worker process ended %s and was replaced", why)
        self._end(worker)
        self._fill()
        tasks = worker.tasks or [[]]
        waiting += [position for task in tasks[1:] for position in task]  # nothing was done of them
        for position in tasks[0]:
            crashes.count[position] += 1
            if -code not in FROM_OUTSIDE:
                crashes.own.add(position)
            if crashes.count[position] < 2:
                waiting.append(position)
            elif position in crashes.own:
                yield position, f"the worker process that computed it ended {why}, twice"
            else:
                yield position, self._here(lent[position])


def _is_stopped(process: BaseProcess) -> bool:
    """Whether a signal or a debugger holds a process."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def _shared_zeros(count: int) -> Tensor:
    """Float32 zeros that processes which start anew share."""
    return torch.zeros(max(1, count)).share_memory_()[:count]


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start meanwhile do not run the main program again: they need nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
