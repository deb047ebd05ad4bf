"""A stack of clients: their examples, and the gradients of their losses.

Two ways of computing, one result: a stack of one runs an ordinary forward and backward pass, which is
the fastest on CPU cores (experiments/benchmarks/README.md); a larger one advances all its clients together,
vectorised over the client axis, which is the fastest on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pisa_fl.clients.flat_model import FlatModel
from pisa_fl.clients.probing import Sums, probed_backward, probed_gradients
from pisa_fl.config import ConfigurationError
from pisa_fl.data.data_set import DataSet
from pisa_fl.randomness import numpy_generator, torch_generator
from pisa_fl.tasks.base import DRAWS, TARGETS
from strategies.base.beyond_gradients import Forward, Probe, Term
from strategies.base.client import Batch

_NOTHING = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class ClientData:
    """The examples of one client: its rows of a shared set.

    Attributes:
        fields: Named tensors of the whole set, (N, ...).
        rows: The client's examples, int64, (n,).
        noise_std: Standard deviation of the Gaussian noise on its inputs (`DataSet.noisy`); zero for none.
        raw: Whether the fields are as they were stored, or `FlatModel.ready`.
        tests: Its test examples among the rows of the whole set, int64, (m,), none of those above.
    """

    fields: Mapping[str, Tensor]
    rows: Tensor
    noise_std: float = 0.0
    raw: bool = True
    tests: Tensor = _NOTHING

    def __len__(self) -> int:
        return len(self.rows)


class LocalStack:
    """C clients on one device; see `strategies.base.client.Stack` for what its methods promise.

    Args:
        model: The model that computes; its weights and running statistics are overwritten.
        data: What makes stored examples ready.
        examples: Client number -> its examples.
        buffers: Running statistics to start from, (b,), or None for a model without.
        round_number: The round, part of every draw's address.
        seed: Seed of the run.
        batch_size: Examples of a mini-batch.
        chunk: Examples differentiated at once where the number does not matter to the result.
        allowed: Passes over a client's examples, at most; None: any number.

    Raises:
        ValueError: More than one client with a model that mixes examples.
    """

    def __init__(
        self,
        model: FlatModel,
        data: DataSet,
        examples: Mapping[int, ClientData],
        buffers: Tensor | None,
        round_number: int,
        seed: int,
        batch_size: int,
        chunk: int,
        allowed: float | None = None,
    ) -> None:
        if len(examples) > 1 and model.mixes:
            raise ValueError(
                "a model that mixes examples (BatchNorm) needs stacks of one client: set engine.stack=1"
            )
        self.clients, self.layout = list(examples), model.layout
        self._work = [0] * len(examples)  # in thirds of an example differentiated
        self._allowed = allowed
        self._model, self._data, self._examples = model, data, list(examples.values())
        self._seed, self._round = seed, round_number
        self._batch_size, self._chunk = batch_size, chunk
        # random draws depend on which examples are read together
        self._disturbed = data.augments or any(e.noise_std for e in self._examples)
        first = self._examples[0]
        one_set = all(e.fields is first.fields for e in self._examples)
        self._alone = self._disturbed or len(self._examples) == 1 or not one_set
        self._draws = [
            torch_generator(seed, "augmentation", round_number, c) if self._disturbed else None
            for c in examples
        ]
        self._probe: tuple[Probe, Sums] | None = None
        if not model.module.training:  # walking through the modules takes as long as a small client's step
            model.module.train()
        model.load_buffers(buffers)

    @property
    def differentiated(self) -> list[int]:
        """Examples differentiated by each client so far, with those of which only outputs were asked for as thirds."""
        return [-(-thirds // 3) for thirds in self._work]

    @property
    def passes(self) -> list[float]:
        """The same over each client's number of examples."""
        return [thirds / 3 / len(own) for thirds, own in zip(self._work, self._examples, strict=True)]

    @property
    def buffers(self) -> Tensor:
        """Running statistics after what was computed so far, (C, b)."""
        return self._model.buffers.expand(len(self.clients), -1)

    def full_gradient(self, weights: Tensor, gradient: str) -> tuple[Tensor, Tensor]:
        """Gradient (C, d) and mean loss (C,) over all examples, in the order they were dealt."""
        fixed = self._disturbed or self._model.mixes
        step = self._batch_size if fixed else max(1, self._chunk // len(self.clients))
        lengths = [len(e) for e in self._examples]
        parts = [torch.arange(n).split(self._sizes(n, step)) for n in lengths]
        batches = (
            self._batch(
                list(chosen), [self._shares(c, n, gradient) for c, n in zip(chosen, lengths, strict=True)]
            )
            for chosen in zip_longest(*parts, fillvalue=_NOTHING)
        )
        total, loss = self._differentiate(weights, batches)
        return total, loss / torch.tensor(lengths, device=loss.device)

    def gradient(self, weights: Tensor, batch: Batch, term: Term | None = None) -> tuple[Tensor, Tensor]:
        """Gradient (C, d) of each client's batch, with a term added to the losses, and mean loss (C,) without it."""
        gradient, loss = self._differentiate(weights, [batch], term)
        return gradient, loss / batch.counts.clamp(min=1)

    def outputs(self, weights: Tensor, batch: Batch, layers: Sequence[str] = ()) -> Forward:
        """Outputs (C, B, ...) of each client's batch, and what went into some layers, as an evaluation has them."""
        self._count(batch.examples, 1)
        return self._model.outputs(weights, batch.data, layers)

    def example_norms(self, weights: Tensor, batch: Batch) -> Tensor:
        """Norms of the gradients of examples' own losses, (C, B); zero for padding."""
        return self._model.example_norms(weights, batch.data, batch.weights)

    def label_counts(self) -> Tensor:
        """How many labels of each class every client has, (C, K), as floating-point numbers."""
        classes = len(self._data.output_names)
        counts = [
            e.fields[TARGETS][e.rows.to(e.fields[TARGETS].device)].flatten().bincount(minlength=classes)
            for e in self._examples
        ]
        return torch.stack(counts).to(self._model.device, torch.float32)

    @contextmanager
    def probed(self, probe: Probe) -> Iterator[Mapping[str, Tensor]]:
        """Have a probe see all that is differentiated meanwhile; gives the sums of what it makes, (C, size)."""
        device, count = self._model.device, len(self.clients)
        sums = {layer: torch.zeros(count, size, device=device) for layer, size in probe.sizes().items()}
        self._probe = probe, sums
        try:
            yield sums
        finally:
            self._probe = None

    def batches(self, epochs: int) -> Iterator[Batch]:
        """Shuffled mini-batches; each client's order is drawn from (seed, "batches", round, client)."""
        orders = [
            _batch_order(
                numpy_generator(self._seed, "batches", self._round, c),
                epochs,
                self._sizes(len(e), self._batch_size),
            )
            for c, e in zip(self.clients, self._examples, strict=True)
        ]
        for chosen in zip_longest(*orders, fillvalue=_NOTHING):
            yield self._batch(list(chosen), [torch.full((len(c),), 1 / max(1, len(c))) for c in chosen])

    @cached_property
    def _target_draws(self) -> list[Tensor]:
        """Numbers from [0, 1) of each client's examples, (n, ...) as its targets are, by which others are drawn."""
        return [
            torch.rand(len(e), *e.fields[TARGETS].shape[1:], generator=torch_generator(*address))
            for e, address in zip(
                self._examples, [(self._seed, "targets", self._round, c) for c in self.clients], strict=True
            )
        ]

    @property
    def _draws_targets(self) -> bool:
        """Whether a probe wants gradients with targets drawn from the outputs, beside those with the data's."""
        return self._probe is not None and self._probe[0].drawn

    def _counted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, each counted as it is differentiated."""
        for batch in batches:
            self._count(batch.examples, 6 if self._draws_targets else 3)
            yield batch

    def _shares(self, chosen: Tensor, examples: int, gradient: str) -> Tensor:
        """Weight of each chosen example in its client's gradient."""
        if gradient == "mean":
            return torch.full((len(chosen),), 1 / examples)
        sizes = torch.tensor(self._sizes(examples, self._batch_size))
        return 1 / sizes.repeat_interleave(sizes)[chosen].to(torch.float32)

    def _sizes(self, examples: int, size: int) -> list[int]:
        """Sizes of a client's batches; a leftover of one joins the one before if the model cannot take it alone."""
        full, rest = divmod(examples, size)
        if rest == 1 and full and not self._model.takes_one:
            return [size] * (full - 1) + [size + 1]
        return [size] * full + [rest] * (rest > 0)

    def _batch(self, chosen: list[Tensor], shares: list[Tensor]) -> Batch:
        """Gather, make ready, disturb and augment the chosen examples of each client."""
        device = self._model.device
        data = self._read_alone(chosen) if self._alone else self._read_together(chosen)
        if self._draws_targets:
            drawn = [draws[rows] for draws, rows in zip(self._target_draws, chosen, strict=True)]
            data = {**data, DRAWS: _padded(drawn).to(device)}
        return Batch(
            data=data,
            weights=_padded(shares).to(device),
            examples=[len(rows) for rows in chosen],
        )

    def _count(self, examples: Sequence[int], thirds: int) -> None:
        work = [w + thirds * n for w, n in zip(self._work, examples, strict=True)]
        if self._allowed is not None:
            for made, own in zip(work, self._examples, strict=True):
                if made > math.ceil(3 * self._allowed * len(own) - 1e-6):
                    raise ConfigurationError(
                        f"its owner allows {self._allowed:g} passes now, and this takes more"
                    )
        self._work = work

    def _read_alone(self, chosen: list[Tensor]) -> dict[str, Tensor]:
        """The batch of every client by itself, (C, B, ...), padded with zeros."""
        batches: list[dict[str, Tensor]] = []
        for client, (rows, examples) in enumerate(zip(chosen, self._examples, strict=True)):
            batch = self._model.take(examples.fields, examples.rows[rows])
            if examples.raw:
                batch = self._data.ready(batch)
            draw = self._draws[client]
            if draw is not None and examples.noise_std:
                batch = self._data.noisy(batch, examples.noise_std, draw)
            if draw is not None and self._data.augments and len(rows):
                batch = self._data.augmented(batch, draw)
            batches.append(batch)
        return {name: _padded([batch[name] for batch in batches]) for name in batches[0]}

    def _read_together(self, chosen: list[Tensor]) -> dict[str, Tensor]:
        """The batches of all clients at once, (C, B, ...), padded with whatever; its weight is zero."""
        whole = self._examples[0]
        rows = _padded([e.rows[c] for c, e in zip(chosen, self._examples, strict=True)])
        batch = self._model.take(whole.fields, rows.flatten())
        if whole.raw:
            batch = self._data.ready(batch)
        return {name: field.unflatten(0, rows.shape) for name, field in batch.items()}

    def _differentiate(
        self, weights: Tensor, batches: Iterable[Batch], term: Term | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sums over batches of the gradients (C, d) of the weighted losses, and of the plain losses (C,)."""
        batches = self._counted(batches)
        if len(self.clients) == 1:
            return self._backward(weights.reshape(-1), batches, term)
        total = torch.zeros(len(self.clients), self.layout.size, device=self._model.device)
        losses = total.new_zeros(len(self.clients))
        for batch in batches:
            gradients, loss = self._vectorised(weights, batch, term)
            total += gradients
            losses += loss
        return total, losses

    def _vectorised(self, weights: Tensor, batch: Batch, term: Term | None) -> tuple[Tensor, Tensor]:
        if self._probe is None:
            gradients_of = self._model.gradients(weights.dim() == 1, term)
            return gradients_of(weights, batch.data, batch.weights, term.given if term else {})
        probe, sums = self._probe
        gradients, loss, made = probed_gradients(self._model, weights, batch.data, batch.weights, term, probe)
        for layer, vectors in made.items():
            sums[layer] += vectors
        return gradients, loss

    def _backward(
        self, weights: Tensor, batches: Iterable[Batch], term: Term | None
    ) -> tuple[Tensor, Tensor]:
        package = self._model.package if self._probe is None and term is None else None
        total, compiled, backward = weights.new_zeros(1), None, False
        given = {name: values[0] for name, values in term.given.items()} if term else {}
        for batch in batches:
            shares = batch.weights[0]
            data = {name: field[0] for name, field in batch.data.items()}
            if package is not None and package.takes(data):
                gradient, loss = package(weights, data, shares)
                compiled = gradient if compiled is None else compiled.add_(gradient)
                total += loss
                continue
            if not backward:
                self._model.load(weights)
                self._model.gradient.zero_()
                backward = True
            if self._probe is not None:
                loss = probed_backward(self._model, data, shares, term, given, *self._probe)
            else:
                objective, loss = self._model.objective(data, term, given)
                (shares * objective).sum().backward()
            total += loss.detach().sum()
        if compiled is None:
            return self._model.gradient.clone().unsqueeze(0), total
        return (compiled.add_(self._model.gradient) if backward else compiled).unsqueeze(0), total


def fitting_stack(
    model: FlatModel, example: Mapping[str, Tensor], batch_size: int, chunk: int, free: int
) -> int:
    """How many clients can advance together in the memory of a GPU.

    Args:
        model: Their model.
        example: One example, as the task takes it.
        batch_size: Examples of a mini-batch of each.
        chunk: Examples differentiated at once where the number does not matter to the result.
        free: Bytes of memory that are free; half of them are used.
    """
    # what a pass keeps is held beside its gradient; a client's vectors are its weights, gradient, dual, answer, ...
    each, client = 2 * model.example_bytes(example), 16 * 4 * model.layout.size
    return max(1, (free // 2 - chunk * each) // (client + batch_size * each))


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths as one tensor, (C, longest, ...), filled with zeros."""
    return rows[0].unsqueeze(0) if len(rows) == 1 else pad_sequence(list(rows), batch_first=True)


def _batch_order(draw: np.random.Generator, epochs: int, sizes: list[int]) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.from_numpy(draw.permutation(sum(sizes))).split(sizes)
