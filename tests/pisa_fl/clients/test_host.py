"""Hosted clients: their state between rounds, their errors, and what they read and write."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import nn
from torch.nn.functional import cross_entropy

from pisa_fl.clients.executor import Executor, tensors
from pisa_fl.clients.flat_model import FlatModel
from pisa_fl.clients.host import CLIENT_FAILED, ClientHost, ClientState
from pisa_fl.clients.stack import ClientData
from pisa_fl.data import ImageData
from pisa_fl.engines.local import LocalGrid
from pisa_fl.tasks import Classification
from strategies import ClientHalf, LocalSgd, Update
from strategies.base.messages import STATE_LOST, record, vectors

SIZES = (5, 3, 4)
CPU = torch.device("cpu")


class Tally(ClientHalf):
    """Adds one to its state in every round, answers with it, and raises for labels of a broken client."""

    def __init__(self, layout, broken=()):
        self.layout, self.broken = layout, set(broken)
        self.stacks, self.draws = [], []

    def state_sizes(self):
        return {"tally": 1}

    def solve(self, stack, instruction, state):
        self.stacks.append(list(stack.clients))
        self.draws.append(float(torch.rand(())))
        if self.broken & set(stack.clients):
            raise ZeroDivisionError("broken")
        tally = state["tally"] + 1
        weights = instruction.arrays["weights"] + tally
        return Update({"weights": weights}, torch.zeros(len(tally)), lambda _: {"tally": tally})


def network(normed=False):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3) if normed else nn.Identity()
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), norm)


def make_host(half=Tally, stack=1, normed=False, batch=2, **options):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (sum(SIZES), 1, 2, 2), dtype=np.uint8)
    labels = draw.integers(0, 3, sum(SIZES))
    data = ImageData(images, labels, images, labels, ("a", "b", "c"), (0.5,), (0.5,))
    parts = torch.arange(sum(SIZES)).split(SIZES)
    clients = {i: ClientData(tensors(data.train, CPU), rows) for i, rows in enumerate(parts)}
    model = FlatModel(network(normed), Classification(), CPU)
    return ClientHost(Executor(model, half(model.layout, **options), data, clients, 3, batch, 100), stack)


def ask(host, number=1, accepted=None, state=None, kind="train", clients=(0, 1, 2), arrays=None):
    """Answers by client; `accepted` and `state` by client as well."""
    grid = LocalGrid(host)
    size = host._model.layout.size
    payload = arrays or record({"weights": torch.zeros(size)})
    messages = []
    for client in clients:
        config = {"server-round": number}
        if accepted is not None:
            config["accepted-round"] = accepted.get(client, 0)
        content = RecordDict({"arrays": payload, "config": ConfigRecord(config)})
        if state and client in state:
            content["state"] = record({"tally": torch.tensor([state[client]])})
        messages.append(Message(content, client, kind))
    return {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages)}


def tally(reply):
    return float(vectors(reply.content["arrays"])["weights"][0])


def test_state_moves_forward_only_when_the_server_acknowledges_it():
    host = make_host()
    assert tally(ask(host, 1, {})[0]) == 1
    assert tally(ask(host, 2, {0: 1})[0]) == 2
    # the reply to round 2 was lost: the client goes back to what the server accepted
    assert tally(ask(host, 3, {0: 1})[0]) == 2
    assert tally(ask(host, 4, {0: 3})[0]) == 3
    # a client the server has never heard from starts over
    assert tally(ask(host, 5, {0: 0})[0]) == 1


def test_a_client_without_the_accepted_state_asks_for_it():
    host = make_host(stack=3)
    replies = ask(host, 7, {0: 5})
    assert replies[0].error.code == STATE_LOST
    assert "client 0 does not hold the state" in replies[0].error.reason
    assert [tally(replies[i]) for i in (1, 2)] == [1, 1]
    replies = ask(host, 8, {0: 5, 1: 7, 2: 7}, state={0: 40.0})
    assert [tally(replies[i]) for i in (0, 1, 2)] == [41, 2, 2]
    assert tally(ask(host, 9, {0: 8})[0]) == 42


def test_a_server_that_acknowledges_nothing_is_taken_to_accept_everything():
    host = make_host()
    assert [tally(ask(host, number)[1]) for number in (1, 2, 3)] == [1, 2, 3]


def test_settling():
    state = ClientState(3, {"x": torch.ones(1)}, 4, {"x": torch.zeros(1)})
    assert not ClientState(3, {}, 4, {}).settle(2)
    assert state.settle(4)
    assert (state.round, state.accepted["x"].item(), state.pending_round, state.pending) == (4, 0.0, None, {})
    assert state.settle(4)
    assert not state.settle(5)


@pytest.mark.parametrize("stack", [1, 3])
def test_a_client_that_raises_does_not_stop_the_others(stack):
    host = make_host(stack=stack, broken=[1])
    replies = ask(host)
    failed = [i for i, reply in replies.items() if reply.has_error()]
    assert failed == [1]
    assert replies[1].error.code == CLIENT_FAILED
    line, _, traceback = replies[1].error.reason.partition("\n")
    assert line == "ZeroDivisionError: broken"
    assert traceback.startswith("Traceback (most recent call last)")
    assert 'raise ZeroDivisionError("broken")' in traceback
    host._half.broken = set()
    assert not any(reply.has_error() for reply in ask(host, 2, {}).values())


@pytest.mark.parametrize(("stack", "groups"), [(1, [[0], [1], [2]]), (2, [[0, 2], [1]]), (9, [[0, 2, 1]])])
def test_clients_advance_in_stacks_of_the_given_size_the_largest_first(stack, groups):
    host = make_host(stack=stack)
    ask(host)
    assert host._half.stacks == groups


def test_global_random_state_is_untouched_and_draws_have_addresses():
    host, again = make_host(), make_host()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    ask(host, 1, {})
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(12)
    ask(again, 1, {})
    assert host._half.draws == again._half.draws
    ask(host, 2, {})
    assert len(set(host._half.draws)) == 6


def test_replies_say_how_many_examples_they_rest_on():
    host = make_host(LocalSgd, lr=0.1, momentum=0.0, weight_decay=0.0, local_epochs=2)
    for client, reply in ask(host).items():
        metrics = reply.content["metrics"]
        assert metrics["num-examples"] == SIZES[client]
        assert metrics["examples-differentiated"] == 2 * SIZES[client]
        assert metrics["train-loss"] > 0


def test_tensors_by_name_are_answered_by_name():
    host = make_host(LocalSgd, normed=True, lr=0.1, momentum=0.0, weight_decay=0.0, local_epochs=1)
    model = network(normed=True)
    sent = ArrayRecord(model.state_dict())
    reply = ask(host, arrays=sent, clients=[2])[2]
    answered = reply.content["arrays"].to_torch_state_dict()
    assert list(answered) == list(model.state_dict())
    assert answered["1.weight"].shape == (3, 4)
    flat = make_host(LocalSgd, normed=True, lr=0.1, momentum=0.0, weight_decay=0.0, local_epochs=1)
    vector = torch.cat([p.detach().flatten() for p in model.parameters()])
    buffers = torch.cat([model[2].running_mean, model[2].running_var])
    reply = ask(flat, arrays=record({"weights": vector, "buffers": buffers}), clients=[2])[2]
    same = vectors(reply.content["arrays"])
    named = torch.cat([answered[name].flatten() for name, _ in model.named_parameters()])
    assert torch.equal(same["weights"], named)
    assert torch.equal(same["buffers"], torch.cat([answered["2.running_mean"], answered["2.running_var"]]))
    assert not torch.equal(same["buffers"], buffers)


def test_answers_do_not_depend_on_who_was_served_before():
    options = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "local_epochs": 2, "normed": True, "batch": 5}
    sent = ArrayRecord(network(normed=True).state_dict())
    together = ask(make_host(LocalSgd, **options), arrays=sent)
    for client, reply in together.items():
        alone = ask(make_host(LocalSgd, **options), arrays=sent, clients=[client])[client]
        for name, array in alone.content["arrays"].items():
            np.testing.assert_array_equal(reply.content["arrays"][name].numpy(), array.numpy(), name)
        assert reply.content["arrays"]["2.num_batches_tracked"].numpy() == 2


def test_missing_and_misshapen_tensors_by_name_are_named():
    host = make_host()
    state = network().state_dict()
    reply = ask(host, arrays=ArrayRecord({"1.weight": state["1.weight"]}), clients=[0])[0]
    assert "arrays ['1.weight'] where ['1.bias', '1.weight'] were expected" in reply.error.reason
    wrong = ArrayRecord({"1.weight": state["1.weight"].T.contiguous(), "1.bias": state["1.bias"]})
    reply = ask(host, arrays=wrong, clients=[0])[0]
    assert "array '1.weight' has shape (4, 3), expected (3, 4)" in reply.error.reason


def test_evaluation_is_of_the_clients_own_examples():
    host = make_host()
    model = network()
    replies = ask(host, kind="evaluate", arrays=ArrayRecord(model.state_dict()))
    for client, own in host.clients.items():
        images, labels = own.fields["inputs"][own.rows], own.fields["targets"][own.rows]
        logits = model((images / 255 - 0.5) / 0.5)
        metrics = replies[client].content["metrics"]
        assert metrics["num-examples"] == len(own)
        assert metrics["loss"] == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_what_is_said_to_train_is_checked_even_if_the_same_was_said_to_evaluate():
    host = make_host()
    content = RecordDict(
        {"arrays": record({"weights": torch.zeros(host._model.layout.size)}), "config": ConfigRecord()}
    )
    messages = [Message(content, 0, "evaluate"), Message(content, 1, "train")]
    evaluated, trained = LocalGrid(host).send_and_receive(messages)
    assert not evaluated.has_error()
    assert trained.error.reason == "instruction refused: server-round is None"
