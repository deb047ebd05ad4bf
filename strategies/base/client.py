"""What a client half is, and what it is given to work with.

A client half solves the local problem of a *cohort*: C clients at once, every per-client tensor with a
leading client axis. A real client is a cohort of one. It is a pure function of its arguments: whoever
hosts the clients keeps their state, moves it forward when the server acknowledges it, and carries the
messages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from strategies.base.layout import Layout
from strategies.base.messages import WEIGHTS, Field


@dataclass(frozen=True)
class Batch:
    """One mini-batch of each client of a cohort.

    Attributes:
        images: Normalised images, (C, B, channels, height, width), rows beyond a client's own padded.
        labels: Class numbers, (C, B).
        weights: Weight of each example in its client's loss, (C, B), zero for padding.
        active: One for clients that still have a batch at this step, zero for the others, (C,).
        examples: Examples in it, without padding.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    active: Tensor
    examples: Sequence[int]


class Cohort(Protocol):
    """C clients, their data and the gradients of their losses F_i."""

    @property
    def clients(self) -> Sequence[int]:
        """Client numbers (partition ids)."""
        ...

    @property
    def layout(self) -> Layout:
        """Layout of the model's parameters, d in all."""
        ...

    def full_gradient(self, weights: Tensor, gradient: str) -> tuple[Tensor, Tensor]:
        """Gradient of every client over all its examples.

        Args:
            weights: One point for all, (d,), or one a client, (C, d).
            gradient: `mean`: of the loss averaged over the examples; `sum`: the sum over mini-batches
                of the gradient of each mini-batch's mean loss.

        Returns:
            Gradients (C, d) and mean losses (C,).
        """
        ...

    def gradient(self, weights: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Gradient (C, d) and loss (C,) of every client's batch at its own weights (C, d)."""
        ...

    def batches(self, epochs: int) -> Iterator[Batch]:
        """Shuffled mini-batches for a number of passes over every client's examples."""
        ...


@dataclass(frozen=True)
class Instruction:
    """What the server sent to a cohort.

    Attributes:
        arrays: Named vectors, the same for every client: `weights` (d,) and what the algorithm adds.
        config: Numbers and texts, the same for every client.
    """

    arrays: Mapping[str, Tensor]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Update:
    """What a cohort answers.

    Attributes:
        arrays: Named vectors with a leading client axis: `weights` (C, d) and what the algorithm adds.
        loss: Training loss of each client, (C,).
        state: The clients' next state, as `state_sizes` names it, {name: (C, size)}.
    """

    arrays: Mapping[str, Tensor]
    loss: Tensor
    state: Mapping[str, Tensor] = field(default_factory=dict)


class ClientHalf(ABC):
    """The client half of an algorithm: a local solver for a cohort."""

    layout: Layout

    def state_sizes(self) -> dict[str, int]:
        """Vectors that a client keeps between rounds -> their lengths. They start as zeros."""
        return {}

    def instruction_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """Arrays that an instruction must hold; anything else is refused by the client."""
        return {WEIGHTS: Field(self.layout.size)}

    def reply_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """Arrays that a reply to an instruction must hold; anything else is refused by the server."""
        return {WEIGHTS: Field(self.layout.size)}

    @abstractmethod
    def solve(self, cohort: Cohort, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """Solve the local problem of every client of the cohort."""
