"""Preconditioners of PISA's local step, one file each, behind the protocol of `base`."""

from strategies.preconditioners.adabelief import AdaBelief
from strategies.preconditioners.adafactor import Adafactor
from strategies.preconditioners.base import Preconditioner
from strategies.preconditioners.identity import Identity
from strategies.preconditioners.kronecker import Kronecker
from strategies.preconditioners.newton_schulz import NewtonSchulz, Spectral
from strategies.preconditioners.second_moment import SecondMoment
from strategies.preconditioners.sgd_sai import SgdSai
from strategies.preconditioners.shampoo import Shampoo

__all__ = [
    "AdaBelief",
    "Adafactor",
    "Identity",
    "Kronecker",
    "NewtonSchulz",
    "Preconditioner",
    "SecondMoment",
    "SgdSai",
    "Shampoo",
    "Spectral",
]
