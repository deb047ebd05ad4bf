"""Preconditioners of PISA's local step, one file each, behind the protocol of `base`."""

from strategies.preconditioners.base import Preconditioner
from strategies.preconditioners.identity import Identity
from strategies.preconditioners.kronecker import Kronecker
from strategies.preconditioners.newton_schulz import NewtonSchulz, Spectral
from strategies.preconditioners.second_moment import SecondMoment

__all__ = ["Identity", "Kronecker", "NewtonSchulz", "Preconditioner", "SecondMoment", "Spectral"]
