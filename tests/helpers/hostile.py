"""What a stranger tries on a SuperLink: `python hostile.py NAME HOST:PORT CREDENTIALS ...` prints what came of it.

Of the credentials it uses the authority's certificate, and client 0's key where it plays a client.
"""

import http.client
import json
import selectors
import socket
import ssl
import sys
import time
from base64 import b64encode
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

ADDRESS, CREDENTIALS = sys.argv[2], Path(sys.argv[3])
HOST, PORT = ADDRESS.rsplit(":", 1)
TLS = ssl.create_default_context(cafile=CREDENTIALS / "ca.crt")
LONG = 20_000_000
MESSAGES, PART = "/v1/fleet/push-messages", "/v1/fleet/push-object"


def status(path, headers, body=b"", method="POST"):
    """Status of the answer to a request whose head is sent, and as much of the body as is given."""
    connection = http.client.HTTPSConnection(ADDRESS, timeout=30, context=TLS)
    connection.putrequest(method, path, skip_host="host" in headers)
    for name, value in ({"content-type": "application/protobuf"} | headers).items():
        connection.putheader(name, value)
    connection.endheaders()
    with suppress(OSError):  # it does not read on, and has said why
        connection.send(body)
    return connection.getresponse().status


def signed(key, by=None):
    now = datetime.now(UTC).isoformat()
    return {
        "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-signature": b64encode(sign_message(by or key, now.encode())).decode(),
        "flwr-timestamp": now,
    }


def bodies():
    own = generate_private_key(SECP384R1())
    client = load_ssh_private_key((CREDENTIALS / "client-0" / "client-0").read_bytes(), None)
    long = {"content-length": str(LONG)}
    endless = {"transfer-encoding": "chunked"}
    chunks = b"8000\r\n" + b"\x12\x00" * 0x4000 + b"\r\n"
    upgrade = {"upgrade": "websocket", "connection": "upgrade", "sec-websocket-key": "a" * 24}
    return {
        "without headers": status(MESSAGES, long),
        "headers of no form": status(MESSAGES, long | dict.fromkeys(signed(own), "?")),
        "a key of its own, long": status(MESSAGES, long | signed(own)),
        "a key of its own, without end": status(MESSAGES, endless | signed(own), chunks),
        "a client's key, signed by another": status(MESSAGES, long | signed(client, by=own)),
        "a path for the host": status(PART, long | signed(own) | {"host": "a/v1/runtime/push-object?"}),
        "an upgrade": status(PART, upgrade | {"sec-websocket-version": "13"}, method="GET"),
        "a client, long": status(MESSAGES, long | signed(client)),
        "a client, a part too long": status(PART, long | signed(client)),
    }


def paths():
    return {
        path: status(path, {"content-length": "0"})
        for path in (
            "/v1/control/start-run",
            "/v1/control/register-node",
            "/v1/runtime/acquire-task",
            "/v1/fleet/../control/start-run",
            "/v1/fleet/%2e%2e/control/start-run",
            "/v1/fleet/..%2fcontrol%2fstart-run",
            "/v1/fleet/%252e%252e/control/start-run",
            "/v1/fleet//v1/control/start-run",
            "//v1/control/start-run",
            "/V1/CONTROL/start-run",
            "/v1/control/start-run/",
            "/v1/control/start-run?x=/v1/fleet/",
            "/v1/control/start-run;/v1/fleet/",
            "https://localhost/v1/control/start-run",
            "/v1/fleet/",
            "/docs",
            "/openapi.json",
            "/health",
            "/",
        )
    }


def connections(number):
    """How many connections are left after a minute, of which most say nothing, and some a byte now and then."""
    watch, slow = selectors.DefaultSelector(), []
    for each in range(int(number)):
        try:
            plain = socket.create_connection((HOST, int(PORT)), timeout=30)
            if each % 50 == 0:  # with TLS, and a head that never ends
                plain = TLS.wrap_socket(plain, server_hostname=HOST)
                plain.send(b"POST /v1/fleet/push-messages HTTP/1.1\r\n")
                slow.append(plain)
        except OSError:
            continue
        plain.setblocking(False)
        watch.register(plain, selectors.EVENT_READ)
    end = time.monotonic() + 60
    while (left := len(watch.get_map())) and time.monotonic() < end:
        for one in slow:
            with suppress(OSError):
                one.send(b"a")
        for key, _ in watch.select(0.5):
            try:
                gone = not key.fileobj.recv(100)
            except ssl.SSLWantReadError:
                gone = False
            except OSError:
                gone = True
            if gone:
                watch.unregister(key.fileobj)
                key.fileobj.close()
    return left


print(json.dumps({"bodies": bodies, "paths": paths, "connections": connections}[sys.argv[1]](*sys.argv[4:])))
