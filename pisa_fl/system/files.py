"""Files that are either complete or not there, and digests by which they are known again."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_folder() -> Path:
    """The folder for what is made once and used again: `$PISA_FL_CACHE`, or one in the user's home."""
    return expand(os.environ.get("PISA_FL_CACHE", "~/.cache/pisa-fl"), "PISA_FL_CACHE")


def expand(name: str | Path, key: str) -> Path:
    """The path that a configuration key names, with `~` replaced.

    Raises:
        ValueError: It is none.
    """
    try:
        if not (text := os.fspath(name)) or "\0" in text:
            raise ValueError("it is empty or has a null character")
        return Path(text).expanduser()
    except (ValueError, TypeError, RuntimeError) as error:  # the last if there is no such user
        raise ValueError(
            f"{key}={name!r} names no path ({error}): give one, quoted if it looks like a number"
        ) from error


def write(path: Path, content: str | bytes) -> None:
    """Write a file that is on the disk when this returns, complete; until then, what was there stays.

    Raises:
        OSError: It cannot be written; nothing is left over.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def append(path: Path, text: str) -> None:
    """Write to the end of a file.

    Raises:
        OSError: It cannot be written; a part of the text may have been.
    """
    with naming(path), path.open("a") as file:
        file.write(text)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system name the file that is written within; those of a full disk do not by themselves."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def sweep(folder: Path) -> None:
    """Remove what processes that were killed left of files in a folder that nobody writes now."""
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.[0-9]+", path.name) and path.is_file():
            path.unlink()


def replace(temporary: Path, path: Path) -> None:
    """Give a file or folder that was written its name, in place of what has it, when all of it is on the disk."""
    for entry in [*temporary.iterdir(), temporary] if temporary.is_dir() else [temporary]:
        sync(entry)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    folder = path.is_dir()
    if folder and sys.platform == "win32":  # which opens no folders
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows flushes what may be written
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
