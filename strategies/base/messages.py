"""Flat vectors in Flower messages: writing, reading, checking.

A train message carries one ArrayRecord `arrays` and one ConfigRecord `config`; a reply one ArrayRecord
`arrays` and one MetricRecord `metrics`, as Flower's own strategies use them. Arrays are one-dimensional
float32: `weights` (d,) and, for a model with running statistics, `buffers` (b,), then whatever the
algorithm adds, which may be whole numbers too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from math import prod
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

ARRAYS, CONFIG, METRICS, STATE = "arrays", "config", "metrics", "state"
WEIGHTS, BUFFERS, GRADIENT, DUAL = "weights", "buffers", "gradient", "dual"
MEASURE = "measure"
ROUND, ACCEPTED = "server-round", "accepted-round"
EXAMPLES, LOSS, DIFFERENTIATED = "num-examples", "train-loss", "examples-differentiated"

CLIENTS = "clients"
"""Who is in a sum, in the reply that stands for all of them; under `EXAMPLES` what each of them has."""

STATE_LOST = 1001
"""Code of the error of a client whose state is not the one that the ledger accepted."""

LARGEST = 1e12
"""The greatest number that a message may hold: what is computed from greater ones, squares above all, overflows."""

WHOLE = (torch.int8, torch.int16, torch.int32)
"""Types of whole numbers that replies hold as they are; everything else becomes float32."""

_HEADER = 128
"""Bytes of NumPy's header of a vector or matrix."""


@dataclass(frozen=True)
class Field:
    """What an array of a message must be.

    Attributes:
        shape: Its shape; a number stands for the length of a vector.
        minimum: The smallest value it may hold.
        types: NumPy's names of the types it may have.
        largest: The greatest size of a value.
        wrong: Why values must be refused though all else is right, or None.
    """

    shape: int | tuple[int, ...]
    minimum: float = -np.inf
    types: tuple[str, ...] = ("float32",)
    largest: float = LARGEST
    wrong: Callable[[NDArray[Any]], str | None] | None = None

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The shape as a tuple."""
        return (self.shape,) if isinstance(self.shape, int) else self.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.dimensions)


def averaged(shape: int, minimum: float = -np.inf) -> Field:
    """The field of a vector whose averages are to be sent on, rounded as they are."""
    return Field(shape, minimum, largest=LARGEST / 2)


def squared(shape: int) -> Field:
    """The field of a vector whose squares, or products with a penalty, are to be sent on."""
    return Field(shape, largest=math.sqrt(LARGEST) / 2)


def out_of_range(vectors: Mapping[str, Tensor]) -> str | None:
    """The name of a vector that no message may hold, for it is not finite or too large; None if there is none."""
    for name, vector in vectors.items():
        if vector.numel() and not float(vector.abs().max()) <= LARGEST:
            return name
    return None


class RoundError(ValueError):
    """What a round gave is not finite, or beyond what messages may hold; whoever raises it kept nothing of it."""


class TensorArray(Array):
    """An Array that holds a tensor on the CPU, and becomes bytes only when it has to leave the process.

    Args:
        tensor: Its values, which nobody may write to any more.
        norm: Their Euclidean norm, if it is known: it bounds them all.
        moved: Their Euclidean distance from what the instruction held under their name, if it is known.
    """

    __qualname__ = Array.__qualname__  # Flower writes it into what it sends

    def __init__(self, tensor: Tensor, norm: float = math.inf, moved: float | None = None) -> None:
        self.tensor = tensor
        self.norm, self.moved = norm, moved
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.shape, self.stype = tuple(tensor.shape), "numpy.ndarray"

    @cached_property
    def data(self) -> bytes:  # type: ignore[override]
        """The values in NumPy's format."""
        return Array(self.tensor.numpy()).data

    def numpy(self) -> NDArray[Any]:
        """A copy of the values."""
        return self.tensor.numpy().copy()

    def own(self) -> None:
        """Copy the values out of memory that is about to be used for others."""
        self.tensor = self.tensor.clone()

    def __reduce__(self) -> tuple[Callable[..., Array], tuple[Any, ...]]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


def sendable(stack: Tensor) -> Tensor:
    """What a client half answers as a reply may hold it: on the CPU, and of a type that NumPy has."""
    return stack.detach().to("cpu", stack.dtype if stack.dtype in WHOLE else torch.float32)


def record(vectors: Mapping[str, Tensor]) -> ArrayRecord:
    """An ArrayRecord of float32 arrays from tensors on any device, which nobody may write to any more."""
    arrays = ArrayRecord()
    for name, vector in vectors.items():
        arrays[name] = TensorArray(vector.detach().to("cpu", torch.float32))
    return arrays


def vectors(arrays: ArrayRecord, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The float32 tensors of an ArrayRecord, which may be those of its sender: not to be written to."""
    return {name: tensor(array).to(device, torch.float32) for name, array in arrays.items()}


def tensor(array: Array) -> Tensor:
    """The values of an array, which may be those of its sender: not to be written to."""
    return array.tensor if isinstance(array, TensorArray) else torch.tensor(read(array))


def payload(arrays: ArrayRecord) -> int:
    """Bytes that the arrays are on their way."""
    return sum(
        _HEADER + array.tensor.nbytes if isinstance(array, TensorArray) else len(array.data)
        for array in arrays.values()
    )


def read(array: Array) -> NDArray[Any]:
    """The values of an array, not to be written to, without a copy.

    Whoever wrote it may mean harm: no more memory is used than the message itself has, and no object is made.

    Raises:
        ValueError: It is not what its header says, or no plain array of numbers.
    """
    if isinstance(array, TensorArray):
        return array.tensor.numpy()
    stream = BytesIO(array.data)
    if array.stype != "numpy.ndarray" or np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("it is not in NumPy's format 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    start = stream.tell()
    plain = dtype.kind in "fiu" and dtype.isnative
    if not plain or len(array.data) != start + prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(array.data)} bytes are no {dtype}{list(shape)}")
    values = np.frombuffer(array.data, dtype, offset=start)
    return values.reshape(shape, order="F" if fortran_order else "C")


def arrays_of(content: RecordDict) -> ArrayRecord:
    """The arrays of a message that was checked."""
    arrays = content[ARRAYS]  # much cheaper than Flower's `array_records`
    assert isinstance(arrays, ArrayRecord)
    return arrays


def metrics_of(content: RecordDict) -> MetricRecord:
    """The metrics of a reply that was checked."""
    metrics = content[METRICS]
    assert isinstance(metrics, MetricRecord)
    return metrics


def config_of(content: RecordDict) -> dict[str, Any]:
    """The numbers and texts of an instruction; empty if it carries none."""
    config = content.get(CONFIG)  # much cheaper than Flower's `config_records`
    return dict(config) if isinstance(config, ConfigRecord) else {}


def members(content: RecordDict) -> dict[int, int]:
    """Who is in the sum that a reply is -> examples of each."""
    said = config_of(content)
    return dict(zip(said[CLIENTS], said[EXAMPLES], strict=True))


def integer(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of a ConfigRecord or MetricRecord; a KeyError if it is missing without a default."""
    return int(values[key] if default is None else values.get(key, default))


def real(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number of a ConfigRecord or MetricRecord; a KeyError if it is missing without a default."""
    return float(values[key] if default is None else values.get(key, default))


def problem(arrays: ArrayRecord, expected: Mapping[str, Field]) -> str | None:
    """Why a message's arrays must be refused, or None if they are as expected."""
    if set(arrays) != set(expected):
        return f"arrays {sorted(arrays)} where {sorted(expected)} were expected"
    for name, field in expected.items():
        array = arrays[name]
        if tuple(array.shape) != field.dimensions:
            return f"array '{name}' has shape {tuple(array.shape)}, expected {field.dimensions}"
        if array.dtype not in field.types:
            return f"array '{name}' has type {array.dtype}, expected {' or '.join(field.types)}"
        try:
            values = read(array)
        except Exception as error:  # whatever a stranger's bytes make the parser raise
            return f"array '{name}' cannot be read: {error}"
        if values.shape != field.dimensions or values.dtype.name != array.dtype:
            return f"array '{name}' holds {values.dtype}{values.shape}, not what it says"
        bounded = isinstance(array, TensorArray) and array.norm <= field.largest
        largest = field.largest
        if values.size and not bounded and not (values.min() >= -largest and values.max() <= largest):
            return f"array '{name}' holds NaN or infinite values, or some beyond {largest:g}"
        if values.size and field.minimum > -np.inf and values.min() < field.minimum:
            return f"array '{name}' holds values below {field.minimum}"
        if field.wrong and (why := field.wrong(values)):
            return f"array '{name}' {why}"
    return None
