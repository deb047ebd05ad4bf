"""Resident worker processes: forked copies of an executor that take jobs, on one core each.

Workers share memory with this process, so that neither data, nor models, nor arrays are ever pickled: they read what
the server sent and what clients remember from it, and write there what clients answer and are to remember next. A
worker itself remembers nothing from job to job: which worker takes a job, and how many there are, makes no difference
to its outcome, and one that dies, or is stopped and does not go on, is replaced without anything being lost. What
workers do not get done, for they are killed from outside again and again or cannot be started, this process does.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pisa_fl.clients.executor import Executor, Job, Outcome
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

FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM)
"""Signals that are no fault of the job at which a worker was when they ended it."""


def can_fork() -> bool:
    """Whether processes can be forked here, without harm: macOS has the call, and libraries that do not survive it."""
    # the processes of `multiprocessing.Pool` are daemons, which may have no children
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


_FORK: Any = multiprocessing.get_context("fork" if can_fork() else None)

Spans = Mapping[str, tuple[int, int]]
"""Name of each array -> where it lies in the exchanged memory, from and up to."""


@dataclass(frozen=True)
class _Lent:
    """A job as it is sent to a worker, and where its arrays lie in the exchanged memory.

    Attributes:
        position: Its position among the jobs.
        job: The job, without arrays and states.
        spans: The instruction's arrays.
        slots: Which of each client's two slots holds its state, -1 for none.
        start: Where the answer is to be written.
        width: Numbers that each client may answer.
    """

    position: int
    job: Job
    spans: Spans
    slots: Sequence[int]
    start: int
    width: int


@dataclass(frozen=True)
class _Written:
    """An outcome as a worker sends it, and where its arrays lie in the exchanged memory.

    Attributes:
        outcome: The outcome, without arrays and states.
        spans: The answer's arrays, within each client's part; whole numbers that take less room lie at its beginning.
        types: Their types.
        state: Whether there is a new state, in the other slot of each client.
    """

    outcome: Outcome
    spans: Spans
    types: Mapping[str, torch.dtype]
    state: bool


class Slots:
    """Two places for the state of every client, in shared memory: one to read it from, one to write the next to.

    Args:
        clients: Client numbers.
        sizes: Vectors that a client keeps -> their lengths.
        on_disk: As for `strategies.base.rows.zeros`.
    """

    def __init__(self, clients: Iterable[int], sizes: Mapping[str, int], on_disk: bool) -> None:
        self._rows = {client: row for row, client in enumerate(clients)}
        self._sizes = sizes
        self._views: dict[tuple[int, int], Mapping[str, Tensor]] = {}
        self._memory = zeros(len(self._rows) * 2 * sum(sizes.values()), on_disk).view(len(self._rows), 2, -1)

    def __call__(self, client: int, slot: int) -> Mapping[str, Tensor]:
        """The vectors in a client's slot; none for slot -1."""
        if slot < 0:
            return {}
        if (client, slot) not in self._views:
            vectors = self._memory[self._rows[client], slot].split(list(self._sizes.values()))
            self._views[client, slot] = dict(zip(self._sizes, vectors, strict=True))
        return self._views[client, slot]

    def place(self, client: int, state: Mapping[str, Tensor]) -> int:
        """The slot that holds a state; it is copied into the first if it lies elsewhere."""
        if not state:
            return -1
        for slot in (0, 1):
            if state is self._views.get((client, slot)):
                return slot
        for name, held in self(client, 0).items():
            held.copy_(state[name]) if name in state else held.zero_()
        return 0


@dataclass(eq=False)
class _Worker:
    """A process, the tasks that it has, in their order, and how many looks in a row found it stopped."""

    process: BaseProcess
    connection: Connection
    tasks: list[list[int]] = field(default_factory=list)
    stopped: int = 0


@dataclass
class _Strikes:
    """How many workers ended at a job, by its position, and the jobs at which one did so by itself."""

    count: Counter[int] = field(default_factory=Counter)
    own: set[int] = field(default_factory=set)


class Workers:
    """Runs jobs on worker processes, which start with the first job.

    Args:
        executor: What every worker is a copy of; on the CPU.
        count: Number of workers.
        on_disk: Keep clients' states in a file for which memory is only a cache (`strategies.base.rows.zeros`).
    """

    def __init__(self, executor: Executor, count: int, on_disk: bool = False) -> None:
        self._executor, self._count, self._on_disk = executor, count, on_disk
        self._slots = Slots(executor.clients, executor.half.kept_sizes(), on_disk)
        self._exchange = torch.empty(0)
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
        examples = [self._executor.examples(job) for job in jobs]
        # the largest first, so that no worker is left with a large one in the end
        waiting = sorted(range(len(jobs)), key=lambda position: examples[position])
        strikes = _Strikes()
        looked = time.monotonic()
        try:
            while waiting or any(worker.tasks for worker in self._workers):
                for worker in self._workers:
                    while waiting and len(worker.tasks) < QUEUED:
                        self._send(worker, self._cut(waiting, examples, alone=bool(strikes.count)), lent)
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
                        yield from self._replace(worker, waiting, strikes, lent)
                        continue
                    worker.tasks.pop(0)
                    for position, result in results:
                        failed = isinstance(result, str)
                        yield position, result if failed else self._outcome(lent[position], result)
                if time.monotonic() - looked >= LOOK:
                    looked = time.monotonic()
                    for worker in self._stopped():
                        worker.process.kill()
                        yield from self._replace(worker, waiting, strikes, lent)
            if finish:
                for position in waiting + self._end_busy():
                    yield position, self._here(lent[position])
        finally:
            self._end_busy()
            self._fill()

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.connection.close()
        for worker in list(self._workers):
            worker.process.join(1.0)
            self._end(worker)

    def _share(self, jobs: Sequence[Job]) -> list[_Lent]:
        """Put what the jobs hold into shared memory; start the workers if they do not have enough of it."""
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
            slots = [self._slots.place(c, state) for c, state in zip(job.clients, job.state, strict=False)]
            spans = sent[id(job.arrays)][1]
            lent.append(
                _Lent(position, replace(job, arrays={}, state=()), spans, slots, end, widths[id(job.config)])
            )
            end += len(job.clients) * widths[id(job.config)]
        if end > len(self._exchange):
            self.close()
            self._exchange = zeros(end, self._on_disk)
        self._fill()
        for arrays, spans in sent.values():
            for name, (start, stop) in spans.items():
                self._exchange[start:stop] = arrays[name]
        return lent

    def _width(self, job: Job) -> int:
        fields = self._executor.half.sent_fields(job.config)
        return sum(field.size for field in fields.values()) + self._executor.model.buffer_layout.size

    def _cut(self, waiting: list[int], examples: Sequence[int], alone: bool) -> list[int]:
        """Take the next task from the jobs: a share of what is left, so that tasks become shorter to the end."""
        share = sum(examples[position] for position in waiting) / (2 * QUEUED * self._count)
        task = [waiting.pop()]
        total = examples[task[0]]
        while waiting and not alone and len(task) < LARGEST_TASK and total + examples[waiting[-1]] <= share:
            task.append(waiting.pop())
            total += examples[task[-1]]
        return task

    def _send(self, worker: _Worker, task: list[int], lent: Sequence[_Lent]) -> None:
        worker.tasks.append(task)
        try:
            worker.connection.send((self._serial, [lent[position] for position in task]))
        except OSError:  # it has died: that is noticed where its answer is waited for
            log.debug("a worker takes no tasks any more")

    def _outcome(self, lent: _Lent, written: _Written) -> Outcome:
        clients = lent.job.clients
        arrays = {
            name: self._exchange.as_strided(
                (len(clients), stop - start), (lent.width, 1), lent.start + start
            ).view(written.types[name])[:, : stop - start]
            for name, (start, stop) in written.spans.items()
        }
        state: list[Mapping[str, Tensor]] = []
        if written.state:
            state = [self._slots(c, other(slot)) for c, slot in zip(clients, lent.slots, strict=True)]
        return replace(written.outcome, arrays=arrays, state=state)

    def _here(self, lent: _Lent) -> Outcome | str:
        """The outcome of a job that this process does, as a worker would; PyTorch is left as it was."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.random.fork_rng(devices=[]):
                written = self._solve(lent, self._read(lent))
        finally:
            torch.set_num_threads(threads)
        return written if isinstance(written, str) else self._outcome(lent, written)

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
        """Fork a worker.

        Raises:
            OSError: The system does not let it.
        """
        ours, theirs = _FORK.Pipe()
        process = _FORK.Process(target=self._serve, args=(theirs, ours), daemon=True)
        try:
            process.start()
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._workers.append(_Worker(process, ours))

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
        self, worker: _Worker, waiting: list[int], strikes: _Strikes, lent: Sequence[_Lent]
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
            strikes.count[position] += 1
            if -code not in FROM_OUTSIDE:
                strikes.own.add(position)
            if strikes.count[position] < 2:
                waiting.append(position)
            elif position in strikes.own:
                yield position, f"the worker process that computed it ended {why}, twice"
            else:
                yield position, self._here(lent[position])

    def _serve(self, connection: Connection, parents: Connection) -> None:
        """What a worker does: answer tasks until nobody is there to send any."""
        parents.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        serial = 0
        read: dict[tuple[tuple[int, int], ...], dict[str, Tensor]] = {}  # arrays of this run's instructions
        try:
            while True:
                run, task = connection.recv()
                if run != serial:
                    serial = run
                    read.clear()
                answers = []
                for lent in task:
                    where = tuple(lent.spans.values())
                    if where not in read:
                        read[where] = self._read(lent)
                    answers.append((lent.position, self._solve(lent, read[where])))
                connection.send(answers)
        except (EOFError, OSError):
            return

    def _read(self, lent: _Lent) -> dict[str, Tensor]:
        """The instruction's arrays, in memory of this process."""
        return {name: self._exchange[start:stop].clone() for name, (start, stop) in lent.spans.items()}

    def _solve(self, lent: _Lent, arrays: Mapping[str, Tensor]) -> _Written | str:
        """Run a job, and write what it gives into the shared memory."""
        clients = lent.job.clients
        state = [self._slots(c, slot) for c, slot in zip(clients, lent.slots, strict=False)]
        outcome = self._executor.answer(replace(lent.job, arrays=arrays, state=state))
        if isinstance(outcome, str):
            return outcome
        ends = list(accumulate((array.shape[1] for array in outcome.arrays.values()), initial=0))
        if ends[-1] > lent.width:
            return f"the client half answers {ends[-1]} numbers where its reply_fields say {lent.width}"
        spans = dict(zip(outcome.arrays, pairwise(ends), strict=True))
        rows = self._exchange[lent.start : lent.start + len(clients) * lent.width].view(len(clients), -1)
        for name, (start, stop) in spans.items():
            array = outcome.arrays[name]
            rows[:, start:stop].view(array.dtype)[:, : stop - start] = array
        for client, slot, vectors in zip(clients, lent.slots, outcome.state, strict=False):
            for name, held in self._slots(client, other(slot)).items():
                held.copy_(vectors[name])
        types = {name: array.dtype for name, array in outcome.arrays.items()}
        return _Written(replace(outcome, arrays={}, state=()), spans, types, bool(outcome.state))


def _is_stopped(process: BaseProcess) -> bool:
    """Whether a signal or a debugger holds a process."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def other(slot: int) -> int:
    """The slot to write to when a state is read from this one; the first if it is read from none."""
    return 1 if slot == 0 else 0
