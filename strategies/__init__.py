"""Federated algorithms: server halves are Flower strategies, client halves solve a cohort's local problems."""

from strategies.base.client import Batch, ClientHalf, Cohort, Instruction, Update
from strategies.base.layout import Layout
from strategies.local_sgd import LocalSgd
from strategies.pisa import Ledger, Penalty, Pisa, PisaClient, PisaLocalClient

__all__ = [
    "Batch",
    "ClientHalf",
    "Cohort",
    "Instruction",
    "Layout",
    "Ledger",
    "LocalSgd",
    "Penalty",
    "Pisa",
    "PisaClient",
    "PisaLocalClient",
    "Update",
]
