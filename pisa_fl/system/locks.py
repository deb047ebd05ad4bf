"""Locks between processes, on any system: a file that one of them holds, and that falls with the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

OWN = 0o600
"""Mode of a lock's file that nobody but its owner may hold."""

LOOK = 0.01
"""Seconds between looks whether a lock that another process holds has fallen."""

GLANCE = 0.2
"""Seconds after which whoever holds a lock does more than to look whether it is held."""


class HeldError(Exception):
    """Another process, or another thread, holds the lock."""


def take(path: Path) -> BaseFileLock:
    """Hold a lock, whose file is made if need be.

    Raises:
        HeldError: Somebody else does.
        OSError: Its file cannot be made.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=GLANCE, poll_interval=LOOK)
    except Timeout:
        raise HeldError(path) from None
    return lock


def is_held(path: Path) -> bool:
    """Whether somebody holds a lock; a file that a killed process left is removed."""
    if not path.exists():
        return False
    try:
        let_go(take(path))
    except HeldError:
        return True
    except OSError:  # nobody but its owner may ask
        return False
    return False


def let_go(lock: BaseFileLock) -> None:
    """Let a lock go, and remove its file."""
    with suppress(OSError):  # Windows keeps a file that is open: there the library removes it afterwards
        Path(lock.lock_file).unlink()  # who waits for it finds that out, and takes the next one
    lock.release()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that is its owner's alone, and wait for it if somebody else does.

    Raises:
        OSError: Its file cannot be made.
    """
    lock = FileLock(path, mode=OWN, thread_local=False, poll_interval=LOOK)
    lock.acquire()
    try:
        yield
    finally:
        let_go(lock)
