"""The server's side of `engine=flower`: Flower's grid, with client numbers for node ids.

Flower knows its clients by node ids, drawn afresh for every simulation. A client's number is its `partition-id`,
which only the client knows; so whoever is new is asked to introduce itself before it takes part. In a federation with
keys a node id belongs to a key, and `nodes.txt`, which `register.sh` writes, tells which number is that key's: whoever
gives another is turned away, for a number is all it takes to be sent a client's dual.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from pisa_fl.clients.host import CLIENT_FAILED, Clients, printable
from pisa_fl.engines.base import ClientGrid, TurnedAway
from pisa_fl.flower.looks import pause
from pisa_fl.system.text import visible
from strategies.base.messages import CONFIG, config_of

log = logging.getLogger(__name__)

INTRODUCTION = 120.0
"""Seconds that a round waits for new clients to introduce themselves; whoever is later takes part in a later one."""

NODES = "PISA_FL_NODES"
"""Environment variable with the path of nodes.txt, in the SuperLink's environment and so in its runs'."""

LONGEST_PAUSE = 1.0
"""Seconds between looks for replies, at most."""


@dataclass(frozen=True)
class Introduction:
    """What a client says of itself.

    Attributes:
        client: Client number.
        examples: Its training examples.
    """

    client: int
    examples: int


class FlowerGrid(ClientGrid):
    """Clients behind a Flower SuperLink, or in Flower's simulation.

    Args:
        clients: What the clients are made of; without rows, they hold their own data.
        grid: Flower's grid.
        registered: The file that tells which node is which client, lines `NODE client-NUMBER KEY`; None: there are no
            keys, and a number is the first node's that gives it, for as long as that is online.
    """

    elsewhere = True

    def __init__(self, clients: Clients, grid: Grid, registered: Path | None = None) -> None:
        super().__init__()
        self._grid, self._clients, self._registered = grid, clients, registered
        self._met: dict[int, Introduction | TurnedAway] = {}  # by node id
        self._asked: dict[str, int] = {}  # message id -> node id
        self._nodes: dict[int, int] = {}  # client number -> node id
        self._sizes = dict(clients.sizes)

    @property
    def sizes(self) -> Mapping[int, int]:
        """Training examples of every client, as far as they are known."""
        return self._sizes

    def get_node_ids(self) -> list[int]:
        """Numbers of the clients that are online and have introduced themselves."""
        self._meet(sorted(self._grid.get_node_ids()))
        self._nodes = {}
        for node, introduction in self._met.items():
            if isinstance(introduction, Introduction) and introduction.client not in self._nodes:
                self._nodes[introduction.client] = node  # the first to come
                self._sizes[introduction.client] = introduction.examples
        return sorted(self._nodes)

    @property
    def turned_away(self) -> Sequence[TurnedAway]:
        """Those that do not fit, and those whose number another node has."""
        admitted, away = set(self._nodes.values()), []
        for node, introduction in self._met.items():
            if isinstance(introduction, TurnedAway):
                away.append(introduction)
            elif node not in admitted:
                number = introduction.client
                away.append(TurnedAway(number, f"another node takes part as client {number}"))
        return away

    def deliver(self, messages: Sequence[Message], timeout: float | None) -> Iterable[Message]:
        """Replies of the nodes, addressed as from client numbers."""
        known = [message for message in messages if message.metadata.dst_node_id in self._nodes]
        own = [
            Message(m.content, self._nodes[m.metadata.dst_node_id], m.metadata.message_type) for m in known
        ]
        self._grid.push_messages(own)  # gives them their ids
        sent = {o.metadata.message_id: message for o, message in zip(own, known, strict=True)}
        for reply in self._wait(set(sent), timeout):
            original = sent[reply.metadata.reply_to_message_id]
            yield Message(reply.error if reply.has_error() else reply.content, reply_to=original)

    def _wait(self, ids: set[str], timeout: float | None) -> Iterable[Message]:
        """Replies to messages, as they come."""
        end = None if timeout is None else time.monotonic() + timeout
        since = time.monotonic()
        while ids:
            replies = list(self._grid.pull_messages(ids))
            ids -= {reply.metadata.reply_to_message_id for reply in replies}
            yield from replies
            if end is not None and time.monotonic() >= end:
                return
            since = time.monotonic() if replies else since
            if ids:
                time.sleep(pause(time.monotonic() - since, LONGEST_PAUSE))

    def _meet(self, online: Sequence[int]) -> None:
        """Ask those who are new, or were away, who they are; whoever answers late is met later."""
        self._met = {node: introduction for node, introduction in self._met.items() if node in online}
        before = dict(self._asked)
        for node in online:
            if node not in self._met and node not in before.values():
                content = RecordDict({CONFIG: ConfigRecord({"version": version("pisa-fl")})})
                question = Message(content, node, MessageType.QUERY)
                self._grid.push_messages([question])
                self._asked[question.metadata.message_id] = node
        late, new = self._wait(set(before), 0.0), self._wait(set(self._asked) - set(before), INTRODUCTION)
        for reply in chain(late, new):
            node = self._asked.pop(reply.metadata.reply_to_message_id)
            if reply.has_error() and reply.error.code != CLIENT_FAILED:
                continue  # Flower's own: it is asked again
            said = {} if reply.has_error() else config_of(reply.content)
            try:
                if reply.has_error():
                    raise ValueError(reply.error.reason)
                self._met[node] = self._introduction(node, said)
            except ValueError as error:
                reason = printable(str(error)).partition("\n")[0]
                log.warning("a client is turned away: %s", reason)
                # who only says why it does not take part is known by its key
                known = {} if self._registered is None else _numbers(self._registered)
                number = said.get("client", known.get(node))
                reason = reason.removeprefix(f"client {number}: ")
                self._met[node] = TurnedAway(number if type(number) is int else None, reason)

    def _introduction(self, node: int, said: Mapping[str, Any]) -> Introduction:
        """What the client at a node said of itself.

        Raises:
            ValueError: It does not fit this federation.
        """
        client, examples = said.get("client"), said.get("examples")
        data, rows = self._clients.data, self._clients.rows
        expected = {
            "version": version("pisa-fl"),
            "shape": list(data.shape),
            "classes": [visible(name) for name in data.output_names],
        }
        for key, value in expected.items():
            if said.get(key) != value:
                raise ValueError(f"client {client} has {key} {said.get(key)}, the server {value}")
        if not isinstance(client, int) or client < 0 or (rows and client not in rows):
            raise ValueError(f"client {client} is none of the {len(rows)} of this federation")
        if self._registered is not None and (own := _numbers(self._registered).get(node)) != client:
            whose = "in no line of nodes.txt, which register.sh writes" if own is None else f"client {own}'s"
            raise ValueError(f"client {client} is not who it says: its key is {whose}")
        if not isinstance(examples, int) or not 1 <= examples < 2**40:
            raise ValueError(f"client {client} says that it has {examples} examples")
        if rows and examples != len(rows[client]):
            raise ValueError(f"client {client} has {examples} examples, {len(rows[client])} were dealt to it")
        if any(isinstance(other, Introduction) and other.client == client for other in self._met.values()):
            log.warning(
                "a second node says that it is client %d: it has to wait until the first is gone", client
            )
        return Introduction(client, examples)


def _numbers(registered: Path) -> dict[int, int]:
    """Client numbers by node id, as far as nodes.txt has them."""
    try:
        text = registered.read_text()
    except FileNotFoundError:
        return {}
    return {int(node): int(number) for node, number in re.findall(r"(?m)^(\d+) client-(\d+) ", text)}
