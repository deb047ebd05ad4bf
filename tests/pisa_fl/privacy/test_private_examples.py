"""DP-SGD in a stack: gradients of single examples, clipped exactly, against autograd one example at a time."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pisa_fl.clients.example_gradients import known_by_layers
from pisa_fl.clients.flat_model import FlatModel
from pisa_fl.clients.private_stack import PrivateStack
from pisa_fl.clients.stack import ClientData
from pisa_fl.data import ImageData
from pisa_fl.privacy import Examples
from pisa_fl.tasks import Classification
from strategies import Term

SIZES = (7, 3, 5)
BOUND = 1.2


class Twice(nn.Module):
    """Convolutions, one in groups and one that is called two times, and linear layers, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.same = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.first, self.last = nn.Linear(36, 6, bias=False), nn.Linear(6, 5)

    def forward(self, images):
        features = torch.tanh(self.same(torch.tanh(self.same(torch.tanh(self.one(images))))))
        return self.last(torch.tanh(self.first(features.flatten(1))))


def made(name):
    torch.manual_seed(3)
    if name == "layers":
        return Twice()
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 5))


def stack(model, clients, noise=0.0, rate=0.5, releases=4, number=1, bound=BOUND):
    draw = np.random.default_rng(2)
    images, labels = draw.integers(0, 256, (15, 2, 6, 6), dtype=np.uint8), draw.integers(0, 5, 15)
    data = ImageData(images, labels, images[:1], labels[:1], tuple("abcde"), (0.5, 0.5), (0.5, 0.5), None)
    fields = {name: torch.from_numpy(field) for name, field in data.train.items()}
    rows = torch.arange(15).split(SIZES)
    examples = {client: ClientData(fields, rows[client]) for client in clients}
    privacy = Examples(bound, noise, rate, 1e-5, "zero_out", "seed", seed=9)
    flat = FlatModel(copy.deepcopy(model), Classification(), torch.device("cpu"))
    # four at a time: sums go over several parts
    return PrivateStack(privacy, releases, flat, data, examples, None, number, 0, 64, 4 * len(clients))


def weights_of(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def one_by_one(model, inputs, targets):
    """Gradients of single examples in double precision."""
    model = copy.deepcopy(model).double()
    for image, label in zip(inputs, targets, strict=True):
        loss = cross_entropy(model(image[None].double()), label[None])
        yield torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def clipped_sum(gradients, bound=BOUND):
    gradients = list(gradients)
    lengths = [float(g.norm()) for g in gradients]
    return sum(g * min(1.0, bound / n) for g, n in zip(gradients, lengths, strict=True)), lengths


def ready(private, client):
    chosen = torch.arange(SIZES[client])
    batch = private._batch([chosen], [torch.ones(len(chosen))])
    return batch.data["inputs"][0], batch.data["targets"][0]


@pytest.mark.parametrize("name", ["layers", "another"])
@pytest.mark.parametrize("together", [True, False])
def test_every_gradient_of_all_examples_is_clipped_by_itself(name, together):
    model, bound = made(name), {"layers": 1.2, "another": 4.0}[name]
    assert known_by_layers(stack(model, [0]).layout) == (name == "layers")
    groups = [(0, 1, 2)] if together else [(0,), (1,), (2,)]
    lengths = []
    for clients in groups:
        found, losses = stack(model, clients, bound=bound).full_gradient(weights_of(model), "mean")
        assert not losses.any()  # nobody is told
        for row, client in enumerate(clients):
            total, own = clipped_sum(one_by_one(model, *ready(stack(model, [client]), client)), bound)
            lengths += own
            torch.testing.assert_close(found[row].double(), total / SIZES[client], rtol=1e-4, atol=1e-6)
    assert min(lengths) < bound < max(lengths)


@pytest.mark.parametrize("clients", [(0,), (0, 1, 2)])
def test_batches_are_drawn_by_chance_and_steps_divided_by_what_is_expected(clients):
    model = made("layers")
    at = weights_of(model).repeat(len(clients), 1)
    drawn = []
    for number in range(1, 60):
        private = stack(model, clients, releases=2, number=number)
        for batch in private.batches(1):
            there = batch.weights > 0
            found, _ = private.gradient(at, batch)
            drawn += [int(count) for count in there.sum(dim=1)[:1]]
            assert batch.examples == [max(1, round(0.5 * SIZES[c])) for c in clients]
            if number > 3:
                continue
            for row, client in enumerate(clients):
                own = {k: field[row][there[row]] for k, field in batch.data.items()}
                total, _ = clipped_sum(one_by_one(model, own["inputs"], own["targets"]))
                expected = total / (0.5 * SIZES[client]) + torch.zeros(at.shape[1], dtype=torch.float64)
                torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-6)
    assert len(drawn) == 118
    # of 7 examples each with the chance 1/2, so that all sizes appear, none included
    assert {0, 1, 6} <= set(drawn)
    assert abs(np.mean(drawn) - 3.5) < 4 * np.sqrt(7 / 4 / len(drawn))


def test_an_empty_batch_is_noise_alone():
    private = stack(made("layers"), [1], noise=2.0, rate=1e-9, releases=1)
    batch = next(private.batches(1))
    assert not batch.weights.numel()
    noise, _ = private.gradient(weights_of(made("layers"))[None], batch)
    assert noise.std() * (1e-9 * SIZES[1]) == pytest.approx(2.0 * BOUND, rel=0.1)


def test_more_than_was_accounted_for_is_refused():
    model = made("layers")
    at = weights_of(model)
    private = stack(model, [0], releases=1)
    private.full_gradient(at, "mean")
    with pytest.raises(ValueError, match="more gradients than"):
        private.full_gradient(at, "mean")
    private = stack(model, [0])
    batch = next(private.batches(1))
    private.gradient(at[None], batch)
    with pytest.raises(ValueError, match="a second gradient of one batch"):
        private.gradient(at[None], batch)
    for asked in (
        lambda: private.outputs(at, batch),
        lambda: private.example_norms(at, batch),
        private.label_counts,
        lambda: private.probed(None).__enter__(),
        lambda: private.gradient(at[None], batch, Term(lambda *_: 0)),
        lambda: private.full_gradient(at, "sum"),
    ):
        with pytest.raises(ValueError, match="privacy=examples does not account for"):
            asked()
