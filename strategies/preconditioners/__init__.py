"""Preconditioners of PISA's local step, one file each, behind the protocol of `base`."""

from strategies.preconditioners.adabelief import AdaBelief
from strategies.preconditioners.adafactor import Adafactor
from strategies.preconditioners.auon import Auon
from strategies.preconditioners.base import Preconditioner
from strategies.preconditioners.dct_low_rank import DctLowRank
from strategies.preconditioners.fismo import Fismo
from strategies.preconditioners.frugal import Frugal
from strategies.preconditioners.identity import Identity
from strategies.preconditioners.kfac import Kfac
from strategies.preconditioners.kronecker import Kronecker
from strategies.preconditioners.mfac import Mfac
from strategies.preconditioners.muon import Muon
from strategies.preconditioners.newton_schulz import NewtonSchulz, Spectral
from strategies.preconditioners.polar_grad import PolarGrad
from strategies.preconditioners.second_moment import SecondMoment
from strategies.preconditioners.sgd_sai import SgdSai
from strategies.preconditioners.shampoo import Shampoo
from strategies.preconditioners.swan import Swan

__all__ = [
    "AdaBelief",
    "Adafactor",
    "Auon",
    "DctLowRank",
    "Fismo",
    "Frugal",
    "Identity",
    "Kfac",
    "Kronecker",
    "Mfac",
    "Muon",
    "NewtonSchulz",
    "PolarGrad",
    "Preconditioner",
    "SecondMoment",
    "SgdSai",
    "Shampoo",
    "Spectral",
    "Swan",
]
