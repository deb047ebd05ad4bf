"""Flat vectors with named views: how a model's tensors lie in one row of length d."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from strategies.base.layers import Layer, layers_of


@dataclass(frozen=True)
class Layout:
    """The order, names and shapes of the tensors that make up a flat vector.

    Weights, duals, gradients and moments of a stack of C clients are all tensors of shape (C, d), so
    that an ADMM step is a few element-wise operations whatever the model.

    Attributes:
        shapes: Name of each tensor -> its shape, in the model's own order.
        layers: Name of each layer that multiplies by one of the tensors -> what it does.
    """

    shapes: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, Layer] = field(default_factory=dict)

    @classmethod
    def of_parameters(cls, model: nn.Module) -> Layout:
        """The layout of a model's trainable parameters.

        Raises:
            ValueError: There are none, or one of them cannot lie in a vector of float32.
        """
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("the model has no trainable parameter: one must have requires_grad")
        for name, parameter in trained.items():
            if isinstance(parameter, nn.UninitializedParameter):
                raise ValueError(
                    f"parameter '{name}' has no shape yet: call the model once, or use layers that are not lazy"
                )
            if parameter.is_meta:
                raise ValueError(
                    f"parameter '{name}' is on the meta device, without values: build it on the CPU"
                )
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"parameter '{name}' is of {parameter.dtype}, and only torch.float32 is trained: call .float()"
                )
        return cls({name: tuple(p.shape) for name, p in trained.items()}, layers_of(model, trained))

    @classmethod
    def of_buffers(cls, model: nn.Module, names: Collection[str] | None = None) -> Layout:
        """The layout of a model's floating-point buffers (BatchNorm's running statistics), or of those named.

        Integer buffers (BatchNorm's batch counter) are left out: they only matter to a running mean
        without momentum, and an average of them means nothing.
        """
        return cls(
            {
                name: tuple(b.shape)
                for name, b in model.named_buffers()
                if b.is_floating_point() and (names is None or name in names)
            }
        )

    @cached_property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        return [prod(shape) for shape in self.shapes.values()]

    @cached_property
    def size(self) -> int:
        """Length d of the flat vector."""
        return sum(self.sizes)

    @cached_property
    def spans(self) -> dict[str, slice]:
        """Name of each tensor -> its slice of the flat vector."""
        spans, start = {}, 0
        for name, size in zip(self.shapes, self.sizes, strict=True):
            spans[name] = slice(start, start + size)
            start += size
        return spans

    @cached_property
    def modules(self) -> list[str]:
        """Names of the modules that the tensors belong to, in their order."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.shapes))

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Tensors of two or more dimensions -> (rows, columns), convolutions as out x in*kh*kw."""
        return {name: (shape[0], prod(shape[1:])) for name, shape in self.shapes.items() if len(shape) >= 2}

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views of a flat tensor, (..., d) -> {name: (..., *shape)}; nothing is copied."""
        lead = flat.shape[:-1]
        return {name: flat[..., self.spans[name]].view(lead + shape) for name, shape in self.shapes.items()}

    def each_matrix(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each of `matrices` inside flat vectors (C, d), as a view (C, rows, columns)."""
        for name, shape in self.matrices.items():
            yield name, flat[:, self.spans[name]].unflatten(-1, shape)

    def extended(self, layer: Layer, flat: Tensor) -> Tensor:
        """[W b] of a layer in flat vectors (C, d), (C, *axes, m, n)."""
        weight = flat[:, self.spans[layer.weight]]
        if layer.kind == "embedding":
            return weight.unflatten(-1, layer.shape[::-1]).mT
        matrix = weight.unflatten(-1, (*layer.axes, *layer.shape))
        if layer.bias is None:
            return matrix
        bias = flat[:, self.spans[layer.bias]].unflatten(-1, (*layer.axes, -1))
        return torch.cat([matrix, bias.unsqueeze(-1)], dim=-1)

    def write(self, layer: Layer, flat: Tensor, matrix: Tensor) -> None:
        """Write [W b] of a layer into flat vectors."""
        if layer.bias is not None:
            flat[:, self.spans[layer.bias]] = matrix[..., -1].flatten(1)
        weight = matrix[..., : layer.shape[1]]
        flat[:, self.spans[layer.weight]] = (weight.mT if layer.kind == "embedding" else weight).flatten(1)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One flat vector (d,) from named tensors.

        Raises:
            ValueError: A tensor is missing or has another shape.
        """
        for name, shape in self.shapes.items():
            if name not in tensors:
                raise ValueError(f"tensor '{name}' of the model is missing")
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"tensor '{name}' has shape {tuple(tensors[name].shape)}, the model's has {shape}"
                )
        if not self.shapes:
            return torch.empty(0)
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.shapes])

    def mean(self, flat: Tensor) -> Tensor:
        """Mean of each tensor, (C, d) -> (C, T)."""
        return torch.stack([part.mean(dim=-1) for part in flat.split(self.sizes, dim=-1)], dim=-1)

    def norms(self, flat: Tensor) -> Tensor:
        """Euclidean norm of each tensor, (C, d) -> (C, T)."""
        return torch.stack(
            [torch.linalg.vector_norm(part, dim=-1) for part in flat.split(self.sizes, -1)], -1
        )

    def largest(self, flat: Tensor) -> Tensor:
        """Greatest size of an element of each tensor, (C, d) -> (C, T)."""
        return torch.stack([part.abs().amax(dim=-1) for part in flat.split(self.sizes, dim=-1)], dim=-1)

    def expand(self, per_tensor: Tensor) -> Tensor:
        """One value a tensor -> one value an element, (..., T) -> (..., d)."""
        repeats = torch.tensor(self.sizes, device=per_tensor.device)
        return per_tensor.repeat_interleave(repeats, dim=-1, output_size=self.size)
