"""How examples are dealt to clients: Flower partitioners, and partitions as plain indices."""

from partitioners.base import IndexPartitioner, Partition
from partitioners.dirichlet import DirichletPartitioner, QuantityPartitioner
from partitioners.feature_noise import FeatureNoisePartitioner
from partitioners.from_file import FromFilePartitioner
from partitioners.iid import IidPartitioner
from partitioners.label_skew import LabelSkewPartitioner
from partitioners.partition import check, deal, load, save
from partitioners.picture import draw
from partitioners.shards import ShardsPartitioner

__all__ = [
    "DirichletPartitioner",
    "FeatureNoisePartitioner",
    "FromFilePartitioner",
    "IidPartitioner",
    "IndexPartitioner",
    "LabelSkewPartitioner",
    "Partition",
    "QuantityPartitioner",
    "ShardsPartitioner",
    "check",
    "deal",
    "draw",
    "load",
    "save",
]
