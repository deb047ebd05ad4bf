"""A limit to how large a model may be that a configuration of somebody else's describes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

TENSORS = 10_000
"""Tensors of a model, at most: small ones without end would take for ever."""


@contextmanager
def at_most(numbers: int | None) -> Iterator[None]:
    """Stop the building of a model as soon as one of its tensors makes it too large.

    PyTorch has not written to the tensor by then, so that no memory is taken. A tensor that stands in several places
    counts in each.

    Args:
        numbers: Of its parameters and buffers together; None: any number.

    Raises:
        ValueError: It has more.
    """
    count = tensors = 0

    def add(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal count, tensors
        if tensor is not None:
            count, tensors = count + tensor.numel(), tensors + 1
        if numbers is not None and (count > numbers or tensors > TENSORS):
            raise ValueError(f"it is larger than {numbers} numbers in {TENSORS} tensors")

    hooks = [register_module_parameter_registration_hook(add), register_module_buffer_registration_hook(add)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
