"""The SuperLink's door: who is let in, with how much, and how long they may take over it.

Flower reads a request to its end, however long and slow, before it asks who sent it, and asks nobody on its own
host. Here

    a registered client     under /v1/fleet/, by the signature that its requests carry, which is asked for first
    a run's own processes   under /v1/runtime/, from this host, by the token that Flower gave them
    holders of the secret   everywhere, from this host

are let in. Others get an answer to at most `STRANGER` bytes under the first two, for Flower to refuse, and to none
elsewhere. A connection whose TLS handshake or next request does not come within `PATIENCE` seconds is closed, a body
has to come at `SLOWEST` bytes a second, and of an address so many connections are kept, and no more.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import socket
from base64 import b64decode
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any

import h11
from cryptography.exceptions import UnsupportedAlgorithm
from fastapi import FastAPI
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, TIMESTAMP_HEADER
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    TASK_TOKEN_HEADER,
)
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

FLEET, RUNTIME = "/v1/fleet/", "/v1/runtime/"
PULL, PUSH = FLEET + "pull-messages", FLEET + "push-object"

STRANGER = 16 * 1024
"""Bytes of a body that are read of whoever is not known."""

REQUEST = 1024 * 1024
"""Bytes of a registered client's body that holds no part of a reply's arrays."""

PART = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + REQUEST
"""Bytes of a body that holds a part of a reply: Flower cuts arrays into chunks."""

AT_ONCE = 2
"""Parts that are read of a client at once; as many as Flower's clients send."""

PATIENCE = 10.0
"""Seconds for a TLS handshake, and for a request's head."""

SLOWEST = 16 * 1024
"""Bytes a second that a body has to bring, after `PATIENCE`."""

STRANGERS = 1024
"""Connections that are kept of addresses from which no registered client has come."""


class Refused(Exception):
    """A request is not let in.

    Attributes:
        status: HTTP status of the answer.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Listener(socket.socket):
    """A listening socket that closes at once the connections that are too many; those of this host never are.

    Args:
        bound: The socket, bound; it is taken over.
        most: Connections that are kept of one address; of IPv6, of one network of 64 bits.
        known: Where registered clients have come from.
    """

    def __init__(self, bound: socket.socket, most: int, known: set[str]) -> None:
        super().__init__(fileno=bound.detach())
        self.set_inheritable(False)
        self._most = most
        self._known = known
        self._kept: Counter[str] = Counter()

    def accept(self) -> tuple[socket.socket, Any]:
        """Wait for a connection.

        Raises:
            ConnectionAbortedError: There are too many.
        """
        accepted, address = super().accept()
        source = origin(address[0])
        if source is None:
            return accepted, address
        if self._kept[source] >= self._most or (
            source not in self._known and self._kept.total() >= STRANGERS
        ):
            accepted.close()
            raise ConnectionAbortedError
        self._kept[source] += 1
        return _Kept(accepted, partial(self._gone, source)), address

    def _gone(self, source: str) -> None:
        self._kept[source] -= 1
        if not self._kept[source]:
            del self._kept[source]


class _Kept(socket.socket):
    """A connection that tells when it is closed."""

    def __init__(self, accepted: socket.socket, closed: Callable[[], None]) -> None:
        super().__init__(fileno=accepted.detach())
        self._closed_once = closed

    def close(self) -> None:
        super().close()
        closed, self._closed_once = self._closed_once, lambda: None
        closed()


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose servers do not wait long for a TLS handshake."""

    async def create_server(self, *arguments: Any, **settings: Any) -> asyncio.Server:
        """Start a server."""
        if settings.get("ssl") is not None:
            settings["ssl_handshake_timeout"] = PATIENCE
        return await super().create_server(*arguments, **settings)


class Http(H11Protocol):
    """HTTP that does not wait long for a request's head, be it that nothing comes or a byte now and then."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection is there."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Part of a request is there."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has gone."""
        self._rest()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._rest()
        elif self._patience is None:
            self._patience = self.loop.call_later(PATIENCE, self.transport.abort)

    def _rest(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


class Door:
    """Flower's application, and who is let in to it.

    Args:
        app: Flower's application.
        secret: Lets in to everything, from this host.
        reply: Bytes of a client's reply, at most.
        known: Where registered clients have come from, to which is added.
    """

    def __init__(self, app: FastAPI, secret: str, reply: int, known: set[str]) -> None:
        self._app = app
        self._secret = f"Bearer {secret}"
        self._reply = reply
        self._known = known
        self._sent: Counter[bytes] = Counter()
        self._turns: dict[bytes, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(AT_ONCE))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            await self._let_in(scope, receive, send)
        except Refused as refused:
            # what was not read of the request is not waited for
            answer = PlainTextResponse(str(refused), refused.status, {"connection": "close"})
            await answer(scope, receive, send)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        source = origin(scope["client"][0]) if scope["client"] else "gone"
        if not re.fullmatch(r"[\w.:\[\]-]*", headers.get("host", "")):
            raise Refused(400, "no such host")  # some look for the path in what may follow it
        if re.fullmatch(FLEET + "[a-z-]+", path):
            await self._client(scope, receive, send, headers, source)
        elif source is not None:
            raise Refused(403, "only from the SuperLink's own host")
        elif re.fullmatch(RUNTIME + "[a-z-]+", path):
            await self._process(scope, receive, send, headers)
        elif path == "/health" or hmac.compare_digest(
            headers.get("authorization", "").encode(), self._secret.encode()
        ):
            await self._app(scope, receive, send)
        else:
            raise Refused(403, "only for who started the SuperLink: set FLWR_HOME as it was set there")

    async def _client(
        self, scope: Scope, receive: Receive, send: Send, headers: Headers, source: str | None
    ) -> None:
        """Let a client in, with no more than it may send."""
        key = await run_in_threadpool(self._signer, headers)
        if key is None:
            await self._app(scope, await _read(receive, headers, STRANGER), send)
            return
        if source is not None:
            self._known.add(source)
        if scope["path"] == PUSH:
            async with self._turns[key]:
                most = min(PART, self._reply - self._sent[key])
                await self._app(scope, await _read(receive, headers, most, partial(self._count, key)), send)
            return
        if scope["path"] == PULL:
            send = self._counting_anew(key, send)
        await self._app(scope, await _read(receive, headers, REQUEST), send)

    def _signer(self, headers: Headers) -> bytes | None:
        """The public key of the registered client that signed a request; None if the key is not registered.

        Raises:
            Refused: It is not signed.
        """
        try:
            key, signature = (
                b64decode(headers[name], validate=True)
                for name in (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
            )
            signed = headers[TIMESTAMP_HEADER].encode("ascii")
            if self._app.state.linkstate_factory.state().get_node_id_by_public_key(key) is None:
                return None
            if verify_signature(bytes_to_public_key(key), signed, signature):
                return key
        except (KeyError, ValueError, TypeError, UnsupportedAlgorithm):
            pass
        raise Refused(401, "not signed by a client")

    def _count(self, key: bytes, length: int) -> None:
        self._sent[key] += length

    def _counting_anew(self, key: bytes, send: Send) -> Send:
        """An answer to a client; one that brings an instruction allows another reply."""
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            if status == 200 and message.get("body"):
                self._sent[key] = 0
            await send(message)

        return answer

    async def _process(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        """Let a run's process in; Flower itself asks for the token, or for the SuperExec's signature."""
        find = self._app.state.linkstate_factory.state().get_task_by_token
        token = headers.get(TASK_TOKEN_HEADER)
        if not token or await run_in_threadpool(find, token) is None:
            receive = await _read(receive, headers, STRANGER)
        await self._app(scope, receive, send)


def origin(address: str) -> str | None:
    """What connections from an address are counted under; None for this host."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        ip = ip.ipv4_mapped or ip
    if ip.is_loopback:
        return None
    return str(ip_network((ip, 64), strict=False) if isinstance(ip, IPv6Address) else ip)


async def _read(
    receive: Receive, headers: Headers, most: int, count: Callable[[int], None] = lambda length: None
) -> Receive:
    """Read a request's body, and give it out again.

    Args:
        receive: Where it comes from.
        headers: The request's.
        most: Bytes that it may have.
        count: Is told of the bytes that came, part by part.

    Raises:
        Refused: It is longer, or comes too slowly.
    """
    if int(headers.get("content-length", "0")) > most:
        raise Refused(413, f"more than {most} bytes")
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(PATIENCE) as limit:
            start = asyncio.get_running_loop().time()
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    raise Refused(400, "gone before its end")
                part = message.get("body", b"")
                count(len(part))
                body += part
                if len(body) > most:
                    raise Refused(413, f"more than {most} bytes")
                more = message.get("more_body", False)
                limit.reschedule(start + PATIENCE + len(body) / SLOWEST)
    except TimeoutError:
        raise Refused(408, "too slow") from None
    left = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again
