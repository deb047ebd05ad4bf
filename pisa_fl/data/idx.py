"""The idx format of MNIST and its relatives (described at https://yann.lecun.com/exdb/mnist)."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pisa_fl.data.image_data import check_memory

UNSIGNED_BYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"
CHUNK = 1 << 20
"""Bytes read at once."""


def find_idx(root: Path, name: str) -> Path:
    """Return the file of `root` for, say, `train-images-idx3-ubyte`, gzipped or not, under its usual names.

    Raises:
        FileNotFoundError: if there is none.
    """
    names = [name, name.replace("-idx", ".idx")]
    for candidate in [*names, *(f"{each}.gz" for each in names)]:
        if (root / candidate).is_file():
            return root / candidate
    raise FileNotFoundError(f"data.root={root} has no file {name} or {name}.gz; put the four idx files there")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the uint8 array of an idx file, gzipped or not; no more is read than its header promises.

    Raises:
        ValueError: if the file is not a complete idx file of unsigned bytes with `dimensions` dimensions.
    """
    with path.open("rb") as file:
        zipped = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        file.seek(0)
        if not zipped:
            return _read(file, path, dimensions)
        try:
            with gzip.open(file) as content:
                return _read(content, path, dimensions)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, f"broken gzip: {error}") from error


def _read(file: BinaryIO | gzip.GzipFile, path: Path, dimensions: int) -> np.ndarray:
    magic = struct.pack(">HBB", 0, UNSIGNED_BYTE, dimensions)
    header = 4 + 4 * dimensions
    content = bytearray(file.read(header))
    if not content.startswith(magic) or len(content) < header:
        raise _damaged(path, f"it starts 0x{content[:4].hex()}, not 0x{magic.hex()} and {dimensions} sizes")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    promised = header + math.prod(shape)
    check_memory("data.root", f"what the header of {path} promises", promised)
    # one byte more would show that there are more
    while chunk := file.read(min(CHUNK, promised + 1 - len(content))):
        content += chunk
    if len(content) != promised:
        found = "more" if len(content) > promised else f"{len(content)} bytes"
        raise _damaged(path, f"{found} where its header promises {promised} bytes")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"data.root: {path} is not a whole idx file ({reason}); fetch it again")
