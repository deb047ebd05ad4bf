"""What a client half is, and what it is given to work with.

A client half solves the local problem of a *stack*: C clients at once, every per-client tensor with a
leading client axis. A real client is a stack of one. It is a pure function of its arguments: whoever
hosts the clients keeps their state, moves it forward when the server acknowledges it, and carries the
messages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from strategies.base.beyond_gradients import Forward, Probe, Term
from strategies.base.layout import Layout
from strategies.base.messages import WEIGHTS, Field
from strategies.base.transform import Transform


@dataclass(frozen=True)
class Batch:
    """One mini-batch of each client of a stack.

    Attributes:
        data: Named tensors, (C, B, ...), ready for the task; rows beyond a client's own are padding.
        weights: Weight of each example in its client's loss, (C, B), zero for padding.
        examples: Each client's in it, without padding; zero for those who have no batch at this step any more.
    """

    data: Mapping[str, Tensor]
    weights: Tensor
    examples: Sequence[int]

    @cached_property
    def counts(self) -> Tensor:
        """`examples` as floating-point numbers, (C,)."""
        return torch.tensor(self.examples, dtype=self.weights.dtype, device=self.weights.device)


class Stack(Protocol):
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

    def gradient(self, weights: Tensor, batch: Batch, term: Term | None = None) -> tuple[Tensor, Tensor]:
        """Gradient (C, d) and loss (C,) of every client's batch at its own weights (C, d).

        The gradient is that of the losses and the term; the loss is without it.
        """
        ...

    def outputs(self, weights: Tensor, batch: Batch, layers: Sequence[str] = ()) -> Forward:
        """Outputs of a batch, (C, B, ...), and inputs of layers, at (d,) or (C, d), as an evaluation has them.

        In `passes`, an example counts a third for it, which is about the share of the forward pass in a gradient.
        """
        ...

    def example_norms(self, weights: Tensor, batch: Batch) -> Tensor:
        """Norm of the gradient of each example's own loss, (C, B), at (d,) or (C, d); zero for padding.

        Raises:
            ValueError: The model keeps running statistics, so that an example alone has no gradient.
        """
        ...

    def label_counts(self) -> Tensor:
        """How many labels of each of the K classes every client's examples have, (C, K).

        Only for a client half that `needs_classes`.
        """
        ...

    def probed(self, probe: Probe) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Have a probe see all that is differentiated meanwhile.

        The sums over examples and batches are added up in what it gives: the vector of every layer, (C, size).
        """
        ...

    def batches(self, epochs: int) -> Iterator[Batch]:
        """Shuffled mini-batches for a number of passes over every client's examples."""
        ...


@dataclass(frozen=True)
class Instruction:
    """What the server sent to a stack.

    Attributes:
        arrays: Named vectors, the same for every client: `weights` (d,) and what the algorithm adds.
        config: Numbers and texts, the same for every client.
        common: What the client half made of these two once, for all its clients; see `ClientHalf.prepare`.
    """

    arrays: Mapping[str, Tensor]
    config: Mapping[str, Any]
    common: Any = None


@dataclass(frozen=True)
class Update:
    """What a stack answers.

    Attributes:
        arrays: Named vectors with a leading client axis: `weights` (C, d) and what the algorithm adds.
        loss: Training loss of each client, (C,).
        state: The clients' next state, as `state_sizes` names it, {name: (C, size)}, as a function of the arrays as
            the server will read them, after whatever is done to them on the way; None for halves without state.
        numbers: Numbers of the algorithm's own, as `reply_numbers` names them, {name: (C,)}.
    """

    arrays: Mapping[str, Tensor]
    loss: Tensor
    state: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    numbers: Mapping[str, Tensor] = field(default_factory=dict)


class ClientHalf(ABC):
    """The client half of an algorithm: a local solver for a stack.

    Attributes:
        needs_classes: Whether it works only where targets are numbers of classes, and the model gives their logits.
        personal: Whether clients are evaluated, each on its own examples, with weights of their own.
    """

    layout: Layout
    transforms: Sequence[Transform] = ()
    needs_classes: bool = False
    personal: bool = False

    def state_sizes(self) -> dict[str, int]:
        """Vectors that a client keeps between rounds -> their lengths. They start as zeros."""
        return {}

    def instruction_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """Arrays that an instruction must hold; anything else is refused by the client."""
        return {WEIGHTS: Field(self.layout.size)}

    def reply_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """Arrays of an update, as the server half reads them."""
        return {WEIGHTS: Field(self.layout.size)}

    def reply_numbers(self, config: Mapping[str, Any]) -> Collection[str]:
        """Numbers of the algorithm's own in an update."""
        return ()

    def kept_sizes(self) -> dict[str, int]:
        """All that a client keeps between rounds: the algorithm's state, and that of the transforms."""
        sizes = self.state_sizes()
        for transform in self.transforms:
            sizes |= transform.state_sizes()
        return sizes

    def sent_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """Arrays that a reply to an instruction must hold; anything else is refused by the server."""
        fields = self.reply_fields(config)
        for transform in self.transforms:
            fields = transform.fields(fields)
        return fields

    def received(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arrays of an update that was sent, (..., size)."""
        read = dict(arrays)
        for transform in reversed(self.transforms):
            read = transform.receive(read)
        return read

    def sending(
        self, update: Update, state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The arrays of an update as they are sent, and what the clients remember if the server accepts them.

        Args:
            update: What `solve` gave.
            state: What the clients remember now, {name: (C, size)}.
        """
        sent = dict(update.arrays)
        kept: dict[str, Tensor] = {}
        for transform in self.transforms:
            sent, own = transform.send(sent, state)
            kept |= own
        if update.state is not None:
            kept |= update.state(self.received(sent))
        return sent, kept

    def prepare(self, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Any:
        """What all clients would compute alike from an instruction: done once, kept for as long as it is in hand."""
        return None

    def own_weights(self, weights: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The weights that clients are evaluated with, (C, d), where they are `personal`.

        Args:
            weights: The server's, (C, d), the same for all; not to be written to.
            state: What the clients remember, {name: (C, size)}; zeros before their first round, and if it was lost.
        """
        return weights

    @abstractmethod
    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """Solve the local problem of every client of the stack."""


def remembered(held: Tensor, otherwise: Tensor) -> Tensor:
    """What each client remembers of one vector, (C, size), or else another: zeros are no memory, but its beginning."""
    return torch.where(held.any(dim=1, keepdim=True), held, otherwise)
