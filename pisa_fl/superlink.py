"""`pisa-fl-superlink`: Flower's SuperLink, of whose one port other hosts get the SuperNodes' part and no other.

Flower asks SuperNodes for their keys under /v1/fleet/. Beside it, on the same port, it serves what starts runs and
registers keys, and asks there for nothing: whoever reached the port could run code of theirs on every host. Here
that part answers this host alone. Arguments are those of `flower-superlink`.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import uvicorn
from flwr.superlink.cli import flower_superlink
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

FLEET = "/v1/fleet/"
"""What SuperNodes use, each request signed with the node's key."""


class FleetOnly:
    """Passes to an application what comes from this host, and from others only what SuperNodes ask.

    Args:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        app = self._app if _admitted(scope) else PlainTextResponse("only from the SuperLink's own host", 403)
        await app(scope, receive, send)


def _admitted(scope: Scope) -> bool:
    if scope["type"] == "lifespan":
        return True
    client = scope.get("client")
    return scope["path"].startswith(FLEET) or (client is not None and ip_address(client[0]).is_loopback)


def main() -> None:
    """Entry point of `pisa-fl-superlink`."""
    serve = uvicorn.run

    def serve_fleet_only(app: ASGIApp, **settings: Any) -> None:
        # a header must not tell where a request comes from
        serve(FleetOnly(app), **settings | {"proxy_headers": False})

    uvicorn.run = serve_fleet_only  # type: ignore[assignment]
    flower_superlink()


if __name__ == "__main__":
    main()
