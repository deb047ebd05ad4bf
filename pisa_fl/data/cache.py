"""Decoded data sets as memory-mapped arrays, so that a new process decodes nothing and shares its pages."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from pisa_fl.data.image_data import Arrays
from pisa_fl.system import files

log = logging.getLogger(__name__)

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")

DIGESTS = "digests.json"
"""The file of an entry that holds its source and the digests of its arrays' files."""

VERSION = "2"
"""Of what decoders make of a source, and of an entry's form: another one is another entry."""


def cached(cache: str | None, name: str, source: Iterable[str], decode: Callable[[], Arrays]) -> Arrays:
    """Return what `decode()` returns, from the cache where it is there and bit for bit what was put there.

    A cache is a convenience: one that cannot be written is left out with a warning, and a damaged
    entry is decoded again.

    Args:
        cache: the folder that holds all data sets (`data.cache`); None decodes every time.
        name: of the data set, the readable part of its folder's name.
        source: everything that the arrays depend on, such as `fingerprint(files)` and options.
        decode: reads the data set from its source.

    Raises:
        ValueError: if `cache` is no path.
    """
    if cache is None:
        return decode()
    root = files.expand(cache, "data.cache")
    whole = "\0".join([VERSION, *source]).encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(whole).hexdigest()
    folder = root / f"{name}-{digest[:16]}"
    if os.path.lexists(folder):
        try:
            return _read(folder, digest)
        except Exception as error:  # whatever a damaged entry makes the parsers raise
            log.warning("data.cache: %s is damaged (%s) and is made again.", folder, error)
    arrays = decode()
    try:
        _write(folder, digest, arrays)
        return _read(folder, digest)
    except (OSError, ValueError) as error:
        log.warning("data.cache: going without, since %s cannot be written (%s).", folder, error)
        return arrays


def fingerprint(paths: Iterable[Path | str]) -> Iterator[str]:
    """Yield path, size, inode and times of each file: they change when the data do.

    Copies can carry the time of a file's last modification along; that of its last change the system alone sets.
    """
    for path in paths:
        status = os.stat(path)
        times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
        yield f"{os.path.abspath(path)} {status.st_size} {status.st_ino} {times}"


def _read(folder: Path, source: str) -> Arrays:
    """Map the arrays of an entry.

    Raises:
        Exception: of any kind, if it is not as it was written, or was written for another source.
    """
    kept = json.loads(_file(folder, DIGESTS).read_bytes())
    if kept["source"] != source:
        raise ValueError("it is of another source")
    arrays = {}
    for key in ARRAYS:
        path = _file(folder, f"{key}.npy")
        if files.digest(path) != kept[key]:
            raise ValueError(f"{path.name} has changed")
        arrays[key] = np.load(path, mmap_mode="r", allow_pickle=False)
    return arrays


def _sound(folder: Path, source: str) -> bool:
    """Whether an entry can be read: another process may have finished it meanwhile, and be reading it."""
    try:
        _read(folder, source)
    except Exception:  # as above
        return False
    return True


def _file(folder: Path, name: str) -> Path:
    """A file of an entry; a pipe in its place would be waited for without end."""
    if not (folder / name).is_file():
        raise ValueError(f"{name} is missing")
    return folder / name


def _write(folder: Path, source: str, arrays: Arrays) -> None:
    """Put an entry in its place, whole, instead of what is there.

    Raises:
        OSError: It cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        complete = Path(temporary, folder.name)
        complete.mkdir()
        kept = {"source": source}
        for key in ARRAYS:
            np.save(complete / f"{key}.npy", arrays[key], allow_pickle=False)
            kept[key] = files.digest(complete / f"{key}.npy")
        files.write(complete / DIGESTS, json.dumps(kept))
        if os.path.lexists(folder) and not _sound(folder, source):
            # moved aside first, since a folder replaces no folder; and gone with the temporary one
            os.replace(folder, Path(temporary, "damaged"))
        try:
            files.replace(complete, folder)
        except OSError:
            # another process may have finished the same entry first, which is as good
            if not folder.exists():
                raise
