"""pisa-fl: federated learning on skewed data, PISA beside FedAvg, FedProx and others.

from pisa_fl import compose, run

result = run(compose("strategy=sisa", "partition=dirichlet", "partition.alpha=0.1", "rounds=20"))
print(result.summary["final_accuracy"])
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pisa_fl.namesakes import find_own_first

if TYPE_CHECKING:
    from pisa_fl.config import ConfigurationError, compose
    from pisa_fl.data import ImageData
    from pisa_fl.engines.local import LocalGrid
    from pisa_fl.federation import Federation
    from pisa_fl.from_config import prepare
    from pisa_fl.results.observer import Observer
    from pisa_fl.results.result import Result
    from pisa_fl.results.runs import Runs, load_runs
    from pisa_fl.runner import load_model, resume, run

__all__ = [
    "ConfigurationError",
    "Federation",
    "ImageData",
    "LocalGrid",
    "Observer",
    "Result",
    "Runs",
    "compose",
    "load_model",
    "load_runs",
    "prepare",
    "resume",
    "run",
]

# PyTorch's threads wait for each other busily unless told otherwise, before it is loaded: with another process on
# the same cores a round then takes many times as long
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

find_own_first()

_HOMES = {
    "ConfigurationError": "config",
    "Federation": "federation",
    "ImageData": "data",
    "LocalGrid": "engines.local",
    "Observer": "results.observer",
    "Result": "results.result",
    "Runs": "results.runs",
    "compose": "config",
    "load_model": "runner",
    "load_runs": "results.runs",
    "prepare": "from_config",
    "resume": "runner",
    "run": "runner",
}


def __dir__() -> list[str]:
    """The public names, whether or not they have been asked for."""
    return sorted({*__all__, "__version__", *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    """Import the public names when they are asked for: `pisa-fl --help` needs none of them."""
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("pisa-fl")
    if name not in _HOMES:
        raise AttributeError(f"module 'pisa_fl' has no attribute '{name}'")
    return getattr(import_module(f"pisa_fl.{_HOMES[name]}"), name)
