"""Weights of the clients' own: what is evaluated, where they are, and what becomes of them when they are lost."""

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from plain_loops import SIZES, make_problem
from quadratics import LAYOUT, Bench, Quadratics, solving
from torch.nn.functional import cross_entropy

from pisa_fl.clients.host import ClientState
from pisa_fl.engines.local import LocalGrid
from strategies import DittoClient, FedPer, FedPerClient, FedRepClient, Layout

SAID = ["strategy.lr=0.05", "strategy.local_epochs=1", "evaluate_clients_every=1", "engine.workers=0"]
METHODS = {
    "fedper": ["strategy=fedper", "strategy.personal_layers=2"],
    "fedrep": ["strategy=fedrep", "strategy.head_epochs=1"],
    "ditto": ["strategy=ditto", "strategy.personal_epochs=2"],
}
PARTS = {"fedper": ("fc2", "fc3"), "fedrep": ("fc3",), "ditto": ("conv1", "conv2", "fc1", "fc2", "fc3")}


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return make_problem(tmp_path_factory.mktemp("problem"))


def loss_of(problem, federation, client, own):
    """Of a client's examples, in the server's weights with the client's own in their place."""
    layout = federation.model.layout
    weights = {name: t.double() for name, t in layout.views(federation.model.weights).items()} | own
    with torch.no_grad():
        for name, parameter in problem.model.named_parameters():
            parameter.copy_(weights[name])
        rows = problem.partition[client]
        return float(cross_entropy(problem.model(problem.images[rows]), problem.labels[rows]))


def own_of(federation, method, vectors):
    """The named tensors of what a client remembers."""
    [row] = vectors.values()
    shapes = federation.model.layout.shapes.items()
    layout = Layout({name: shape for name, shape in shapes if name.split(".")[0] in PARTS[method]})
    return {name: t.double() for name, t in layout.views(row).items()}


@pytest.mark.parametrize("evaluated", ["null", "1"])
def test_whoever_looks_at_the_common_weights_alone_is_told_so(problem, caplog, evaluated):
    problem.run(0, *METHODS["fedper"], f"evaluate_clients_every={evaluated}", "engine.workers=0")
    assert ("of the weights that the server has" in caplog.text) == (evaluated == "null")


@pytest.mark.parametrize("method", METHODS)
def test_a_client_is_evaluated_with_the_weights_of_its_own_that_the_server_accepted(
    problem, method, monkeypatch, caplog
):
    send_and_receive, exchanges = LocalGrid.send_and_receive, []

    def lose_one(grid, messages, **kwargs):
        asked = list(messages)
        exchanges.extend(asked[:1] if asked[0].metadata.message_type == "train" else ())
        replies = list(send_and_receive(grid, asked, **kwargs))
        lost = len(exchanges) == 2 and asked[0].metadata.message_type == "train"
        return [r for r in replies if not (lost and r.metadata.src_node_id == 1)]

    monkeypatch.setattr(LocalGrid, "send_and_receive", lose_one)
    federation, metrics = problem.run(2, *METHODS[method], *SAID)
    states = federation.grid.host.states
    assert [line["clients_failed"] for line in metrics] == [0, 0, 1]
    assert [states[client].round for client in range(len(SIZES))] == [2, 1, 2, 2]
    for client, found in federation.of_clients.items():
        own = own_of(federation, method, states[client].accepted)
        assert found["loss"] == pytest.approx(loss_of(problem, federation, client, own), rel=1e-4)
        assert found["loss"] != pytest.approx(loss_of(problem, federation, client, {}), rel=1e-2)
    # one that lost them is evaluated with the server's, and that is said
    states[3] = ClientState()
    found = federation._evaluate_clients()
    assert found[3]["loss"] == pytest.approx(loss_of(problem, federation, 3, {}), rel=1e-4)
    assert [found[client] for client in range(3)] == [federation.of_clients[client] for client in range(3)]
    assert caplog.messages[-1].endswith("client 3 has lost what it remembered, and begins anew")


@pytest.mark.parametrize("method", METHODS)
def test_before_their_first_round_clients_are_evaluated_with_the_servers_weights(problem, method):
    federation, _ = problem.run(0, *METHODS[method], *SAID)
    for client, found in federation.of_clients.items():
        assert found["loss"] == pytest.approx(loss_of(problem, federation, client, {}), rel=1e-4)


def test_personal_layers_are_never_sent(problem):
    federation, _ = problem.run(2, *METHODS["fedper"], *SAID)
    layout = federation.model.layout
    fresh = layout.flatten({name: t.float() for name, t in problem.start.items()})
    moved = layout.views(federation.model.weights - fresh)
    for name, tensor in moved.items():
        assert bool(tensor.any()) == (name.split(".")[0] not in PARTS["fedper"])


@pytest.mark.parametrize("pull", [0.0, 0.5, 3.0])
def test_dittos_own_models_stop_where_the_clients_loss_and_the_pull_balance(pull):
    problem = Quadratics.draw()
    local = {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.0, "local_epochs": 5}
    server = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    bench = Bench(server, DittoClient(LAYOUT, pull, 5, **local))
    with solving(problem):
        for _ in range(150):
            bench.round()
    w = bench.consensus.double()
    for client, state in bench.host.states.items():
        a = problem.a[client] + pull * torch.eye(LAYOUT.size, dtype=torch.float64)
        expected = torch.linalg.solve(a, problem.b[client] + pull * w)
        assert (state.pending["own"].double() - expected).norm() <= 1e-4 * expected.norm()


TWO = Layout({"first.weight": (3, 2), "first.bias": (3,), "last.weight": (2, 3)})
LOCAL = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "local_epochs": 1}


def test_the_last_layers_are_the_personal_ones():
    assert FedPerClient(TWO, 1, **LOCAL).places.tolist() == [False] * 9 + [True] * 6
    assert not FedPerClient(TWO, 0, **LOCAL).places.any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FedPer(TWO, 2, "examples"), "personal_layers must leave one of the model's 2 layers"),
        (lambda: FedPer(TWO, 1, "equal"), "alpha must be examples or uniform"),
        (lambda: FedPerClient(TWO, -1, **LOCAL), "personal_layers must be a whole number of 0 or more"),
        (lambda: FedRepClient(TWO, 0, 1, **LOCAL), "personal_layers must be a whole number of 1 or more"),
        (lambda: FedRepClient(TWO, 1, 0, **LOCAL), "head_epochs must be a whole number of 1 or more"),
        (lambda: DittoClient(TWO, -1.0, 1, **LOCAL), "lambda_ must not be negative"),
        (lambda: DittoClient(TWO, 1.0, 0, **LOCAL), "personal_epochs must be a whole number of 1 or more"),
    ],
)
def test_impossible_numbers_of_personal_weights_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("accepted", ["2", -1, 3, 1.0])
def test_an_evaluation_of_an_impossible_round_is_refused_and_changes_nothing(problem, accepted):
    federation, _ = problem.run(2, *METHODS["ditto"], *SAID)
    before = federation.grid.host.states[0]
    said = ConfigRecord({"server-round": 2, "accepted-round": accepted})
    content = RecordDict({"arrays": federation.arrays, "config": said})
    [reply] = federation.grid.send_and_receive([Message(content, 0, "evaluate")])
    assert "accepted-round is" in reply.error.reason
    assert federation.grid.host.states[0] is before
    assert before.round == 2
