"""Every random draw has an address: (seed, purpose, and where it falls: round, client, ...).

Nothing draws from global state, so a draw does not depend on what was drawn before it: runs repeat bit
for bit whatever the engine, the number of workers or the round at which a run was resumed.
"""

from __future__ import annotations

from hashlib import blake2b
from zlib import crc32

import numpy as np
import torch


def numpy_generator(seed: int, purpose: str, *where: int) -> np.random.Generator:
    """NumPy's generator for one address: `default_rng([seed, crc32(purpose), *where])`."""
    return np.random.default_rng([seed, crc32(purpose.encode()), *where])


def torch_seed(seed: int, purpose: str, *where: int) -> int:
    """A seed for PyTorch's generators for one address, in [0, 2^63); cheap, as many clients may need one each."""
    address = ",".join(map(str, (seed, purpose, *where)))
    return int.from_bytes(blake2b(address.encode(), digest_size=8).digest()) >> 1


def torch_generator(seed: int, purpose: str, *where: int) -> torch.Generator:
    """PyTorch's CPU generator for one address."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, *where))
