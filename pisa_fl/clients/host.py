"""Hosting clients: their data, their state, and the client half that answers the server's messages.

A host serves any number of clients: all of them in the `local` engine, a shard of them in a Ray actor, a
single one in a Flower ClientApp. It moves a client's state forward only when the server acknowledges it:
every train message says which round the server last accepted from that client (`accepted-round`). An instruction
that is not what the client half expects is refused, and changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import Stage
from numpy.typing import NDArray
from torch import Tensor, nn

from pisa_fl.clients.compiled import Package, packaged
from pisa_fl.clients.executor import MOVED, Executor, InstructionError, Job, Outcome, failure_reason, tensors
from pisa_fl.clients.flat_model import FlatModel
from pisa_fl.clients.stack import ClientData, fitting_stack
from pisa_fl.config import ConfigurationError
from pisa_fl.data.data_set import DataSet
from pisa_fl.models.examination import Findings, examine
from pisa_fl.privacy import Privacy
from pisa_fl.randomness import global_generators
from pisa_fl.secure.masking import Masking, stage_of
from pisa_fl.tasks import Task
from strategies.base.client import ClientHalf
from strategies.base.messages import (
    ACCEPTED,
    ARRAYS,
    BUFFERS,
    METRICS,
    ROUND,
    STATE,
    STATE_LOST,
    WEIGHTS,
    Field,
    TensorArray,
    config_of,
    integer,
    problem,
    record,
    vectors,
)

Run = Callable[[Sequence[Job]], Iterable[tuple[int, Outcome | str]]]
"""Runs jobs, in any order: their positions, and what became of them or why nothing did. It may leave some out."""

_Arrays = dict[int, tuple[dict[str, Tensor], list[str]]]
"""What was read of array records, by their identity."""

CLIENT_FAILED = 1000
"""Code of the error of a client whose own code raised; its reason holds the traceback after the first line."""


_NONE = np.empty(0, np.int64)

LONGEST_REASON = 8000
"""Characters of an error that are kept; what strangers write has no end."""


@dataclass(frozen=True)
class Clients:
    """What the clients of a federation are made of; it can be sent to another process.

    Attributes:
        data: The data set; clients read its training examples.
        rows: Client number -> positions of its training examples.
        model: The model; every host works on a copy.
        half: Client half.
        seed: Every random draw of the rounds follows from it.
        batch_size: Examples of a mini-batch.
        device: Where clients compute.
        noise_std: Client number -> standard deviation of the noise on its inputs; empty for none.
        task: What is learnt; None: what usually is of such data.
        tests: Client number -> positions of its own test examples, which it does not train on.
        privacy: What they do so that others learn little of their data; None: nothing.
        secure: Whether clients answer with updates only where masks hide them (`pisa_fl.secure`).
    """

    data: DataSet
    rows: Mapping[int, NDArray[np.integer]]
    model: nn.Module
    half: ClientHalf
    seed: int
    batch_size: int
    device: torch.device
    noise_std: Mapping[int, float] = field(default_factory=dict)
    task: Task | None = None
    tests: Mapping[int, NDArray[np.integer]] = field(default_factory=dict)
    privacy: Privacy | None = None
    secure: bool = False

    @cached_property
    def findings(self) -> Findings:
        """What training has to know of the model.

        Raises:
            ConfigurationError: It cannot be trained, or not on these clients' examples, or not as privately as was
                promised.
        """
        if self.half.needs_classes and not self.learnt.classes:
            raise ConfigurationError(
                f"{type(self.half).__name__} needs targets that are classes, and {type(self.learnt).__name__} has none:"
                " use another strategy"
            )
        found = examine(self.model, self.learnt, self.data)
        if self.privacy is not None:
            try:
                self.privacy.check(self.half, found)
            except ValueError as error:
                raise ConfigurationError(str(error)) from error
        if any(self.noise_std.values()):  # refused now, where there is none for such inputs
            with global_generators(0):
                self.data.noisy(self.data.trial(1), 0.0, torch.Generator())
        if not found.takes_one:
            remedy = (
                "its normalisation needs two examples at least: give it more, or a model without (GroupNorm)"
            )
            if self.batch_size == 1:
                raise ConfigurationError(f"batch_size=1 is impossible with this model, {remedy}")
            for client, size in self.sizes.items():
                if size == 1:
                    raise ConfigurationError(
                        f"client {client} has a single example and cannot train this model, {remedy}"
                    )
        return found

    @property
    def learnt(self) -> Task:
        """The task."""
        return self.task or self.data.usual_task()

    @property
    def sizes(self) -> dict[int, int]:
        """Training examples of every client, by client number."""
        return {number: len(rows) for number, rows in self.rows.items()}

    def host(
        self,
        numbers: Iterable[int],
        stack: int | Literal["auto"] = "auto",
        chunk: int | Literal["auto"] = "auto",
        precision: Literal["float32", "bfloat16"] = "float32",
        compiled: bool = False,
        ready: bool = False,
    ) -> ClientHost:
        """A host of the clients with the given numbers.

        Args:
            numbers: Client numbers.
            stack: Clients that advance together; `auto`: 1 on a CPU or for a model that mixes examples (BatchNorm),
                else as many as half of the GPU's free memory holds.
            chunk: Examples differentiated at once where the number does not matter to the result; `auto`: 250 on a
                CPU, about what its cache holds, else 8192.
            precision: `float32`, or `bfloat16`: mixed, by PyTorch's autocast.
            compiled: Have PyTorch compile the gradients of stacks of several, or on a CPU those of a client alone.
            ready: Make the whole set ready now, instead of every example each time it is read.

        Raises:
            ConfigurationError: An option is impossible.
        """
        if precision not in ("float32", "bfloat16"):
            raise ConfigurationError(f"engine.precision must be float32 or bfloat16, got {precision}")
        model = FlatModel(
            copy.deepcopy(self.model), self.learnt, self.device, precision, compiled, self.findings
        )
        fields = tensors(self.data.train, self.device)
        on_cpu = self.device.type == "cpu"
        if chunk == "auto":
            chunk = 250 if on_cpu else 8192
        if stack == "auto" and (on_cpu or model.mixes):
            stack = 1
        elif stack == "auto":
            free, _ = torch.cuda.mem_get_info(self.device)
            example = self.data.ready({name: field[:1] for name, field in fields.items()})
            stack = fitting_stack(model, example, self.batch_size, chunk, free)
        if ready:
            fields = model.ready(fields, self.data)
        if compiled and on_cpu and stack == 1:
            model.package = self._package(model, fields, ready)
        clients = {
            number: ClientData(
                fields,
                torch.as_tensor(self.rows[number]),
                self.noise_std.get(number, 0.0),
                raw=not ready,
                tests=torch.as_tensor(self.tests.get(number, _NONE)),
            )
            for number in numbers
        }
        executor = Executor(
            *(model, self.half, self.data, clients, self.seed, self.batch_size, chunk), privacy=self.privacy
        )
        return ClientHost(executor, stack, Masking(self.half) if self.secure else None)

    def _package(self, model: FlatModel, fields: Mapping[str, Tensor], ready: bool) -> Package | None:
        """Gradients of a client's batches, compiled."""
        examples = len(next(iter(fields.values())))
        batch = model.take(fields, torch.arange(self.batch_size) % examples)
        return packaged(model, batch if ready else self.data.ready(batch))


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
    accepted: Mapping[str, Tensor] = field(default_factory=dict)
    pending_round: int | None = None
    pending: Mapping[str, Tensor] = field(default_factory=dict)

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

    def to(self, device: torch.device | str, alone: bool = False) -> ClientState:
        """The same with its vectors on a device; `alone`: each in memory of its own, as copies."""
        accepted = {name: vector.to(device, copy=alone) for name, vector in self.accepted.items()}
        pending = {name: vector.to(device, copy=alone) for name, vector in self.pending.items()}
        return ClientState(self.round, accepted, self.pending_round, pending)


@dataclass(frozen=True)
class _Received:
    """A message's content, read.

    Attributes:
        arrays: What the clients compute with; the very same object for messages that share it.
        names: Names of the model's tensors, if it was not written as flat vectors.
        config: Numbers and texts, without what is said to single clients.
        accepted: The round that the server accepted last; None from a server half that acknowledges nothing.
        supplied: The state that belongs to it, for a client that lost it.
        refused: Why it must not be acted upon, or None.
    """

    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    names: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    accepted: int | None = None
    supplied: Mapping[str, Tensor] | None = None
    refused: str | None = None


@dataclass(frozen=True)
class _Group:
    """Messages that say the same to every client, with the clients' numbers."""

    train: bool
    instruction: _Received
    messages: list[tuple[int, Message]] = field(default_factory=list)

    def takes(self, train: bool, other: _Received) -> bool:
        same = self.instruction
        return self.train == train and same.arrays is other.arrays and same.config == other.config


class ClientHost:
    """Answers for the clients it hosts, and remembers what they remember.

    Args:
        executor: What computes for them.
        stack: Clients that advance together.
        masking: What hides their updates; None: they are sent as they are.
    """

    def __init__(self, executor: Executor, stack: int, masking: Masking | None = None) -> None:
        self.executor, self.clients = executor, executor.clients
        self.data, self.device = executor.data, executor.model.device
        self.states = {client: ClientState() for client in executor.clients}
        self._model, self._half, self._stack = executor.model, executor.half, stack
        self.masking = masking

    def handle(self, messages: Sequence[tuple[int, Message]], run: Run | None = None) -> Iterator[Message]:
        """Answer messages, given with the number of the client each is for; errors are answers too.

        Args:
            messages: The messages.
            run: Runs the jobs in place of this host's own executor.
        """
        masking = self.masking
        if masking is None:
            yield from self._openly(messages, run)
            return
        hidden = {message.metadata.message_id: (client, message) for client, message in messages}
        openly: list[tuple[int, Message]] = []
        for client, message in messages:
            stage = stage_of(message)
            if stage == Stage.COLLECT_MASKED_VECTORS or message.metadata.message_type == MessageType.EVALUATE:
                openly.append((client, message))
            else:
                yield self._masked(masking, client, message, stage)
        for reply in self._openly(openly, run):
            client, message = hidden[reply.metadata.reply_to_message_id]
            masks = message.metadata.message_type != MessageType.EVALUATE and not reply.has_error()
            yield self._masked(masking, client, message, stage_of(message), reply) if masks else reply

    def _masked(
        self,
        masking: Masking,
        client: int,
        message: Message,
        stage: str | None,
        update: Message | None = None,
    ) -> Message:
        """An answer of secure aggregation; whoever lost its state says so before there are keys."""
        try:
            if stage is None:
                raise InstructionError("it asks for an update that nothing hides")
            if stage == Stage.SETUP:
                self._check_rounds(message.content, 1)
                accepted = config_of(message.content).get(ACCEPTED)
                if not self._settle(client, _Received(accepted=accepted)):
                    return Message(Error(STATE_LOST, _lost(client)), reply_to=message)
            return masking.answer(client, message, update)
        except Exception as error:  # whatever a stranger's message makes the protocol raise
            return Message(Error(CLIENT_FAILED, failure_reason(error)), reply_to=message)

    def _openly(self, messages: Sequence[tuple[int, Message]], run: Run | None) -> Iterator[Message]:
        """Answers as they are."""
        contents: dict[tuple[int, bool], _Received] = {}
        arrays: _Arrays = {}
        groups: list[_Group] = []
        for client, message in messages:
            content = message.content if message.has_content() else RecordDict()
            train = message.metadata.message_type != MessageType.EVALUATE
            if (id(content), train) not in contents:
                contents[id(content), train] = self._read(content, train, arrays)
            instruction = contents[id(content), train]
            if instruction.refused is not None:
                yield Message(Error(CLIENT_FAILED, instruction.refused), reply_to=message)
            elif self._remembering(train) and not self._settle(client, instruction):
                yield Message(Error(STATE_LOST, _lost(client)), reply_to=message)
            else:
                group = next((g for g in groups if g.takes(train, instruction)), None)
                if group is None:
                    groups.append(group := _Group(train, instruction))
                group.messages.append((client, message))
        if self._stack > 1:
            for group in groups:
                # clients of like size advance together, whoever was asked first: less of a stack is padding
                group.messages.sort(key=lambda one: (-len(self.clients[one[0]]), one[0]))
        parts = [
            _Group(group.train, group.instruction, group.messages[start : start + self._stack])
            for group in groups
            for start in range(0, len(group.messages), self._stack)
        ]
        yield from self._answer(parts, run or self._run)

    def _answer(self, groups: Sequence[_Group], run: Run) -> Iterator[Message]:
        """Answer groups, each a stack; if one of them fails, each of its clients alone."""
        alone: list[_Group] = []
        for position, outcome in run([self._job(group) for group in groups]):
            group = groups[position]
            if not isinstance(outcome, str):
                yield from self._replies(group, outcome)
            elif len(group.messages) > 1:
                alone += [_Group(group.train, group.instruction, [one]) for one in group.messages]
            else:
                yield Message(Error(CLIENT_FAILED, outcome), reply_to=group.messages[0][1])
        if alone:
            yield from self._answer(alone, run)

    def _run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome | str]]:
        yield from ((position, self.executor.answer(job)) for position, job in enumerate(jobs))

    def _job(self, group: _Group) -> Job:
        clients = [client for client, _ in group.messages]
        remembering = self._remembering(group.train)
        states = [self.states[client].accepted for client in clients] if remembering else []
        kind: Literal["train", "evaluate"] = "train" if group.train else "evaluate"
        return Job(kind, clients, group.instruction.arrays, group.instruction.config, states)

    def _replies(self, group: _Group, outcome: Outcome) -> Iterator[Message]:
        """Keep what the clients are to remember, and put their answers into messages."""
        names = group.instruction.names
        for row, (client, message) in enumerate(group.messages):
            content = RecordDict()
            if group.train:
                if outcome.state:
                    state = self.states[client]
                    state.pending_round = integer(group.instruction.config, ROUND)
                    state.pending = outcome.state[row]
                arrays = ArrayRecord()
                for name, stack in outcome.arrays.items():
                    moved = outcome.norms[MOVED][row] if name == WEIGHTS else None
                    arrays[name] = TensorArray(stack[row], outcome.norms[name][row], moved)
                content[ARRAYS] = self._by_name(vectors(arrays), names) if names else arrays
            content[METRICS] = MetricRecord(dict(outcome.metrics[row]))
            yield Message(content, reply_to=message)

    def _remembering(self, train: bool) -> bool:
        """Whether what clients remember matters: to training, and to an evaluation of weights of their own."""
        return train or self._half.personal

    def _read(self, content: RecordDict, train: bool, arrays: _Arrays) -> _Received:
        """Read and check what a message says; arrays that another one has too are read once."""
        try:
            self._check_arrays(content, train)
            if self._remembering(train):
                self._check_rounds(content, int(train))
            sent = content.array_records[ARRAYS]
            if id(sent) not in arrays:
                arrays[id(sent)] = self._flat(sent)
            flat, names = arrays[id(sent)]
            config = config_of(content)
            accepted = config.pop(ACCEPTED, None)
            supplied = content.array_records.get(STATE) if self._remembering(train) else None
            state = None
            if supplied is not None:
                self._check_state(supplied)
                state = vectors(supplied, self._model.device)
            return _Received(flat, names, config, accepted, state)
        except Exception as error:  # whatever a stranger's message makes the checks raise
            return _Received(refused=failure_reason(error))

    def _check_arrays(self, content: RecordDict, train: bool) -> None:
        """Refuse arrays that are not what the client half expects.

        Raises:
            InstructionError: They are not.
        """
        if ARRAYS not in content.array_records or set(content.array_records) - {ARRAYS, STATE}:
            raise InstructionError(f"array records {sorted(content.array_records)}")
        arrays = content.array_records[ARRAYS]
        if WEIGHTS in arrays:
            expected = self._half.instruction_fields(config_of(content))
            if not train:  # which takes the weights, and whatever is sent to train beside them
                expected = {name: field for name, field in expected.items() if name in arrays}
            if self._model.buffer_layout.size:
                expected |= {BUFFERS: Field(self._model.buffer_layout.size)}
        else:  # the model's tensors by name, as Flower's servers make them
            types = ("float32", "float64", "int64")
            own = self._model.module.state_dict()
            expected = {name: Field(tuple(t.shape), types=types) for name, t in own.items()}
        if reason := problem(arrays, expected):
            raise InstructionError(reason)

    def _check_rounds(self, content: RecordDict, later: int) -> None:
        """Refuse impossible rounds.

        Args:
            content: What was sent.
            later: By how many rounds it is later than any that was accepted, at least.

        Raises:
            InstructionError: They are.
        """
        config = config_of(content)
        round_number, accepted = config.get(ROUND), config.get(ACCEPTED, 0)
        if type(round_number) is not int or not later <= round_number < 2**31:
            raise InstructionError(f"{ROUND} is {round_number!r}")
        if type(accepted) is not int or not 0 <= accepted <= round_number - later:
            raise InstructionError(f"{ACCEPTED} is {accepted!r} in round {round_number}")

    def _check_state(self, supplied: ArrayRecord) -> None:
        """Refuse a state that is no state of a client.

        Raises:
            InstructionError: It is none.
        """
        sizes = self._half.kept_sizes()
        expected = {name: Field(sizes[name]) for name in supplied if name in sizes}
        if reason := problem(supplied, expected) if expected else "a state without vectors":
            raise InstructionError(reason)

    def _settle(self, client: int, instruction: _Received) -> bool:
        """Bring the client to the state that the server accepted; False if it does not hold it."""
        state, accepted = self.states[client], instruction.accepted
        if accepted is None:  # a server half that acknowledges nothing takes every reply for accepted
            accepted = state.round if state.pending_round is None else state.pending_round
        if state.settle(accepted):
            return True
        if instruction.supplied is not None:
            self.states[client] = ClientState(accepted, dict(instruction.supplied))
        return instruction.supplied is not None

    def _flat(self, sent: ArrayRecord) -> tuple[dict[str, Tensor], list[str]]:
        """The vectors of an instruction, and the tensor names it used if it was not written as vectors.

        Our own server sends flat vectors; a strategy started with `ArrayRecord(model.state_dict())`, as
        Flower's documentation does it, sends the model's tensors by name and is answered likewise.
        """
        arrays = vectors(sent, self._model.device)
        if WEIGHTS in arrays:
            return {name: vector.clone() for name, vector in arrays.items()}, []
        read = {WEIGHTS: self._model.layout.flatten(arrays)}
        if self._model.buffer_layout.size:
            read[BUFFERS] = self._model.buffer_layout.flatten(arrays)
        return read, list(arrays)

    def _by_name(self, flat: Mapping[str, Tensor], names: Sequence[str]) -> ArrayRecord:
        self._model.load(flat[WEIGHTS])
        tensors = dict(
            self._model.module.state_dict()
        )  # tied parameters, under all their names, and constants
        if BUFFERS in flat:
            tensors |= self._model.buffer_layout.views(flat[BUFFERS])
        return record({name: tensors[name].clone() for name in names})


def _lost(client: int) -> str:
    return f"client {client} does not hold the state that the server accepted"


def printable(reason: str) -> str:
    """A stranger's text as it may be logged: cut, and without control characters but line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in reason[:LONGEST_REASON])
