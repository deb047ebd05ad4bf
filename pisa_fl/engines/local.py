"""The `local` engine: all clients in this process, without a server, that starts at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Literal

from flwr.app import Message

from pisa_fl.engines.base import ClientGrid, set_threads
from pisa_fl.host import ClientHost, Clients, ClientState


def local_engine(
    clients: Clients,
    cohort: int | Literal["auto"] = "auto",
    chunk: int = 250,
    threads: int | Literal["auto"] | None = None,
) -> LocalGrid:
    """All clients in this process.

    Args:
        clients: What the clients are made of.
        cohort: Clients that advance together; `auto`: 1 on a CPU or for a model with running statistics, else 32.
        chunk: Examples differentiated at once where the number does not matter to the result.
        threads: PyTorch's threads; `auto`: one per core, None leaves them.
    """
    set_threads(threads)
    return LocalGrid(clients.host(clients.rows, cohort, chunk))


class LocalGrid(ClientGrid):
    """Clients that answer before `send_and_receive` returns.

    Args:
        host: The clients.
    """

    def __init__(self, host: ClientHost) -> None:
        super().__init__()
        self.host = host

    @cached_property
    def sizes(self) -> Mapping[int, int]:
        """Training examples of every client."""
        return {client: len(data) for client, data in self.host.clients.items()}

    def get_node_ids(self) -> list[int]:
        """The client numbers, in order."""
        return sorted(self.host.clients)

    def deliver(self, messages: Sequence[Message], timeout: float | None) -> Iterable[Message]:
        """Replies in the order of the messages; clients in this process need no timeout."""
        return list(self.host.handle([(message.metadata.dst_node_id, message) for message in messages]))

    def states(self) -> Mapping[int, ClientState]:
        """What the clients remember."""
        return self.host.states

    def restore(self, states: Mapping[int, ClientState]) -> None:
        """Give the clients back what `states` gave."""
        self.host.states = {client: state.to(self.host.device) for client, state in states.items()}
