"""The memory of a process and its descendants, each shared page counted once (Linux's proportional set size)."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

EVERY = 0.2
"""Seconds between looks; a look reads the page tables, which takes the process a moment too."""


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text().split())
    return [pid, *(descendant for child in children for descendant in family(child))]


def used(pid: int) -> int:
    """Bytes that a process and its descendants use at present."""
    total = 0
    for member in family(pid):
        with suppress(OSError):  # it may have ended
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
            total += sum(1024 * int(found) for found in re.findall(r"^Pss: +(\d+) kB", rollup, re.MULTILINE))
    return total


class Peak:
    """The most that a process and its descendants use while this context lasts.

    Attributes:
        bytes: That number.
    """

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid, self._over = pid, Event()
        self._thread = Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            self.bytes = max(self.bytes, used(self._pid))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
