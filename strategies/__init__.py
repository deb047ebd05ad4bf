"""Federated algorithms: server halves are Flower strategies, client halves solve a cohort's local problems."""

from strategies.client import Batch, ClientHalf, Cohort, Instruction, Update
from strategies.layout import Layout
from strategies.ledger import Ledger
from strategies.local_sgd import LocalSgd
from strategies.penalty import Penalty
from strategies.pisa import Pisa, PisaClient
from strategies.pisa_local import PisaLocalClient

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
