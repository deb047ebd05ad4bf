"""Where the noise comes from: the run's seed, or the operating system."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pisa_fl.randomness import torch_generator

BITS = 53
"""Of a number from the operating system: as many as double precision holds."""


@dataclass(frozen=True)
class Draws:
    """Random numbers of one address, one after the other.

    Attributes:
        generator: Where they come from; None: the operating system.
    """

    generator: torch.Generator | None

    def uniform(self, count: int) -> Tensor:
        """Numbers from [0, 1), (count,), double precision."""
        if self.generator is not None:
            return torch.rand(count, dtype=torch.float64, generator=self.generator)
        return _from_system(count)

    def normal(self, count: int) -> Tensor:
        """Numbers of mean 0 and variance 1, (count,)."""
        if self.generator is not None:
            return torch.randn(count, dtype=torch.float64, generator=self.generator).float()
        return torch.special.ndtri(_from_system(count) + 0.5**BITS / 2).float()


@dataclass(frozen=True)
class Randomness:
    """Draws by their address.

    Attributes:
        kind: `seed`: they follow from the run's; `system`: the operating system's, which nobody can repeat.
        seed: The run's.
    """

    kind: Literal["seed", "system"]
    seed: int

    def at(self, purpose: str, *where: int) -> Draws:
        """The draws of one address."""
        return Draws(torch_generator(self.seed, purpose, *where) if self.kind == "seed" else None)


def _from_system(count: int) -> Tensor:
    whole = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(64 - BITS)
    return torch.from_numpy(whole.astype(np.float64)) * 0.5**BITS
