"""A stack whose clients take noised gradients of their examples, and nothing else of them (DP-SGD)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from pisa_fl.clients.example_gradients import clipped_sum, known_by_layers
from pisa_fl.clients.stack import LocalStack
from pisa_fl.privacy import Examples
from pisa_fl.privacy.clipping import clipped
from strategies.base.beyond_gradients import Forward, Probe, Term
from strategies.base.client import Batch


class PrivateStack(LocalStack):
    """As `LocalStack`, for `pisa_fl.privacy.Examples`.

    Losses are not told, they are zero. Batches are as large as chance has them, which nobody is told either: their
    `examples` are those that are expected. Whatever else a client half asks of the examples is refused, and so are more
    gradients than were accounted for.

    Args:
        privacy: Clipping, noise and rate.
        allowed: Noised gradients that each client may take in the round.
        given: As for `LocalStack`.
    """

    def __init__(self, privacy: Examples, allowed: int, *given: Any) -> None:
        super().__init__(*given)
        self._privacy, self._left, self._at_hand = privacy, allowed, False
        at = privacy.random.at
        self._chances = [at("example sampling", self._round, client) for client in self.clients]
        self._noise = [at("example noise", self._round, client) for client in self.clients]

    def full_gradient(self, weights: Tensor, gradient: str) -> tuple[Tensor, Tensor]:
        """Noised gradient (C, d) of the mean over all examples, each of which counts C / n at most."""
        if gradient != "mean":
            self._refuse(f"gradient={gradient}")
        lengths = [len(e) for e in self._examples]
        step = max(1, self._chunk // len(self.clients))
        total = torch.zeros(len(self.clients), self.layout.size, device=self._model.device)
        for start in range(0, max(lengths), step):
            chosen = [torch.arange(min(start, n), min(start + step, n)) for n in lengths]
            batch = self._batch(chosen, [torch.ones(len(rows)) for rows in chosen])
            self._count(batch.examples, 3)
            total += self._clipped(weights, batch)
        return self._released(total, lengths)

    def gradient(self, weights: Tensor, batch: Batch, term: Term | None = None) -> tuple[Tensor, Tensor]:
        """Noised gradient (C, d) of each client's batch, divided by the examples that are expected in one."""
        if term is not None:
            self._refuse("a term in the loss of every example")
        if not self._at_hand:
            self._refuse("a second gradient of one batch")
        self._at_hand = False
        self._count(batch.examples, 3)
        total = self._clipped(weights, batch)
        return self._released(total, [self._privacy.rate * len(e) for e in self._examples])

    def batches(self, epochs: int) -> Iterator[Batch]:
        """Batches of examples that are drawn each by itself, 1/rate of them a pass."""
        expected = [max(1, round(self._privacy.rate * len(e))) for e in self._examples]
        for _ in range(epochs * self._privacy.steps):
            chosen = [
                (draws.uniform(len(e)) < self._privacy.rate).nonzero().flatten()
                for draws, e in zip(self._chances, self._examples, strict=True)
            ]
            self._at_hand = True
            batch = self._batch(chosen, [torch.ones(len(rows)) for rows in chosen])
            yield replace(batch, examples=expected)

    def outputs(self, weights: Tensor, batch: Batch, layers: Sequence[str] = ()) -> Forward:
        """Refused."""
        self._refuse("outputs")

    def example_norms(self, weights: Tensor, batch: Batch) -> Tensor:
        """Refused."""
        self._refuse("norms of gradients")

    def label_counts(self) -> Tensor:
        """Refused."""
        self._refuse("counts of labels")

    @contextmanager
    def probed(self, probe: Probe) -> Iterator[Mapping[str, Tensor]]:
        """Refused."""
        self._refuse("a probe of layers")
        yield {}

    def _clipped(self, weights: Tensor, batch: Batch) -> Tensor:
        """Sums of the clipped gradients of a batch's examples, (C, d)."""
        bound = self._privacy.clip
        if not batch.weights.shape[1]:  # chance drew nobody
            return torch.zeros(len(self.clients), self.layout.size, device=self._model.device)
        if len(self.clients) > 1 or not known_by_layers(self.layout):
            each = partial(clipped, bound=bound)
            return self._model.sums_of_gradients(weights, batch.data, batch.weights, each)
        self._model.load(weights.reshape(-1))
        data = {name: field[0] for name, field in batch.data.items()}
        return clipped_sum(self._model, data, bound).unsqueeze(0)

    def _released(self, total: Tensor, expected: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Sums of clipped gradients (C, d) as they may be seen."""
        if not self._left:
            self._refuse("more gradients than local_epochs say")
        self._left -= 1
        if self._privacy.noise:
            noise = torch.stack([draws.normal(self.layout.size) for draws in self._noise])
            total = total + self._privacy.deviation * noise.to(total.device)
        share = torch.tensor(expected, dtype=total.dtype, device=total.device).unsqueeze(1)
        return total / share, total.new_zeros(len(self.clients))

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"privacy=examples does not account for {what}: use another strategy, or privacy=local"
        )
