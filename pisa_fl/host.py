"""Hosting clients: their data, their state, and the client half that answers the server's messages.

A host serves any number of clients: all of them in the `local` engine, a shard of them in a Ray actor, a
single one in a Flower ClientApp. It moves a client's state forward only when the server acknowledges it:
every train message says which round the server last accepted from that client (`accepted-round`). An instruction
that is not what the client half expects is refused, and changes nothing.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, Error, Message, MessageType, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor, nn

from pisa_fl.cohort import ClientData, FlatModel, LocalCohort
from pisa_fl.config import ConfigurationError
from pisa_fl.data import ImageData
from pisa_fl.randomness import numpy_generator
from strategies.client import ClientHalf, Instruction
from strategies.messages import (
    ACCEPTED,
    ARRAYS,
    BUFFERS,
    DIFFERENTIATED,
    EXAMPLES,
    LOSS,
    METRICS,
    ROUND,
    STATE,
    STATE_LOST,
    WEIGHTS,
    Field,
    config_of,
    fault,
    integer,
    record,
    vectors,
)

CLIENT_FAILED = 1000
"""Code of the error of a client whose own code raised; its reason holds the traceback after the first line."""


LONGEST_REASON = 8000
"""Characters of an error that are kept; what strangers write has no end."""


class InstructionError(ValueError):
    """A message from the server that a client must not act upon."""


@dataclass(frozen=True)
class Clients:
    """What the clients of a federation are made of; it can be sent to another process.

    Attributes:
        data: The data set; clients read its training images.
        rows: Client number -> positions of its training examples.
        model: The model; every host works on a copy.
        half: Client half.
        seed: Every random draw of the rounds follows from it.
        batch_size: Examples of a mini-batch.
        device: Where clients compute.
        noise_std: Client number -> standard deviation of the noise on its pixels (0..1); empty for none.
    """

    data: ImageData
    rows: Mapping[int, NDArray[np.integer]]
    model: nn.Module
    half: ClientHalf
    seed: int
    batch_size: int
    device: torch.device
    noise_std: Mapping[int, float] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[int, int]:
        """Training examples of every client, by client number."""
        return {number: len(rows) for number, rows in self.rows.items()}

    def host(self, numbers: Iterable[int], cohort: int | Literal["auto"], chunk: int) -> ClientHost:
        """A host of the clients with the given numbers.

        Args:
            numbers: Client numbers.
            cohort: Clients that advance together; `auto`: 1 on a CPU or for a model with running statistics, else 32.
            chunk: Examples differentiated at once where the number does not matter to the result.
        """
        images = tensor(self.data.train_images, self.device)
        labels = tensor(self.data.train_labels, self.device)
        clients = {
            number: ClientData(
                images,
                labels,
                torch.as_tensor(self.rows[number]),
                self.noise_std.get(number, 0.0),
            )
            for number in numbers
        }
        model = FlatModel(copy.deepcopy(self.model), self.device)
        if cohort == "auto":
            cohort = 1 if self.device.type == "cpu" or model.buffer_layout.size else 32
        return ClientHost(model, self.half, self.data, clients, self.seed, self.batch_size, chunk, cohort)


def tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor on the device; on the CPU it shares the (perhaps memory-mapped) array's pages."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it
        return torch.from_numpy(array).to(device)


@dataclass
class ClientState:
    """What one client remembers: the state that the server accepted, and the one it has not yet acknowledged.

    Attributes:
        round: Round of the accepted state; 0 is the start, all zeros.
        accepted: The accepted state, {name: (size,)}.
        pending_round: Round of the state that the last reply announced, or None.
        pending: That state.
    """

    round: int = 0
    accepted: dict[str, Tensor] = field(default_factory=dict)
    pending_round: int | None = None
    pending: dict[str, Tensor] = field(default_factory=dict)

    def settle(self, accepted_round: int) -> bool:
        """Go to the state of the round that the server accepted; False, and nothing changes, if it is not here."""
        if accepted_round == 0:  # the server knows nothing of this client: both are at the start
            self.round, self.accepted = 0, {}
        elif accepted_round == self.pending_round:
            self.round, self.accepted = accepted_round, self.pending
        elif accepted_round != self.round:
            return False
        self.pending_round, self.pending = None, {}
        return True

    def to(self, device: torch.device | str) -> ClientState:
        """The same with its vectors on a device."""
        accepted = {name: vector.to(device) for name, vector in self.accepted.items()}
        pending = {name: vector.to(device) for name, vector in self.pending.items()}
        return ClientState(self.round, accepted, self.pending_round, pending)


class ClientHost:
    """Runs the client half for the clients it hosts.

    Args:
        model: The model that all its clients compute with, in turn.
        half: The client half of the algorithm.
        data: Normalisation and augmentation of the data set.
        clients: Client number -> its examples.
        seed: Seed of the run.
        batch_size: Examples of a mini-batch.
        chunk: Examples differentiated at once where the number does not matter to the result.
        cohort: Clients that advance together.
    """

    def __init__(
        self,
        model: FlatModel,
        half: ClientHalf,
        data: ImageData,
        clients: Mapping[int, ClientData],
        seed: int,
        batch_size: int,
        chunk: int,
        cohort: int,
    ) -> None:
        self.clients, self.device = clients, model.device
        self.states = {client: ClientState() for client in clients}
        self.data, self._model, self._half = data, model, half
        self._seed, self._batch_size, self._chunk, self._cohort = seed, batch_size, chunk, cohort

    def handle(self, messages: Sequence[tuple[int, Message]]) -> Iterator[Message]:
        """Answer messages, given with the number of the client each is for; errors are answers too."""
        for group in _same_instruction(messages, self._cohort):
            yield from self._answer(group)

    def _answer(self, group: Sequence[tuple[int, Message]]) -> Iterator[Message]:
        """Answer messages with the same arrays together; if one of them fails, each alone."""
        try:
            if group[0][1].metadata.message_type == MessageType.EVALUATE:
                yield from [self._evaluate(*one) for one in group]
            else:
                yield from self._train(group)
        except Exception as error:
            if len(group) > 1:
                for one in group:
                    yield from self._answer([one])
            else:
                yield Message(Error(CLIENT_FAILED, failure_reason(error)), reply_to=group[0][1])

    def _train(self, group: Sequence[tuple[int, Message]]) -> list[Message]:
        self._check_arrays(group[0][1].content)
        ready, replies = [], []
        for client, message in group:
            self._check_rounds(message.content)
            if self._settle(client, message):
                ready.append((client, message))
            else:
                reason = f"client {client} does not hold the state that the server accepted"
                replies.append(Message(Error(STATE_LOST, reason), reply_to=message))
        if not ready:
            return replies
        content = ready[0][1].content
        config = config_of(content)
        arrays, names = self._read(content)
        round_number = integer(config, ROUND)
        clients = [client for client, _ in ready]
        cohort = LocalCohort(
            self._model,
            self.data,
            {client: self.clients[client] for client in clients},
            arrays.pop(BUFFERS, None),
            round_number,
            self._seed,
            self._batch_size,
            self._chunk,
        )
        state = {
            name: torch.stack([self._state_of(client, name, size) for client in clients])
            for name, size in self._half.state_sizes().items()
        }
        # dropout and its like draw from PyTorch's global generator: give them an address of their own
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if on_gpu else []):
            seed = int(numpy_generator(self._seed, "model", round_number, clients[0]).integers(2**63))
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                torch.cuda.manual_seed(seed)
            update = self._half.solve(cohort, Instruction(arrays, config), state)
        reply_arrays = dict(update.arrays)
        if self._model.buffer_layout.size:
            reply_arrays[BUFFERS] = cohort.buffers
        for row, (client, message) in enumerate(ready):
            if update.state:
                self.states[client].pending_round = round_number
                self.states[client].pending = {name: v[row].clone() for name, v in update.state.items()}
            metrics = MetricRecord(
                {
                    ROUND: round_number,
                    EXAMPLES: len(self.clients[client]),
                    LOSS: float(update.loss[row]),
                    DIFFERENTIATED: cohort.differentiated[row],
                }
            )
            reply = self._write({name: v[row] for name, v in reply_arrays.items()}, names)
            replies.append(Message(RecordDict({ARRAYS: reply, METRICS: metrics}), reply_to=message))
        return replies

    def _evaluate(self, client: int, message: Message) -> Message:
        """Loss and accuracy of the sent weights on the client's own examples."""
        self._check_arrays(message.content)
        arrays, _ = self._read(message.content)
        self._model.load(arrays[WEIGHTS], arrays.get(BUFFERS))
        own = self.clients[client]
        accuracy, loss = self._model.evaluate(own.images, own.labels, own.rows, self.data, self._chunk)
        metrics = MetricRecord({EXAMPLES: len(own), "accuracy": accuracy, "loss": loss})
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    def _check_arrays(self, content: RecordDict) -> None:
        """Refuse arrays that are not what the client half expects.

        Raises:
            InstructionError: They are not.
        """
        if ARRAYS not in content.array_records or set(content.array_records) - {ARRAYS, STATE}:
            raise InstructionError(f"array records {sorted(content.array_records)}")
        arrays = content.array_records[ARRAYS]
        if WEIGHTS in arrays:
            expected = self._half.instruction_fields()
            if self._model.buffer_layout.size:
                expected |= {BUFFERS: Field(self._model.buffer_layout.size)}
        else:  # the model's tensors by name, as Flower's servers make them
            types = ("float32", "float64", "int64")
            own = self._model.module.state_dict()
            expected = {name: Field(tuple(t.shape), types=types) for name, t in own.items()}
        if reason := fault(arrays, expected):
            raise InstructionError(reason)

    def _check_rounds(self, content: RecordDict) -> None:
        """Refuse impossible rounds and a state that is no state of a client.

        Raises:
            InstructionError: They are.
        """
        config = config_of(content)
        round_number, accepted = config.get(ROUND), config.get(ACCEPTED, 0)
        if type(round_number) is not int or not 1 <= round_number < 2**31:
            raise InstructionError(f"{ROUND} is {round_number!r}")
        if type(accepted) is not int or not 0 <= accepted < round_number:
            raise InstructionError(f"{ACCEPTED} is {accepted!r} in round {round_number}")
        if STATE in content.array_records:
            supplied, sizes = content.array_records[STATE], self._half.state_sizes()
            expected = {name: Field(sizes[name]) for name in supplied if name in sizes}
            if reason := fault(supplied, expected) if expected else "a state without vectors":
                raise InstructionError(reason)

    def _settle(self, client: int, message: Message) -> bool:
        """Bring the client to the state that the server accepted; False if it does not hold it."""
        state = self.states[client]
        content = message.content
        accepted = config_of(content).get(ACCEPTED)
        if accepted is None:  # a server half that acknowledges nothing takes every reply for accepted
            accepted = state.round if state.pending_round is None else state.pending_round
        if state.settle(accepted):
            return True
        supplied = content.array_records.get(STATE)
        if supplied is not None:
            self.states[client] = ClientState(accepted, vectors(supplied, self._model.device))
        return supplied is not None

    def _state_of(self, client: int, name: str, size: int) -> Tensor:
        held = self.states[client].accepted.get(name)
        return torch.zeros(size, device=self._model.device) if held is None else held

    def _read(self, content: RecordDict) -> tuple[dict[str, Tensor], list[str]]:
        """The vectors of an instruction, and the tensor names it used if it was not written as vectors.

        Our own server sends flat vectors; a strategy started with `ArrayRecord(model.state_dict())`, as
        Flower's documentation does it, sends the model's tensors by name and is answered likewise.
        """
        arrays = vectors(content.array_records[ARRAYS], self._model.device)
        if WEIGHTS in arrays:
            return arrays, []
        read = {WEIGHTS: self._model.layout.flatten(arrays)}
        if self._model.buffer_layout.size:
            read[BUFFERS] = self._model.buffer_layout.flatten(arrays)
        return read, list(arrays)

    def _write(self, flat: Mapping[str, Tensor], names: Sequence[str]) -> ArrayRecord:
        if not names:
            return record(flat)
        tensors = dict(self._model.module.state_dict())  # for what is neither weight nor running statistic
        tensors |= self._model.layout.views(flat[WEIGHTS])
        if BUFFERS in flat:
            tensors |= self._model.buffer_layout.views(flat[BUFFERS])
        return record({name: tensors[name] for name in names})


def failure_reason(error: Exception) -> str:
    """One line, then the traceback; an instruction that was refused needs none, nor what the user can mend."""
    if isinstance(error, ConfigurationError):
        return str(error)
    line = " ".join(str(error).split())
    if isinstance(error, InstructionError):
        return f"instruction refused: {line}"
    trace = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {line}\n{trace}"


def printable(reason: str) -> str:
    """A stranger's text as it may be logged: cut, and without control characters but line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in reason[:LONGEST_REASON])


def _same_instruction(
    messages: Sequence[tuple[int, Message]], cohort: int
) -> Iterator[list[tuple[int, Message]]]:
    """Cut messages into groups that carry the very same arrays and the same words, each of at most `cohort` clients."""

    def instruction(addressed: tuple[int, Message]) -> tuple[str, int, dict[str, Any]]:
        message = addressed[1]
        content = message.content if message.has_content() else RecordDict()
        config = {key: value for key, value in config_of(content).items() if key != ACCEPTED}
        return message.metadata.message_type, id(content.array_records.get(ARRAYS)), config

    for _, group in groupby(messages, key=instruction):
        while part := list(islice(group, cohort)):
            yield part
