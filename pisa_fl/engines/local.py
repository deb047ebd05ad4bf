"""The `local` engine: a Flower `Grid` in this process, without a server, that starts at once."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from pisa_fl.host import ClientHost

SERVER_NODE = 1
"""Flower's node id of the server side; a client's node id is its client number."""


class LocalGrid(Grid):
    """Delivers messages to the clients of one host, which answers before `send_and_receive` returns.

    Any Flower strategy runs on it, by `strategy.start(grid=LocalGrid(host), ...)`.

    Args:
        host: The clients.
    """

    def __init__(self, host: ClientHost) -> None:
        self._host = host
        self._sent = 0
        self._replies: dict[str, Message] = {}
        # Flower's Message takes its sender from the process
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 0, 0, SERVER_NODE
        self._run = Run.create_empty(run_id=0)

    def set_run(self, run: Run) -> None:
        """Take over a run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._run

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

    def get_node_ids(self) -> Iterable[int]:
        """The client numbers, in order."""
        return sorted(self._host.clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have the clients answer; the replies wait to be pulled."""
        addressed = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)  # what a SuperLink would do
            addressed.append((message.metadata.dst_node_id, message))
        self._replies |= {r.metadata.reply_to_message_id: r for r in self._host.handle(addressed)}
        return [message.metadata.message_id for _, message in addressed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to the given messages, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies in the order of the messages; clients in this process need no timeout."""
        return self.pull_messages(self.push_messages(messages))
