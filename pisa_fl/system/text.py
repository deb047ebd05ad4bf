"""Text as it is shown: what users wrote, such as names and paths, and the numbers of clients."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

NAMED = 10
"""Clients that are named in a line."""


def visible(text: str) -> str:
    r"""One line of text, with what no terminal shows (control characters, lone surrogates) as \x1b or \udce9."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def tolerate_any_text() -> None:
    r"""Have stdout print what its encoding lacks as \xe9, as stderr does, and not raise."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def listed(clients: Sequence[int]) -> str:
    """Numbers of clients in their order: `0, 1, 2`, or the first of them `and 5 others`."""
    numbers = ", ".join(str(client) for client in sorted(clients)[:NAMED])
    return f"{numbers} and {len(clients) - NAMED} others" if len(clients) > NAMED else numbers
