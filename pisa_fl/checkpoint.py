"""Checkpoints: everything a run needs to go on with the same bits, complete or not there at all.

`checkpoint/round-000050/` holds `server-*.safetensors` (weights, ledger and whatever else the strategy keeps),
`clients-*.safetensors` (their states), in parts so that writing them takes little memory, `state.json` (round and
counters), `model.safetensors` (the model so far, by PyTorch's names, for others to read), `best.safetensors` if the run
keeps one, and `SHA256SUMS` of all of these, which `sha256sum -c` reads. A folder is written under a temporary name and
renamed, and the one before is kept until then; a damaged one is passed over for the one before it. Randomness needs no
saving: every draw has an address (`pisa_fl.randomness`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pisa_fl.clients.host import ClientState
from pisa_fl.config import ConfigurationError
from pisa_fl.config.explain import first_line
from pisa_fl.federation import Federation
from pisa_fl.identity import run_id
from pisa_fl.server.gateway import Traffic
from pisa_fl.system.files import digest, naming, replace, sync
from strategies.base.messages import WEIGHTS, record, vectors

log = logging.getLogger(__name__)

PART = 2**28
"""Bytes of a file, about."""

SUMS = "SHA256SUMS"
"""Name of the file that tells whether the others are what was written."""


def save_checkpoint(federation: Federation, folder: Path, keep: int, beside: Sequence[Path] = ()) -> None:
    """Write the federation's state after its present round, and delete all but the last `keep` checkpoints.

    Files `beside` it are copied.

    One of this round that is whole says the same, and stays: a round that is given up leaves no trace.

    Raises:
        OSError: It cannot be written; those before it stay.
    """
    target = round_folder(folder, federation.round)
    if not _is_whole(target):
        _replace(federation, target, beside)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def round_folder(folder: Path, round_number: int) -> Path:
    """Where the checkpoint of a round lies."""
    return folder / f"round-{round_number:06d}"


def _replace(federation: Federation, target: Path, beside: Sequence[Path]) -> None:
    """Write a checkpoint where there is none, or a damaged one."""
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with naming(target):
            temporary.mkdir(parents=True)
            _write_all(federation, temporary, beside)
            shutil.rmtree(target, ignore_errors=True)
            replace(temporary, target)
            sync(target.parent.parent)  # their folder may be new
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_checkpoint(federation: Federation, folder: Path) -> bool:
    """Bring the federation to the last checkpoint that is whole, and delete what lies beyond it.

    Returns:
        Whether there was one; not if the run ended before it wrote any.

    Raises:
        ConfigurationError: There are some, but none that is whole.
    """
    found = checkpoints(folder)
    for position, path in reversed(list(enumerate(found))):
        try:
            if not _is_whole(path):
                raise ValueError("its files are not what was written")
            _restore(federation, path)
        except Exception as error:  # whatever a damaged file makes the parsers and the strategy raise
            log.warning("checkpoint %s is damaged (%s), trying the one before", path.name, first_line(error))
            continue
        # later rounds are done again, and write theirs again
        for leftover in [*found[position + 1 :], *folder.glob(".round-*")]:
            shutil.rmtree(leftover)
        return True
    if found:
        raise ConfigurationError(f"resume: {folder} holds no checkpoint that is whole")
    return False


def known_identity(folder: Path, number: str) -> Mapping[str, str] | None:
    """What the last whole checkpoint of a run tells of its identity; None if there is no checkpoint.

    Args:
        folder: Of the checkpoints.
        number: The run's id.

    Raises:
        ConfigurationError: There are some, but no whole one of this run.
    """
    found = checkpoints(folder)
    states = [json.loads((path / "state.json").read_text()) for path in reversed(found) if _is_whole(path)]
    own = next((state for state in states if state.get("run_id") == number), None)
    if own is not None:
        return dict(own["identity"])
    if states:
        others = ", ".join(sorted({str(state.get("run_id")) for state in states}))
        raise ConfigurationError(
            f"resume: {folder} is of run {others} and config.yaml of run {number}: put the files of one run together"
        )
    if found:
        raise ConfigurationError(f"resume: {folder} holds no checkpoint that is whole")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, from the first round to the last."""
    rounds = {path: re.fullmatch(r"round-([0-9]+)", path.name) for path in folder.glob("round-*")}
    return sorted((path for path, match in rounds.items() if match), key=lambda path: int(path.name[6:]))


def _write_all(federation: Federation, folder: Path, beside: Sequence[Path]) -> None:
    """Write a checkpoint's files."""
    server = {
        f"strategy.{name}": value.contiguous() for name, value in federation.server.state_dict().items()
    }
    server |= {f"arrays.{name}": value for name, value in vectors(federation.arrays).items()}
    server["buffers"] = federation.gateway.buffers
    rounds: dict[int, tuple[int, int | None]] = {}

    def of_clients() -> Iterator[Mapping[str, Tensor]]:
        for client, held in federation.grid.states():
            rounds[client] = (held.round, held.pending_round)
            parts = {"accepted": held.accepted, "pending": held.pending}
            yield {f"{client}.{part}.{name}": v for part, those in parts.items() for name, v in those.items()}

    _write(folder, "server", ({name: value} for name, value in server.items()))
    _write(folder, "clients", of_clients())
    state = {
        "run_id": run_id(federation.identity),
        "identity": dict(federation.identity),
        "round": federation.round,
        "seconds": federation.seconds,
        "traffic": asdict(federation.gateway.traffic),
        "accepted": federation.gateway.accepted,
        "clients": rounds,
    }
    if federation.account is not None:
        state["privacy"] = federation.account.state()
    federation.load_weights()
    _save(federation.model.state_dict(), folder / "model.safetensors")
    for file in beside:
        shutil.copyfile(file, folder / file.name)
    (folder / "state.json").write_text(json.dumps(state))
    (folder / SUMS).write_text(_sums(folder, sorted(path.name for path in folder.iterdir())), newline="\n")


def _sums(folder: Path, names: Iterable[str]) -> str:
    return "".join(f"{digest(folder / name)}  {name}\n" for name in names)


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint is there, every bit as it was written."""
    try:
        names = _names(folder)
        return "state.json" in names and (folder / SUMS).read_text() == _sums(folder, names)
    except (OSError, ValueError):
        return False


def _names(folder: Path) -> list[str]:
    """Names of a checkpoint's files."""
    return re.findall(r"  ([a-z0-9.-]+)\n", (folder / SUMS).read_text())


def _restore(federation: Federation, folder: Path) -> None:
    """Read the server's part, and let the federation have it; then the clients', file by file."""
    state = json.loads((folder / "state.json").read_text())
    if state["run_id"] != run_id(federation.identity):
        raise ValueError("it is of another run")
    server = {name: tensor for part in _read(folder, "server") for name, tensor in part.items()}
    arrays, traffic = record(_part(server, "arrays")), Traffic(**state["traffic"])
    round_number, seconds, buffers = int(state["round"]), float(state["seconds"]), server["buffers"]
    weights = vectors(arrays)[WEIGHTS], vectors(federation.arrays)[WEIGHTS]
    if weights[0].shape != weights[1].shape or buffers.shape != federation.gateway.buffers.shape:
        raise ValueError("it is of another model")
    federation.server.load_state_dict(_part(server, "strategy"))
    federation.gateway.accepted = {int(client): last for client, last in state["accepted"].items()}
    federation.arrays, federation.gateway.buffers, federation.gateway.traffic = arrays, buffers, traffic
    federation.round, federation.seconds = round_number, seconds
    if federation.account is not None:
        federation.account.restore(state["privacy"])
    federation.grid.restore(_states(folder, state["clients"]))


def _states(folder: Path, rounds: Mapping[str, tuple[int, int | None]]) -> Iterator[tuple[int, ClientState]]:
    """What each client remembered, a file at a time."""
    nothing = set(rounds)
    for tensors in _read(folder, "clients"):
        for client, keys in groupby(sorted(tensors), lambda key: key.partition(".")[0]):
            held: dict[str, dict[str, Tensor]] = {"accepted": {}, "pending": {}}
            for key in keys:
                _, part, name = key.split(".", 2)
                held[part][name] = tensors[key]
            accepted, pending = rounds[client]
            yield int(client), ClientState(accepted, held["accepted"], pending, held["pending"])
            nothing.remove(client)
    for client in nothing:
        accepted, pending = rounds[client]
        yield int(client), ClientState(accepted, {}, pending, {})


def _write(folder: Path, name: str, groups: Iterable[Mapping[str, Tensor]]) -> None:
    """Write tensors in files of about `PART` bytes; those of a group lie in one."""
    part: dict[str, Tensor] = {}
    number = size = 0
    for tensors in groups:
        part |= {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        size += sum(tensor.nbytes for tensor in tensors.values())
        if size >= PART:
            _save(part, folder / f"{name}-{number:04d}.safetensors")
            part, number, size = {}, number + 1, 0
    if part:
        _save(part, folder / f"{name}-{number:04d}.safetensors")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """As `save_file`, but what the system refuses is an OSError.

    Raises:
        OSError: The file cannot be written.
    """
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise


def _read(folder: Path, name: str) -> Iterator[dict[str, Tensor]]:
    """What `_write` wrote, file by file."""
    for file in _names(folder):
        if file.startswith(f"{name}-"):
            yield load_file(folder / file)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}."): v for n, v in tensors.items() if n.startswith(f"{prefix}.")}
