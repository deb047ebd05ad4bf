"""The `local` engine: all clients on this machine, without a server, that starts at once.

On CPU cores the clients' work is done by resident worker processes of one thread each; on a GPU, or in a process
that may have no children, by this process, a stack at a time.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Literal

from flwr.app import ArrayRecord, Message
from torch import Tensor

from pisa_fl.clients.executor import TEST_PART, Job
from pisa_fl.clients.flat_model import measured
from pisa_fl.clients.host import ClientHost, Clients, ClientState
from pisa_fl.config import ConfigurationError
from pisa_fl.engines.base import ClientGrid, cores
from pisa_fl.engines.packing import PackingError
from pisa_fl.engines.unreliable import Unreliable
from pisa_fl.engines.workers import Workers, start_method
from strategies.base import checks
from strategies.base.messages import TensorArray

log = logging.getLogger(__name__)

READY = 2**30
"""Bytes that a training set may take, all processes together, to be made ready once instead of every time."""


@checks.literals
def local_engine(
    clients: Clients,
    workers: int | Literal["auto"] = "auto",
    stack: int | Literal["auto"] = "auto",
    chunk: int | Literal["auto"] = "auto",
    precision: Literal["float32", "bfloat16"] = "float32",
    compiled: bool = False,
    threads: int | Literal["auto"] | None = None,
    state: Literal["memory", "disk"] = "memory",
    lost: float = 0.0,
    stragglers: float = 0.0,
) -> LocalGrid:
    """All clients on this machine.

    Args:
        clients: What the clients are made of.
        workers: Processes that compute, 0 for this one; `auto`: one per core, but 0 with a GPU, in a process that may
            have no children, as one of `multiprocessing.Pool`, and where they start anew (not on Linux) and cannot
            be sent what they need. The result does not depend on their number.
        stack: As for `Clients.host`, and so are `chunk`, `precision` and `compiled`.
        chunk: See there.
        precision: See there.
        compiled: See there.
        threads: PyTorch's threads in this process until the grid is closed; `auto`: one, with a GPU one per core; None
            leaves them. A worker has one, and results are the same for any number of workers if this process has.
        state: Where what clients remember is kept: in `memory`, or on `disk` (`strategies.base.rows.zeros`).
        lost: Share of the replies that get lost (`pisa_fl.engines.unreliable`).
        stragglers: Share of the clients that are seldom in time.

    Raises:
        ValueError: The workers are impossible here, or another value is.
    """
    on_cpu = clients.device.type == "cpu"
    auto, method = workers == "auto", start_method()
    if workers == "auto":
        workers = min(cores(), len(clients.rows)) if on_cpu and method else 0
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ConfigurationError(
            f"engine.workers must be auto or a whole number of at least 0, got {workers}"
        )
    if workers and not (on_cpu and method):
        raise ConfigurationError(
            f"engine.workers={workers} needs device=cpu, and a process that may have children, which one of"
            " multiprocessing.Pool may not: use engine.workers=0"
        )
    if state == "disk" and not (workers and method == "fork"):
        raise ConfigurationError(
            "state=disk needs worker processes that are forked, which device=cpu on Linux has: engine.workers=1"
        )
    network = Unreliable(clients.rows, clients.seed, lost, stragglers)
    ready = on_cpu and clients.data.ready_bytes <= READY
    host = clients.host(clients.rows, stack, chunk, precision, compiled, ready)
    try:
        grid = LocalGrid(host, workers, state == "disk", network)
    except PackingError as error:
        if not auto:
            raise ConfigurationError(
                f"engine.workers={workers}: workers start anew here, and cannot be sent what they need ({error}): put"
                " it into a module, or use engine.workers=0"
            ) from error
        log.warning("workers cannot be sent what they need, so that this process computes alone: %s", error)
        workers, grid = 0, LocalGrid(host, network=network)
    grid.use_threads(1 if threads == "auto" and on_cpu else threads)
    return grid


class LocalGrid(ClientGrid):
    """Clients that answer before `send_and_receive` returns.

    Args:
        host: The clients.
        workers: Processes that compute, 0 for this one.
        on_disk: Keep what clients remember on disk; with workers.
        network: Which replies arrive; None: all.
    """

    def __init__(
        self, host: ClientHost, workers: int = 0, on_disk: bool = False, network: Unreliable | None = None
    ) -> None:
        super().__init__()
        self.host, self._network = host, network
        self._workers = Workers(host.executor, workers, on_disk) if workers else None
        self._lent: list[weakref.ref[TensorArray]] = []

    @cached_property
    def sizes(self) -> Mapping[int, int]:
        """Training examples of every client."""
        return {client: len(data) for client, data in self.host.clients.items()}

    def get_node_ids(self) -> list[int]:
        """The client numbers, in order."""
        return sorted(self.host.clients)

    def deliver(self, messages: Sequence[Message], timeout: float | None) -> Iterable[Message]:
        """Replies in the order of the messages; clients in this process need no timeout."""
        addressed = [(message.metadata.dst_node_id, message) for message in messages]
        if self._workers is None:
            replies = list(self.host.handle(addressed))
        else:
            self._take_back()
            replies = list(self.host.handle(addressed, partial(self._workers.run, timeout=timeout)))
            self._lend(replies)
        if self._network is not None:
            replies = self._network.arriving(messages, replies)
        order = {message.metadata.message_id: position for position, message in enumerate(messages)}
        return sorted(replies, key=lambda reply: order[reply.metadata.reply_to_message_id])

    def states(self) -> Iterator[tuple[int, ClientState]]:
        """What each client remembers."""
        return iter(self.host.states.items())

    def restore(self, states: Iterable[tuple[int, ClientState]]) -> None:
        """Give the clients back what `states` gave."""
        for client, state in states:
            kept = state.to(self.host.device) if self._workers is None else self._workers.keep(client, state)
            self.host.states[client] = kept

    def test(self, arrays: Mapping[str, Tensor], timeout: float | None = None) -> dict[str, float] | None:
        """Mean loss and metrics of weights on the test set, by the workers as far as they are in time."""
        if self._workers is None:
            return None
        examples = self.host.data.tests
        jobs = [Job("test", [part], arrays, {}, []) for part in range(-(-examples // TEST_PART))]
        parts: list[Mapping[str, float]] = [{}] * len(jobs)
        for position, outcome in self._workers.run(jobs, timeout, finish=True):
            if isinstance(outcome, str):
                raise RuntimeError(f"the test set cannot be evaluated: {outcome}")
            parts[position] = outcome.metrics[0]
        return measured(self.host.executor.model.task, parts, examples)

    def close(self) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.close()
        super().close()

    def _lend(self, replies: Iterable[Message]) -> None:
        """Note the arrays that lie in memory which the workers will write to again."""
        records = (record for reply in replies if reply.has_content() for record in reply.content.values())
        arrays = (array for record in records if isinstance(record, ArrayRecord) for array in record.values())
        self._lent = [weakref.ref(array) for array in arrays if isinstance(array, TensorArray)]

    def _take_back(self) -> None:
        """Let arrays that somebody has kept have memory of their own."""
        for reference in self._lent:
            if (array := reference()) is not None:
                array.own()
        self._lent = []
