"""Smaller uploads: a gradient in fewer bytes, and the memory of what was left out.

What a scheme C leaves out of a gradient is not lost but added to the client's next one, *error feedback* (Seide, Fu,
Droppo, Li, Yu, Interspeech 2014; Karimireddy, Rebjock, Stich, Jaggi, ICML 2019, arXiv 1901.09847):

    sent   = C(g_i + e_i)
    e_i    = g_i + e_i - sent              kept by the client, from e_i = 0; it moves on if the server accepts the reply

so that what a client has sent and what it keeps add up to all its gradients, whatever C leaves out. It comes late,
though: where clients differ, g_i does not vanish at the optimum nor does e_i, and the consensus stays away from it by
something in proportion to the step, a little with `bfloat16` and `int8`, much with `topk`; it gets there as the step
shrinks, as with a schedule.

Symbols: d elements of the model in T tensors, g_i `gradient`, e_i `error`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import GRADIENT, Field, squared
from strategies.base.transform import Transform

SchemeName = Literal["none", "bfloat16", "int8", "topk"]

ERROR, SCALE, INDEX = "error", "scale", "index"

LARGEST = squared(1).largest
"""The greatest size of an element, once it is read: as of a gradient that is sent as it is."""


class Compression(Protocol):
    """A scheme C. Its arrays may have leading axes, those of a stack: (..., length)."""

    def fields(self) -> dict[str, Field]:
        """What it sends of a gradient; whatever passes their checks can be decoded, and is finite."""
        ...

    def encode(self, flat: Tensor) -> dict[str, Tensor]:
        """What is sent in place of vectors (..., d)."""
        ...

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The vectors that it stands for, (..., d)."""
        ...


@dataclass(frozen=True)
class Bfloat16:
    """The upper half of every float32, rounded to nearest, ties to even: 2 bytes an element, 8 significant bits."""

    layout: Layout

    def fields(self) -> dict[str, Field]:
        """The bits as whole numbers, for NumPy has no such type."""
        return {GRADIENT: Field(self.layout.size, types=("int16",), wrong=self._wrong)}

    def encode(self, flat: Tensor) -> dict[str, Tensor]:
        """As `Compression`."""
        return {GRADIENT: flat.to(torch.bfloat16).view(torch.int16)}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """As `Compression`."""
        return arrays[GRADIENT].view(torch.bfloat16).float()

    def _wrong(self, values: NDArray[Any]) -> str | None:
        read = self.decode({GRADIENT: torch.tensor(values)})
        if float(read.abs().max()) <= LARGEST:  # which NaN is not
            return None
        return f"stands for NaN or infinite values, or some beyond {LARGEST:g}"


@dataclass(frozen=True)
class Int8:
    """127 steps up and down to the largest element of every tensor, to the nearest: d + 4 T bytes."""

    layout: Layout

    def fields(self) -> dict[str, Field]:
        """The steps, and how large one is in each tensor."""
        return {
            GRADIENT: Field(self.layout.size, minimum=-127, types=("int8",)),
            SCALE: Field(len(self.layout.shapes), minimum=0.0, largest=LARGEST / 127),
        }

    def encode(self, flat: Tensor) -> dict[str, Tensor]:
        """As `Compression`."""
        scale = self.layout.largest(flat) / 127
        least = torch.finfo(scale.dtype).tiny  # a tensor of zeros has steps of none
        steps = flat / self.layout.expand(scale.clamp_min(least))
        return {GRADIENT: steps.round_().to(torch.int8), SCALE: scale}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """As `Compression`."""
        return arrays[GRADIENT] * self.layout.expand(arrays[SCALE])


@dataclass(frozen=True)
class TopK:
    """The ceil(keep d) largest elements, of equal ones the first, and where they are: 8 bytes each.

    Attributes:
        layout: Of the vectors.
        keep: Share of the elements that is sent, in (0, 1].
    """

    layout: Layout
    keep: float

    @cached_property
    def count(self) -> int:
        """Elements that are sent, k."""
        return math.ceil(self.keep * self.layout.size)

    def fields(self) -> dict[str, Field]:
        """The elements, and their ascending positions."""
        last = self.layout.size - 1
        return {
            GRADIENT: squared(self.count),
            INDEX: Field(self.count, minimum=0, types=("int32",), largest=last, wrong=_not_ascending),
        }

    def encode(self, flat: Tensor) -> dict[str, Tensor]:
        """As `Compression`."""
        size = flat.abs().nan_to_num(nan=math.inf)  # so that NaN is sent, and refused
        least = size.topk(self.count, sorted=False).values.amin(dim=-1, keepdim=True)
        above, level = size > least, size == least
        room = self.count - above.sum(dim=-1, keepdim=True)
        chosen = above | (level & (level.cumsum(dim=-1) <= room))
        index = chosen.nonzero()[:, -1].view(*flat.shape[:-1], self.count)
        return {GRADIENT: flat.gather(-1, index), INDEX: index.to(torch.int32)}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """As `Compression`."""
        values = arrays[GRADIENT]
        nothing = values.new_zeros((*values.shape[:-1], self.layout.size))
        return nothing.scatter(-1, arrays[INDEX].long(), values)


def _not_ascending(values: NDArray[Any]) -> str | None:
    return None if (np.diff(values) > 0).all() else "does not ascend, or holds a value twice"


class ErrorFeedback(Transform):
    """A scheme for the gradient, and the memory of what it leaves out.

    Args:
        scheme: The scheme C.
        layout: Of the gradients.
    """

    def __init__(self, scheme: Compression, layout: Layout) -> None:
        self.scheme, self.layout = scheme, layout

    def state_sizes(self) -> dict[str, int]:
        """The error e_i."""
        return {ERROR: self.layout.size}

    def fields(self, fields: Mapping[str, Field]) -> dict[str, Field]:
        """The scheme's, in place of the gradient."""
        return {name: field for name, field in fields.items() if name != GRADIENT} | self.scheme.fields()

    def send(
        self, arrays: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """C(g_i + e_i), and what it leaves out."""
        whole = arrays[GRADIENT] + state[ERROR]
        sent = self.scheme.encode(whole)
        others = {name: array for name, array in arrays.items() if name != GRADIENT}
        return others | sent, {ERROR: whole - self.scheme.decode(sent)}

    def receive(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradient that is sent."""
        names = self.scheme.fields()
        others = {name: array for name, array in arrays.items() if name not in names}
        return others | {GRADIENT: self.scheme.decode(arrays)}


def compression(name: SchemeName, keep: float, layout: Layout, by_gradient: bool) -> list[Transform]:
    """Error feedback with the scheme of that name; nothing if gradients are sent as they are.

    Args:
        name: `none`, `bfloat16`, `int8` or `topk`.
        keep: Share of the elements that `topk` sends, in (0, 1].
        layout: Of the gradients.
        by_gradient: Whether gradients are what clients send.

    Raises:
        ValueError: A value is outside its range, or no gradients are sent.
    """
    checks.share("keep", keep)
    if name == "none":
        return []
    if not by_gradient:
        raise ValueError(
            f"compression={name} needs clients that send gradients: set wire=gradient, or compression=none"
        )
    if name == "topk":
        return [ErrorFeedback(TopK(layout, keep), layout)]
    return [ErrorFeedback(Bfloat16(layout) if name == "bfloat16" else Int8(layout), layout)]
