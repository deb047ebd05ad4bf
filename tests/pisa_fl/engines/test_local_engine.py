"""Flower's own strategies on the `local` engine, against plain NumPy."""

from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import strategy as flower
from torch import nn

from pisa_fl.data import ImageData
from pisa_fl.engines.local import LocalGrid, local_engine
from pisa_fl.federation import Federation, TooFewClientsError
from strategies import ClientHalf, Layout, LocalSgd

SIZES = (9, 14, 5, 12, 7)
LOCAL = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "local_epochs": 2}


def network(normed=False):
    torch.manual_seed(4)
    norm = nn.BatchNorm2d(2) if normed else nn.Identity()
    return nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))


def image_data():
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 3, sum(SIZES))
    images = draw.integers(0, 120, (sum(SIZES), 1, 5, 5)) + 40 * labels[:, None, None, None]
    images = images.astype(np.uint8)
    return ImageData(images, labels, images[:20], labels[:20], ("a", "b", "c"), (0.4,), (0.2,))


def federate(strategy, seed=0, normed=False, half=None, **options):
    model = network(normed)
    half = half or LocalSgd(Layout.of_parameters(model), **LOCAL)
    partition = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    engine = partial(local_engine, stack=options.pop("stack", "auto"))
    return Federation(
        image_data(), partition, model, strategy, half, engine, seed=seed, batch_size=4, **options
    )


def fedavg(**options):
    return flower.FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1, **options)


def final(federation, rounds):
    lines = list(federation.rounds(rounds))
    federation.load_weights()
    return federation.model.weights.clone(), lines


class Recorder(LocalGrid):
    """Keeps what the clients were sent and what they answered."""

    def __init__(self, host):
        super().__init__(host)
        self.exchanges = []

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        # strategies may empty the replies they aggregate
        arrays = [
            {k: a.numpy() for k, a in r.content.array_records.get("arrays", {}).items()} for r in replies
        ]
        metrics = [dict(r.content["metrics"]) for r in replies]
        self.exchanges.append((messages, arrays, metrics))
        return replies


def mean(updates, examples):
    return {
        k: sum(n * u[k] for n, u in zip(examples, updates, strict=True)) / sum(examples) for k in updates[0]
    }


def median(updates, examples):
    return {k: np.median([u[k] for u in updates], axis=0) for k in updates[0]}


def krum(updates, examples):
    """The update nearest to its n - f - 2 nearest others, with f = 1."""
    flat = np.array([np.concatenate([a.ravel() for a in u.values()]) for u in updates])
    apart = ((flat[:, None] - flat[None]) ** 2).sum(axis=2)
    scores = np.sort(apart, axis=1)[:, 1 : 1 + len(updates) - 1 - 2].sum(axis=1)
    return updates[int(np.argmin(scores))]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("strategy", "aggregate"),
    [
        (flower.FedAvg(), mean),
        (flower.FedMedian(), median),
        (flower.Krum(num_malicious_nodes=1), krum),
    ],
    ids=["FedAvg", "FedMedian", "Krum"],
)
def test_flowers_strategies_run_unchanged(strategy, aggregate, normed):
    federation = federate(strategy, normed=normed)
    grid = Recorder(federation.grid.host)
    start = network(normed).state_dict()
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(start), num_rounds=2)
    train, evaluate = grid.exchanges[0::2], grid.exchanges[1::2]
    assert len(train) == len(evaluate) == 2
    for number in (0, 1):
        _, answered, measured = train[number]
        updates = [{k: a.astype(np.float64) for k, a in arrays.items()} for arrays in answered]
        examples = [m["num-examples"] for m in measured]
        assert sorted(examples) == sorted(SIZES)
        expected = aggregate(updates, examples)
        # what is sent next: to evaluation, then to the next round's training, and in the end returned
        sent = evaluate[number][0][0].content["arrays"].to_numpy_ndarrays()
        for array, target in zip(sent, expected.values(), strict=True):
            np.testing.assert_allclose(array, target, rtol=1e-5, atol=1e-7)
        measured = evaluate[number][2]
        accuracy = np.average(
            [m["accuracy"] for m in measured], weights=[m["num-examples"] for m in measured]
        )
        reported = result.evaluate_metrics_clientapp[number + 1]
        assert reported["accuracy"] == pytest.approx(accuracy)
    assert list(result.arrays.keys()) == list(start)
    network(normed).load_state_dict(result.arrays.to_torch_state_dict())
    moved = result.arrays.to_torch_state_dict()["4.weight"] - start["4.weight"]
    assert moved.norm() > 0.01


@pytest.mark.parametrize(
    "name", ["FedAdam", "FedYogi", "FedAdagrad", "FedAvgM", "FedMedian", "FedTrimmedAvg"]
)
def test_other_strategies_of_flower_train(name):
    strategy = getattr(flower, name)(fraction_evaluate=0.0)
    weights, lines = final(federate(strategy), 2)
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert weights.isfinite().all()
    assert not torch.equal(weights, federate(fedavg()).model.weights)
    assert lines[-1]["clients_ok"] == len(SIZES)
    assert lines[-1]["passes"] == pytest.approx(2 * LOCAL["local_epochs"])


def test_fedavgm_without_momentum_is_fedavg():
    plain, _ = final(federate(fedavg()), 3)
    settings = {"fraction_evaluate": 0.0, "server_momentum": 0.0}
    same, _ = final(federate(flower.FedAvgM(**settings)), 3)
    assert torch.equal(plain, same)
    # at half the server's learning rate it goes half the way in a round
    start = federate(fedavg()).model.weights
    whole, _ = final(federate(fedavg()), 1)
    halved, _ = final(federate(flower.FedAvgM(**settings, server_learning_rate=0.5)), 1)
    torch.testing.assert_close(halved - start, (whole - start) / 2, rtol=1e-4, atol=1e-7)


def test_same_seed_same_bits():
    first, lines = final(federate(fedavg(), seed=3, participation=0.6), 3)
    second, again = final(federate(fedavg(), seed=3, participation=0.6), 3)
    other, _ = final(federate(fedavg(), seed=4, participation=0.6), 3)
    assert torch.equal(first, second)
    for a, b in zip(lines, again, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }
    assert not torch.equal(first, other)
    assert lines[-1]["clients_ok"] == 3


def test_stacks_change_nothing_but_rounding():
    alone, _ = final(federate(fedavg(), stack=1), 2)
    for stack in (2, 5):
        together, _ = final(federate(fedavg(), stack=stack), 2)
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_averaged_by_examples():
    federation = federate(fedavg(), normed=True)
    seen = []
    original = federation.gateway._take_buffers

    def take(replies, trained):
        seen.extend(
            (r.content["metrics"]["num-examples"], r.content["arrays"]["buffers"].numpy().copy())
            for r in replies
        )
        original(replies, trained)

    federation.gateway._take_buffers = take
    final(federation, 1)
    expected = sum(n * b.astype(np.float64) for n, b in seen) / sum(SIZES)
    assert sorted(n for n, _ in seen) == sorted(SIZES)
    own = federation.model.module[1]
    found = torch.cat([own.running_mean, own.running_var]).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.ptp([b[0] for _, b in seen]) > 1e-3  # clients' statistics differ


def test_a_round_without_any_reply_says_why():
    class Broken(ClientHalf):
        def solve(self, stack, instruction, state):
            raise ArithmeticError("no such thing")

    broken = Broken()
    broken.layout = Layout.of_parameters(network())
    federation = federate(fedavg(), half=broken)
    with pytest.raises(TooFewClientsError, match=r"in round 1; client 0: ArithmeticError: no such thing"):
        list(federation.rounds(1))


def test_messages_may_be_pushed_and_pulled():
    federation = federate(fedavg())
    grid = LocalGrid(federation.grid.host)
    content = RecordDict({"arrays": federation.arrays, "config": ConfigRecord({"server-round": 1})})
    messages = [grid.create_message(content, "train", node, "1") for node in grid.get_node_ids()]
    ids = list(grid.push_messages(messages))
    assert len(set(ids)) == len(SIZES)
    first = list(grid.pull_messages(ids[:2]))
    assert [m.metadata.src_node_id for m in first] == [0, 1]
    rest = list(grid.pull_messages(ids))
    assert [m.metadata.src_node_id for m in rest] == [2, 3, 4]
    assert [m.metadata.reply_to_message_id for m in first + rest] == ids
    assert list(grid.pull_messages(ids)) == []
