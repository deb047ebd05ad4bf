"""Secure aggregation with real clients: sums against plain ones, and what the server gets to see on the way."""

import re
from collections import defaultdict
from io import BytesIO
from math import fsum

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage

from pisa_fl import checkpoint, compose
from pisa_fl.checkpoint import load_checkpoint, save_checkpoint
from pisa_fl.clients.host import ClientState
from pisa_fl.config import ConfigurationError
from pisa_fl.from_config import prepare
from pisa_fl.secure.limbs import LEVELS, REACH, joined, split
from strategies.base.messages import DUAL, EXAMPLES, LOSS, WEIGHTS, members, metrics_of, vectors

QUICK = ("model=logistic", "engine.workers=0", "progress=false", "tracker=none")
FEDAVG = (*QUICK, "strategy=fedavg", "strategy.local_epochs=1", "partition=quantity")
LOST = {3, 7}


class Wire:
    """What crosses a federation's grid; it loses replies of a stage, or changes them."""

    def __init__(self, federation):
        self.sent, self.replies, self.losing, self.change = [], [], {}, None
        self._deliver = federation.grid.deliver
        federation.grid.deliver = self.deliver

    def deliver(self, messages, timeout):
        arrived = []
        self.sent += messages
        stages = {m.metadata.message_id: stage(m) for m in messages}
        for reply in self._deliver(messages, timeout):
            node, at = reply.metadata.src_node_id, stages[reply.metadata.reply_to_message_id]
            if node in self.losing.get(at, ()):
                continue
            if self.change is not None:
                self.change(at, node, reply)
            self.replies.append((at, reply))
            arrived.append(reply)
        return arrived


def stage(message):
    return message.content.config_records.get(RECORD_KEY_CONFIGS, {}).get(Key.STAGE)


def exchange(federation, number=1):
    """The training exchange of a round, without its end."""
    federation.gateway.begin(number)
    messages = federation.server.configure_train(
        number, federation.arrays, ConfigRecord(), federation.gateway
    )
    return federation.gateway.send_and_receive(messages)


@pytest.fixture(scope="module")
def plain():
    """What ten clients answer openly to the same instruction: weights, loss and examples of each."""
    federation = prepare(compose(*FEDAVG))
    replies = exchange(federation)
    return {
        reply.metadata.src_node_id: (
            vectors(reply.content["arrays"])[WEIGHTS].double().numpy(),
            metrics_of(reply.content)[LOSS],
            metrics_of(reply.content)[EXAMPLES],
        )
        for reply in replies
    }


@pytest.fixture(scope="module")
def secure():
    federation = prepare(compose(*FEDAVG, "secure=secagg"))
    return federation, Wire(federation)


@pytest.fixture(scope="module")
def five():
    federation = prepare(compose(*FEDAVG, "clients=5", "secure=secagg"))
    return federation, Wire(federation)


def mean(plain, clients):
    examples = [plain[client][2] for client in clients]
    weights = sum(n * plain[client][0] for n, client in zip(examples, clients, strict=True))
    loss = sum(n * plain[client][1] for n, client in zip(examples, clients, strict=True))
    return weights / sum(examples), loss / sum(examples)


@pytest.fixture(scope="module")
def found_before():
    return {}


@pytest.mark.parametrize("at", [None, *Stage.all(), "two"])
def test_the_mean_is_the_plain_one_whoever_drops_out_when(plain, secure, found_before, at):
    federation, wire = secure
    wire.sent.clear(), wire.replies.clear()
    wire.losing = {Stage.SHARE_KEYS: {3}, Stage.COLLECT_MASKED_VECTORS: {7}} if at == "two" else {at: LOST}
    (reply,) = exchange(federation)
    there = sorted(plain if at in (None, Stage.UNMASK) else plain.keys() - LOST)
    weights, loss = mean(plain, there)
    found = vectors(reply.content["arrays"])[WEIGHTS].numpy()
    np.testing.assert_allclose(found, weights.astype(np.float32), rtol=2e-7, atol=1e-11)
    # the same to the bit under other masks, in whichever stage the others dropped out
    before = found_before.setdefault(len(there), found)
    np.testing.assert_array_equal(found, before)
    metrics = metrics_of(reply.content)
    assert metrics[LOSS] == pytest.approx(loss, rel=1e-9)
    assert members(reply.content) == {client: plain[client][2] for client in there}
    traffic = federation.gateway.traffic
    assert (traffic.clients_ok, traffic.clients_failed) == (len(there), 10 - len(there))
    assert traffic.examples == metrics[EXAMPLES] == sum(plain[client][2] for client in there)


def test_the_mean_is_the_plain_one_with_a_few_neighbours_each(plain):
    federation = prepare(compose(*FEDAVG, "secure=secagg", "secure.shares=5"))
    wire = Wire(federation)
    wire.losing = {Stage.COLLECT_MASKED_VECTORS: LOST}
    (reply,) = exchange(federation)
    weights, _ = mean(plain, sorted(plain.keys() - LOST))
    found = vectors(reply.content["arrays"])[WEIGHTS].numpy()
    np.testing.assert_allclose(found, weights.astype(np.float32), rtol=2e-7, atol=1e-11)
    dealt = [r.content[RECORD_KEY_CONFIGS] for at, r in wire.replies if at == Stage.SHARE_KEYS]
    assert [len(said[Key.DESTINATION_LIST]) for said in dealt] == [4] * 10


def test_no_update_can_be_told_from_what_crosses_the_grid(plain, secure):
    federation, wire = secure
    wire.sent.clear(), wire.replies.clear()
    wire.losing = {Stage.COLLECT_MASKED_VECTORS: LOST}
    exchange(federation)
    masked = {}
    for at, reply in wire.replies:
        assert not any(isinstance(one, ArrayRecord) for one in reply.content.values())
        if at == Stage.COLLECT_MASKED_VECTORS:
            assert set(metrics_of(reply.content)) == {"server-round", EXAMPLES, "examples-differentiated"}
            data = reply.content[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]
            masked[reply.metadata.src_node_id] = [np.load(BytesIO(part)) for part in data]
    heaviest = max(n for _, _, n in plain.values())
    hidden = {}
    for client, parts in masked.items():
        weights, loss, examples = plain[client]
        own = quantize(split(np.append(weights, loss) * examples / heaviest), REACH, LEVELS)
        for mine, seen in zip(own, parts[1:], strict=True):
            assert (mine == seen).mean() < 1e-3
            # uniform over the modulus: eight equal parts hold an eighth each, within five standard deviations
            counts = np.histogram(seen, bins=8, range=(0, 2**48))[0]
            assert np.abs(counts - len(seen) / 8).max() < 5 * np.sqrt(len(seen) * 7 / 64)
        hidden[client] = parts[1] - own[0]
    # what the masks amount to is another for each, and for all of them together
    assert len({mask.tobytes() for mask in [*hidden.values(), sum(hidden.values())]}) == len(hidden) + 1
    asked = defaultdict(set)
    for message in wire.sent:
        said = message.content[RECORD_KEY_CONFIGS]
        for key in (Key.ACTIVE_NODE_ID_LIST, Key.DEAD_NODE_ID_LIST):
            for owner in said.get(key, []):
                asked[owner].add(key)
    # of nobody both the seed of its mask and the key of those it shares: one would do to see its update
    assert {owner: keys for owner, keys in asked.items() if len(keys) > 1} == {}
    assert {owner for owner, keys in asked.items() if keys == {Key.DEAD_NODE_ID_LIST}} == LOST


def one_more(at, node, reply):
    """Client 4 adds one to what it masks."""
    if at == Stage.COLLECT_MASKED_VECTORS and node == 4:
        said = reply.content[RECORD_KEY_CONFIGS]
        factor, *rest = said[Key.MASKED_PARAMETERS]
        value = np.load(BytesIO(factor))
        stream = BytesIO()
        np.save(stream, (value + 1) % 2**48)
        said[Key.MASKED_PARAMETERS] = [stream.getvalue(), *rest]


def other_shares(at, node, reply):
    """Client 0, whose shares are used, gives those of others."""
    if at == Stage.UNMASK and node == 0:
        said = reply.content[RECORD_KEY_CONFIGS]
        said[Key.SHARE_LIST] = said[Key.SHARE_LIST][1:] + said[Key.SHARE_LIST][:1]


def short(at, node, reply):
    """Client 4 sends fewer numbers: it is left out, the others are not."""
    if at == Stage.COLLECT_MASKED_VECTORS and node == 4:
        said = reply.content[RECORD_KEY_CONFIGS]
        said[Key.MASKED_PARAMETERS] = said[Key.MASKED_PARAMETERS][:2]


@pytest.mark.parametrize(
    ("losing", "change", "reason"),
    [
        ({Stage.COLLECT_MASKED_VECTORS: {1, 2, 3}}, None, "2 of 5, it takes 3"),
        ({Stage.UNMASK: {1, 2, 3}}, None, "2 clients gave their shares of client 0's keys, it takes 3"),
        ({}, one_more, "the masks do not cancel"),
        ({}, other_shares, "the (masks|shares of keys) do not"),
        ({}, short, None),
    ],
    ids=["too few updates", "too few shares", "another factor", "others' shares", "a short update"],
)
def test_what_does_not_fit_together_is_no_sum(five, losing, change, reason):
    federation, wire = five
    wire.losing, wire.change = losing, change
    try:
        replies = exchange(federation)
    finally:
        wire.losing, wire.change = {}, None
    if reason is None:
        assert members(replies[0].content).keys() == {0, 1, 2, 3}
        return
    assert replies == []
    assert federation.gateway.traffic.clients_ok == 0
    failures = [str(failure) for failure in federation.gateway.failures if failure.client is None]
    assert len(failures) == 1
    assert re.search(f"no sum: .*{reason}", failures[0])


def test_a_client_hides_its_update_whatever_it_is_asked(five):
    federation, _ = five
    federation.gateway.begin(1)
    message = next(
        iter(federation.server.configure_train(1, federation.arrays, ConfigRecord(), federation.gateway))
    )
    (reply,) = federation.grid.send_and_receive([message])
    assert reply.error.reason == "instruction refused: it asks for an update that nothing hides"
    message.content[RECORD_KEY_CONFIGS] = ConfigRecord({Key.STAGE: Stage.COLLECT_MASKED_VECTORS})
    (reply,) = federation.grid.send_and_receive([Message(message.content, 0, "train")])
    assert reply.has_error()  # before there are keys


def test_sums_of_limbs_are_exact_over_the_whole_reach():
    generator = np.random.default_rng(0)
    size = 1000
    values = generator.choice([-1, 1], (9, size)) * 2.0 ** generator.uniform(-45, 18.99, (9, size))
    values[0, :2] = REACH, -REACH
    whole = [quantize(split(row), REACH, LEVELS) for row in values]
    sums = [sum(row[limb].astype(np.int64) for row in whole) for limb in range(2)]
    exact = np.array([fsum(column) for column in values.T])
    found = joined(sums, len(values))
    # each to the nearest 2^-40, and one rounding of the sum
    assert (np.abs(found - exact) <= 9 * 2.0**-41 + np.spacing(np.abs(exact))).all()
    for wrong in (np.nan, np.inf, 1.01 * REACH):
        with pytest.raises(ValueError, match="cannot be summed exactly"):
            split(np.array([0.0, wrong]))


PISA = (
    *QUICK,
    "strategy/preconditioner=second_moment",
    "clients=5",
    "engine.lost=0.2",
    "rounds=4",
    "patience=0",
)


def test_pisa_with_its_duals_at_the_clients_goes_the_plain_way_and_goes_on_after_a_kill(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "PART", 200_000)
    plain = prepare(compose("strategy=pisa", "max_update=null", *PISA))
    expected = [vectors(plain.arrays)[WEIGHTS] for _ in plain.rounds(4)]
    federation = prepare(compose("strategy=pisa_summed", "secure=secagg", *PISA))
    found, failed = [], 0
    for line in federation.rounds(4):
        found.append(vectors(federation.arrays)[WEIGHTS])
        failed += line["clients_failed"]
        if line["round"] == 2:
            save_checkpoint(federation, tmp_path, 1)
            assert len(list(tmp_path.glob("*/clients-*"))) > 1
    assert failed == 4
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=2e-8)
    assert (expected[-1] - expected[0]).abs().max() > 5e-3
    again = prepare(compose("strategy=pisa_summed", "secure=secagg", *PISA))
    assert load_checkpoint(again, tmp_path)
    for line in again.rounds(4):
        assert torch.equal(vectors(again.arrays)[WEIGHTS], found[line["round"]])
    # a dual is lost, which nobody else has: those of all begin anew, from zero
    again.grid.restore((dict(again.grid.states()) | {4: ClientState()}).items())
    offset = again.server.state_dict()["sums.offset"]
    (line,) = again.rounds(5)
    assert line["clients_ok"] >= 3
    assert set(again.server.state_dict()["sums.rounds"].tolist()) == {5}
    for client in again.server.state_dict()["sums.clients"].tolist():
        assert torch.equal(dict(again.grid.states())[client].pending[DUAL], -offset)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("strategy=pisa",), "Pisa needs every client's own message: use strategy=pisa_summed"),
        (("strategy=krum",), "Krum needs every client's own message"),
        (("strategy=scaffold",), "Scaffold needs every client's own message"),
        (("strategy=fedavg", "privacy=central"), "leave out one of them"),
        (("strategy=fedavg", "max_update=5"), "set max_update=null"),
        (("strategy=fedavg", "participation=0.2"), "takes 3 clients of a round or more"),
        (("strategy=fedavg", "secure.threshold=0.5"), "secure.threshold must be above 0.5 and at most 1"),
        (("strategy=fedavg", "secure.shares=4"), "secure.shares must be odd"),
        (
            ("strategy=pisa_summed", "strategy/preconditioner=muon"),
            "Muon maps gradients to directions, so that steps do not add up",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_sums_cannot_do_is_refused_in_a_sentence(settings, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        prepare(compose(*QUICK, "secure=secagg", *settings))


def test_duals_at_the_clients_take_sums():
    with pytest.raises(ConfigurationError, match="set secure=secagg, or engine=ray"):
        prepare(compose(*QUICK, "strategy=pisa_summed"))
