"""Optimizers of clients' local steps, one file each, behind the protocol of `base`."""

from strategies.optimizers.adamw import AdamW
from strategies.optimizers.base import Optimizer
from strategies.optimizers.muon import Muon
from strategies.optimizers.sam import Sam
from strategies.optimizers.sgd import Sgd

__all__ = ["AdamW", "Muon", "Optimizer", "Sam", "Sgd"]
