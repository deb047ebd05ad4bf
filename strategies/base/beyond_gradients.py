"""What a client half may ask of its model beyond flat gradients: outputs, terms of the objective, probes of layers.

Layers go by the names of their modules, such as `layout.modules` has them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Forward:
    """What a forward pass gave, of one client or with a leading client axis.

    Attributes:
        output: What the model makes of the batch, as the task has it, such as logits (B, K).
        inputs: What went into the layers that were asked for, (B, ...): into the last one, the features.
    """

    output: Any
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Term:
    """What an algorithm adds to the loss of every example, as MOON's contrast or a distillation from other outputs.

    A term of the weights alone, such as FedProx's, needs none of this: its gradient is added to the loss's.

    Attributes:
        of: From one client's forward pass and its share of `given`: what is added, (B,). It is vectorised over the
            clients by PyTorch, so that no value may decide what is computed.
        layers: Layers whose inputs it takes.
        given: Named tensors that it needs beside them, (C, B, ...), such as a teacher's outputs.
    """

    of: Callable[[Forward, Mapping[str, Tensor]], Tensor]
    layers: Sequence[str] = ()
    given: Mapping[str, Tensor] = field(default_factory=dict)


class Probe(ABC):
    """What is made at once of the inputs and output gradients of layers, such as Kronecker factors or diagonals.

    Attributes:
        drawn: Whether the gradients are of losses with targets that are drawn from the model's own output, as the true
            Fisher matrix has them, and not with those of the data.
    """

    drawn: bool = False

    @abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Layers that are watched -> length of the vector made of each."""

    @abstractmethod
    def reduce(self, layer: str, inputs: Tensor, gradients: Tensor, weights: Tensor) -> Tensor:
        """The vector of a layer, (size,), from one client's batch; those of several batches are added up.

        It is vectorised over the clients by PyTorch, so that no value may decide what is computed.

        Args:
            layer: Its name.
            inputs: What went into it, (B, ...), of whatever type.
            gradients: Gradient of each example's own loss with respect to what came out of it, (B, ...).
            weights: Weight of each example in its client's loss, (B,); zero for padding.
        """
