"""The executor: what clients compute, apart from who they are to the server and what they remember.

A job is the work of one stack on one instruction. Its outcome follows from the job and from what the executor was made
of, and from nothing else, so that any process that has an executor can take any job.
"""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from pisa_fl.clients.flat_model import FlatModel
from pisa_fl.clients.private_stack import PrivateStack
from pisa_fl.clients.stack import ClientData, LocalStack
from pisa_fl.config import ConfigurationError
from pisa_fl.data.data_set import DataSet, Fields
from pisa_fl.privacy import Examples, Privacy
from pisa_fl.randomness import global_generators, torch_seed
from strategies.base.client import ClientHalf, Instruction
from strategies.base.messages import (
    BUFFERS,
    DIFFERENTIATED,
    EXAMPLES,
    LOSS,
    ROUND,
    WEIGHTS,
    integer,
    sendable,
)

MOVED = "moved"

TEST_PART = 1000
"""Examples of a part of the test set, which are read at once."""


class InstructionError(ValueError):
    """A message from the server that a client must not act upon."""


@dataclass(frozen=True)
class Job:
    """The work of one stack.

    Attributes:
        kind: `train`: to solve the local problem; `evaluate`: to evaluate the weights, or those that the client half
            makes the clients' own of them, on the clients' own test examples, or on those that they train on where
            they have none; `test`: to do so on parts of the test set, which are no clients but take their place.
        clients: Their numbers.
        arrays: What the server sent, {name: (size,)}; jobs of one instruction share it.
        config: Numbers and texts that it sent.
        state: What each client remembers, {name: (size,)}; what is missing is zero.
    """

    kind: Literal["train", "evaluate", "test"]
    clients: Sequence[int]
    arrays: Mapping[str, Tensor]
    config: Mapping[str, Any]
    state: Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        metrics: Numbers of each client.
        arrays: What they answer, {name: (C, size)}.
        state: What each is to remember if the server accepts that, {name: (size,)}; empty if there is no such thing.
        norms: Euclidean norm of each client's row of each of the arrays, infinite where it is not known; under `MOVED`,
            how far its weights moved.
    """

    metrics: Sequence[Mapping[str, int | float]]
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    state: Sequence[Mapping[str, Tensor]] = ()
    norms: Mapping[str, Sequence[float]] = field(default_factory=dict)


class Executor:
    """Runs the client half.

    Args:
        model: The model that all clients compute with, in turn.
        half: The client half of the algorithm.
        data: What makes stored examples ready; its test set.
        clients: Client number -> its examples.
        seed: Seed of the run.
        batch_size: Examples of a mini-batch.
        chunk: Examples differentiated at once where the number does not matter to the result.
        privacy: What clients do so that others learn little of their data; None: nothing.

    Attributes:
        allowed: Passes over a client's examples that an answer may take, at most; None: any number.
        made: Passes of all clients that were made here so far, whether they came to an end or not.
    """

    def __init__(
        self,
        model: FlatModel,
        half: ClientHalf,
        data: DataSet,
        clients: Mapping[int, ClientData],
        seed: int,
        batch_size: int,
        chunk: int,
        privacy: Privacy | None = None,
    ) -> None:
        self.model, self.half, self.data, self.clients = model, half, data, clients
        self._seed, self._batch_size, self._chunk, self._privacy = seed, batch_size, chunk, privacy
        self._last: tuple[Mapping[str, Tensor], Instruction] | None = None
        self.allowed: float | None = None
        self.made = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs."""
        return vars(self) | {"_last": None}

    def read_only(self) -> list[Tensor | NDArray[Any]]:
        """The sets of examples, which all processes may share."""
        sets = {id(client.fields): client.fields for client in self.clients.values()}
        own = [field for fields in sets.values() for field in fields.values()]
        return [*own, *self.data.train.values(), *self.data.test.values()]

    def answer(self, job: Job) -> Outcome | str:
        """The outcome, or why there is none."""
        try:
            return self.run(job)
        except Exception as error:
            return failure_reason(error)

    def run(self, job: Job) -> Outcome:
        """The outcome; whatever the client half raises is raised here."""
        versions = {name: array._version for name, array in job.arrays.items()}
        outcome = self._train(job) if job.kind == "train" else self._evaluate(job)
        for name, array in job.arrays.items():
            if array._version != versions[name]:
                raise RuntimeError(
                    f"the client half wrote to the array '{name}' of its instruction: clone it before"
                )
        return outcome

    def _train(self, job: Job) -> Outcome:
        round_number = integer(job.config, ROUND)
        stack = self._stack(job, round_number)
        state = self._state(job)
        # dropout and its like draw from PyTorch's global generators: give them an address of their own
        seed = torch_seed(self._seed, "model", round_number, job.clients[0])
        try:
            with global_generators(seed, self.model.device):
                update = self.half.solve(stack, self._instruction_of(job), state)
        finally:
            self.made += sum(stack.passes)
        losses = update.loss.tolist()
        if self._privacy is not None:
            update = self._privacy.sent(update, job.clients, round_number, job.arrays[WEIGHTS])
            losses = [0.0] * len(job.clients)  # which would tell of their examples
        answered, kept = self.half.sending(update, state)
        if self.model.buffer_layout.size:
            answered[BUFFERS] = stack.buffers
        metrics = [
            {
                ROUND: round_number,
                EXAMPLES: len(self.clients[client]),
                LOSS: losses[row],
                DIFFERENTIATED: stack.differentiated[row],
                **{name: float(own[row]) for name, own in update.numbers.items()},
            }
            for row, client in enumerate(job.clients)
        ]
        arrays = {name: sendable(rows) for name, rows in answered.items()}
        rows = [{name: vectors[row] for name, vectors in kept.items()} for row in range(len(job.clients))]
        if len(rows) > 1:  # a row of many would keep them all in memory
            rows = [{name: vector.clone() for name, vector in row.items()} for row in rows]
        norms = {name: [_norm(row) for row in sent] for name, sent in arrays.items()}
        if WEIGHTS in arrays:
            start = job.arrays[WEIGHTS].cpu()
            norms[MOVED] = [math.sqrt(gap @ gap) for gap in (row - start for row in arrays[WEIGHTS])]
        return Outcome(metrics, arrays, rows if kept else (), norms)

    def _stack(self, job: Job, round_number: int) -> LocalStack:
        clients = {client: self.clients[client] for client in job.clients}
        given = (
            *(self.model, self.data, clients, job.arrays.get(BUFFERS), round_number),
            *(self._seed, self._batch_size, self._chunk, self.allowed),
        )
        if isinstance(self._privacy, Examples):
            return PrivateStack(self._privacy, self._privacy.allowed(self.half), *given)
        return LocalStack(*given)

    def _evaluate(self, job: Job) -> Outcome:
        """Loss and metrics of the sent weights, or of the clients' own; of the test set, sums to be put together."""
        weights = job.arrays[WEIGHTS].expand(len(job.clients), -1)
        if job.kind == "evaluate" and self._privacy is not None:
            raise InstructionError(
                "its metrics would tell of its examples, and privacy promises that they do not"
            )
        own = self.half.personal and job.kind == "evaluate"
        if own:
            weights = self.half.own_weights(weights, self._state(job))
        metrics: list[dict[str, int | float]] = []
        for row, client in enumerate(job.clients):
            if own or not row:
                self.model.load(weights[row], job.arrays.get(BUFFERS))
            if job.kind == "test":
                rows = torch.arange(client * TEST_PART, min((client + 1) * TEST_PART, self.data.tests))
                metrics.append(dict(self.model.totals(self.test, rows, self.data)))
            else:
                its = self.clients[client]
                rows = its.tests if len(its.tests) else its.rows
                found = self.model.evaluate(its.fields, rows, self.data, self._chunk, its.raw)
                metrics.append({EXAMPLES: len(rows), **found})
        return Outcome(metrics)

    @cached_property
    def test(self) -> dict[str, Tensor]:
        """The test set."""
        return tensors(self.data.test, self.model.device)

    def examples(self, job: Job) -> int:
        """How many examples a job has to do with, by which it can be told how long it takes."""
        if job.kind == "test":
            return TEST_PART * len(job.clients)
        return sum(len(self.clients[client]) for client in job.clients)

    def _instruction_of(self, job: Job) -> Instruction:
        """What the client half prepared is made once for the jobs of one instruction."""
        if self._last is not None:
            arrays, instruction = self._last
            if arrays is job.arrays and instruction.config == job.config:
                return instruction
        own = {name: array for name, array in job.arrays.items() if name != BUFFERS}
        self._last = job.arrays, Instruction(own, job.config, self.half.prepare(own, job.config))
        return self._last[1]

    def _state(self, job: Job) -> dict[str, Tensor]:
        """What the clients remember, {name: (C, size)}."""
        return {
            name: torch.stack([self._vector(held, name, size) for held in job.state])
            for name, size in self.half.kept_sizes().items()
        }

    def _vector(self, held: Mapping[str, Tensor], name: str, size: int) -> Tensor:
        return held[name] if name in held else torch.zeros(size, device=self.model.device)


def _norm(row: Tensor) -> float:
    """Euclidean norm; not known of whole numbers, whose squares their type cannot hold."""
    return math.sqrt(row @ row) if row.is_floating_point() else math.inf


def tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor on the device; on the CPU it shares the (perhaps memory-mapped) array's pages."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it
        return torch.from_numpy(array).to(device)


def tensors(fields: Fields, device: torch.device) -> dict[str, Tensor]:
    """Arrays by name as tensors, likewise."""
    return {name: tensor(field, device) for name, field in fields.items()}


def failure_reason(error: Exception) -> str:
    """One line, then the traceback; an instruction that was refused needs none, nor what the user can mend."""
    if isinstance(error, ConfigurationError):
        return str(error)
    line = " ".join(str(error).split())
    if isinstance(error, InstructionError):
        return f"instruction refused: {line}"
    trace = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {line}\n{trace}"
