"""An object for processes that start anew: arrays that are only read go into shared memory, all else is
pickled once.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torch.multiprocessing  # has `multiprocessing` send tensors by where their shared memory lies
from numpy.typing import NDArray
from torch import Tensor

from pisa_fl.clients.executor import tensor

CPU = torch.device("cpu")


class PackingError(Exception):
    """An object cannot be sent to another process."""


@dataclass(frozen=True)
class Packed:
    """An object as `multiprocessing` sends it at little cost.

    Attributes:
        code: Its pickle, uint8 in shared memory.
        arrays: Those that are only read, in shared memory.
    """

    code: Tensor
    arrays: list[Tensor]

    def unpack(self) -> Any:
        """The object."""
        return _Unpickler(self).load()


def pack(thing: Any, read_only: Iterable[Tensor | NDArray[Any]]) -> Packed:
    """Pack an object.

    Args:
        thing: The object.
        read_only: Arrays somewhere in it that are large, and that nobody writes to.

    Raises:
        PackingError: Something in it cannot be pickled, or is of the main program, which others cannot import.
    """
    file = BytesIO()
    pickler = _Pickler(file, read_only)
    try:
        pickler.dump(thing)
    except Exception as error:  # whatever the object's own code raises
        raise PackingError(" ".join(str(error).split()) or type(error).__name__) from error
    return Packed(torch.frombuffer(file.getbuffer(), dtype=torch.uint8).share_memory_(), pickler.arrays)


class _Pickler(pickle.Pickler):
    def __init__(self, file: BytesIO, read_only: Iterable[Tensor | NDArray[Any]]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        different = list({id(array): array for array in read_only}.values())
        self._positions = {id(array): position for position, array in enumerate(different)}
        self.arrays = [
            (array if isinstance(array, Tensor) else tensor(array, CPU)).share_memory_()
            for array in different
        ]

    def persistent_id(self, obj: Any) -> tuple[int, bool] | None:
        """The position of an array among the shared ones, and whether it is NumPy's."""
        position = self._positions.get(id(obj))
        return None if position is None else (position, isinstance(obj, np.ndarray))

    def reducer_override(self, obj: Any) -> Any:
        """Refuse what another process does not find."""
        if (inspect.isclass(obj) or inspect.isfunction(obj)) and obj.__module__ == "__main__":
            raise pickle.PicklingError(f"{obj.__qualname__} is defined in the main program, and in no module")
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: Packed) -> None:
        super().__init__(BytesIO(packed.code.numpy().tobytes()))
        self._arrays = packed.arrays

    def persistent_load(self, pid: tuple[int, bool]) -> Tensor | NDArray[Any]:
        """A shared array by its position."""
        position, for_numpy = pid
        return self._arrays[position].numpy() if for_numpy else self._arrays[position]
