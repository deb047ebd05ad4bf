"""Text that users wrote, such as names and paths, as it is shown to them."""

from __future__ import annotations

import io
import sys


def visible(text: str) -> str:
    r"""One line of text, with what no terminal shows (control characters, lone surrogates) as \x1b or \udce9."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def tolerate_any_text() -> None:
    r"""Have stdout print what its encoding lacks as \xe9, as stderr does, and not raise."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
