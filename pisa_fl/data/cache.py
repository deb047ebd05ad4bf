"""Decoded data sets as memory-mapped arrays, so that a new process decodes nothing and shares its pages."""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from pisa_fl.data.image_data import Arrays

log = logging.getLogger(__name__)

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")


def cached(cache: str | None, name: str, source: Iterable[str], decode: Callable[[], Arrays]) -> Arrays:
    """Return what `decode()` returns, from the cache where it is there.

    A cache is a convenience: one that cannot be written is left out with a warning, and a damaged
    entry is decoded again.

    Args:
        cache: the folder that holds all data sets (`data.cache`); None decodes every time.
        name: of the data set, the readable part of its folder's name.
        source: everything that the arrays depend on, such as `fingerprint(files)` and options.
        decode: reads the data set from its source.
    """
    if cache is None:
        return decode()
    digest = hashlib.sha256("\0".join(source).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    folder = Path(cache).expanduser() / f"{name}-{digest}"
    if folder.exists():
        try:
            return _read(folder)
        except (OSError, ValueError, EOFError) as error:
            log.warning("data.cache: %s is damaged (%s) and is made again.", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    arrays = decode()
    try:
        _write(folder, arrays)
        return _read(folder)
    except OSError as error:
        log.warning("data.cache: going without, since %s cannot be written (%s).", folder, error)
        return arrays


def fingerprint(files: Iterable[Path | str]) -> Iterator[str]:
    """Yield path, size and modification time of each file: they change when the data do."""
    for file in files:
        status = os.stat(file)
        yield f"{os.path.abspath(file)} {status.st_size} {status.st_mtime_ns}"


def files_below(folder: Path) -> Iterator[str]:
    """Yield all files below `folder`, in a fixed order."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        yield from (os.path.join(parent, file) for file in sorted(files))


def _read(folder: Path) -> Arrays:
    return {key: np.load(folder / f"{key}.npy", mmap_mode="r", allow_pickle=False) for key in ARRAYS}


def _write(folder: Path, arrays: Arrays) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        complete = Path(temporary, folder.name)
        complete.mkdir()
        for key in ARRAYS:
            np.save(complete / f"{key}.npy", arrays[key], allow_pickle=False)
        try:
            complete.rename(folder)
        except OSError:
            # another process may have finished the same entry first, which is as good
            if not folder.exists():
                raise
