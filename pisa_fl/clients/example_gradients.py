"""Gradients of single examples, clipped and summed in one backward pass, where a model's layers allow it.

In a layer that multiplies by a matrix, an example's gradient is sum over positions of (output gradient)(input)^T: known
from what goes in and what comes back, of all examples at once. For other models there is
`FlatModel.sums_of_gradients`, which takes the gradients one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pisa_fl.clients.flat_model import Fields, FlatModel
from pisa_fl.clients.layers import watched
from strategies.base.layers import Layer
from strategies.base.layout import Layout


def known_by_layers(layout: Layout) -> bool:
    """Whether every tensor belongs to a linear layer or a convolution."""
    layers = [layer for layer in layout.layers.values() if layer.kind != "embedding"]
    return {name for layer in layers for name in layer.tensors} == set(layout.shapes)


def clipped_sum(model: FlatModel, batch: Fields, bound: float) -> Tensor:
    """Sum of the gradients of examples' own losses at the present weights, each no longer than a bound, (d,).

    Args:
        model: One whose tensors are `known_by_layers`.
        batch: One client's.
        bound: The greatest length; a gradient that is not finite counts as zero.

    Raises:
        ValueError: A layer has not a row for each example.
    """
    layers = model.layout.layers
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    outputs: list[tuple[str, Tensor]] = []

    def on_call(layer: str, given: Tensor, output: Tensor) -> None:
        inputs[layer].append(given.detach())
        outputs.append((layer, output))

    with watched(model.module, layers, on_call):
        _, losses = model.objective(batch, None, {})
    back = torch.autograd.grad(losses.sum(), [output for _, output in outputs], allow_unused=True)
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for (layer, output), gradient in zip(outputs, back, strict=True):
        if len(output) != len(losses):
            raise ValueError(f"layer '{layer}' gives {len(output)} rows for {len(losses)} examples")
        found[layer].append(torch.zeros_like(output) if gradient is None else gradient.float())
    called = [name for name in layers if inputs[name]]
    rows = {name: _rows(layers[name], inputs[name], found[name]) for name in called}
    squares = torch.stack([_square(*rows[name]) for name in called]).sum(dim=0)
    sound = squares.isfinite()
    share = torch.where(sound & (squares > bound**2), bound / squares.sqrt(), sound.double()).float()
    total = losses.new_zeros(1, model.layout.size)
    for name in called:
        given, gradients = (
            torch.where(sound[:, None, None], part, torch.zeros_like(part)) for part in rows[name]
        )
        scaled = gradients * share[:, None, None]
        model.layout.write(
            layers[name], total, (scaled.flatten(-3, -2).mT @ given.flatten(-3, -2)).unsqueeze(0)
        )
    return total[0]


def _rows(layer: Layer, inputs: list[Tensor], gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of all calls, inputs (*axes, B, positions, n), with a one for the bias, and output gradients (..., m)."""
    given = torch.cat([layer.inputs(one) for one in inputs], dim=-2)
    if layer.bias is not None:
        given = torch.cat([given, torch.ones_like(given[..., :1])], dim=-1)
    return given, torch.cat([layer.gradients(one) for one in gradients], dim=-2)


def _square(given: Tensor, gradients: Tensor) -> Tensor:
    """Squared length of the gradient of each example, (B,), double precision."""
    if given.shape[-2] == 1:
        each = given.square().sum((-2, -1), dtype=torch.float64) * gradients.square().sum(
            (-2, -1), dtype=torch.float64
        )
    else:
        each = (gradients.mT @ given).square().sum((-2, -1), dtype=torch.float64)
    return each.sum(dim=0) if each.dim() > 1 else each
