"""Whose a run directory is: of one run for good, written by one process at a time.

A directory is claimed before anything in it is checked, written or removed, and a folder that a refused run had made is
taken back before the claim ends. Folders that others made are left alone.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import BaseFileLock
from hydra.core.override_parser.types import Quote, QuotedString

from pisa_fl.config import ConfigurationError, literal
from pisa_fl.system import locks
from pisa_fl.system.locks import HeldError, let_go, take

FILES = (
    "config.yaml",
    "partition.json",
    "partition.csv",
    "partition.png",
    "initial.safetensors",
    "model.safetensors",
    "metrics.jsonl",
    "failures.jsonl",
    "summary.json",
    "curves.png",
    "events.out.tfevents.*",
    "metrics.csv",
    "tracker-*.json",
    "asked.json",
    "checkpoint",
    "flower.log",
)
"""What tells that a directory holds a run."""

LOCK = ".lock"
"""File in a directory that the run which writes it holds, and removes."""

_made: set[Path] = set()
"""Folders that this process made and may take back."""


@contextmanager
def claimed(directory: Path | None) -> Iterator[None]:
    """Nobody else writes the directory meanwhile; it is made, and taken back if nothing was written.

    Raises:
        ConfigurationError: Somebody does.
        OSError: It cannot be made or opened.
    """
    if directory is None:
        yield
        return
    directory = Path(os.path.abspath(directory))
    lock = _claim(directory)
    try:
        yield
    finally:
        let_go(lock)
        _take_back(directory)  # not empty if another process has claimed it meanwhile


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else holds a file of a run directory meanwhile.

    Raises:
        ConfigurationError: Somebody does.
    """
    lock = _take(path.with_name(f".{path.name}.lock"))
    try:
        yield
    finally:
        let_go(lock)


def check_free(directory: Path, beside: Collection[str] = ()) -> None:
    """Check that a directory holds no run.

    Args:
        directory: Claimed.
        beside: Files of a run that may be there.

    Raises:
        ConfigurationError: It holds one.
    """
    if (name := first_file(directory, beside)) is not None:
        raise ConfigurationError(
            f"{directory} holds a run already, as its {name} tells: choose another directory, or go on with that"
            f" run: {resume_command(directory)}"
        )


SWEEP = "sweep.json"
"""File of a sweep's folder that tells of its runs."""

OF_SWEEPS = ("multirun.yaml", SWEEP, "optuna.db", "best.yaml")
"""What a sweep writes into its folder beside those of its runs."""


def first_file(directory: Path, beside: Collection[str] = ()) -> str | None:
    """Name of a file, none of those `beside`, that tells that a directory holds a run; None if it holds none."""
    found = (path.name for name in FILES if name not in beside for path in directory.glob(name))
    return next(found, None)


def is_held(directory: Path) -> bool:
    """Whether a process writes the directory."""
    return locks.is_held(directory / LOCK)


def make_new(directory: Path) -> Path:
    """Make a folder that nobody else has: of this name, or with -2, -3, ... behind it.

    Raises:
        OSError: It cannot be made.
    """
    directory = Path(os.path.abspath(directory))
    for number in count(1):
        folder = directory if number == 1 else directory.with_name(f"{directory.name}-{number}")
        make(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir()
            _made.add(folder)
            return folder
    raise AssertionError


def make(directory: Path) -> None:
    """Make a folder and those above it, noting those that were not there.

    Raises:
        OSError: It cannot be made.
    """
    directory = Path(os.path.abspath(directory))
    for folder in reversed([directory, *directory.parents]):
        if not folder.is_dir():
            with suppress(FileExistsError):  # another process was faster, or it is a file
                folder.mkdir()
                _made.add(folder)
    directory.mkdir(exist_ok=True)


def note_made(folders: Iterable[Path]) -> None:
    """Note folders that were made for this process by others."""
    _made.update(folders)


def withdraw(directory: Path) -> None:
    """Take a folder back, and those above it, that this process made for a run that wrote nothing."""
    if directory in _made:
        with suppress(ConfigurationError, OSError), claimed(directory):
            pass


def withdraw_sweeps() -> None:
    """Take back folders that this process made for sweeps of which no run wrote anything."""
    for folder in sorted(_made, reverse=True):
        with suppress(OSError):
            files = list(folder.iterdir())
            if all(file.name in OF_SWEEPS for file in files):
                for file in files:
                    file.unlink()
                _take_back(folder)


def resume_command(directory: Path, folders: Iterable[str] = ()) -> str:
    """The command that goes on with a run, as it can be pasted into a shell.

    Args:
        directory: The run directory.
        folders: Of the user's modules that the run needs.
    """
    path = os.path.abspath(directory)
    own = "".join(f"--config-dir {shlex.quote(folder)} " for folder in folders)
    return f"pisa-fl {own}resume={shlex.quote(quoted(path))}"


def quoted(text: str) -> str:
    """A text as the value of an override: in quotes if Hydra would read it as anything else."""
    if re.fullmatch(r"/[A-Za-z0-9_/.@%+-]*", text):
        return text
    return str(QuotedString(literal(text), Quote.double).with_quotes())


def _take_back(directory: Path) -> None:
    """Remove a folder, and those above it, as far as they are empty and this process made them."""
    empty = True
    for folder in (directory, *directory.parents):
        if folder not in _made:
            break
        _made.discard(folder)
        try:
            if empty:
                folder.rmdir()
        except OSError:
            empty = False


def _claim(directory: Path) -> BaseFileLock:
    """The lock of a directory, which is made if need be."""
    while True:
        make(directory)
        with suppress(FileNotFoundError):  # another process took it back
            return _take(directory / LOCK)


def _take(path: Path) -> BaseFileLock:
    try:
        return take(path)
    except HeldError:
        directory = path.parent
        raise ConfigurationError(
            f"{directory} is being written by a run that goes on: choose another directory, or stop it"
            f" (touch {shlex.quote(f'{directory}/stop')}) and go on with it later: {resume_command(directory)}"
        ) from None
