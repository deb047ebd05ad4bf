"""Checkpoints: everything a run needs to go on with the same bits, complete or not there at all.

`checkpoint/round-000050/` holds `server-*.safetensors` (weights, ledger and whatever else the strategy keeps),
`clients-*.safetensors` (their states), in parts so that writing them takes little memory, and `state.json` (round,
counters, and the SHA-256 of the other files). A folder is written under a temporary name and renamed; a damaged one is
passed over for the one before it. Randomness needs no saving: every draw has an address (`pisa_fl.randomness`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy import Strategy
from safetensors.torch import load_file, save_file
from torch import Tensor

from pisa_fl.config import ConfigurationError
from pisa_fl.federation import Federation
from pisa_fl.files import digest
from pisa_fl.gateway import Traffic
from pisa_fl.host import ClientState
from strategies.messages import record, vectors

log = logging.getLogger(__name__)

PART = 2**28
"""Bytes of a file, about."""


def save_checkpoint(federation: Federation, folder: Path, keep: int) -> None:
    """Write the federation's state after its present round, and delete all but the last `keep` checkpoints."""
    tensors, numbers = strategy_state(federation.strategy)
    server = {f"strategy.{name}": value for name, value in tensors.items()}
    server |= {f"arrays.{name}": value for name, value in vectors(federation.arrays).items()}
    server["buffers"] = federation.gateway.buffers
    clients: dict[str, Tensor] = {}
    rounds: dict[int, tuple[int, int | None]] = {}
    for client, held in federation.grid.states().items():
        rounds[client] = (held.round, held.pending_round)
        clients |= {f"{client}.accepted.{name}": value for name, value in held.accepted.items()}
        clients |= {f"{client}.pending.{name}": value for name, value in held.pending.items()}
    target = folder / f"round-{federation.round:06d}"
    temporary = folder / f".{target.name}"
    for leftover in (temporary, target):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = {
        "round": federation.round,
        "seconds": federation.seconds,
        "traffic": asdict(federation.gateway.traffic),
        "strategy": numbers,
        "clients": rounds,
        "sha256": _write(temporary, "server", server) | _write(temporary, "clients", clients),
    }
    (temporary / "state.json").write_text(json.dumps(state))
    os.replace(temporary, target)
    for old in sorted(folder.glob("round-*"))[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(federation: Federation, folder: Path) -> None:
    """Bring the federation to the last checkpoint that is whole.

    Raises:
        ConfigurationError: There is none.
    """
    for path in sorted(folder.glob("round-*"), reverse=True):
        try:
            state = json.loads((path / "state.json").read_text())
            if any(digest(path / name) != known for name, known in state["sha256"].items()):
                raise ValueError("its files are not what was written")
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("checkpoint %s is damaged (%s), trying the one before", path.name, error)
            continue
        _restore(federation, state, path)
        return
    raise ConfigurationError(f"resume: {folder} holds no checkpoint that is whole")


def _restore(federation: Federation, state: Mapping[str, Any], path: Path) -> None:
    tensors: dict[str, dict[str, Tensor]] = {"server": {}, "clients": {}}
    for name in state["sha256"]:
        tensors[name.partition("-")[0]] |= load_file(path / name)
    server, clients = tensors["server"], tensors["clients"]
    federation.arrays = record(_part(server, "arrays"))
    federation.gateway.buffers = server["buffers"]
    federation.gateway.traffic = Traffic(**state["traffic"])
    federation.round, federation.seconds = state["round"], state["seconds"]
    load_strategy_state(federation.strategy, _part(server, "strategy"), state["strategy"])
    states = {}
    for client, (accepted, pending) in state["clients"].items():
        held = _part(clients, client)
        states[int(client)] = ClientState(accepted, _part(held, "accepted"), pending, _part(held, "pending"))
    federation.grid.restore(states)


def strategy_state(strategy: Strategy) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What a strategy remembers, as tensors and numbers.

    A strategy with a `state_dict` says so itself. For the others, Flower's among them, it is those attributes
    that are numbers, arrays, or dictionaries of arrays.
    """
    if hasattr(strategy, "state_dict"):
        return {name: value.contiguous() for name, value in strategy.state_dict().items()}, {}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for name, value in vars(strategy).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers[name] = value
        elif isinstance(value, np.ndarray):
            tensors[name] = torch.tensor(value)
        elif isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
            tensors |= {f"{name}/{key}": torch.tensor(v) for key, v in value.items()}
    return tensors, numbers


def load_strategy_state(
    strategy: Strategy, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]
) -> None:
    """Give a strategy back what `strategy_state` took."""
    if hasattr(strategy, "load_state_dict"):
        strategy.load_state_dict(tensors)
        return
    for name, number in numbers.items():
        setattr(strategy, name, number)
    tables: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        attribute, slash, key = name.partition("/")
        if slash:
            tables.setdefault(attribute, {})[key] = tensor.numpy()
        else:
            setattr(strategy, attribute, tensor.numpy())
    for attribute, table in tables.items():
        setattr(strategy, attribute, table)


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write tensors in files of at most about `PART` bytes; the files' names and SHA-256."""
    digests: dict[str, str] = {}
    part: dict[str, Tensor] = {}
    size, left = 0, len(tensors)
    for key, tensor in tensors.items():
        part[key] = tensor.detach().cpu().contiguous()
        size, left = size + tensor.nbytes, left - 1
        if size >= PART or not left:
            file = folder / f"{name}-{len(digests):04d}.safetensors"
            save_file(part, file)
            digests[file.name] = digest(file)
            part, size = {}, 0
    return digests


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}."): v for n, v in tensors.items() if n.startswith(f"{prefix}.")}
