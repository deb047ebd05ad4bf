"""Hosting clients: their data, their state, and the client half that answers the server's messages.

A host serves any number of clients: all of them in the `local` engine, a shard of them in a worker, a
single one in a Flower ClientApp. It moves a client's state forward only when the server acknowledges it:
every train message says which round the server last accepted from that client (`accepted-round`).
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice

import torch
from flwr.app import ArrayRecord, Error, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from pisa_fl.cohort import ClientData, FlatModel, LocalCohort
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
    config_of,
    integer,
    record,
    vectors,
)

log = logging.getLogger(__name__)

CLIENT_FAILED = 1000
"""Code of the error of a client whose own code raised."""


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
        """Go to the state of the round that the server accepted; False if it is not here."""
        if self.pending_round == accepted_round:
            self.round, self.accepted = accepted_round, self.pending
        self.pending_round, self.pending = None, {}
        if accepted_round == 0:  # the server knows nothing of this client: both are at the start
            self.round, self.accepted = 0, {}
        return self.round == accepted_round


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
        self.clients = clients
        self.states = {client: ClientState() for client in clients}
        self._model, self._half, self._data = model, half, data
        self._seed, self._batch_size, self._chunk, self._cohort = seed, batch_size, chunk, cohort
        self._shown: set[str] = set()

    def handle(self, messages: Sequence[tuple[int, Message]]) -> Iterator[Message]:
        """Answer messages, given with the number of the client each is for; errors are answers too."""
        for group in _same_instruction(messages, self._cohort):
            try:
                if group[0][1].metadata.message_type == MessageType.EVALUATE:
                    yield self._evaluate(*group[0])
                else:
                    yield from self._train(group)
            except Exception as error:
                clients = ", ".join(str(client) for client, _ in group)
                self._show(clients, error)
                reason = f"client {clients}: {type(error).__name__}: {error}"
                for _, message in group:
                    yield Message(Error(CLIENT_FAILED, reason), reply_to=message)

    def _show(self, clients: str, error: Exception) -> None:
        """Log the traceback of a client's error, once for every place that raises."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename}:{last.lineno}"
        if place not in self._shown:
            self._shown.add(place)
            trace = "".join(traceback.format_exception(error))
            log.error("client %s failed:\n%s", clients, trace)

    def _train(self, group: Sequence[tuple[int, Message]]) -> Iterator[Message]:
        ready = []
        for client, message in group:
            if self._settle(client, message):
                ready.append((client, message))
            else:
                reason = f"client {client} does not hold the state that the server accepted"
                yield Message(Error(STATE_LOST, reason), reply_to=message)
        if not ready:
            return
        content = ready[0][1].content
        config = config_of(content)
        arrays, names = self._read(content)
        round_number = integer(config, ROUND, 0)
        clients = [client for client, _ in ready]
        cohort = LocalCohort(
            self._model,
            self._data,
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
        with torch.random.fork_rng(devices=[self._model.device] if self._model.device.type == "cuda" else []):
            torch.manual_seed(
                int(numpy_generator(self._seed, "model", round_number, clients[0]).integers(2**63))
            )
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
                    EXAMPLES: len(self.clients[client]),
                    LOSS: float(update.loss[row]),
                    DIFFERENTIATED: cohort.differentiated[row],
                }
            )
            reply = self._write({name: v[row] for name, v in reply_arrays.items()}, names)
            yield Message(RecordDict({ARRAYS: reply, METRICS: metrics}), reply_to=message)

    def _evaluate(self, client: int, message: Message) -> Message:
        """Loss and accuracy of the sent weights on the client's own examples."""
        arrays, _ = self._read(message.content)
        self._model.load(arrays[WEIGHTS], arrays.get(BUFFERS))
        own = self.clients[client]
        accuracy, loss = self._model.evaluate(own.images, own.labels, own.rows, self._data, self._chunk)
        metrics = MetricRecord({EXAMPLES: len(own), "accuracy": accuracy, "loss": loss})
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    def _settle(self, client: int, message: Message) -> bool:
        """Bring the client to the state that the server accepted; False if it does not hold it."""
        state = self.states[client]
        content = message.content
        accepted = config_of(content).get(ACCEPTED)
        if accepted is None:  # a server half that acknowledges nothing takes every reply for accepted
            accepted = state.round if state.pending_round is None else state.pending_round
        supplied = content.array_records.get(STATE)
        if supplied is not None:
            self.states[client] = ClientState(int(accepted), vectors(supplied, self._model.device))
            return True
        return state.settle(int(accepted))

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


def _same_instruction(
    messages: Sequence[tuple[int, Message]], cohort: int
) -> Iterator[list[tuple[int, Message]]]:
    """Cut messages into groups that carry the very same arrays, each of at most `cohort` clients."""

    def instruction(addressed: tuple[int, Message]) -> tuple[str, int]:
        message = addressed[1]
        return message.metadata.message_type, id(message.content.array_records.get(ARRAYS))

    for _, group in groupby(messages, key=instruction):
        while part := list(islice(group, cohort)):
            yield part
