"""Files that are either complete or not there, and digests by which they are known again."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Write a file that is on the disk when this returns, complete; until then, what was there stays.

    Raises:
        OSError: It cannot be written; nothing is left over.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def replace(temporary: Path, path: Path) -> None:
    """Give a file or folder that was written its name, in place of what has it, when all of it is on the disk."""
    for entry in [*temporary.iterdir(), temporary] if temporary.is_dir() else [temporary]:
        _sync(entry)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
