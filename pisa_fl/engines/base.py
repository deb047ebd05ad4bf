"""What an engine is: a Flower `Grid` whose node ids are client numbers."""

from __future__ import annotations

import multiprocessing
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from omegaconf import DictConfig
from torch import Tensor

from pisa_fl.clients.host import ClientState
from pisa_fl.engines.host_sum import HostSum
from pisa_fl.results.result import Result

SHARE = "PISA_FL_CORES"
"""Environment variable that tells a run of several side by side how many cores are its own."""

SERVER_NODE = 1
"""Flower's node id of the server side; a client's node id is its client number."""


@dataclass(frozen=True)
class TurnedAway:
    """A client that wants to take part and may not.

    Attributes:
        client: Its number, as far as it is known.
        reason: One line.
    """

    client: int | None
    reason: str

    def __str__(self) -> str:
        return f"{'a client' if self.client is None else f'client {self.client}'}: {self.reason}"


class ClientGrid(Grid):
    """Carries messages between the server half and the clients.

    Any Flower strategy runs on it, by `strategy.start(grid=..., ...)`. An engine says who the clients are and how
    messages reach them, and hands out what they remember if it can, for a checkpoint.

    Attributes:
        elsewhere: Clients come and go as they like, so that some may be away when a run begins.
        sums: Whether updates are asked for by `summed`.
    """

    elsewhere = False
    sums = False

    def __init__(self) -> None:
        self._sent = 0
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=0)
        self._threads_before: int | None = None
        if TaskIdentity._run_id is None:
            identify()

    @abstractmethod
    def get_node_ids(self) -> list[int]:
        """Numbers of the clients that can be reached, in order."""

    @abstractmethod
    def deliver(self, messages: Sequence[Message], timeout: float | None) -> Iterable[Message]:
        """Replies of the clients, in any order; those that are not there after `timeout` seconds are left out."""

    @property
    def turned_away(self) -> Sequence[TurnedAway]:
        """Those that were online, and not admitted, when the clients were last asked for."""
        return ()

    @property
    @abstractmethod
    def sizes(self) -> Mapping[int, int]:
        """Training examples of every client, as far as they are known, by client number."""

    def states(self) -> Iterator[tuple[int, ClientState]]:
        """What each client remembers, one after the other; nobody where they keep it themselves."""
        return iter(())

    def restore(self, states: Iterable[tuple[int, ClientState]]) -> None:
        """Give the clients back what `states` gave."""

    def test(self, arrays: Mapping[str, Tensor], timeout: float | None = None) -> dict[str, float] | None:
        """Mean `loss` and metrics of weights on the test set; None where that is left to the server.

        What is not there after `timeout` seconds, this process computes.
        """
        return None

    def close(self) -> None:
        """Let go of processes and connections, and leave PyTorch's threads as they were."""
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None

    def use_threads(self, threads: int | Literal["auto"] | None) -> None:
        """Set PyTorch's threads in this process, as `set_threads` does, until the grid is closed."""
        self._threads_before = torch.get_num_threads()
        set_threads(threads)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, and wait for the replies, at most `timeout` seconds."""
        return self.deliver(self._numbered(messages), timeout)

    def summed(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[HostSum]:
        """As `send_and_receive`, but what the clients of each host answer as one sum."""
        raise NotImplementedError(f"{type(self).__name__} has no hosts that sum")

    def _numbered(self, messages: Iterable[Message]) -> list[Message]:
        """The messages, each with an id of its own."""
        numbered = list(messages)
        for message in numbered:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)  # what a SuperLink would do
        return numbered

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have the clients answer; the replies wait to be pulled."""
        sent = list(messages)
        self._replies |= {r.metadata.reply_to_message_id: r for r in self.send_and_receive(sent)}
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to the given messages, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to a client."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Run) -> None:
        """Take over a run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._run


class Launcher(ABC):
    """An engine that has the whole federation run elsewhere, and brings back how it ended."""

    @property
    @abstractmethod
    def real_clients(self) -> bool:
        """Whether clients are processes of their own hosts, with data of theirs, and not simulated."""

    @abstractmethod
    def launch(self, config: DictConfig, directory: Path | None, resume: bool = False) -> Result:
        """Run a federation, or go on with one.

        Args:
            config: Resolved configuration of the run.
            directory: Run directory; None keeps nothing.
            resume: Go on with the run in the directory.

        Raises:
            ConfigurationError: Something is impossible or missing.
            RunError: The run failed.
            Interrupted: It was stopped, and can go on.
        """


def set_threads(threads: int | Literal["auto"] | None) -> None:
    """Set PyTorch's threads in this process; `auto`: one per core, but one in a child process; None leaves them."""
    if threads == "auto":
        threads = 1 if is_child() else cores()
    if threads is not None:
        torch.set_num_threads(threads)


def is_child() -> bool:
    """Whether `multiprocessing` started this process: others have the other cores.

    One that was forked from a process whose threads had begun to compute hangs as soon as it uses several itself.
    """
    return multiprocessing.parent_process() is not None


def cores() -> int:
    """Processors that this process may use: its share, if it is a run of several side by side."""
    if SHARE in os.environ:
        return int(os.environ[SHARE])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def identify() -> None:
    """Say who sends: Flower's Message takes that from the process."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 0, 0, SERVER_NODE
