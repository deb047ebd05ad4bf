"""How examples are dealt to clients: Flower partitioners, and partitions as plain indices.

Whoever takes a partitioner from this package gets one of `flwr_datasets`' kind. The configuration names the modules
instead: a run only deals, and saves the second that `flwr_datasets` takes to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from partitioners.base import Partition
from partitioners.partition import check, deal, load, save, save_counts
from partitioners.picture import draw

if TYPE_CHECKING:
    from partitioners.base import IndexPartitioner
    from partitioners.dirichlet import DirichletPartitioner, QuantityPartitioner
    from partitioners.feature_noise import FeatureNoisePartitioner
    from partitioners.from_file import FromFilePartitioner
    from partitioners.iid import IidPartitioner
    from partitioners.label_skew import LabelSkewPartitioner
    from partitioners.natural import NaturalPartitioner
    from partitioners.shards import ShardsPartitioner

__all__ = [
    "DirichletPartitioner",
    "FeatureNoisePartitioner",
    "FromFilePartitioner",
    "IidPartitioner",
    "IndexPartitioner",
    "LabelSkewPartitioner",
    "NaturalPartitioner",
    "Partition",
    "QuantityPartitioner",
    "ShardsPartitioner",
    "check",
    "deal",
    "draw",
    "load",
    "save",
    "save_counts",
]

_HOMES = {
    "DirichletPartitioner": "dirichlet",
    "FeatureNoisePartitioner": "feature_noise",
    "FromFilePartitioner": "from_file",
    "IidPartitioner": "iid",
    "IndexPartitioner": "base",
    "LabelSkewPartitioner": "label_skew",
    "NaturalPartitioner": "natural",
    "QuantityPartitioner": "dirichlet",
    "ShardsPartitioner": "shards",
}


def __dir__() -> list[str]:
    """The public names, whether or not they have been asked for."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    """Import a partitioner when it is asked for, and have Flower know it for one of its own."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'partitioners' has no attribute '{name}'")
    from flwr_datasets.partitioner import Partitioner

    from partitioners import base

    Partitioner.register(base.IndexPartitioner)
    return getattr(import_module(f"partitioners.{_HOMES[name]}"), name)
