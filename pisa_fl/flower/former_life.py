"""What a SuperNode that was killed owes, and how the next one with its key makes up for it.

For a minute Flower takes a SuperNode that was killed for online: it refuses another one with its key, and has the
round wait for what the former was asked. So a SuperNode writes down its node id, and every message until that is
answered. The next one tells the SuperLink that the former has gone, and answers for it, with an error: the round goes
on, and the client takes part in the next. What is written is of one host and folder, so that a copy takes over nothing.
"""

from __future__ import annotations

import json
import platform
from base64 import b64decode, b64encode
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Error, Message
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from pisa_fl.system.files import write

REASON = "its SuperNode was killed while it was at work on this, and is back"


class Life:
    """What is written down of a SuperNode's life.

    Args:
        path: The file; what a former life left in it is read.

    Attributes:
        node: Node id of the former life, or None.
        owed: What it had not answered.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = f"{platform.node()}:{path.resolve()}"
        self._now: dict[str, str] = {}
        self.node: int | None = None
        self.owed: list[Message] = []
        with suppress(OSError, ValueError, KeyError, TypeError):  # without it, nothing can be made up for
            left = json.loads(path.read_bytes())
            if left["place"] == self._place:
                self.owed = [_read(text) for text in left["owed"].values()]
                self.node = int(left["node"])

    def begin(self, node: int) -> None:
        """Write down the node id of a new life."""
        self.node = node
        self._write()

    def took(self, message: Message) -> None:
        """A message is to be answered."""
        proto = message_to_proto(remove_content_from_message(message))
        self._now[message.metadata.message_id] = b64encode(proto.SerializeToString()).decode()
        self._write()

    def answered(self, reply: Message) -> None:
        """A message is answered."""
        if self._now.pop(reply.metadata.reply_to_message_id, None) is not None:
            self._write()

    def taking(self, receive: Callable[[], Any]) -> Callable[[], Any]:
        """A way to receive a message that writes it down."""

        def received() -> Any:
            if (found := receive()) is not None:
                self.took(found[0])
            return found

        return received

    def answering(self, send: Callable[..., Any]) -> Callable[..., Any]:
        """A way to send a reply that writes down that its message is answered."""

        def sent(reply: Message, *more: Any) -> Any:
            wanted = send(reply, *more)
            self.answered(reply)
            return wanted

        return sent

    def _write(self) -> None:
        with suppress(OSError):  # a full disk must not end the SuperNode
            write(self._path, json.dumps({"place": self._place, "node": self.node, "owed": self._now}))


def bury(life: Life, connection: dict[str, Any]) -> None:
    """Tell the SuperLink that the former SuperNode has gone, if there was one with a key.

    Args:
        life: What it left.
        connection: What the new one connects with.
    """
    keys = connection.get("authentication_keys")
    if life.node is None or keys is None:
        return
    client = FleetHttpClient.from_server_address(
        connection["server_address"],
        connection["insecure"],
        connection.get("root_certificates"),
        [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(*keys)],
    )
    # refused if it had gone by itself, and no answer if there is no SuperLink now
    with client, suppress(httpx.HTTPError, RuntimeError):
        client.DeactivateNode(DeactivateNodeRequest(node_id=life.node))


def make_up(
    life: Life,
    send: Callable[[Message, Any, float], tuple[set[str], str]],
    push_object: Callable[[int, str, str, bytes], None],
) -> None:
    """Answer what the former SuperNode had not, with an error.

    Args:
        life: What it left.
        send: Sends a reply's head; gives what else is wanted of it.
        push_object: Sends that.
    """
    for message in life.owed:
        with suppress(
            Exception
        ):  # whatever is wrong with what is past: the run has ended, or the server went on
            reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, REASON), reply_to=message)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            parts = get_all_nested_objects(reply)
            wanted, session = send(reply, get_object_tree(reply), 0.0)
            for name in wanted:
                push_object(reply.metadata.run_id, session, name, parts[name].deflate())
    life.owed = []


def _read(text: str) -> Message:
    return message_from_proto(ProtoMessage.FromString(b64decode(text)))
