"""Layers that multiply what they get by a matrix: linear, convolution, embedding; what a preconditioner has to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies a row of inputs by a matrix (m x n), once or at each of several positions.

    A convolution in groups is as many convolutions side by side, each with a matrix of its own and inputs of its own.

    Attributes:
        kind: What it is.
        weight: Name of its matrix among the model's tensors; an embedding has it transposed, (n, m).
        bias: Name of its bias, or None.
        shape: m and n of a group, without the bias.
        kernel: Size of a convolution's patch, in each dimension; so for the rest.
        stride: Steps between patches.
        dilation: Steps between a patch's elements.
        padding: What is added around the input, as `torch.nn.functional.pad` takes it.
        padding_mode: By what.
        groups: How many groups a convolution has; one: there are none, and no axis of them.
    """

    kind: Literal["linear", "convolution", "embedding"]
    weight: str
    bias: str | None
    shape: tuple[int, int]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    padding_mode: str = "constant"
    groups: int = 1

    @property
    def tensors(self) -> list[str]:
        """Names of its matrix and bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def extended(self) -> tuple[int, int]:
        """Shape of [W b] of a group."""
        return self.shape[0], self.shape[1] + (self.bias is not None)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axis of the groups, if there are any: W is (*axes, m, n)."""
        return (self.groups,) if self.groups > 1 else ()

    def inputs(self, inputs: Tensor) -> Tensor:
        """Rows that the matrix is multiplied by, (*axes, B, positions, n); of an embedding numbers, (B, positions)."""
        if self.kind == "embedding":
            return inputs.flatten(1)
        return self._rows(self._patches(inputs.float()) if self.kind == "convolution" else inputs.float())

    def gradients(self, gradients: Tensor) -> Tensor:
        """Gradients of what comes out of it, (*axes, B, positions, m)."""
        return self._rows(gradients.movedim(1, -1) if self.kind == "convolution" else gradients)

    def _rows(self, rows: Tensor) -> Tensor:
        """From (B, ..., n) of all groups, one after the other, to (*axes, B, positions, n)."""
        rows = rows.unsqueeze(1) if rows.dim() == 2 else rows.flatten(1, -2)
        return rows.unflatten(-1, (self.groups, -1)).movedim(-2, 0) if self.axes else rows

    def positions(self, gradients: Tensor) -> int:
        """How many there are, from the gradients of what comes out of it."""
        return prod(gradients.shape[2:] if self.kind == "convolution" else gradients.shape[1:-1])

    def _patches(self, inputs: Tensor) -> Tensor:
        """The patches of inputs (B, channels, ...), (B, positions in each dimension, ..., n)."""
        patches = F.pad(inputs, self.padding, self.padding_mode)
        sizes = zip(self.kernel, self.stride, self.dilation, strict=True)
        for place, (size, stride, dilation) in enumerate(sizes, start=2):
            patches = patches.unfold(place, dilation * (size - 1) + 1, stride)[..., ::dilation]
        count = len(self.kernel)
        # (B, channels, positions..., patch...) -> (B, positions..., channels, patch...)
        return patches.movedim(1, 1 + count).flatten(1 + count)


def layers_of(model: nn.Module, trained: Collection[str]) -> dict[str, Layer]:
    """Name -> layer, of a model's linear layers, convolutions and embeddings whose matrix is trained and theirs alone.

    Classes derived from PyTorch's may do something else, and are none.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        weight, bias = f"{prefix}weight", f"{prefix}bias"
        if weight not in trained or owners[id(module.weight)] > 1:
            continue
        own_bias = bias if bias in trained and owners[id(module.bias)] == 1 else None
        if type(module) is nn.Linear:
            layers[name] = Layer("linear", weight, own_bias, (module.out_features, module.in_features))
        elif type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            layers[name] = _convolution(module, weight, own_bias)
        elif type(module) is nn.Embedding and module.padding_idx is None and not module.scale_grad_by_freq:
            shape = module.embedding_dim, module.num_embeddings
            layers[name] = Layer("embedding", weight, None, shape)
    return layers


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, weight: str, bias: str | None) -> Layer:
    if isinstance(module.padding, str):
        spread = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        around = [(s // 2, s - s // 2) if module.padding == "same" else (0, 0) for s in spread]
    else:
        around = [(p, p) for p in module.padding]
    padding = tuple(size for pair in reversed(around) for size in pair)  # the last dimension first
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    groups = module.groups
    shape = module.out_channels // groups, module.in_channels // groups * prod(module.kernel_size)
    geometry = tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation)
    return Layer("convolution", weight, bias, shape, *geometry, padding, mode, groups)
