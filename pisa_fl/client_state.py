"""What a real client remembers between messages, in a file: a Flower client has a new process for every message.

One file a client and experiment, `<root>/<experiment>/client-<number>.safetensors`, replaced in one piece and
readable by its owner only. A file that is damaged or of another version counts as lost: the client then says so,
and the server supplies its state from the ledger.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pisa_fl.config import ConfigurationError
from pisa_fl.host import ClientState

log = logging.getLogger(__name__)

VERSION = "1"
"""Of the file's form."""

DEFAULT_ROOT = "~/.local/state/pisa-fl"


class StateFile:
    """The file of one client in one experiment.

    Args:
        root: Folder of all experiments; None: `$PISA_FL_STATE`, or `~/.local/state/pisa-fl`.
        experiment: Name of the experiment, the same for all its runs and resumptions.
        client: Client number.

    Raises:
        ConfigurationError: The experiment's name cannot be a folder's.
    """

    def __init__(self, root: str | None, experiment: str, client: int) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", experiment):
            raise ConfigurationError(
                f"engine.experiment={experiment} must be 1 to 64 letters, digits, hyphens and underscores"
            )
        base = Path(root or os.environ.get("PISA_FL_STATE") or DEFAULT_ROOT).expanduser()
        self._path = base / experiment / f"client-{client}.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else answers for this client meanwhile."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(_private(self._path.with_suffix(".lock")), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def load(self) -> ClientState:
        """What was saved; a client without a (readable) file is at the start."""
        try:
            content = self._path.read_bytes()
            head, _, body = content.partition(b"\n")
            rounds = json.loads(head)
            if rounds["version"] != VERSION:
                raise ValueError(f"it is of version {rounds['version']}")
            tensors = load_tensors(body)
            vectors: dict[str, dict[str, Tensor]] = {"accepted": {}, "pending": {}}
            for name, vector in tensors.items():
                part, _, key = name.partition(".")
                vectors[part][key] = vector
            return ClientState(
                int(rounds["round"]), vectors["accepted"], rounds["pending_round"], vectors["pending"]
            )
        except FileNotFoundError:
            return ClientState()
        except Exception as error:  # whatever a damaged file makes the parsers raise
            log.warning("%s cannot be used (%s): the server will supply the state", self._path, error)
            return ClientState()

    def save(self, state: ClientState) -> None:
        """Replace what was saved."""
        tensors = {f"accepted.{name}": vector for name, vector in state.accepted.items()}
        tensors |= {f"pending.{name}": vector for name, vector in state.pending.items()}
        rounds = {"version": VERSION, "round": state.round, "pending_round": state.pending_round}
        body = save_tensors({name: vector.cpu().contiguous() for name, vector in tensors.items()})
        self._write(self._path, json.dumps(rounds).encode() + b"\n" + body)

    def rows(self, source: str, deal: Callable[[], NDArray[np.integer]]) -> NDArray[np.integer]:
        """Positions of the client's examples, dealt once.

        Args:
            source: Everything that the deal depends on.
            deal: Deals them.
        """
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        path = self._path.with_name(f"{self._path.stem}-{digest}.npy")
        with self.locked():
            try:
                return np.load(path, allow_pickle=False)
            except Exception:  # there is none, or whatever a damaged file makes the parser raise
                rows = deal()
            content = BytesIO()
            np.save(content, rows, allow_pickle=False)
            self._write(path, content.getvalue())
            return rows

    def _write(self, path: Path, content: bytes) -> None:
        temporary = _private(path.with_suffix(".new"))
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _private(path: Path) -> Path:
    """A file, made if it is not there, that only its owner can read."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    return path
