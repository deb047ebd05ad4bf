"""K-FAC's A and C of layers, from what goes into them and the gradients of what comes out; FedPM has A alone.

Each is on its way as its upper triangle or, of a side that keeps its basis, as its diagonal; equations in
`strategies.preconditioners.kfac`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from strategies.base.beyond_gradients import Probe
from strategies.base.layers import Layer
from strategies.preconditioners.eigenbases import Side

AT_ONCE = 2**24
"""Numbers that the rows of a layer's inputs, such as a convolution's patches, may take at once."""

Sides = Mapping[str, tuple[Side | None, Side]]
"""Layer -> the side of what comes out of it (C), None if it is not wanted, and of what goes into it (A)."""


class Factors(Probe):
    """A and C of layers, and the sum of the weights of the examples that they are of.

    Args:
        layers: Name -> layer.
        sides: Their sides.
        drawn: As the base's.
    """

    def __init__(self, layers: Mapping[str, Layer], sides: Sides, drawn: bool) -> None:
        self._layers, self._sides, self.drawn = layers, sides, drawn
        self._lengths = {
            name: (1, left.packed if left else 0, right.packed) for name, (left, right) in sides.items()
        }

    def sizes(self) -> dict[str, int]:
        """The sum of the weights, C and A of each layer."""
        return {name: sum(lengths) for name, lengths in self._lengths.items()}

    def reduce(self, layer: str, inputs: Tensor, gradients: Tensor, weights: Tensor) -> Tensor:
        """Sums over the examples: of the weights, of sum_t b_t b_t^T, and of the mean a_t a_t^T."""
        own, (left, right) = self._layers[layer], self._sides[layer]
        positions = own.positions(gradients)
        at_once = max(1, AT_ONCE // (positions * right.size * own.groups))
        parts = zip(*(whole.split(at_once) for whole in (inputs, gradients, weights)), strict=True)
        made = [
            torch.cat(
                [
                    share.sum()[None],
                    *([_outputs(own, b, share, left)] if left else []),
                    _inputs(own, a, share / positions, right),
                ]
            )
            for a, b, share in parts
        ]
        return torch.stack(made).sum(dim=0)

    def unpacked(self, probed: Tensor) -> Iterator[tuple[Side, Tensor]]:
        """C and A of every layer, or of each of its groups, in their order.

        They are (C, *axes, size, size) or, of a side that keeps its basis, (C, *axes, size).
        """
        parts = probed.split([n for lengths in self._lengths.values() for n in lengths], dim=-1)
        for place, (left, right) in enumerate(self._sides.values()):
            weight, c, a = parts[3 * place : 3 * place + 3]
            if left:
                yield left, left.unpack(c)
            # a layer that is called twice is one of twice the positions: its b b^T add up, its a a^T do not
            yield right, right.unpack(a / weight.clamp(min=torch.finfo(a.dtype).tiny))


def _moment(rows: Tensor, side: Side) -> Tensor:
    """Sum of r r^T over rows (*axes, k, size), or its diagonal."""
    return rows.square().sum(dim=-2) if side.span is None else rows.mT @ rows


def _scaled(batch: Tensor, weights: Tensor) -> Tensor:
    """Examples (B, ...) times the roots of their weights, so that products of two are weighted."""
    return batch * weights.sqrt().reshape(-1, *(1,) * (batch.dim() - 1))


def _outputs(layer: Layer, gradients: Tensor, weights: Tensor, side: Side) -> Tensor:
    """Weighted sum of b b^T, packed."""
    return side.pack(_moment(layer.gradients(_scaled(gradients, weights)).flatten(-3, -2), side))


def _inputs(layer: Layer, inputs: Tensor, weights: Tensor, side: Side) -> Tensor:
    """Weighted sum of a a^T, packed."""
    if layer.kind == "embedding":
        numbers = layer.inputs(inputs)
        spread = weights.unsqueeze(1).expand(numbers.shape)
        return weights.new_zeros(side.size).scatter_add(0, numbers.flatten(), spread.flatten())
    rows = layer.inputs(_scaled(inputs.float(), weights))  # linear in the inputs, of which there are fewer
    ones = weights.sqrt().unsqueeze(1).expand(rows.shape[-3:-1]).flatten()
    rows = rows.flatten(-3, -2)
    moment = _moment(rows, side)
    if layer.bias is not None:  # without a copy of all rows that has ones beside them
        last = (ones @ ones).expand(*layer.axes, 1)
        if side.span is None:
            return side.pack(torch.cat([moment, last], dim=-1))
        moment = F.pad(moment, (0, 1, 0, 1))
        moment[..., -1] = torch.cat([ones @ rows, last], dim=-1)
    return side.pack(moment)
