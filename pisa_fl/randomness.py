"""Every random draw has an address: (seed, purpose, and where it falls: round, client, ...).

Nothing draws from global state, so a draw does not depend on what was drawn before it: runs repeat bit
for bit whatever the engine, the number of workers or the round at which a run was resumed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from zlib import crc32

import numpy as np
import torch

from strategies.base.forking import after_fork


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


_CPU = torch.device("cpu")
_drawing = threading.RLock()


def _renew_lock() -> None:
    """A forked process has none of the threads that may hold the lock."""
    global _drawing
    _drawing = threading.RLock()


after_fork(_renew_lock)


@contextmanager
def global_generators(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """PyTorch's global generators, seeded, for what draws from nothing else: initial weights, dropout and its like.

    Meanwhile they belong to this thread; afterwards they are as they were.

    Args:
        seed: In [0, 2^63).
        device: The one that draws; the CPU's generator is seeded in any case.
    """
    gpu = device.type == "cuda"
    with _drawing:
        before = torch.get_rng_state()
        before_on_gpu = torch.cuda.get_rng_state(device) if gpu else None
        try:
            torch.default_generator.manual_seed(seed)
            if gpu:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
        finally:
            torch.set_rng_state(before)
            if before_on_gpu is not None:
                torch.cuda.set_rng_state(before_on_gpu, device)
