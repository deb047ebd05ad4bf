"""The `ray` engine: clients on resident Ray actors, processes of this machine or of a Ray cluster.

What the clients are made of goes to Ray's object store once, and what a round's messages share goes there once a
round, however many actors there are. Any actor could host any client; the grid deals the clients to the actors, and
what a client remembers stays where it was dealt. An actor that dies is replaced and asked again; its clients answer
that they lost their state, and are supplied from the ledger. An actor gets no second task while it works on one, so
that one that is too slow for the round's timeout does not fall further and further behind.

Where the server half needs sums alone, actors give them: a round costs the server then what its actors cost, and not
its clients (docs/scale.md).
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
from flwr.app import ArrayRecord, Error, Message, RecordDict

from pisa_fl.clients.host import ClientHost, Clients, ClientState
from pisa_fl.config import ConfigurationError
from pisa_fl.config.explain import first_line
from pisa_fl.engines.base import ClientGrid, cores, identify, set_threads
from pisa_fl.engines.host_sum import HostSum
from pisa_fl.engines.on_disk import StatesOnDisk
from pisa_fl.system.text import listed
from strategies.base.messages import ARRAYS

# read when Ray is imported: it reports nothing to its makers, and prints nothing about actors that die or about what
# its next version will do, which are no news to who reads our own log
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
try:
    import ray
except ImportError:
    _INSTALLED = False
else:
    _INSTALLED = True

log = logging.getLogger(__name__)

T = TypeVar("T")

ACTOR_DIED = 1003
"""Code of the error of a client whose actor ended while it was asked, and whose next one did too."""

STARTING = 120.0
"""Seconds that the actors may take to start."""

AT_ONCE = 64
"""Clients whose states are on their way at once."""

LOOK = 1.0
"""Seconds without any reply after which a round looks whether a machine was lost."""


class Host:
    """What runs in an actor: a host of whichever clients it gets messages for.

    Args:
        clients: What the clients are made of, in the object store.
        options: Of `Clients.host`.
        threads: PyTorch's threads.
        path: Folders to import from, as the server process has them.
        on_disk: Keep what the clients remember on disk.
    """

    def __init__(
        self,
        clients: Sequence[ray.ObjectRef],
        options: Mapping[str, Any],
        threads: int,
        path: Sequence[str],
        on_disk: bool,
    ) -> None:
        sys.path[:0] = [folder for folder in path if folder not in sys.path]
        set_threads(threads)
        identify()
        self._clients, self._options, self._on_disk = clients, options, on_disk

    @cached_property
    def _whole(self) -> Clients:
        clients: Clients = ray.get(self._clients[0])
        return clients

    @cached_property
    def host(self) -> ClientHost:
        """The clients' host; whatever making it raises is raised in the task that asked for it."""
        return self._whole.host(self._whole.rows, **self._options)

    @cached_property
    def _disk(self) -> StatesOnDisk | None:
        return StatesOnDisk(self._whole.half.kept_sizes()) if self._on_disk else None

    def ready(self) -> None:
        """Make the host."""
        _ = self.host

    def handle(
        self, contents: Sequence[Light], asked: Sequence[Asked], *records: ArrayRecord
    ) -> Iterator[Message]:
        """Answer messages, each as it is done.

        Args:
            contents: Of the messages.
            asked: The messages.
            records: Arrays of the contents.
        """
        # Ray sends values into this generator, which `yield from` would pass on into the other
        for _, reply in self._answers(contents, asked, records):
            yield reply

    def summed(
        self, contents: Sequence[Light], asked: Sequence[Asked], *records: ArrayRecord
    ) -> Iterator[HostSum]:
        """As `handle`, but one sum in the end."""
        total = HostSum()
        for instruction, reply in self._answers(contents, asked, records):
            total.add(self._whole.half, instruction, reply)
        yield total

    def _answers(
        self, contents: Sequence[Light], asked: Sequence[Asked], records: Sequence[ArrayRecord]
    ) -> Iterator[tuple[Message, Message]]:
        """Messages and replies."""
        for content, position in contents:
            if position is not None:
                content[ARRAYS] = records[position]
        messages = {}
        for client, number, kind, position in asked:
            messages[number] = Message(contents[position][0], client, kind)
            messages[number].metadata.__dict__["_message_id"] = number
        for reply in self.host.handle([(m.metadata.dst_node_id, m) for m in messages.values()]):
            instruction = messages[reply.metadata.reply_to_message_id]
            self._keep(instruction.metadata.dst_node_id)
            yield instruction, reply

    def _keep(self, client: int) -> None:
        if self._disk is not None:
            self._disk.keep(client, self.host.states[client])

    def states(self, clients: Iterable[int]) -> dict[int, ClientState]:
        """What some clients remember, on the CPU."""
        return {client: self.host.states[client].to("cpu", alone=True) for client in clients}

    def restore(self, states: Mapping[int, ClientState]) -> None:
        """Give clients back what `states` gave."""
        for client, state in states.items():
            self.host.states[client] = state.to(self.host.device)
            self._keep(client)


Light = tuple[RecordDict, int | None]
"""A message's content without its arrays, and which of the records those are."""

Asked = tuple[int, str, str, int]
"""Of a message: the client that it is for, its id, its type, and which of the contents is its own."""


@dataclass(eq=False)
class Shard:
    """An actor, and the clients that it hosts.

    Attributes:
        new_actor: Makes an actor.
        actor: The actor.
        ready: Settled once the actor runs, or cannot.
        clients: Numbers of the clients.
        examples: Training examples of them all.
        unsent: Messages that wait for the actor to be free.
        asked: Messages that it works on, by id; empty once the round no longer waits for it.
        replies: What its present task answers, perhaps a task of an earlier round; None if it is free.
        again: Whether messages were sent a second time in this round.
    """

    new_actor: Callable[[], Any]
    actor: Any = field(init=False)
    ready: ray.ObjectRef = field(init=False)
    clients: list[int] = field(default_factory=list)
    examples: int = 0
    unsent: list[Message] = field(default_factory=list)
    asked: dict[str, Message] = field(default_factory=dict)
    replies: Any = None
    again: bool = False

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start an actor, in place of the one before."""
        self.actor, self.replies = self.new_actor(), None
        self.ready = self.actor.ready.remote()

    @property
    def waits(self) -> bool:
        """Whether the actor has no machine yet, or is still starting."""
        return not ray.wait([self.ready], timeout=0)[0]

    def send(self, shared: Mapping[int, ray.ObjectRef], method: str) -> None:
        """Give the actor its messages if it is free, each alone if they were sent before; arrays go by reference."""
        if self.replies is not None or not self.unsent:
            return
        task = self.unsent[:1] if self.again else self.unsent
        positions: dict[int, int] = {}
        contents: list[Light] = []
        known: dict[int, int] = {}
        asked: list[Asked] = []
        for message in task:
            whole, about = message.content, message.metadata
            if id(whole) not in known:
                known[id(whole)] = len(contents)
                arrays = whole.array_records.get(ARRAYS)
                rest = RecordDict({k: v for k, v in whole.items() if v is not arrays})
                place = None if arrays is None else positions.setdefault(id(arrays), len(positions))
                contents.append((rest, place))
            asked.append((about.dst_node_id, about.message_id, about.message_type, known[id(whole)]))
        records = [shared[i] for i in positions]
        task_of = getattr(self.actor, method).options(num_returns="streaming")
        self.replies = task_of.remote(contents, asked, *records)
        self.asked = {message.metadata.message_id: message for message in task}
        self.unsent = self.unsent[len(task) :]

    def __str__(self) -> str:
        return f"clients {listed(self.clients)}"


class RayGrid(ClientGrid):
    """Clients on resident Ray actors.

    If Ray runs in this process already it is used as it is, whatever `address` says, and outlives the grid.

    Args:
        clients: What the clients are made of.
        address: None starts Ray on this machine; `auto` or host:port joins a running cluster.
        actors: Processes that host the clients; `auto`: as many as there is room for, never more than clients.
        cpus: Cores of an actor, by Ray's accounts.
        gpus: GPUs of an actor; below 1, a share of one.
        stack: Clients of an actor that advance together, as for `Clients.host`, and so are the three others.
        chunk: See there.
        precision: See there.
        compiled: See there.
        threads: PyTorch's threads in this process and in every actor; `auto`: one per core, None leaves them.
        state: Where actors keep what their clients remember: in `memory`, or on `disk`, $TMPDIR of their machines.
        sums: Have every actor answer with one sum over its clients.

    Raises:
        ConfigurationError: Ray is missing, cannot be reached or has no room, or an actor cannot start.
    """

    def __init__(
        self,
        clients: Clients,
        address: str | None = None,
        actors: int | Literal["auto"] = "auto",
        cpus: float = 1.0,
        gpus: float = 0.0,
        stack: int | Literal["auto"] = "auto",
        chunk: int | Literal["auto"] = "auto",
        precision: Literal["float32", "bfloat16"] = "float32",
        compiled: bool = False,
        threads: int | Literal["auto"] | None = 1,
        state: Literal["memory", "disk"] = "memory",
        sums: bool = False,
    ) -> None:
        if not _INSTALLED:
            raise ConfigurationError("engine=ray needs Ray: pip install 'pisa-fl[ray]'")
        _check(actors, cpus, gpus, clients.device)
        if state == "disk" and clients.device.type != "cpu":
            raise ConfigurationError("engine.state=disk needs device=cpu: set engine.state=memory")
        super().__init__()
        self.sums = sums
        self.use_threads(threads)
        self._sizes, self._cpus, self._gpus = clients.sizes, cpus, gpus
        self._shards: list[Shard] = []
        self._homes: dict[int, Shard] = {}
        self._timeout: float | None = None
        self._started_ray = not ray.is_initialized()
        try:
            if self._started_ray:
                start_ray(address)
            count = self._count(actors)
            # in a list, or Ray would read it before the actor has set its path
            options = {"stack": stack, "chunk": chunk, "precision": precision, "compiled": compiled}
            parts = ([_put(clients)], options, torch.get_num_threads(), sys.path, state == "disk")
            host: Any = ray.remote(Host)
            actor = host.options(num_cpus=cpus, num_gpus=gpus)
            self._shards = [Shard(lambda: actor.remote(*parts)) for _ in range(count)]
            self._deal(self._sizes)
            self._await_actors()
        except BaseException:
            self.close()
            raise

    @property
    def sizes(self) -> Mapping[int, int]:
        """Training examples of every client."""
        return self._sizes

    def get_node_ids(self) -> list[int]:
        """The client numbers, in order."""
        return sorted(self._sizes)

    def deliver(self, messages: Sequence[Message], timeout: float | None) -> Iterable[Message]:
        """Replies in the order in which they come; those of an earlier round that come now are thrown away."""
        return [reply for reply in self._ask_all(messages, timeout, "handle") if isinstance(reply, Message)]

    def summed(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[HostSum]:
        """One sum of every actor, if it was not replaced on the way; errors of clients whose actor died twice."""
        sums = []
        for one in self._ask_all(self._numbered(messages), timeout, "summed"):
            if isinstance(one, Message):
                error, one = one, HostSum()
                one.fail(error)
            sums.append(one)
        return sums

    def _ask_all(
        self, messages: Sequence[Message], timeout: float | None, method: Literal["handle", "summed"]
    ) -> list[Message | HostSum]:
        self._timeout = timeout
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        shared: dict[int, ray.ObjectRef] = {}
        for shard in self._shards:
            shard.unsent, shard.asked, shard.again = [], {}, False
        for message in messages:
            arrays = message.content.array_records.get(ARRAYS)
            if arrays is not None and id(arrays) not in shared:
                shared[id(arrays)] = ray.put(arrays)
            self._homes[message.metadata.dst_node_id].unsent.append(message)
        replies: list[Message | HostSum] = []
        while waiting := [shard for shard in self._shards if shard.unsent or shard.asked]:
            for shard in waiting:
                shard.send(shared, method)
            left = min(LOOK, max(0.0, deadline - time.monotonic()))
            ready, _ = ray.wait([shard.replies for shard in waiting], num_returns=1, timeout=left)
            if ready:
                replies += self._receive(next(shard for shard in waiting if shard.replies is ready[0]))
            elif time.monotonic() >= deadline:
                break
            else:
                self._make_do()
        return replies

    def states(self) -> Iterator[tuple[int, ClientState]]:
        """What each client remembers, but for an actor that is busy for longer than a round may take."""
        for shard in list(self._shards):
            # clients of an actor that is still starting remember nothing, and must not be waited for
            if shard.waits:
                continue
            for clients in _parts(shard.clients):
                answer = self._ask(shard, shard.actor.states.remote(clients), self._timeout)
                if answer is None:
                    break
                yield from answer.items()

    def restore(self, states: Iterable[tuple[int, ClientState]]) -> None:
        """Give the clients back what `states` gave."""
        for part in _parts(states):
            own: dict[Shard, dict[int, ClientState]] = {}
            for client, state in part:
                own.setdefault(self._homes[client], {})[client] = state
            for shard, those in own.items():
                self._ask(shard, shard.actor.restore.remote(those), None)

    def close(self) -> None:
        """End the actors, and Ray if this grid started it."""
        for shard in self._shards:
            with suppress(Exception):  # Ray may be gone before
                ray.kill(shard.actor)
        self._shards = []
        if self._started_ray:
            ray.shutdown()
        super().close()

    def _count(self, actors: int | Literal["auto"]) -> int:
        """How many actors there are to be."""
        most = room(ray.nodes(), self._cpus, self._gpus)
        if most < (1 if actors == "auto" else actors):
            raise ConfigurationError(
                f"engine.actors={actors}: Ray has room for {most} actors of engine.cpus={self._cpus:g} and"
                f" engine.gpus={self._gpus:g}: lower one of the three"
            )
        return min(most if actors == "auto" else actors, len(self._sizes))

    def _deal(self, clients: Iterable[int]) -> None:
        """Deal clients to the actors, the largest first, each to the actor with the fewest examples so far."""
        for client in sorted(clients, key=lambda c: (-self._sizes[c], c)):
            home = min(self._shards, key=lambda shard: shard.examples)
            home.clients.append(client)
            home.examples += self._sizes[client]
            self._homes[client] = home

    def _await_actors(self) -> None:
        """Wait until every actor is there, with its host.

        Raises:
            ConfigurationError: One of them is not.
        """
        try:
            ray.get([shard.ready for shard in self._shards], timeout=STARTING)
        except ray.exceptions.GetTimeoutError as error:
            raise ConfigurationError(
                f"engine.actors: {len(self._shards)} actors did not start within {STARTING:g} seconds: ask for fewer"
            ) from error
        except ray.exceptions.RayError as error:
            raise ConfigurationError(f"engine=ray: an actor cannot start: {_why(error)}") from error

    def _receive(self, shard: Shard) -> Sequence[Message | HostSum]:
        """Take what an actor has ready: one reply or sum, the end of its task, or its own end."""
        try:
            reply: Message | HostSum = ray.get(next(shard.replies))
        except StopIteration:
            shard.replies, shard.asked = None, {}
            return []
        except ray.exceptions.RayError as error:
            return self._replace(shard, _why(error))
        answered = reply.answered if isinstance(reply, HostSum) else [reply.metadata.reply_to_message_id]
        awaited = [shard.asked.pop(number, None) for number in answered]
        return [] if None in awaited else [reply]

    def _replace(self, shard: Shard, why: str) -> list[Message]:
        """Replace an actor and send what it left unanswered once more; what ends a second one is answered by an error.

        Which of them ended it cannot be told, for the last replies before that may be lost: each is sent alone.
        """
        log.warning("the actor of %s ended (%s) and was replaced", shard, why)
        ray.kill(shard.actor)
        shard.start()
        unanswered, shard.asked = list(shard.asked.values()), {}
        if shard.again:
            error = Error(ACTOR_DIED, f"its actor ended a second time: {why}")
            return [Message(error, reply_to=message) for message in unanswered]
        if unanswered:
            shard.unsent, shard.again = unanswered + shard.unsent, True
        return []

    def _make_do(self) -> None:
        """Give the clients of actors for which no machine is left to the other actors."""
        homeless = [shard for shard in self._shards if shard.waits]
        everyone_fits = len(self._shards) <= room(ray.nodes(), self._cpus, self._gpus)
        if everyone_fits or len(homeless) == len(self._shards):
            return
        self._shards = [shard for shard in self._shards if shard not in homeless]
        for shard in homeless:
            log.warning("no machine is left for the actor of %s: the others take them over", shard)
            ray.kill(shard.actor)
            self._deal(shard.clients)
            for message in [*shard.unsent, *shard.asked.values()]:
                self._homes[message.metadata.dst_node_id].unsent.append(message)

    def _ask(self, shard: Shard, answer: ray.ObjectRef, timeout: float | None) -> Any:
        """What an actor answers, if it does within the time; None if it does not."""
        try:
            return ray.get(answer, timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            log.warning("the actor of %s is busy: they will go on without what they remember", shard)
        except ray.exceptions.RayError as error:
            self._replace(shard, _why(error))
        return None


def room(machines: Iterable[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """How many actors the machines that are alive have room for, if nobody else uses them.

    Args:
        machines: As `ray.nodes` describes them.
        cpus: Cores of an actor.
        gpus: GPUs of an actor; a share is one of a single GPU.
    """
    total = 0.0
    for machine in machines:
        has = machine["Resources"] if machine["Alive"] else {}
        own = has.get("GPU", 0)
        shares = own * _fits(1, gpus) if 0 < gpus < 1 else _fits(own, gpus)
        total += min(_fits(has.get("CPU", 0), cpus), shares)
    return int(total)


def start_ray(address: str | None) -> None:
    """Start Ray on this machine, or join a cluster.

    Raises:
        ConfigurationError: There is none, or none that can be used.
    """
    if address not in (None, "auto"):
        _call(str(address))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address or "local",
            num_cpus=None if address else cores(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray raises nearly anything here
        raise ConfigurationError(
            f"engine.address={address or 'null'}: Ray cannot be used: {first_line(error)}"
        ) from error
    finally:
        with suppress(ValueError, TypeError):  # not in the main thread, or not Python's to put back
            signal.signal(signal.SIGTERM, handler)


def _check(actors: int | Literal["auto"], cpus: float, gpus: float, device: torch.device) -> None:
    """Check what an actor is to have.

    Raises:
        ConfigurationError: It is impossible.
    """
    if actors != "auto" and (isinstance(actors, bool) or not isinstance(actors, int) or actors < 1):
        raise ConfigurationError(f"engine.actors must be auto or a whole number of at least 1, got {actors}")
    for key, value in (("cpus", cpus), ("gpus", gpus)):
        if value < 0 or (value > 1 and value != int(value)) or (key == "cpus" and value == 0):
            raise ConfigurationError(f"engine.{key} must be a whole number or a share of one, got {value}")
    if device.type == "cuda" and not gpus:
        raise ConfigurationError(
            "engine.gpus=0 gives the actors no GPU, and device=cuda needs one: set engine.gpus, 0.5 for two actors on"
            " each GPU, or device=cpu"
        )


def _call(address: str) -> None:
    """See if anything answers at host:port; Ray itself would try for minutes, and then end the process.

    Raises:
        ConfigurationError: Nothing does.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigurationError(f"engine.address must be null, auto or host:port, got {address}")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"engine.address={address}: nothing answers there: start a cluster by `ray start --head`, or give"
            " engine.address=null"
        ) from error


def _parts(things: Iterable[T]) -> Iterator[list[T]]:
    """Things in parts of `AT_ONCE`."""
    rest = iter(things)
    while part := list(islice(rest, AT_ONCE)):
        yield part


def _put(clients: Clients) -> ray.ObjectRef:
    """What the clients are made of, in the object store; an actor finds its GPU as the first.

    Raises:
        ConfigurationError: It cannot be sent to another process.
    """
    device = torch.device("cuda:0") if clients.device.type == "cuda" else clients.device
    try:
        return ray.put(replace(clients, device=device))
    except TypeError as error:
        why = first_line(error.__cause__ or error)
        raise ConfigurationError(f"engine=ray sends the clients to other processes: {why}") from error


def _fits(whole: float, part: float) -> float:
    """How many parts a whole has, as decimal fractions: 0.3 has three of 0.1."""
    return math.floor(whole / part + 1e-9) if part else math.inf


def _why(error: ray.exceptions.RayError) -> str:
    """One sentence about what ended an actor."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = getattr(error.cause, "client_exc", error.cause)  # Ray's wrapping of what unpickling raised
        return f"{type(cause).__name__}: {first_line(cause)}"
    return "its process died"
