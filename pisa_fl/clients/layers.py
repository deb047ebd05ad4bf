"""Layers watched while a model computes: what goes into them, and the gradients of what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

OnCall = Callable[[str, Tensor, Tensor], Tensor | None]
"""Gets a layer's name, input and output; what it gives, if anything, takes the output's place."""


@contextmanager
def watched(module: nn.Module, layers: Iterable[str], on_call: OnCall) -> Iterator[None]:
    """Have a function see every call of some layers.

    Args:
        module: The model.
        layers: Names of its modules that take one tensor and give one.
        on_call: What is called.

    Raises:
        ValueError: The model has no such layer, or the layer takes or gives something else.
    """
    handles = []
    try:
        for layer in layers:
            hook = partial(_call, layer, on_call)
            handles.append(_layer(module, layer).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no layer '{name}'") from None


def _call(layer: str, on_call: OnCall, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
        raise ValueError(f"layer '{layer}', a {type(module).__name__}, must take one tensor and give one")
    return on_call(layer, inputs[0], output)
