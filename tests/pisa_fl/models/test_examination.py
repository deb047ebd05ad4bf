"""What a model must be, its buffers, and batches that it cannot take."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg, FedAvgM
from torch import nn

from pisa_fl import prepare
from pisa_fl.clients.stack import LocalStack
from pisa_fl.config import ConfigurationError, build, compose
from pisa_fl.data import ImageData
from pisa_fl.engines.local import local_engine
from pisa_fl.federation import DivergedError, Federation
from pisa_fl.models.examination import examine
from pisa_fl.tasks import Classification
from strategies import Layout, LocalSgd

SHAPE = (1, 4, 4)


class Flat(nn.Module):
    """A linear model, and what a test adds to it."""

    def __init__(self, **added):
        super().__init__()
        self.linear = nn.Linear(16, 3)
        for name, one in added.items():
            if isinstance(one, torch.Tensor) and not isinstance(one, nn.Parameter):
                self.register_buffer(name, one)
            else:
                setattr(self, name, one)

    def forward(self, images):
        return self.linear(images.flatten(1))


class Scaled(Flat):
    def forward(self, images):
        return super().forward(images) * self.scale


class Masked(Flat):
    def forward(self, images):
        rows = images[:, 0]
        return super().forward(torch.softmax(rows @ rows.mT + self.mask, -1) @ rows)


class Blind(Flat):
    def forward(self, images):
        with torch.no_grad():
            return super().forward(images)


class Replacing(Flat):
    def forward(self, images):
        if not hasattr(self, "kept"):
            self.kept = self.linear.weight.detach().clone(), self.linear.bias.detach().clone()
        self.linear.weight, self.linear.bias = (nn.Parameter(v.clone()) for v in self.kept)
        return super().forward(images)


class Tied(Flat):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, images):
        return self.linear(self.second(torch.relu(self.first(images.flatten(1)))))


class OwnAverage(Flat):
    """Keeps a running mean of its own making, and a table that stays."""

    def forward(self, images):
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * images.detach().mean()
        return super().forward(images + self.table)


def normed(norm):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), norm, nn.ReLU(), nn.Linear(5, 3))


def images(count, seed=0):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, *SHAPE)).astype(np.uint8)
    return pixels, generator.integers(0, 3, count).astype(np.int64)


def examined(model):
    train = images(3)
    return examine(model, Classification(), ImageData(*train, *train, ("a", "b", "c"), (0.5,), (0.5,)))


def federation(model, sizes=(9, 17), batch_size=8, epochs=1, server=None, half=None):
    """FedAvg, or what is given, on clients of so many examples each."""
    train, test = images(sum(sizes)), images(6, 1)
    data = ImageData(*train, *test, ("a", "b", "c"), (0.5,), (0.5,))
    rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    server = server or FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    half = half or LocalSgd(Layout.of_parameters(model), 0.1, 0.0, 0.0, epochs)
    engine = lambda clients: local_engine(clients, workers=0)  # noqa: E731
    return Federation(data, rows, model, server, half, engine, batch_size=batch_size)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: torch.jit.script(Flat()), "does not follow from its parameters"),
        (Replacing, "does not follow from its parameters"),
        (Blind, "no gradient"),
        (lambda: Flat().requires_grad_(False), "no trainable parameter"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "has no shape yet"),
        (lambda: Flat().double(), "float64"),
        (lambda: Flat().half(), "float16"),
        (lambda: Flat(phase=nn.Parameter(torch.zeros(2, dtype=torch.complex64))), "complex64"),
        (lambda: Flat().to("meta"), "meta"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(15, 3)), "cannot take images of"),
    ],
)
def test_a_model_that_would_never_learn_is_refused_in_one_sentence(model, sentence):
    with pytest.raises(ConfigurationError, match=sentence) as refused:
        examined(model())
    assert "\n" not in str(refused.value)


def test_only_what_a_training_pass_changes_is_a_running_statistic():
    table, seen = torch.full((4, 4), -torch.inf).triu(1).nan_to_num(0.0).clamp(min=-1e30), torch.tensor(0.0)
    assert examined(OwnAverage(table=table, seen=seen)).statistics == ("seen",)
    model = normed(nn.BatchNorm1d(5))
    nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)  # its mean would stay at zero
    held = {name: value.clone() for name, value in model.state_dict().items()}
    found = examined(model)
    assert found.statistics == ("2.running_mean", "2.running_var")
    assert not found.takes_one
    for name, value in model.state_dict().items():
        assert torch.equal(value, held[name]), name


@pytest.mark.parametrize(
    ("model", "one"),
    [
        (lambda: nn.Sequential(nn.BatchNorm2d(1), Flat()), True),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 4), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3)), False),
        (lambda: normed(nn.BatchNorm1d(5, track_running_stats=False)), False),
        (lambda: normed(nn.GroupNorm(1, 5)), True),
        (lambda: nn.Sequential(nn.InstanceNorm2d(1), Flat()), True),
    ],
)
def test_whether_one_example_is_enough_is_found_out(model, one):
    assert examined(model()).takes_one == one


@pytest.mark.parametrize("fill", [-np.inf, float(torch.finfo(torch.bfloat16).min), -1e13])
def test_masks_are_constants_of_the_model(fill):
    mask = torch.full((4, 4), fill).triu(1)
    run = federation(Masked(mask=mask))
    assert [m["clients_failed"] for m in run.rounds(2)] == [0, 0, 0]
    assert not len(run.gateway.buffers)
    assert torch.equal(run.model.state_dict()["mask"], mask)


@pytest.mark.parametrize("scale", [nn.Parameter(torch.tensor(1.0)), torch.tensor(1.0)])
def test_tensors_without_dimensions(scale):
    model = Scaled(scale=scale)
    run = federation(model)
    assert [m["clients_failed"] for m in run.rounds(2)] == [0, 0, 0]
    assert (float(run.model.state_dict()["scale"]) != 1.0) == isinstance(scale, nn.Parameter)


def test_tied_weights_are_trained_once_and_stay_tied():
    run = federation(Tied())
    start = run.model.state_dict()["first.weight"]
    assert [m["clients_failed"] for m in run.rounds(1)] == [0, 0]
    run.load_weights()
    held = run.model.state_dict()
    assert torch.equal(held["first.weight"], held["second.weight"])
    assert not torch.equal(held["first.weight"], start)


def test_a_leftover_of_one_joins_the_batch_before():
    sizes = {}
    for name, norm in (("batch", nn.BatchNorm1d(5)), ("group", nn.GroupNorm(1, 5))):
        run, seen = federation(normed(norm), sizes=(9, 17, 16, 3)), []
        run.grid.host._model.module.register_forward_pre_hook(
            lambda module, given, seen=seen: seen.append(len(given[0])) if module.training else None
        )
        assert [m["clients_failed"] for m in run.rounds(1)] == [0, 0]
        sizes[name] = sorted(seen)
    assert sizes == {"batch": [3, 8, 8, 8, 9, 9], "group": [1, 1, 3, 8, 8, 8, 8, 8]}


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_full_gradients_take_the_same_batches(how):
    model = normed(nn.BatchNorm1d(5))
    plain = copy.deepcopy(model)
    run = federation(model)
    executor = run.grid.host.executor
    stack = LocalStack(executor.model, run.data, {1: executor.clients[1]}, None, 1, 0, 8, 1000)
    weights = run.model.weights.clone()
    gradient, loss = stack.full_gradient(weights, how)
    x = (torch.tensor(run.data.train_images[9:]) / 255 - 0.5) / 0.5
    y = torch.tensor(run.data.train_labels[9:])
    losses = []
    for part in (slice(0, 8), slice(8, 17)):
        each = nn.functional.cross_entropy(plain(x[part]), y[part], reduction="none")
        losses.append(each.detach().sum())
        (each.mean() if how == "sum" else each.sum() / 17).backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
    torch.testing.assert_close(gradient[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss[0], sum(losses) / 17, rtol=1e-6, atol=1e-6)


def test_a_client_or_a_batch_of_one_is_refused_where_it_is_impossible():
    with pytest.raises(ConfigurationError, match="client 1 has a single example"):
        federation(normed(nn.BatchNorm1d(5)), sizes=(9, 1))
    with pytest.raises(ConfigurationError, match="batch_size=1 "):
        federation(normed(nn.BatchNorm1d(5)), batch_size=1)
    run = federation(normed(nn.GroupNorm(1, 5)), sizes=(9, 1), batch_size=1)
    assert [m["clients_failed"] for m in run.rounds(1)] == [0, 0]


def test_a_round_that_gives_impossible_values_is_undone_and_ends_the_run():
    server = FedAvgM(
        fraction_evaluate=0.0,
        min_train_nodes=1,
        min_available_nodes=1,
        server_learning_rate=1.0,
        server_momentum=0.5,
    )
    run = federation(Flat(), server=server)
    list(run.rounds(2))
    held = {name: array.numpy().copy() for name, array in run.arrays.items()}
    traffic, momentum = replace(run.gateway.traffic), [v.copy() for v in server.momentum_vector]
    server.server_learning_rate = math.inf
    with pytest.raises(DivergedError, match=r"^round 3 gave values that are not finite.* lower strategy.lr"):
        list(run.rounds(3))
    assert run.round == 2
    assert run.gateway.traffic == traffic
    for name, array in run.arrays.items():
        assert np.array_equal(array.numpy(), held[name])
    for now, then in zip(server.momentum_vector, momentum, strict=True):
        assert np.array_equal(now, then)
    server.server_learning_rate = 1.0
    assert [m["round"] for m in run.rounds(3)] == [3]


def test_a_zero_initialised_head_learns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(model[3].weight), nn.init.zeros_(model[3].bias)
    config = compose("strategy=sisa", "strategy.lr=0.02")
    layout = Layout.of_parameters(model)
    server, half = (build(config.strategy[half], layout=layout) for half in ("server", "client"))
    run = federation(model, sizes=(9, 17, 30, 8), server=server, half=half)
    last, losses = run.model.weights.clone(), []
    for line in run.rounds(30):
        run.load_weights()
        assert (run.model.weights - last).abs().max() <= 10 * 0.02
        last = run.model.weights.clone()
        losses.append(line["train_loss"])
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("norm", "mixes"),
    [
        (nn.BatchNorm1d(5), True),
        (nn.BatchNorm1d(5, affine=False, track_running_stats=False), True),
        (nn.GroupNorm(1, 5), False),
        (nn.Dropout(0.5), False),
        (nn.Identity(), False),
    ],
)
def test_whether_a_model_mixes_the_examples_of_a_batch(norm, mixes):
    assert examined(normed(norm)).mixes is mixes


@pytest.mark.parametrize("name", ["simple_cnn", "mlp", "logistic", "vgg9", "resnet18"])
def test_the_models_of_the_package_mix_no_examples(name):
    config = compose(f"model={name}", "data.fraction=0.05", "strategy=fedavg", "engine.workers=0")
    assert not prepare(config).model.mixes
