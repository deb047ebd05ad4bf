"""`pisa-fl-superlink`: Flower's SuperLink behind a door (door.py).

Flower asks SuperNodes for their keys under /v1/fleet/. Beside it, on the same port, it serves what starts runs and
registers keys, and asks there for nothing: whoever reached the port could run code of theirs on every host. Here
that part answers this host alone, and of this host those who hold a secret that is made at every start: Flower's
commands find it in `$FLWR_HOME/credentials.yaml`, which only the user who started the SuperLink may read.

Arguments are those of `flower-superlink`, and the two below.
"""

from __future__ import annotations

import argparse
import importlib
import secrets
import sys
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI
from flwr.cli.constant import ACCESS_TOKEN_STORE_KEY, AUTHN_TYPE_STORE_KEY, REFRESH_TOKEN_STORE_KEY
from flwr.common.constant import ISOLATION_MODE_SUBPROCESS, AuthnType
from flwr.supercore.credential_store import get_credential_store
from flwr.supercore.utils import get_flwr_home

from pisa_fl.flower.door import Door, Http, Listener
from pisa_fl.system.resources import open_as_many_as_allowed

# the package has a function of the same name
flower: Any = importlib.import_module("flwr.superlink.cli.flower_superlink")

MEGABYTE = 10**6


def main() -> None:
    """Entry point of `pisa-fl-superlink`."""
    parser = argparse.ArgumentParser(prog="pisa-fl-superlink", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--largest-reply",
        type=_count,
        default=1000,
        metavar="MB",
        help="megabytes that a client may send in answer to one message, at most; 1000",
    )
    parser.add_argument(
        "--connections-per-address",
        type=_count,
        default=256,
        metavar="N",
        help="connections that one address may have open; a client has up to four; 256",
    )
    own, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    if {"-h", "--help"} & set(rest):
        print(parser.format_help(), "\nand those of flower-superlink:\n", sep="")

    def serve(app: FastAPI, **settings: Any) -> None:
        _serve(app, own.largest_reply * MEGABYTE, own.connections_per_address, settings)

    flower.uvicorn.run = serve
    flower.flower_superlink()


def _serve(app: FastAPI, reply: int, most: int, settings: dict[str, Any]) -> None:
    """Serve Flower's application behind the door, until it is told to end."""
    open_as_many_as_allowed()
    known: set[str] = set()
    secret = secrets.token_urlsafe(32)
    door = Door(app, secret, reply, known)
    # a header must not tell where a request comes from
    own = {"proxy_headers": False, "ws": "none", "http": Http, "loop": "pisa_fl.flower.door:Loop"}
    config = uvicorn.Config(door, **settings | own)
    with Listener(config.bind_socket(), most, known) as listener:
        _hand_out(secret, config.port)
        if app.state.superlink_lifespan.config.isolation == ISOLATION_MODE_SUBPROCESS:
            _guard_tasks(app)
        server = uvicorn.Server(config)
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    if not server.started:
        sys.exit(1)


def _hand_out(secret: str, port: int) -> None:
    """Put the secret where Flower's commands look for what lets them in to a SuperLink on this host."""
    store = get_credential_store()
    for host in ("127.0.0.1", "[::1]", "localhost"):
        values = {
            AUTHN_TYPE_STORE_KEY: AuthnType.OIDC,
            ACCESS_TOKEN_STORE_KEY: secret,
            REFRESH_TOKEN_STORE_KEY: secret,
        }
        for key, value in values.items():
            store.set(key % f"{host}:{port}", value.encode())


def _guard_tasks(app: FastAPI) -> None:
    """Have the SuperExec that the SuperLink starts prove itself, or any process here could take a run's task."""
    secret, file = secrets.token_bytes(32), get_flwr_home() / "superexec-secret"
    file.unlink(missing_ok=True)
    file.touch(mode=0o600)
    file.write_bytes(secret)
    app.state.superexec_auth_secret = secret
    command = flower._get_superexec_command
    flower._get_superexec_command = lambda **options: [
        *command(**options),
        "--superexec-auth-secret-file",
        str(file),
    ]


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


if __name__ == "__main__":
    main()
