"""What a real client remembers between messages, in a file: a Flower client has a new process for every message.

One file a client and experiment, `<root>/<experiment>/client-<number>.safetensors`, replaced in one piece and
readable by its owner only. A file counts as lost if it is damaged, or of another version, client or model: the client
then says so, and the server supplies its state from the ledger. Every file ends with a SHA-256 of place and content.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pisa_fl.clients.host import ClientState
from pisa_fl.config import ConfigurationError
from pisa_fl.system.files import expand, replace
from pisa_fl.system.locks import locked

log = logging.getLogger(__name__)

VERSION = "2"
"""Of the file's form."""

DIGEST_SIZE = 64
"""Bytes of a SHA-256 in hexadecimal."""

DEFAULT_ROOT = "~/.local/state/pisa-fl"


def root_of(chosen: str | None = None) -> Path:
    """The folder of all experiments.

    Args:
        chosen: None: `$PISA_FL_STATE`, or `~/.local/state/pisa-fl`.

    Raises:
        ConfigurationError: It is no path.
    """
    try:
        return expand(chosen or os.environ.get("PISA_FL_STATE") or DEFAULT_ROOT, "engine.state")
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


class StateFile:
    """The file of one client in one experiment.

    Args:
        root: Folder of all experiments; None: `$PISA_FL_STATE`, or `~/.local/state/pisa-fl`.
        experiment: Name of the experiment, the same for all its runs and resumptions.
        client: Client number.

    Raises:
        ConfigurationError: The experiment's name cannot be a folder's, or the root no path.
    """

    def __init__(self, root: str | None, experiment: str, client: int) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", experiment):
            raise ConfigurationError(
                f"engine.experiment={experiment} must be 1 to 64 letters, digits, hyphens and underscores"
            )
        self._path = root_of(root) / experiment / f"client-{client}.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else answers for this client meanwhile.

        Raises:
            OSError: The folder cannot be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(self._path.with_suffix(".lock")):
            yield

    def load(self, sizes: Mapping[str, int] | None = None) -> ClientState:
        """What was saved; a client without a usable file is at the start.

        Args:
            sizes: Lengths of the vectors that a state may hold, by name; None admits any.
        """
        if not os.path.lexists(self._path):
            return ClientState()
        try:
            head, _, body = _unsealed(self._path).partition(b"\n")
            rounds = json.loads(head)
            if rounds["version"] != VERSION:
                raise ValueError(f"it is of version {rounds['version']}")
            vectors: dict[str, dict[str, Tensor]] = {"accepted": {}, "pending": {}}
            for name, vector in load_tensors(body).items():
                part, _, key = name.partition(".")
                if sizes is not None and vector.shape != (sizes.get(key),):
                    raise ValueError(f"its {key} is of another model")
                if not torch.isfinite(vector).all():
                    raise ValueError(f"its {key} is not finite")
                vectors[part][key] = vector
            return ClientState(
                rounds["round"], vectors["accepted"], rounds["pending_round"], vectors["pending"]
            )
        except Exception as error:  # whatever a damaged file makes the parsers raise
            log.warning("%s cannot be used (%s): the server will supply the state", self._path, error)
            return ClientState()

    def save(self, state: ClientState) -> None:
        """Replace what was saved.

        Raises:
            OSError: The folder cannot be written.
        """
        tensors = {f"accepted.{name}": vector for name, vector in state.accepted.items()}
        tensors |= {f"pending.{name}": vector for name, vector in state.pending.items()}
        rounds = {"version": VERSION, "round": state.round, "pending_round": state.pending_round}
        body = save_tensors({name: vector.cpu().contiguous() for name, vector in tensors.items()})
        _seal(self._path, json.dumps(rounds).encode() + b"\n" + body)

    def rows(self, source: str, deal: Callable[[], NDArray[np.integer]]) -> NDArray[np.integer]:
        """Positions of the client's examples, dealt once; dealt again if what was kept is damaged.

        Args:
            source: Everything that the deal depends on.
            deal: Deals them.

        Raises:
            OSError: The folder cannot be written.
        """
        digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        path = self._path.with_name(f"{self._path.stem}-{digest}.npy")
        with self.locked():
            if os.path.lexists(path):
                try:
                    return np.load(BytesIO(_unsealed(path)), allow_pickle=False)
                except Exception as error:  # whatever a damaged file makes the parser raise
                    log.warning("%s cannot be used (%s): the examples are dealt again", path, error)
            rows = deal()
            array = BytesIO()
            np.save(array, rows, allow_pickle=False)
            _seal(path, array.getvalue())
            return rows


def _seal(path: Path, content: bytes) -> None:
    """Replace a file, or whatever is in its place, with one that only its owner can read.

    Raises:
        OSError: It cannot be written; nothing is left over.
    """
    temporary = path.with_suffix(".new")  # the same each time, so that what a killed process left goes
    for place in (temporary, path):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
    try:
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(content + _digest(path, content))
        replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _unsealed(path: Path) -> bytes:
    """What was sealed in a file.

    Raises:
        ValueError: It is not there as it was written.
    """
    if not path.is_file():  # a pipe in its place would be waited for without end
        raise ValueError("it is no file")
    sealed = path.read_bytes()
    content, digest = sealed[:-DIGEST_SIZE], sealed[-DIGEST_SIZE:]
    if _digest(path, content) != digest:
        raise ValueError("it has changed, or comes from elsewhere")
    return content


def _digest(path: Path, content: bytes) -> bytes:
    """SHA-256 of a file's content and of its place, experiment and name: another client's file is not this one's."""
    place = f"{path.parent.name}/{path.name}\n".encode()
    return hashlib.sha256(place + content).hexdigest().encode()
