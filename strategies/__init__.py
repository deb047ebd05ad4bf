"""Federated algorithms: server halves are Flower strategies, client halves solve a stack's local problems."""

from strategies.augmented_sgd import AugmentedSgd
from strategies.base.beyond_gradients import Forward, Probe, Term
from strategies.base.client import Batch, ClientHalf, Instruction, Stack, Update
from strategies.base.layout import Layout
from strategies.base.server import ServerHalf
from strategies.base.transform import Transform
from strategies.ditto import DittoClient
from strategies.fedadmm import FedAdmm
from strategies.fedcm import FedCm, FedCmClient
from strategies.feddyn import FedDyn
from strategies.fedlc import FedLcClient
from strategies.fednova import FedNova, FedNovaClient
from strategies.fedpac import FedPac, FedPacClient
from strategies.fedper import FedPer, FedPerClient
from strategies.fedpm import FedPm, FedPmClient
from strategies.fedrep import FedRepClient
from strategies.fedrs import FedRsClient
from strategies.fedsmoo import FedSmoo, FedSmooClient
from strategies.fedvarp import FedVarp
from strategies.local_sgd import LocalSgd
from strategies.mifa import Mifa
from strategies.moon import MoonClient
from strategies.pisa import (
    Ledger,
    Penalty,
    Pisa,
    PisaClient,
    PisaLocalClient,
    PisaSummed,
    PisaSummedClient,
)
from strategies.scaffold import Scaffold, ScaffoldClient

__all__ = [
    "AugmentedSgd",
    "Batch",
    "ClientHalf",
    "DittoClient",
    "FedAdmm",
    "FedCm",
    "FedCmClient",
    "FedDyn",
    "FedLcClient",
    "FedNova",
    "FedNovaClient",
    "FedPac",
    "FedPacClient",
    "FedPer",
    "FedPerClient",
    "FedPm",
    "FedPmClient",
    "FedRepClient",
    "FedRsClient",
    "FedSmoo",
    "FedSmooClient",
    "FedVarp",
    "Forward",
    "Instruction",
    "Layout",
    "Ledger",
    "LocalSgd",
    "Mifa",
    "MoonClient",
    "Penalty",
    "Pisa",
    "PisaClient",
    "PisaLocalClient",
    "PisaSummed",
    "PisaSummedClient",
    "Probe",
    "Scaffold",
    "ScaffoldClient",
    "ServerHalf",
    "Stack",
    "Term",
    "Transform",
    "Update",
]
