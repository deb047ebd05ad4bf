"""The idx format of MNIST and its relatives (described at https://yann.lecun.com/exdb/mnist)."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

UNSIGNED_BYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"


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
    """Return the uint8 array of an idx file, gzipped or not.

    Raises:
        ValueError: if the file is not a complete idx file of unsigned bytes with `dimensions` dimensions.
    """
    content = path.read_bytes()
    if content.startswith(GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, f"broken gzip: {error}") from error
    magic = struct.pack(">HBB", 0, UNSIGNED_BYTE, dimensions)
    header = 4 + 4 * dimensions
    if not content.startswith(magic) or len(content) < header:
        raise _damaged(path, f"it starts 0x{content[:4].hex()}, not 0x{magic.hex()} and {dimensions} sizes")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    if len(content) != header + math.prod(shape):
        raise _damaged(path, f"{len(content)} bytes where its header promises {header + math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"data.root: {path} is not a whole idx file ({reason}); fetch it again")
