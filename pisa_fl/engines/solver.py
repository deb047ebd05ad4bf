"""What a worker process does: it runs jobs whose arrays and states lie in memory that it shares with who sends them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from pisa_fl.clients.executor import Executor, Job, Outcome
from pisa_fl.engines.packing import Packed

Spans = Mapping[str, tuple[int, int]]
"""Name of each array -> where it lies in the exchanged memory, from and up to."""


@dataclass(frozen=True)
class Lent:
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
class Written:
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
        zeros: Makes so many zeros, in memory that the workers share.
    """

    def __init__(
        self, clients: Iterable[int], sizes: Mapping[str, int], zeros: Callable[[int], Tensor] = torch.zeros
    ) -> None:
        self._rows = {client: row for row, client in enumerate(clients)}
        self._sizes = sizes
        self._views: dict[tuple[int, int], Mapping[str, Tensor]] = {}
        self._memory = zeros(len(self._rows) * 2 * sum(sizes.values())).view(len(self._rows), 2, -1)

    def __call__(self, client: int, slot: int) -> Mapping[str, Tensor]:
        """The vectors in a client's slot; none for slot -1."""
        if slot < 0:
            return {}
        if (client, slot) not in self._views:
            vectors = self._memory[self._rows[client], slot].split(list(self._sizes.values()))
            self._views[client, slot] = dict(zip(self._sizes, vectors, strict=True))
        return self._views[client, slot]

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to make the views anew: it has the memory, and not one handle a view."""
        return vars(self) | {"_views": {}}

    def place(self, client: int, state: Mapping[str, Tensor]) -> int:
        """The slot that holds a state; it is copied into the first if it lies elsewhere."""
        if not state:
            return -1
        for slot in (0, 1):
            if state is self._views.get((client, slot)):
                return slot
        self.put(client, 0, state)
        return 0

    def put(self, client: int, slot: int, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Copy a state into a slot; the vectors there, or none for one without any."""
        if not state:
            return {}
        for name, held in self(client, slot).items():
            held.copy_(state[name]) if name in state else held.zero_()
        return self(client, slot)


@dataclass
class Solver:
    """Runs jobs, and reads and writes what they hold.

    Attributes:
        executor: What a worker is a copy of; on the CPU.
        slots: What clients remember.
        exchange: What the server sent, and what clients answer, float32 in one dimension.
    """

    executor: Executor
    slots: Slots
    exchange: Tensor

    def read(self, lent: Lent) -> dict[str, Tensor]:
        """The instruction's arrays, in memory of this process."""
        return {name: self.exchange[start:stop].clone() for name, (start, stop) in lent.spans.items()}

    def solve(self, lent: Lent, arrays: Mapping[str, Tensor]) -> Written | str:
        """Run a job, and write what it gives into the shared memory."""
        clients = lent.job.clients
        state = [self.slots(c, slot) for c, slot in zip(clients, lent.slots, strict=False)]
        outcome = self.executor.answer(replace(lent.job, arrays=arrays, state=state))
        if isinstance(outcome, str):
            return outcome
        ends = list(accumulate((array.shape[1] for array in outcome.arrays.values()), initial=0))
        if ends[-1] > lent.width:
            return f"the client half answers {ends[-1]} numbers where its reply_fields say {lent.width}"
        spans = dict(zip(outcome.arrays, pairwise(ends), strict=True))
        rows = self.exchange[lent.start : lent.start + len(clients) * lent.width].view(len(clients), -1)
        for name, (start, stop) in spans.items():
            array = outcome.arrays[name]
            rows[:, start:stop].view(array.dtype)[:, : stop - start] = array
        for client, slot, vectors in zip(clients, lent.slots, outcome.state, strict=False):
            for name, held in self.slots(client, other(slot)).items():
                held.copy_(vectors[name])
        types = {name: array.dtype for name, array in outcome.arrays.items()}
        return Written(replace(outcome, arrays={}, state=()), spans, types, bool(outcome.state))

    def outcome(self, lent: Lent, written: Written) -> Outcome:
        """A job's outcome, where it lies."""
        clients = lent.job.clients
        arrays = {
            name: self.exchange.as_strided(
                (len(clients), stop - start), (lent.width, 1), lent.start + start
            ).view(written.types[name])[:, : stop - start]
            for name, (start, stop) in written.spans.items()
        }
        state: list[Mapping[str, Tensor]] = []
        if written.state:
            state = [self.slots(c, other(slot)) for c, slot in zip(clients, lent.slots, strict=True)]
        return replace(written.outcome, arrays=arrays, state=state)


def serve(connection: Connection, parents: Connection | None, solver: Solver) -> None:
    """Answer tasks until nobody is there to send any; a larger exchange takes the place of the one before.

    Args:
        connection: Where they come from.
        parents: Its other end, if this process was forked and has it too.
        solver: Does them.
    """
    if parents is not None:
        parents.close()
    _prepare()
    serial = 0
    read: dict[tuple[tuple[int, int], ...], dict[str, Tensor]] = {}  # arrays of this run's instructions
    try:
        while True:
            message = connection.recv()
            if isinstance(message, Tensor):
                solver.exchange = message
                continue
            run, task = message
            if run != serial:
                serial = run
                read.clear()
            answers = []
            for lent in task:
                where = tuple(lent.spans.values())
                if where not in read:
                    read[where] = solver.read(lent)
                answers.append((lent.position, solver.solve(lent, read[where])))
            connection.send(answers)
    except (EOFError, OSError):
        return


def serve_anew(connection: Connection, executor: Packed, slots: Slots, exchange: Tensor) -> None:
    """As `serve`, in a process that was started anew."""
    _prepare()  # before anything computes
    serve(connection, None, Solver(executor.unpack(), slots, exchange))


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def other(slot: int) -> int:
    """The slot to write to when a state is read from this one; the first if it is read from none."""
    return 1 if slot == 0 else 0
