"""Five thousand mutated replies and as many mutated instructions: what is not valid changes nothing.

What is valid is decided a second time here, by `values_of`, `reply_meaning` and `instruction_meaning`: a mutation
may hit what does not matter, or turn a message into another valid one; then it must count as exactly that message.
"""

import ast
import copy
import io
import logging
import math
import random
import resource
import struct
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pisa_fl.clients.host import Clients, ClientState
from pisa_fl.data import ImageData
from pisa_fl.engines.local import LocalGrid
from pisa_fl.server.flowers_own import server_half
from pisa_fl.server.gateway import Gateway
from strategies import Layout, LocalSgd, Penalty, Pisa, PisaClient
from strategies.base.messages import STATE_LOST, Field, problem, record, vectors
from strategies.preconditioners import Identity, SecondMoment

SIZES = (3, 5, 4, 6)
NODES = range(len(SIZES))
LARGEST = 1e12  # a greater number is as good as infinite: what is computed from it would be
MEBIBYTE = 2**20


# --- a small federation


def network(normed):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3) if normed else nn.Identity())


def second_moment(layout):
    return SecondMoment(layout, 0.9, 1e-8, 0.1, "residual", "vector", "exact")


def halves(method, layout):
    if method.startswith("fedavg"):
        server = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        return server, LocalSgd(layout, 0.1, 0.9, 0.0, 1)
    by_hand = 6.0 if method == "pisa" else None
    penalty = Penalty(0.1, 0.9, by_hand, 1.0 if by_hand else None, 0.9, 2)
    q = Identity if method == "pisa" else second_moment
    return Pisa(layout, q, penalty, 0.1, 1, "examples"), PisaClient(layout, q, penalty, 1, 1, "mean")


def host_of(half, model, stack=1):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (sum(SIZES), 1, 2, 2), dtype=np.uint8)
    labels = draw.integers(0, 3, sum(SIZES))
    data = ImageData(images, labels, images, labels, ("a", "b", "c"), (0.5,), (0.5,))
    partition = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    rows = dict(enumerate(partition))
    return Clients(data, rows, model, half, 0, 8, torch.device("cpu")).host(NODES, stack, 100)


class Grid(LocalGrid):
    """Hands over what `script` makes of the messages; without one, the clients' replies."""

    script = None

    def deliver(self, messages, timeout):
        return super().deliver(messages, timeout) if self.script is None else self.script(messages)


class Server:
    """A server half and its gateway."""

    def __init__(self, method):
        normed, by_name = method != "pisa", method == "fedavg by name"
        model = network(normed)
        layout = Layout.of_parameters(model)
        self.strategy, half = halves(method, layout)
        self.half = half
        self.twin, _ = halves(method, layout)
        buffers = torch.cat([torch.empty(0), *(b for b in model.buffers() if b.is_floating_point())])
        self.grid = Grid(host_of(half, model))
        server = server_half(self.strategy)
        self.gateway = Gateway(self.grid, half, torch.empty(0) if by_name else buffers, 0, 1.0, server)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        self.arrays = ArrayRecord(model.state_dict()) if by_name else record({"weights": weights})

    def round(self, number):
        self.gateway.begin(number)
        messages = self.strategy.configure_train(number, self.arrays, ConfigRecord(), self.gateway)
        replies = self.gateway.send_and_receive(messages)
        arrays, _ = self.strategy.aggregate_train(number, replies)
        self.gateway.commit()
        self.arrays = self.arrays if arrays is None else arrays
        return replies

    def twin_round(self, number, before, meanings):
        """What the server must hold after a round in which it accepted these replies."""
        tensors, arrays, buffers, accepted = before
        server_half(self.twin).load_state_dict(copy.deepcopy(tensors))
        sent = list(self.twin.configure_train(number, arrays, ConfigRecord(), self.gateway))
        replies = []
        for message in sorted(sent, key=lambda m: m.metadata.dst_node_id):
            node = message.metadata.dst_node_id
            if node in meanings:
                values, metrics = meanings[node]
                named = {k: Array(v) for k, v in values.items() if k != "buffers" or not len(buffers)}
                content = RecordDict({"arrays": ArrayRecord(named), "metrics": MetricRecord(metrics)})
                replies.append(Message(content, reply_to=message))
        result, _ = self.twin.aggregate_train(number, replies)
        examples = sum(metrics["num-examples"] for _, metrics in meanings.values())
        if len(buffers) and examples:
            replied = [meanings[node] for node in sorted(meanings)]
            terms = (m["num-examples"] * v["buffers"].astype(np.float64) for v, m in replied)
            buffers = torch.from_numpy((sum(terms) / examples).astype(np.float32))
        if self.half.state_sizes():
            accepted = accepted | dict.fromkeys(meanings, number)
        return (server_half(self.twin).state_dict(), arrays if result is None else result, buffers, accepted)

    def holds(self):
        return copy.deepcopy(
            (
                server_half(self.strategy).state_dict(),
                self.arrays,
                self.gateway.buffers,
                self.gateway.accepted,
            )
        )

    def restore(self, before):
        tensors, self.arrays, self.gateway.buffers, accepted = before
        self.gateway.accepted = dict(accepted)
        server_half(self.strategy).load_state_dict(copy.deepcopy(tensors))


def bits(held):
    """Every bit of what a server, a client or a reply holds."""
    if isinstance(held, torch.Tensor):
        return str(held.dtype), tuple(held.shape), held.contiguous().numpy().tobytes()
    if isinstance(held, Array):
        return held.dtype, held.shape, held.numpy().tobytes()
    if isinstance(held, ClientState):
        return held.round, bits(held.accepted), held.pending_round, bits(held.pending)
    if isinstance(held, float):
        return repr(held)
    if hasattr(held, "items"):
        return {key: bits(value) for key, value in held.items()}
    return tuple(map(bits, held)) if isinstance(held, tuple | list) else held


def finite(held):
    tensors, arrays, buffers, _ = held
    found = [*tensors.values(), buffers, *(torch.from_numpy(a.numpy()) for a in arrays.values())]
    return all(t.isfinite().all() for t in found)


# --- what is valid, decided a second time


def values_of(array, shape, types=("float32",), least=-math.inf, most=LARGEST):
    """The values of an array of a message, or None if it is not one of finite numbers as expected."""
    data = array.data
    if tuple(array.shape) != shape or array.dtype not in types or array.stype != "numpy.ndarray":
        return None
    if data[:8] != b"\x93NUMPY\x01\x00" or len(data) < 10:
        return None
    (length,) = struct.unpack("<H", data[8:10])
    try:
        with warnings.catch_warnings(action="ignore"):
            said = np.lib.format.read_array_header_1_0(io.BytesIO(data[8:]))
    except Exception:
        return None
    size = math.prod(shape)
    if repr(said[0]) != repr(shape) or said[2].name != array.dtype or said[2].byteorder == ">":
        return None
    if len(data) != 10 + length + size * said[2].itemsize:
        return None
    kind = {"float32": "f", "float64": "d", "int64": "q"}[array.dtype]
    values = np.array(struct.unpack(f"<{size}{kind}", data[10 + length :]), array.dtype)
    if not all(abs(v) <= most and v >= least for v in values.tolist()):
        return None
    return np.array(values.reshape(shape, order="F" if said[1] else "C"), order="C")


def all_values(arrays, expected):
    """The values of all arrays, by name, or None."""
    if set(arrays) != set(expected):
        return None
    values = {name: values_of(arrays[name], *rule) for name, rule in expected.items()}
    return None if any(v is None for v in values.values()) else values


def kinds(content, kind):
    return {name: value for name, value in content.items() if isinstance(value, kind)}


def reply_meaning(content, expected, number, node):
    """The arrays and metrics of a valid reply of a client, or None."""
    arrays, metrics = kinds(content, ArrayRecord), kinds(content, MetricRecord)
    if set(content) != {"arrays", "metrics"} or set(arrays) != {"arrays"} or set(metrics) != {"metrics"}:
        return None
    measured = dict(metrics["metrics"])
    if set(measured) != {"server-round", "num-examples", "train-loss", "examples-differentiated"}:
        return None
    if any(not isinstance(v, int | float) or not abs(v) <= sys.float_info.max for v in measured.values()):
        return None
    if abs(measured["train-loss"]) > LARGEST:
        return None
    seen, passed = measured["num-examples"], measured["examples-differentiated"]
    if measured["server-round"] != number or not isinstance(seen, int) or seen != SIZES[node]:
        return None
    if not isinstance(passed, int) or not 0 <= passed < 2**40:
        return None
    values = all_values(arrays["arrays"], expected)
    exact = {key: int(v) if isinstance(v, bool) or v == number else v for key, v in measured.items()}
    return None if values is None else (values, exact)


def instruction_meaning(content, expected, sizes, trained):
    """Arrays, rounds and supplied state of a valid instruction to train or to evaluate, or None."""
    arrays, configs = kinds(content, ArrayRecord), kinds(content, ConfigRecord)
    if "arrays" not in arrays or set(arrays) - {"arrays", "state"}:
        return None
    values = all_values(arrays["arrays"], expected)
    config = dict(configs.get("config", {}))
    number, accepted = config.get("server-round"), config.get("accepted-round", 0)
    if values is not None and not trained:
        return values, 1, None, None
    if values is None or type(number) is not int or not 1 <= number < 2**31:
        return None
    if type(accepted) is not int or not 0 <= accepted < number:
        return None
    supplied = None
    if "state" in arrays:
        wanted = {name: ((sizes[name],),) for name in arrays["state"] if name in sizes}
        supplied = all_values(arrays["state"], wanted)
        if not supplied:
            return None
    return values, number, config.get("accepted-round"), supplied


# --- mutations


def numpy_bytes(header, payload, version=(1, 0)):
    text = header.encode("latin1")
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + payload


def header_of(descr, fortran, shape):
    return f"{{'descr': {descr!r}, 'fortran_order': {fortran!r}, 'shape': {shape}, }}"


DESCRIPTIONS = ["<f4", ">f4", "=f4", "f4", "float32", "<f8", "<f2", "<i4", "<i8", "<u8", "|O", "|b1", "|S4"]
DESCRIPTIONS += ["<U1", "<c8", "|V4", "<f16", "m8[s]", "f4,f4", "0f4", ("<f4", (2,)), "", None, 4]
DESCRIPTIONS += [[("a", "<f4")], [("a", "<f4", (2,))], [("a", "|O")]]
SHAPES = ["(10**12,)", "(1000000000000,)", "(-1,)", "(-6,)", "(0,)", "()", "(1.0,)", "None", "(True,)", "[1]"]
SHAPES += ["(2L,)", "'x'", "{}", "(0, 1000000000000)"]
SHAPES += ["(" + "1," * 70 + ")", "(" + "9" * 4500 + ",)", "(" * 150 + ")" * 150, "(" * 3000 + ")" * 3000]
SHAPES += ["(" + "-" * 9000 + "1,)", "[" * 90 + "]" * 90, "__import__('os')", "(4294967296, 4294967296)"]
TEXTS = ["", "x", "float32\n", "\x1b[2J", "ö" * 50, "weights", "dual", "float64", "numpy.ndarray", "pickle"]
NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**40, 2**63 - 1, -(2**63), 10**400, 0.0, -0.0, 0.5, -2.5, 1e308, 1e-320]
NUMBERS += [math.nan, math.inf, -math.inf, 1.0, 3.0]
SPECIAL = [math.nan, math.inf, -math.inf, -1.0, 3.4e38, -3.4e38, 1e12, 1.1e12, 1e-44, -0.0]
RECORDS = ["arrays", "metrics", "config", "state", "more", ""]


def flip(rng, data, first, last):
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 16])):
        changed[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def header_mutation(rng, array):
    """Another header before the same values."""
    start = 10 + struct.unpack("<H", array.data[8:10])[0]
    descr, fortran, shape = "<f4", rng.choice([False, True]), str(tuple(array.shape))
    which = rng.randrange(5)
    descr = rng.choice(DESCRIPTIONS) if which == 0 else descr
    shape = rng.choice(SHAPES) if which == 1 else shape
    version = rng.choice([(2, 0), (3, 0), (1, 1), (0, 0), (255, 255)]) if which == 2 else (1, 0)
    ends = ["\n", "", " \n", " " * 99 + "\n", "\n\n", "#", "\0\n"]
    header = header_of(descr, fortran, shape) + rng.choice(ends)
    if which == 3:
        broken = ["", "{}", "()", "\n", header * 2, header[:-9], header.replace("descr", "desc"), "9" * 9000]
        header = rng.choice(broken)
    return numpy_bytes(header, array.data[start:], version)


def values_mutation(rng, array):
    """Some of the values replaced, or the type, or all of it by objects."""
    values = array.numpy().copy()
    if rng.random() < 0.2:
        others = [values.astype(kind) for kind in ("f8", ">f4", "i8")]
        other = Array(rng.choice([values[..., None], *others]))
        return rng.choice([other, Array(array.dtype, array.shape, array.stype, other.data)])
    if rng.random() < 0.1:
        file = io.BytesIO()
        np.save(file, np.full(values.shape, {}, dtype=object), allow_pickle=True)
        return Array(array.dtype, array.shape, array.stype, file.getvalue())
    flat = values.reshape(-1)
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        for _ in range(rng.choice([1, 1, 5])):
            flat[rng.randrange(flat.size)] = np.array(rng.choice(SPECIAL)).astype(values.dtype)
    return Array(values)


def field_mutation(rng, array):
    """Its bytes as they were, but another name for what they are."""
    dtype, shape, stype, data = array.dtype, array.shape, array.stype, array.data
    shapes = [(), (0,), (1,), (-1,), (10**12,), shape[::-1], (*shape, 1), (1, *shape), shape * 40]
    which = rng.randrange(3)
    if which == 0:
        dtype = rng.choice(["float64", "int64", "float16", ">f4", "bool", *TEXTS])
    elif which == 1:
        shape = rng.choice(shapes)
    else:
        stype = rng.choice(TEXTS)
    return Array(dtype, tuple(shape), stype, data)


def array_mutation(rng, array):
    data, kind = array.data, rng.randrange(8)
    mutated_before = values_of(array, array.shape, ("float32", "int64")) is None
    if mutated_before or not array.shape:
        return Array(array.dtype, array.shape, array.stype, data[: rng.randrange(len(data) + 1)])
    start = 10 + struct.unpack("<H", data[8:10])[0]
    if kind < 2:  # in the header
        data = flip(rng, data, 0, start)
    elif kind == 2:  # in the values
        data = flip(rng, data, start, len(data))
    elif kind == 3:
        data = data[: rng.choice([0, 5, 9, 11, 60, len(data) - 4, len(data) - 1])]
    elif kind == 4:
        data += rng.choice([b"\0", b"\0" * 4, data, b"\n", bytes(5000)])
    elif kind == 5:
        data = header_mutation(rng, array)
    else:
        return values_mutation(rng, array) if kind == 6 else field_mutation(rng, array)
    return Array(array.dtype, array.shape, array.stype, data)


def arrays_mutation(rng, arrays):
    """An array changed, missing, one more, renamed, or two exchanged."""
    named, kind = dict(arrays), rng.randrange(10)
    if not named:
        return ArrayRecord({"weights": Array(np.ones(3, np.float32))})
    one, other = rng.choice(list(named)), rng.choice(list(named))
    if kind == 0:
        del named[one]
    elif kind == 1:
        named[rng.choice(TEXTS)] = named[one]
    elif kind == 2:
        named[rng.choice([*TEXTS, one + " ", one.upper(), "observed", "moment", "buffers"])] = named.pop(one)
    elif kind == 3:
        named[one], named[other] = named[other], named[one]
    elif kind == 4 and rng.random() < 0.2:
        named = {}
    else:
        named[one] = array_mutation(rng, named[one])
    return ArrayRecord(named)


def put(values, key, value):
    """A value in a record, even one that it would not take."""
    values.__dict__["_data"][key] = value
    return values


def values_record_mutation(rng, values):
    """A number or text changed, missing, one more or renamed."""
    changed, kind = values.copy(), rng.randrange(8)
    key = rng.choice(list(changed) or ["x"])
    pool = [*NUMBERS, True, False, [1], [1.0, 2.0], [], "1", "x" * MEBIBYTE, "a\nb\x1b[2J", b"1", b""]
    if kind == 0 and key in changed:
        del changed[key]
    elif kind == 1:
        put(changed, rng.choice([*TEXTS, "accepted-round", "loss"]), 1)
    elif kind == 2 and key in changed:
        put(changed, rng.choice([key + "s", key.upper(), "accepted-round"]), changed.pop(key))
    else:
        held = changed.get(key)
        countable = isinstance(held, int | float) and abs(held) < 2**63
        near = [held + 1, held - 1, float(held)] if countable else [0]
        put(changed, key, rng.choice([*pool, *near]))
    return changed


def records_mutation(rng, content):
    """A record missing, one more, renamed, of another kind, or all gone."""
    records, kind = dict(content), rng.randrange(6)
    some = [
        ArrayRecord({}),
        MetricRecord({}),
        MetricRecord({"x": 1}),
        ConfigRecord({"x": 1}),
        *records.values(),
    ]
    one = rng.choice(list(records))
    if kind == 0:
        del records[one]
    elif kind == 1:
        records[rng.choice(RECORDS)] = rng.choice(some)
    elif kind == 2:
        records[rng.choice(RECORDS)] = records.pop(one)
    elif kind == 3:
        records[one] = rng.choice(some)
    elif kind == 4:
        records = dict(zip(records, reversed(records.values()), strict=True))
    elif rng.random() < 0.3:
        records = {}
    return RecordDict(records)


def again(content):
    """The same records once more; the gateway takes the running statistics out of those that it is given."""
    return RecordDict({name: values.copy() for name, values in content.items()})


def content_mutation(rng, content):
    """One to three mutations; what they leave alone stays the same object."""
    mutated = RecordDict(dict(content))
    for _ in range(rng.choice([1, 1, 1, 1, 2, 3])):
        kind, arrays = rng.random(), list(kinds(mutated, ArrayRecord))
        values = list(kinds(mutated, MetricRecord | ConfigRecord))
        if kind < 0.5 and arrays:
            name = rng.choice(arrays)
            mutated[name] = arrays_mutation(rng, mutated[name])
        elif kind < 0.85 and values:
            name = rng.choice(values)
            mutated[name] = values_record_mutation(rng, mutated[name])
        elif mutated:
            mutated = records_mutation(rng, mutated)
    return mutated


def monstrous_reason(rng):
    some = ["", "\n", "\nTraceback", "x" * MEBIBYTE, "\x1b[2J\x1b]0;owned\x07", "a\r\nb", "\0\0", " ", "\t"]
    some += ["\u202egnp.exe", "\u2028\u2029\x85\x0b\x0c", "\n" * MEBIBYTE, "ok\n\nTraceback\n" * 9, None]
    some += ["".join(map(chr, range(999))), f"client {rng.random()}\n{rng.random()}"]
    return rng.choice(some)


def error_mutation(rng):
    codes = [0, 1, -1, 5, 999, 1000, STATE_LOST, STATE_LOST, 1002, 2**31, -(2**63)]
    return Error(rng.choice(codes), monstrous_reason(rng))


class Mutator:
    """A grid's script that hands over mutations of honest replies, and the server's verdict by this file's rules."""

    def __init__(self, rng, honest, expected, number):
        self.rng, self.honest, self.expected, self.number = rng, honest, expected, number
        self.count = 0
        self.clear()

    def clear(self):
        self.seen, self.answers, self.strangers, self.copies = [], {}, [], []

    def __call__(self, messages):
        rng, replies = self.rng, []
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        self.seen += asked
        for message in messages:
            node = message.metadata.dst_node_id
            kind = rng.random()
            honest = self.honest[node]
            self.count += kind >= 0.05
            if (
                kind < 0.05
            ):  # not mutated; so whoever said that its state is lost may answer when it is supplied
                replies.append(Message(again(honest), reply_to=message))
            elif kind < 0.8:
                replies.append(Message(content_mutation(rng, again(honest)), reply_to=message))
            elif kind < 0.9:
                replies.append(Message(error_mutation(rng), reply_to=message))
            elif kind < 0.97:
                replies.append(self.forged(Message(again(honest), reply_to=message)))
            if replies and rng.random() < 0.05:
                replies.append(rng.choice([replies[-1], Message(again(honest), reply_to=message)]))
        rng.shuffle(replies)
        answers = {}
        for reply in replies:
            node, sender = asked.get(reply.metadata.reply_to_message_id), reply.metadata.src_node_id
            if node is None or (sender != node and not reply.has_error()):
                self.strangers.append(sender)
            elif node in answers:
                self.copies.append(node)
            else:
                answers[node] = reply
        # now: the gateway takes the running statistics out of the replies
        self.answers |= {node: self.meaning(node, reply) for node, reply in answers.items()}
        return replies

    def meaning(self, node, reply):
        return None if reply.has_error() else reply_meaning(reply.content, self.expected, self.number, node)

    def forged(self, reply):
        """A reply to another message, or in the name of another."""
        rng, metadata = self.rng, reply.metadata.__dict__
        if rng.random() < 0.6:
            ids = ["", "0", "-1", "x" * 1000, "1", metadata["_reply_to_message_id"] + " ", *self.seen]
            metadata["_reply_to_message_id"] = rng.choice(ids)
        else:
            metadata["_src_node_id"] = rng.choice([0, 1, 2, 3, 4, 99, -1, 2**63])
        return reply

    def accepted(self):
        return {node: meaning for node, meaning in self.answers.items() if meaning is not None}


def growth(before):
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def is_one_line(text):
    return text.strip() and len(text.splitlines()) == 1 and text.isprintable()


# --- replies

METHODS = ("sisa", "pisa", "fedavg", "fedavg by name")
ROUNDS, BATCHES = (1, 2, 3, 4, 7), 70  # times four clients, times four methods


def honest_round(server, number):
    """What the server says and what the clients answer, without any of it being taken to account."""
    said, answered = [], []

    def script(messages):
        said.extend(messages)
        answered.extend(LocalGrid.deliver(server.grid, messages, None))
        return []

    server.grid.script = script
    server.round(number)
    server.grid.script = None
    assert not any(reply.has_error() for reply in answered)
    return (
        {message.metadata.dst_node_id: message.content for message in said},
        {reply.metadata.src_node_id: reply.content for reply in answered},
    )


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Every refusal is logged; numpy warns of headers that Python 2 wrote."""
    monkeypatch.setattr(logging.getLogger("flwr"), "disabled", True)
    logging.getLogger("pisa_fl.server.gateway").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        yield
    logging.getLogger("pisa_fl.server.gateway").setLevel(logging.NOTSET)


@pytest.mark.parametrize("method", METHODS)
def test_a_mutated_reply_changes_nothing_or_counts_as_the_reply_that_it_is(method):
    rng, server, undisturbed = random.Random(METHODS.index(method)), Server(method), Server(method)
    gateway = server.gateway
    mutated = unchanged = accepted = 0
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in ROUNDS:
        held = server.holds()
        _, honest = honest_round(server, number)
        # what is averaged may be rounded up, and of these PISA's server takes squares and products
        most = {"buffers": LARGEST / 2} if "by name" not in method else {}
        if not method.startswith("fedavg"):
            most |= {"weights": LARGEST**0.5 / 2, "observed": LARGEST**0.5 / 2}
        expected = {
            name: (array.shape, ("float32",), -math.inf, most.get(name, LARGEST))
            for name, array in honest[0]["arrays"].items()
        }
        mutator = server.grid.script = Mutator(rng, honest, expected, number)
        for _ in range(BATCHES):
            mutator.clear()
            replies = server.round(number)
            meanings = mutator.accepted()
            others = set(NODES) - set(meanings)
            assert {r.metadata.src_node_id for r in replies if not r.has_error()} == set(meanings)
            refused = [failure.client for failure in gateway.failures]
            assert sorted(refused) == sorted([*mutator.strangers, *mutator.copies, *others])
            assert all(is_one_line(failure.reason) for failure in gateway.failures)
            counted = gateway.traffic.clients_ok, gateway.traffic.clients_failed
            assert counted == (len(meanings), len(others))
            after = server.holds()
            assert finite(after)
            assert bits(after) == bits(server.twin_round(number, held, meanings))
            if not meanings:
                assert bits(after) == bits(held)
            unchanged += not meanings
            accepted += len(meanings)
            server.restore(held)
        mutated += mutator.count
        server.grid.script = None
        server.round(number)
        undisturbed.round(number)
        assert gateway.failures == []
        assert bits(server.holds()) == bits(undisturbed.holds()) != bits(held)
    assert mutated >= 1250
    assert unchanged >= 50
    assert 25 <= accepted <= mutated / 3
    assert growth(started) < 100 * MEBIBYTE


# --- instructions


def instruction_mutation(rng, honest):
    if rng.random() < 0.02:
        return Error(rng.choice([0, STATE_LOST, 1000]), monstrous_reason(rng))
    return content_mutation(rng, again(honest))


def addressed(content, node, kind="train"):
    if isinstance(content, RecordDict):
        return Message(content, node, kind)
    message = Message(content, reply_to=Message(RecordDict({}), node, kind))
    message.metadata.__dict__["_dst_node_id"] = node
    return message


def canonical(meaning):
    """The message that is meant, written anew."""
    values, number, accepted, supplied = meaning
    config = {"server-round": number} | ({} if accepted is None else {"accepted-round": accepted})
    vectors = {"arrays": values} | ({"state": supplied} if supplied else {})
    records = {name: ArrayRecord({k: Array(v) for k, v in named.items()}) for name, named in vectors.items()}
    return RecordDict({**records, "config": ConfigRecord(config)})


def holds_accepted(state, meaning):
    """Whether a client has, or is given, the state that the server accepted."""
    _, _, accepted, supplied = meaning
    return accepted in (None, 0, state.round, state.pending_round) or bool(supplied)


class Told:
    """A client host that is told mutated instructions, and judged by what it does and remembers."""

    def __init__(self, rng, server):
        self.rng, self.grid, self.half = rng, server.grid, server.half
        self.supply = server_half(server.strategy).supply
        types = ("float32", "float64", "int64")
        self.named = {name: (tuple(t.shape), types) for name, t in network(True).state_dict().items()}
        self.refused = self.lost = self.followed = 0

    def tell(self, contents, kinds=None):
        messages = [addressed(c, node, (kinds or {}).get(node, "train")) for node, c in contents.items()]
        replies = list(self.grid.send_and_receive(messages))
        assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages]
        return dict(zip(contents, replies, strict=True))

    def instructions(self, said):
        """Good instructions; some clients have lost their state, and are supplied."""
        good = {}
        for node in NODES:
            state, good[node] = self.supply(node), said[node]
            if state is not None and self.rng.random() < 0.3:
                good[node] = RecordDict({**said[node], "state": state})
                if self.rng.random() < 0.5:
                    self.grid.host.states[node] = ClientState()
        return good

    def mutate(self, good):
        """Tell every client something mutated; afterwards each remembers what it did before."""
        states, rng = self.grid.host.states, self.rng
        before = copy.deepcopy(states)
        sent = {node: instruction_mutation(rng, good[node]) for node in NODES}
        kinds = {node: "train" if rng.random() < 0.95 else "evaluate" for node in NODES}
        replies = self.tell(sent, kinds)
        after, self.grid.host.states = states, before
        for node, reply in replies.items():
            self.judge(node, sent[node], kinds[node], reply, after[node])

    def judge(self, node, content, kind, reply, after):
        before, meaning = self.grid.host.states[node], None
        if isinstance(content, RecordDict):
            expected = self.named if "weights" not in content.get("arrays", {}) else self.expected
            meaning = instruction_meaning(content, expected, self.half.state_sizes(), kind == "train")
        if meaning is None or (kind == "train" and not holds_accepted(before, meaning)):
            assert reply.has_error()
            assert (reply.error.code == STATE_LOST) == (meaning is not None)
            assert len(reply.error.reason.partition("\nTraceback")[0].splitlines()) == 1
            assert bits(after) == bits(before)
            self.refused += 1
            self.lost += meaning is not None
            return
        kept = copy.deepcopy(before)
        meant = self.tell({node: canonical(meaning)}, {node: kind})[node]
        if meant.has_error():  # a round so far away that there is no penalty for it
            assert reply.error.reason.splitlines()[0] == meant.error.reason.splitlines()[0]
        else:
            assert bits(reply.content) == bits(meant.content)
        assert bits(after) == bits(self.grid.host.states[node])
        if kind == "evaluate":
            assert bits(after) == bits(kept)
        self.grid.host.states[node] = kept
        self.followed += 1


@pytest.mark.parametrize("method", METHODS)
def test_a_mutated_instruction_changes_nothing_or_counts_as_the_instruction_that_it_is(method):
    rng, server = random.Random(METHODS.index(method)), Server(method)
    told, host = Told(rng, server), server.grid.host
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in ROUNDS:
        remembered = copy.deepcopy(host.states)
        said, honest = honest_round(server, number)
        told.expected = {
            name: (array.shape, ("float32",), 0.0 if name in ("moment", "mass") else -math.inf)
            for name, array in said[0]["arrays"].items()
        }
        for _ in range(BATCHES // 4):
            host.states = copy.deepcopy(remembered)
            good = told.instructions(said)
            for _ in range(4):
                told.mutate(good)
            # as if nothing had been
            replies = told.tell(good)
            assert {n: bits(r.content) for n, r in replies.items()} == {n: bits(c) for n, c in honest.items()}
        host.states = copy.deepcopy(remembered)
        server.round(number)
        assert server.gateway.failures == []
    assert told.refused + told.followed >= 1250
    assert told.refused >= 600
    assert told.followed >= 50
    assert told.lost > 0
    assert growth(started) < 100 * MEBIBYTE


def test_clients_that_advance_together_follow_each_its_own_words():
    server = Server("pisa")
    host = server.grid.host = host_of(server.half, network(False), stack=3)
    said, _ = honest_round(server, 1)
    words = {0: {"server-round": 1}, 1: {"server-round": 6}, 2: {"server-round": 6}, 3: {"server-round": -1}}
    sent = {n: RecordDict({**said[n], "config": ConfigRecord(w)}) for n, w in words.items()}
    assert len({id(content["arrays"]) for content in sent.values()}) == 1
    replies = Told(random.Random(), server).tell(sent)
    assert replies[3].has_error()
    for node in (0, 1, 2):
        assert replies[node].content["metrics"]["server-round"] == words[node]["server-round"]
        assert host.states[node].pending_round == words[node]["server-round"]


# --- single arrays, texts and states

EXPECTED = {"weights": Field(5, minimum=-2.0)}
numbers = st.floats(-2, 9, width=32) | st.floats(width=32)
values = st.lists(numbers, min_size=5, max_size=5).map(lambda v: np.array(v, "<f4").tobytes())
shapes = st.lists(st.integers(-9, 9), max_size=3).map(lambda s: str(tuple(s)))
headers = st.builds(
    lambda descr, fortran, shape, end: header_of(descr, fortran, shape) + end,
    st.sampled_from(DESCRIPTIONS) | st.just("<f4"),
    st.sampled_from([False, True, None, 1]),
    st.just("(5,)") | st.sampled_from(SHAPES) | shapes,
    st.text(" \n", max_size=9),
)
texts = headers | st.text(st.characters(max_codepoint=255), max_size=200)
versions = st.sampled_from([(1, 0), (1, 0), (2, 0), (3, 0)])
files = st.builds(numpy_bytes, texts, values | st.binary(max_size=40), versions)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(data=files | st.binary(max_size=200))
def test_bytes_are_refused_or_read_as_what_they_are(data):
    array = Array("float32", (5,), "numpy.ndarray", data)
    arrays, found = ArrayRecord({"weights": array}), values_of(array, (5,), least=-2.0)
    reason = problem(arrays, EXPECTED)
    assert (reason is None) == (found is not None)
    if found is not None:
        assert vectors(arrays)["weights"].numpy().tobytes() == found.tobytes()


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(reason=st.none() | st.text(), code=st.integers(-(2**63), 2**63 - 1))
def test_the_reason_of_a_failure_is_one_line_that_a_terminal_can_show(reason, code):
    server = Server("pisa")
    server.grid.script = lambda messages: [Message(Error(code, reason), reply_to=m) for m in messages]
    assert all(reply.has_error() for reply in server.round(1))
    assert [failure.client for failure in server.gateway.failures] == list(NODES)
    for failure in server.gateway.failures:
        assert is_one_line(failure.reason)
        assert all(line.isprintable() for line in failure.traceback.split("\n"))


steps = st.lists(st.tuples(st.sampled_from(["ask", "forge"]), st.integers(0, 8), st.booleans()), max_size=12)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(history=steps)
def test_a_client_whose_server_is_now_and_then_forged_keeps_what_its_server_accepted(history):
    """Forged instructions name any round as accepted but the start and the one that the client would believe."""
    state, accepted = ClientState(), 0
    for number, (kind, forged, heard) in enumerate(history, start=1):
        if kind == "forge":
            if forged not in (0, state.round, state.pending_round):
                assert not state.settle(forged)
            continue
        assert state.settle(accepted)
        assert [*state.accepted.values()] == ([accepted] if accepted else [])
        state.pending_round, state.pending = number, {"tally": number}
        accepted = number if heard else accepted


@pytest.mark.parametrize(
    "shape", ["(1000000000000,)", "(100000000,)", "(0, 1000000000000)", "(-1, 100000000)", "(25, 4000000)"]
)
@pytest.mark.parametrize("descr", ["<f4", "|O", "|V1000000000", "|S1000000000", "f4," * 9])
def test_a_forged_header_makes_nobody_allocate(shape, descr):
    data = numpy_bytes(header_of(descr, False, shape), bytes(20))
    size = ast.literal_eval(shape)
    said = [(5,), size if all(n >= 0 for n in size) else (5,)]
    for dimensions in said:
        arrays = ArrayRecord({"weights": Array("float32", dimensions, "numpy.ndarray", data)})
        tracemalloc.start()
        reason = problem(arrays, {"weights": Field(dimensions)})
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert reason
        assert peak < MEBIBYTE
