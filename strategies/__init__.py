"""Federated algorithms: server halves are Flower strategies, client halves solve a stack's local problems."""

from strategies.base.beyond_gradients import Forward, Probe, Term
from strategies.base.client import Batch, ClientHalf, Instruction, Stack, Update
from strategies.base.layout import Layout
from strategies.base.server import ServerHalf
from strategies.base.transform import Transform
from strategies.local_sgd import LocalSgd
from strategies.pisa import Ledger, Penalty, Pisa, PisaClient, PisaLocalClient

__all__ = [
    "Batch",
    "ClientHalf",
    "Forward",
    "Instruction",
    "Layout",
    "Ledger",
    "LocalSgd",
    "Penalty",
    "Pisa",
    "PisaClient",
    "PisaLocalClient",
    "Probe",
    "ServerHalf",
    "Stack",
    "Term",
    "Transform",
    "Update",
]
