"""Large matrices of which little may be in use: memory that is taken as it is written, or a file without a name."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import torch
from torch import Tensor

PART = 2**24
"""Bytes that are written at once where a file's space cannot be reserved."""

ROWS = 64
"""Rows of a block: a matrix grows by that many."""


def zeros(count: int, on_disk: bool = False) -> Tensor:
    """Float32 zeros that forked processes share, taken from the machine only where something is written.

    Args:
        count: How many.
        on_disk: Keep them in a file of the folder for temporary files ($TMPDIR), which has no name and so is gone
            when nobody uses it any more; its space is reserved, and the system keeps in memory what it has room for.

    Raises:
        OSError: There is no room for them.
    """
    size = max(1, count) * 4
    if not on_disk:
        with _needing(size, "memory", "give state=disk"):
            return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.float32)[:count]
    folder = tempfile.gettempdir()
    with (
        _needing(size, folder, "set TMPDIR to a folder with more"),
        tempfile.TemporaryFile(dir=folder) as file,
    ):
        _reserve(file, size)  # a page that has no room when it is written ends the process
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.float32)[:count]


def _reserve(file: IO[bytes], size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, PART):  # macOS and Windows
        file.write(bytes(min(PART, size - start)))
    file.flush()


@contextmanager
def _needing(size: int, place: str, remedy: str) -> Iterator[None]:
    """Errors of the system say what was asked of it."""
    try:
        yield
    except OSError as error:
        text = (
            f"{error.strerror}: {size / 1e6:,.1f} MB are needed at once for what clients remember: {remedy}"
        )
        raise OSError(error.errno, text, place) from error


class Rows:
    """A matrix of float32 zeros that grows by rows, and is not moved when it does.

    Args:
        width: Its columns.
        on_disk: As for `zeros`.
    """

    def __init__(self, width: int, on_disk: bool = False) -> None:
        self._width, self._on_disk = width, on_disk
        self._blocks: list[Tensor] = []

    def grow(self, rows: int) -> None:
        """Have at least so many rows."""
        while len(self._blocks) * ROWS < rows:
            self._blocks.append(zeros(ROWS * self._width, self._on_disk).view(ROWS, self._width))

    def __getitem__(self, row: int) -> Tensor:
        """One row, (width,)."""
        return self._blocks[row // ROWS][row % ROWS]

    def blocks(self, rows: int) -> list[Tensor]:
        """The first rows, block by block."""
        return [
            block[: rows - start] for start, block in zip(range(0, rows, ROWS), self._blocks, strict=False)
        ]
