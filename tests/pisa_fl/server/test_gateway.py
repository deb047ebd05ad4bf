"""The gateway between a strategy and clients that misbehave."""

import io
import math
import re
import statistics
from typing import ClassVar
from zlib import crc32

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from pisa_fl.engines.local import LocalGrid
from pisa_fl.metric import Metric
from pisa_fl.server.gateway import REFUSED, Failure, Gateway
from strategies import ClientHalf, Layout, Penalty, PisaClient, Update
from strategies.base.messages import Field, record
from strategies.preconditioners import Identity

D = 6
NODES = (0, 1, 2, 3)


class Half(ClientHalf):
    """Answers with weights and a moment that must not be negative."""

    def reply_fields(self, config):
        return {"weights": Field(D), "moment": Field(2, minimum=0.0)}

    def solve(self, stack, instruction, state):
        return Update({}, torch.empty(0))


def arrays(node=0):
    return {"weights": np.full(D, node, np.float32), "moment": np.ones(2, np.float32)}


def metrics(node=0):
    return {
        "server-round": 1,
        "num-examples": 10 + node,
        "train-loss": 0.5 + node,
        "examples-differentiated": 20 + node,
    }


def content(node=0, *, of=None, **changes):
    """What client `node` answers; `changes` replace arrays or, through `of`, the metrics."""
    named = {key: value for key, value in (arrays(node) | changes).items() if value is not None}
    measured = {key: value for key, value in (metrics(node) | (of or {})).items() if value is not None}
    return RecordDict(
        {
            "arrays": ArrayRecord({key: Array(np.asarray(value)) for key, value in named.items()}),
            "metrics": MetricRecord(measured),
        }
    )


class Scripted(LocalGrid):
    """A grid whose clients answer from a script, {node: content, Error or None}, last client first."""

    def __init__(self, script, nodes=NODES):
        super().__init__(host=None)
        self.script, self.nodes, self.sent = script, nodes, []

    @property
    def sizes(self):
        """Client 2's is not known."""
        return {0: 10, 1: 11, 3: 13}

    def get_node_ids(self):
        return list(reversed(self.nodes))

    def deliver(self, messages, timeout):
        self.sent = messages
        replies = []
        for message in reversed(messages):
            node = message.metadata.dst_node_id
            answer = self.script.get(node, content(node))
            if answer is not None:
                replies.append(Message(answer, reply_to=message))
        return replies


def ask(script, half=None, buffers=None, message_type="train", instruction=None):
    grid, measures = Scripted(script), (Metric("accuracy", "higher", "%", most=1), Metric("loss", "lower"))
    own = half or Half(), torch.empty(0) if buffers is None else buffers
    gateway = Gateway(grid, *own, 0, 1.0, measures=measures)
    gateway.begin(1)
    payload = instruction or record({"weights": torch.zeros(D)})
    messages = [
        Message(RecordDict({"arrays": payload, "config": ConfigRecord({"server-round": 1})}), n, message_type)
        for n in (2, 0, 3, 1)
    ]
    return gateway, grid, gateway.send_and_receive(messages)


def forged():
    """An array that says of itself what its bytes do not hold."""
    answer = content(2)
    other = Array(np.zeros(D + 1, np.float32))
    answer["arrays"]["weights"] = Array("float32", (D,), other.stype, other.data)
    return answer


def unreadable():
    answer = content(2)
    answer["arrays"]["weights"] = Array("float32", (D,), "numpy.ndarray", b"no array")
    return answer


def pickled():
    """An object array, whose reading would run code."""
    answer = content(2)
    other = Array(np.zeros(D, np.float32))
    file = io.BytesIO()
    np.save(file, np.array([{}] * D, dtype=object), allow_pickle=True)
    answer["arrays"]["weights"] = Array("float32", (D,), other.stype, file.getvalue())
    return answer


def extra(name, value):
    answer = content(2)
    answer[name] = value
    return answer


def without(name):
    answer = content(2)
    del answer[name]
    return answer


BAD = {
    "missing array": (content(2, moment=None), r"arrays \['weights'\] where \['moment', 'weights'\]"),
    "foreign array": (content(2, more=np.zeros(1, np.float32)), "arrays .*'more'.* expected"),
    "shape": (
        content(2, weights=np.zeros(D + 1, np.float32)),
        r"'weights' has shape \(7,\), expected \(6,\)",
    ),
    "matrix": (content(2, weights=np.zeros((1, D), np.float32)), r"'weights' has shape \(1, 6\)"),
    "double": (content(2, weights=np.zeros(D)), "'weights' has type float64, expected float32"),
    "NaN": (content(2, weights=np.float32([0, 0, math.nan, 0, 0, 0])), "'weights' holds NaN or infinite"),
    "infinite": (
        content(2, weights=np.float32([0, 0, -math.inf, 0, 0, 0])),
        "'weights' holds NaN or infinite",
    ),
    "negative moment": (content(2, moment=np.float32([1, -1e-3])), "'moment' holds values below 0"),
    "forged": (forged(), "'weights' holds float32.*not what it says"),
    "unreadable": (unreadable(), "'weights' cannot be read"),
    "pickled": (pickled(), "'weights' cannot be read"),
    "no examples": (content(2, of={"num-examples": 0}), "impossible number of examples: num-examples 0"),
    "negative examples": (
        content(2, of={"num-examples": -5}),
        "impossible number of examples: num-examples -5",
    ),
    "half an example": (
        content(2, of={"num-examples": 2.5}),
        "impossible number of examples: num-examples 2.5",
    ),
    "too many examples": (content(2, of={"num-examples": 2**50}), "impossible number of examples"),
    "differentiated": (
        content(2, of={"examples-differentiated": -1}),
        "impossible number of examples: examples-differentiated -1",
    ),
    "half differentiated": (content(2, of={"examples-differentiated": 0.5}), "impossible number of examples"),
    "NaN loss": (content(2, of={"train-loss": math.nan}), "metrics hold NaN"),
    "list of losses": (content(2, of={"train-loss": [0.1, 0.2]}), "metrics hold .* lists"),
    "missing metric": (content(2, of={"train-loss": None}), "not those of a training reply"),
    "foreign metric": (content(2, of={"more": 1}), "not those of a training reply"),
    "no metrics": (without("metrics"), r"metric records \[\]"),
    "no arrays": (without("arrays"), r"array records \[\]"),
    "more metrics": (extra("more", MetricRecord({"x": 1})), "metric records .*more"),
    "more arrays": (extra("more", ArrayRecord({})), "array records .*more"),
    "more configuration": (extra("more", ConfigRecord({"x": 1})), "config.* records .*more"),
    "another's number": (content(2, of={"client": 0}), "not those of a training reply"),
    "another round": (content(2, of={"server-round": 2}), "of round 2, expected 1"),
    "a huge loss": (content(2, of={"train-loss": 1e13}), "a training loss of 10000000000000"),
    "own error": (Error(1000, "client 2: RuntimeError: broken"), "client 2: RuntimeError: broken"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_reply_is_refused_and_the_others_go_on(fault, caplog):
    answer, reason = BAD[fault]
    gateway, _, replies = ask({2: answer})
    assert [r.metadata.src_node_id for r in replies] == list(NODES)
    assert [r.has_error() for r in replies] == [False, False, True, False]
    assert replies[2].error.code == (1000 if fault == "own error" else REFUSED)
    [failure] = gateway.failures
    said = failure.reason
    assert failure.client == 2
    assert re.search(reason, said), said
    assert f"client 2 failed: {said}" in caplog.text
    assert (gateway.traffic.clients_ok, gateway.traffic.clients_failed) == (3, 1)
    others = [n for n in NODES if n != 2]
    assert gateway.traffic.examples == sum(10 + n for n in others)
    assert gateway.traffic.differentiated == sum(20 + n for n in others)


def compressed(name, **arrays):
    """The client half that sends gradients so, keep=0.5, and what client 2 answers in its place."""
    layout, penalty = Layout({"a": (2, 2), "b": (2,)}), Penalty(0.1, 0.9, 1.0, 1.0, 1.0, 10)
    half = PisaClient(layout, Identity, penalty, 0, 1, "mean", wire="gradient", compression=name, keep=0.5)
    return half, content(2, weights=None, moment=None, **arrays)


STEPS, SCALES = np.int8([0, 1, -127, 127, 3, 0]), np.float32([0.5, 0])
VALUES, PLACES = np.float32([1, -2, 3]), np.int32([0, 2, 5])
INFINITE, NOT_A_NUMBER, HUGE = np.float32([math.inf, math.nan, 1e9]).view(np.int32) >> 16


def with_bits(bits):
    return {"gradient": np.int16([0, bits, 0, 0, 0, 0])}


COMPRESSED = {
    "good bits": ("bfloat16", with_bits(0x3F80), None),
    "infinite bits": ("bfloat16", with_bits(INFINITE), "'gradient' stands for NaN or infinite values"),
    "NaN bits": ("bfloat16", with_bits(NOT_A_NUMBER), "'gradient' stands for NaN or infinite values"),
    "huge bits": ("bfloat16", with_bits(HUGE), "'gradient' stands for .* some beyond 500000"),
    "floats": ("bfloat16", {"gradient": np.zeros(6, np.float32)}, "has type float32, expected int16"),
    "good steps": ("int8", {"gradient": STEPS, "scale": SCALES}, None),
    "no scale": ("int8", {"gradient": STEPS}, r"arrays \['gradient'\] where \['gradient', 'scale'\]"),
    "wide steps": (
        "int8",
        {"gradient": STEPS.astype(np.int32), "scale": SCALES},
        "has type int32, expected int8",
    ),
    "lowest step": (
        "int8",
        {"gradient": np.full(6, -128, np.int8), "scale": SCALES},
        "holds values below -127",
    ),
    "NaN scale": ("int8", {"gradient": STEPS, "scale": np.float32([1, math.nan])}, "'scale' holds NaN"),
    "huge scale": (
        "int8",
        {"gradient": STEPS, "scale": np.float32([4000, 0])},
        "'scale' holds .* beyond 3937",
    ),
    "negative scale": (
        "int8",
        {"gradient": STEPS, "scale": np.float32([-1, 0])},
        "'scale' holds values below 0",
    ),
    "one scale": ("int8", {"gradient": STEPS, "scale": SCALES[:1]}, r"'scale' has shape \(1,\)"),
    "good places": ("topk", {"gradient": VALUES, "index": PLACES}, None),
    "beyond the end": (
        "topk",
        {"gradient": VALUES, "index": np.int32([0, 2, 6])},
        "'index' holds .* beyond 5",
    ),
    "before the start": (
        "topk",
        {"gradient": VALUES, "index": np.int32([-1, 2, 5])},
        "'index' holds values below 0",
    ),
    "twice": (
        "topk",
        {"gradient": VALUES, "index": np.int32([0, 2, 2])},
        "'index' does not ascend, or holds",
    ),
    "in disorder": (
        "topk",
        {"gradient": VALUES, "index": np.int32([0, 5, 2])},
        "'index' does not ascend, or",
    ),
    "NaN value": (
        "topk",
        {"gradient": VALUES * np.float32(math.nan), "index": PLACES},
        "'gradient' holds NaN",
    ),
    "too many": (
        "topk",
        {"gradient": np.ones(4, np.float32), "index": np.arange(4, dtype=np.int32)},
        "shape",
    ),
    "wide places": (
        "topk",
        {"gradient": VALUES, "index": PLACES.astype(np.int64)},
        "type int64, expected int32",
    ),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_a_compressed_reply_is_checked_as_strictly(case):
    name, arrays, reason = COMPRESSED[case]
    half, answer = compressed(name, **arrays)
    gateway, _, replies = ask({2: answer}, half)
    assert replies[2].has_error() == (reason is not None)
    reasons = [failure.reason for failure in gateway.failures if failure.client == 2]
    assert not reasons if reason is None else re.search(reason, *reasons), reasons


def test_good_replies_pass_in_the_order_of_the_clients():
    gateway, _, replies = ask({})
    assert not any(r.has_error() for r in replies)
    for node, reply in zip(NODES, replies, strict=True):
        assert reply.metadata.src_node_id == node
        assert (reply.content["arrays"]["weights"].numpy() == node).all()
    assert gateway.failures == []


def test_silence_is_a_failure():
    gateway, _, replies = ask({1: None})
    assert [r.metadata.src_node_id for r in replies] == [0, 2, 3]
    assert gateway.failures == [Failure(1, "no reply")]


def test_what_nobody_asked_for_is_dropped():
    grid = Scripted({})
    gateway = Gateway(grid, Half(), torch.empty(0), 0, 1.0)
    gateway.begin(1)
    payload = record({"weights": torch.zeros(D)})
    asked, other = (Message(RecordDict({"arrays": payload}), node, "train") for node in (1, 3))
    original = grid.send_and_receive
    stray = original([other])
    grid.send_and_receive = lambda messages, timeout=None: [*stray, *original(messages)]
    replies = gateway.send_and_receive([asked])
    assert [r.metadata.src_node_id for r in replies] == [1]
    assert (gateway.traffic.clients_ok, gateway.traffic.clients_failed) == (1, 0)


def test_counting():
    gateway, grid, _ = ask({1: None})
    down = sum(len(m.content["arrays"]["weights"].data) for m in grid.sent)
    up = sum(len(a.data) for a in content()["arrays"].values())
    assert down >= len(NODES) * 4 * D
    assert (gateway.traffic.bytes_down, gateway.traffic.bytes_up) == (down, 3 * up)
    assert gateway.traffic.examples == 10 + 12 + 13
    assert gateway.traffic.loss_sum == 10 * 0.5 + 12 * 2.5 + 13 * 3.5
    messages = [Message(m.content, m.metadata.dst_node_id, "train") for m in grid.sent]
    grid.script |= {n: content(n, of={"server-round": 2}) for n in NODES if n != 1}
    gateway.begin(2)
    assert (gateway.traffic.clients_failed, gateway.failures) == (0, [])
    gateway.send_and_receive(messages)
    # bytes and examples differentiated add up over the rounds, the rest starts anew
    assert (gateway.traffic.bytes_down, gateway.traffic.bytes_up) == (2 * down, 6 * up)
    assert gateway.traffic.differentiated == 2 * (20 + 22 + 23)
    assert gateway.traffic.examples == 10 + 12 + 13


def test_tensors_by_name_must_come_back_as_they_were_sent():
    sent = record({"conv.weight": torch.zeros(2, 1, 3), "conv.bias": torch.zeros(2)})
    good = {"conv.weight": np.ones((2, 1, 3), np.float32), "conv.bias": np.ones(2, np.float32)}

    def answer(node, **changes):
        named = {k: Array(v) for k, v in (good | changes).items()}
        return RecordDict({"arrays": ArrayRecord(named), "metrics": MetricRecord(metrics(node))})

    script = {node: answer(node) for node in NODES}
    script[1] = answer(1, **{"conv.bias": np.ones((2, 1), np.float32)})
    gateway, _, replies = ask(script, instruction=sent)
    assert [r.has_error() for r in replies] == [False, True, False, False]
    assert gateway.failures[0].reason.startswith("array 'conv.bias' has shape (2, 1), expected (2,)")


def test_running_statistics_are_sent_averaged_and_hidden():
    buffers = torch.tensor([1.0, 2.0])
    script = {n: content(n, buffers=np.float32([n, 10 * n])) for n in NODES}
    script[3] = content(3, buffers=np.float32([math.nan, 0]))
    gateway, grid, replies = ask(script, buffers=buffers)
    for message in grid.sent:
        assert message.content["arrays"]["buffers"].numpy().tolist() == [1.0, 2.0]
    examples = [10, 11, 12]
    mean = sum(n * e for n, e in zip(NODES, examples, strict=False)) / sum(examples)
    torch.testing.assert_close(gateway.buffers, torch.tensor([mean, 10 * mean]))
    assert [r.has_error() for r in replies] == [False, False, False, True]
    for reply in replies[:3]:
        assert set(reply.content["arrays"]) == {"weights", "moment"}


def test_running_statistics_that_are_missing_are_a_fault():
    gateway, _, _ = ask({n: content(n) for n in NODES}, buffers=torch.ones(2))
    assert gateway.traffic.clients_failed == len(NODES)
    assert torch.equal(gateway.buffers, torch.ones(2))


EVALUATED = {"num-examples": 3, "loss": 0.1, "accuracy": 1.0}


def test_evaluation_is_not_counted_as_training():
    answer = {n: RecordDict({"metrics": MetricRecord(EVALUATED)}) for n in NODES}
    answer[0] = RecordDict({"metrics": MetricRecord(EVALUATED | {"loss": math.inf, "accuracy": math.nan})})
    gateway, _, replies = ask(answer, message_type="evaluate")
    assert not any(r.has_error() for r in replies)
    assert (gateway.traffic.clients_ok, gateway.traffic.clients_failed) == (0, 0)
    assert not gateway.failures


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num-examples": math.nan}, "impossible number of examples"),
        ({"num-examples": 0}, "impossible number of examples"),
        ({"num-examples": 2.0}, "impossible number of examples"),
        ({"accuracy": 7.0}, "accuracy of 7.0"),
        ({"accuracy": -1e300}, "accuracy of -1e+300"),
        ({"loss": [0.1]}, "metrics hold lists"),
        ({"f1": 0.1}, "expected ['accuracy', 'loss', 'num-examples']"),
        ({"accuracy": None}, "expected ['accuracy', 'loss', 'num-examples']"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_and_noted(changes, words):
    wrong = {key: value for key, value in (EVALUATED | changes).items() if value is not None}
    answer = {n: RecordDict({"metrics": MetricRecord(wrong if n == 2 else EVALUATED)}) for n in NODES}
    gateway, _, replies = ask(answer, message_type="evaluate")
    assert [r.metadata.src_node_id for r in replies if r.has_error()] == [2]
    [failure] = gateway.failures
    assert failure.client == 2
    assert words in str(failure)


def test_an_evaluation_brings_no_arrays():
    said = {"metrics": MetricRecord(EVALUATED)}
    answer = {n: RecordDict(said) for n in NODES}
    answer[2] = RecordDict({**said, "arrays": ArrayRecord({"buffers": Array(np.ones(3, np.float32))})})
    gateway, _, _ = ask(answer, message_type="evaluate", buffers=torch.zeros(5))
    assert "array records ['arrays'], expected []" in str(gateway.failures)


@pytest.mark.parametrize("number", [1e300, 0.0, -1.0])
def test_numbers_of_the_algorithms_own_that_cannot_be_are_refused(number):
    class Counting(Half):
        def reply_numbers(self, config):
            return ["reach"]

    script = {n: content(n, of={"reach": number if n == 2 else 3.0}) for n in NODES}
    gateway, _, _ = ask(script, half=Counting())
    assert [(f.client, f"reach of {number}" in str(f)) for f in gateway.failures] == [(2, True)]


@pytest.mark.parametrize(
    ("participation", "count"), [(1.0, 10), (0.5, 5), (0.26, 3), (0.24, 2), (0.01, 1), (0.999, 10)]
)
def test_participation_draws_by_the_documented_rule(participation, count):
    nodes = list(range(10))
    gateway = Gateway(Scripted({}, nodes), Half(), torch.empty(0), 7, participation)
    drawn = {}
    for number in (1, 2, 3):
        gateway.begin(number)
        drawn[number] = gateway.get_node_ids()
        assert drawn[number] == gateway.get_node_ids()
        rule = np.random.default_rng([7, crc32(b"participation"), number])
        expected = nodes if participation == 1 else sorted(rule.choice(nodes, count, replace=False).tolist())
        assert drawn[number] == expected
        assert len(drawn[number]) == count
    if 1 < count < 10:
        assert len({tuple(d) for d in drawn.values()}) > 1


class Alike(Scripted):
    """A grid that knows nobody's number of examples."""

    sizes: ClassVar = {}


def lengths(values, max_update=20.0, names=False, before=0.0):
    """A gateway's failures when clients answer with updates of these lengths, `before` being usual."""
    nodes = list(range(len(values)))
    at = np.full(D, 3.0, np.float32)
    script = {}
    for node, length in enumerate(values):
        moved = at + np.float32(length) * np.eye(D, dtype=np.float32)[0]
        script[node] = content(0, weights=moved)
        if names:
            script[node] = RecordDict(
                {
                    "arrays": ArrayRecord({"a": Array(moved[:2]), "b": Array(moved[2:])}),
                    "metrics": MetricRecord(metrics(0)),
                }
            )
    gateway = Gateway(Alike(script, nodes), Half(), torch.empty(0), 0, 1.0, max_update=max_update)
    gateway.traffic.usual_length = before
    gateway.begin(1)
    sent = {"a": torch.tensor(at[:2]), "b": torch.tensor(at[2:])} if names else {"weights": torch.tensor(at)}
    arrays_sent = record(sent)
    said = ConfigRecord({"server-round": 1})
    replies = gateway.send_and_receive(
        [Message(RecordDict({"arrays": arrays_sent, "config": said}), n, "train") for n in nodes]
    )
    assert gateway.traffic.clients_failed == sum(r.has_error() for r in replies) == len(gateway.failures)
    assert gateway.traffic.clients_ok == len(values) - len(gateway.failures)
    if max_update is not None and len(values) >= 5:
        assert gateway.traffic.usual_length == pytest.approx(max(before, statistics.median(values)))
    return {f.client: f.reason for f in gateway.failures}


@pytest.mark.parametrize("names", [False, True])
def test_an_update_out_of_all_proportion_is_refused(names):
    refused = lengths([1.0, 2.0, 1.5, 41.0, 1.0, 1e5], names=names)
    assert list(refused) == [3, 5]
    assert refused[3] == "its update is 23.4 times as long as the greatest median of a round, max_update=20"


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ([1.0, 1.0, 1.0, 19.9, 1.0], {}),
        ([1.0, 1.0, 1.0, 1e5], {}),  # too few to tell
        ([0.0] * 6, {}),  # a round that only measures
        ([1e-3, 1e-3, 1.0, 1e-3, 1e-3], {"before": 0.1}),  # one that has more to say than those who are done
        ([0.0, 0.0, 0.0, 0.0, 5.0], {}),
        ([1.0, 1.0, 1.0, 1e5, 1.0], {"max_update": None}),
    ],
)
def test_updates_that_are_not_refused(values, options):
    assert lengths(values, **options) == {}


@pytest.mark.parametrize("value", [1, 0, -3, math.nan, math.inf, True, "20"])
def test_an_impossible_max_update(value):
    with pytest.raises(ValueError, match=r"^max_update must be a number above 1, or null, got"):
        Gateway(Scripted({}), Half(), torch.empty(0), 0, 1.0, max_update=value)


def test_a_round_that_is_begun_again_leaves_no_measure_of_updates():
    gateway = Gateway(Scripted({}), Half(), torch.empty(0), 0, 1.0)
    gateway.traffic.usual_length = 1.0
    gateway.begin(1)
    gateway.traffic.usual_length = 5.0
    gateway.begin_again()
    assert gateway.traffic.usual_length == 1.0
