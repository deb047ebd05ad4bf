"""What makes a run the one that it is: everything that its bits follow from, as short texts by the name of each part.

The parts are noted while a federation is built. A run that goes on compares each with what its checkpoint knows, before
the next is built on it. Where files lie, which engine carries the messages and how many rounds there are to be is no
part of it, so that a run has the same id wherever it is repeated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from partitioners import Partition
from pisa_fl.config import PATHS, ConfigurationError

SETTINGS = (
    "seed",
    "clients",
    "participation",
    "batch_size",
    "data.augment",
    "data.client_test",
    "model",
    "strategy",
    "task",
)
"""Keys of the configuration that the bits follow from, those below them included."""

ELSEWHERE = ("rounds", "state")
"""Last parts of keys below them that only say how long a run is, or where memory comes from."""

DEAL = "partition"
"""Key of what the deal followed from; the id only knows the deal, whether it was drawn or read from a file."""

SENTENCES = {
    "data": "the data are not those of the run: put them back as they were",
    "deal": "partition.json is not what was dealt: put it back as it was",
    "tensors": "the model's tensors are not those of the run: it has other names, shapes or types than at its start",
    "weights": "initial.safetensors does not hold the weights that the run began with: put it back as it was",
}


class Identity:
    """Parts that are noted, and compared with those that are known.

    Args:
        known: Parts of the run that goes on; None for a new one.
    """

    def __init__(self, known: Mapping[str, str] | None = None) -> None:
        self.parts: dict[str, str] = {}
        self._known = known

    def note(self, parts: Mapping[str, str]) -> None:
        """Note parts.

        Raises:
            ConfigurationError: One is not what is known of the run; the sentence names it.
        """
        self.parts |= parts
        for name, value in parts.items():
            if self._known is not None and self._known.get(name) != value:
                was = self._known.get(name, "not there")
                changed = f"{name} is {value} in config.yaml and was {was} when the run began: set it back"
                raise ConfigurationError(f"resume: {SENTENCES.get(name, changed)}")


@contextmanager
def expected(name: str) -> Iterator[None]:
    """Whatever cannot be read meanwhile is not that part of the run.

    Raises:
        ConfigurationError: Something cannot be read.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigurationError(f"resume: {SENTENCES[name]}") from error


def run_id(parts: Mapping[str, str]) -> str:
    """The run's id: 12 hexadecimal digits."""
    bits = {name: value for name, value in parts.items() if not name.startswith(f"{DEAL}.")}
    return hashlib.sha256(json.dumps(bits, sort_keys=True).encode()).hexdigest()[:12]


def of_settings(config: DictConfig) -> dict[str, str]:
    """The parts of the configuration, by dotted key."""
    # not every engine has the key, and those without compute so
    parts = _flat("engine.precision", OmegaConf.select(config, "engine.precision", default="float32"))
    private = ["privacy"] if OmegaConf.select(config, "privacy") is not None else []
    for key in (*SETTINGS, *private, DEAL):
        value = OmegaConf.select(config, key)
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        parts |= _flat(key, plain)
    if config.get("secure") is not None or OmegaConf.select(config, "engine.sums"):  # which rounds otherwise
        parts["secure"] = "sums"
    return {
        key: value
        for key, value in parts.items()
        if key.rpartition(".")[2] not in ELSEWHERE and key not in PATHS
    }


def of_deal(partition: Partition, noise: Mapping[int, float]) -> dict[str, str]:
    """The part of the deal and of the noise on each client's inputs; none if clients bring their data."""
    if not partition:
        return {}
    known = hashlib.sha256(json.dumps([[len(rows) for rows in partition], sorted(noise.items())]).encode())
    known.update(np.concatenate(partition).astype("<i8").tobytes())
    return {"deal": known.hexdigest()}


def of_tensors(model: nn.Module) -> dict[str, str]:
    """The part of a model's tensors: their names, shapes and types, and which are trained."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lines = [f"{n} {list(t.shape)} {t.dtype} {n in trained}" for n, t in model.state_dict().items()]
    return {"tensors": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def of_weights(model: nn.Module) -> dict[str, str]:
    """The part of a model's present values."""
    known = hashlib.sha256()
    for tensor in model.state_dict().values():
        known.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {"weights": known.hexdigest()}


def _flat(key: str, value: object) -> dict[str, str]:
    """Values as JSON, by dotted key."""
    if isinstance(value, Mapping) and value:
        return {k: v for name, below in value.items() for k, v in _flat(f"{key}.{name}", below).items()}
    return {key: json.dumps(value)}
