"""Probes, terms, outputs and norms of a stack, of one client or many, against plain autograd one example at a time."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from pisa_fl.clients.flat_model import FlatModel
from pisa_fl.clients.stack import ClientData, LocalStack
from pisa_fl.data import ImageData
from pisa_fl.models.gpt import GPT
from pisa_fl.tasks import Classification, NextCharacter
from strategies import Forward, Layout, Probe, Term
from strategies.base.client import Batch
from strategies.preconditioners import Kfac

CPU = torch.device("cpu")
COUNTS = (5, 2, 4)
"""Examples in the batch of each client: the rest is padding."""


class Twice(nn.Module):
    """A layer that is called two times, and dropout, which an evaluation is without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.same, self.drop, self.last = (
            nn.Linear(6, 4),
            nn.Linear(4, 4),
            nn.Dropout(0.5),
            nn.Linear(4, 3),
        )

    def forward(self, inputs):
        return self.last(self.drop(torch.tanh(self.same(torch.tanh(self.same(self.first(inputs)))))))


def convolutional():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 5))


def kind(name):
    """Model, task, a batch of every client, and layers of a model by name."""
    torch.manual_seed(1)
    many, most = len(COUNTS), max(COUNTS)
    if name in ("convolutional", "groups"):
        model, task, layers = convolutional(), Classification(), ["0", "3"]
        if name == "groups":
            model[0] = nn.Conv2d(2, 4, 3, groups=2)
            model[3] = nn.Linear(4 * 16, 5)
        data = {"inputs": torch.randn(many, most, 2, 6, 6), "targets": torch.randint(5, (many, most))}
    elif name == "twice":
        model, task, layers = Twice(), Classification(), ["first", "same", "last"]
        model.drop.p = 0.0
        data = {"inputs": torch.randn(many, most, 6), "targets": torch.randint(3, (many, most))}
    else:
        model, task = GPT((7,), 11, 1, 2, 8), NextCharacter()
        layers = ["embedding", "blocks.0.mlp", "out"]
        data = {key: torch.randint(11, (many, most, 7)) for key in ("inputs", "targets")}
    counts = torch.tensor(COUNTS)
    weights = (torch.arange(most) < counts[:, None]) / counts[:, None]
    return model, task, Batch(data, weights, COUNTS), layers


def of_client(batch, client):
    one = slice(client, client + 1)
    n = COUNTS[client]
    return Batch(
        {name: field[one, :n] for name, field in batch.data.items()},
        batch.weights[one, :n],
        COUNTS[one],
    )


def stack(model, task, clients):
    draw = np.random.default_rng(2)
    images, labels = draw.integers(0, 256, (12, 2, 6, 6), dtype=np.uint8), draw.integers(0, 5, 12)
    data = ImageData(images, labels, images[:1], labels[:1], tuple("abcde"), (0.5, 0.5), (0.5, 0.5), None)
    fields = {name: torch.from_numpy(field) for name, field in data.train.items()}
    rows = dict(zip(range(len(COUNTS)), torch.arange(11).split(COUNTS), strict=True))
    examples = {client: ClientData(fields, rows[client]) for client in clients}
    return LocalStack(FlatModel(copy.deepcopy(model), task, CPU), data, examples, None, 1, 0, 3, 100)


def points(model, count):
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.manual_seed(5)
    return flat + 0.1 * torch.randn(count, len(flat))


def at(model, weights):
    model = copy.deepcopy(model)
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    return model


def example(batch, client, row):
    return {name: field[client, row : row + 1] for name, field in batch.data.items()}


class Factors(Probe):
    """Mean input of a layer beside the second moment of its output gradients: a Kronecker factor."""

    def __init__(self, model, layers):
        self.widths = {layer: model.get_submodule(layer).weight.shape for layer in layers}
        if "embedding" in self.widths:
            self.widths["embedding"] = self.widths["embedding"][::-1]

    def sizes(self):
        return {layer: 1 + shape[0] ** 2 for layer, shape in self.widths.items()}

    def reduce(self, layer, inputs, gradients, weights):
        convolution = gradients.dim() == 4
        rows = gradients.movedim(1, -1) if convolution else gradients
        rows = rows.flatten(1, -2) if rows.dim() > 2 else rows.unsqueeze(1)
        factor = torch.einsum("b,bti,btj->ij", weights, rows, rows)
        mean = (weights * inputs.float().flatten(1).mean(dim=1)).sum()
        return torch.cat([mean.reshape(1), factor.flatten()])


def watched_loss(plain, task, one, layers, drawn=False):
    """Loss of an example, of its own target or one that is drawn, and every call of the layers: name, input, output."""
    seen = []
    handles = [
        plain.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output, layer=layer: seen.append((layer, inputs[0], output))
        )
        for layer in layers
    ]
    output = task.output(plain, one)
    loss = task.losses(output, task.drawn(output, one) if drawn else one).sum()
    for handle in handles:
        handle.remove()
    return seen, loss


def by_hooks(model, task, batch, layers, probe):
    """What a probe makes of each client, from hooks on a plain model and one example after another."""
    made = []
    for client, weights in enumerate(points(model, len(COUNTS))):
        plain, total = at(model, weights), dict.fromkeys(layers, 0.0)
        for row in range(COUNTS[client]):
            one = example(batch, client, row)
            seen, loss = watched_loss(plain, task, one, layers, probe.drawn)
            outgoing = torch.autograd.grad(loss, [output for *_, output in seen])
            share = batch.weights[client, row : row + 1]
            for (layer, inputs, _), gradient in zip(seen, outgoing, strict=True):
                total[layer] = total[layer] + probe.reduce(layer, inputs.detach(), gradient, share)
        made.append(total)
    return {layer: torch.stack([total[layer] for total in made]) for layer in layers}


@pytest.mark.parametrize("drawn", [False, True], ids=["data", "drawn"])
@pytest.mark.parametrize("name", ["convolutional", "twice", "gpt"])
def test_a_probe_sees_what_hooks_on_a_plain_model_see(name, drawn):
    model, task, batch, layers = kind(name)
    probe, weights = Factors(model, layers), points(model, len(COUNTS))
    probe.drawn = drawn
    if drawn:
        batch.data["draws"] = torch.rand(batch.data["targets"].shape)
    expected = by_hooks(model, task, batch, layers, probe)
    together = stack(model, task, range(len(COUNTS)))
    plain = together.gradient(weights, batch)
    with together.probed(probe) as sums:
        gradient, loss = together.gradient(weights, batch)
    torch.testing.assert_close(gradient, plain[0])
    torch.testing.assert_close(loss, plain[1])
    for layer in layers:
        torch.testing.assert_close(sums[layer], expected[layer], rtol=1e-4, atol=1e-6)
    for client in range(len(COUNTS)):
        alone, own = stack(model, task, [client]), of_client(batch, client)
        without = alone.gradient(weights[client], own)[0]
        with alone.probed(probe) as sums:
            assert torch.equal(alone.gradient(weights[client], own)[0], without)
        for layer in layers:
            torch.testing.assert_close(sums[layer][0], expected[layer][client], rtol=1e-4, atol=1e-6)
        kept = {layer: vector.clone() for layer, vector in sums.items()}
        alone.gradient(weights[client], own)
        assert all(torch.equal(sums[layer], kept[layer]) for layer in layers)


def kfacs(model, fisher):
    damping = 0.1, "constant", 1.0, 0
    return Kfac(Layout.of_parameters(model), 0.9, *damping, None, 1.0, fisher, "eigen", 50, 1, 1e-8).probe


@pytest.mark.parametrize("kind_of_probe", ["own", "kfac"])
def test_a_probe_adds_up_the_parts_of_a_full_gradient(kind_of_probe):
    model, task, _, layers = kind("convolutional")
    probe, weights = Factors(model, layers), points(model, 1)[0]
    if kind_of_probe == "kfac":
        probe = kfacs(model, "sampled")
    made = []
    for chunk, clients in ((100, range(3)), (3, range(3)), (2, [1])):
        some = stack(model, task, clients)
        some._chunk = chunk
        with some.probed(probe) as sums:
            some.full_gradient(weights, "mean")
        made.append(sums)
    for layer in layers:
        torch.testing.assert_close(made[0][layer], made[1][layer], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(made[0][layer][1:2], made[2][layer], rtol=1e-4, atol=1e-6)
        assert made[0][layer].abs().min(dim=0).values.max() > 0


def contrast(layer, forward: Forward, given):
    """MOON's (Li et al. 2021, equation 3): features like the consensus's, unlike the last round's."""
    likeness = [cosine_similarity(forward.inputs[layer], given[name]) for name in ("consensus", "last")]
    return cross_entropy(2 * torch.stack(likeness, dim=1), given["first"], reduction="none")


@pytest.mark.parametrize("name", ["convolutional", "groups", "twice", "gpt"])
def test_factors_of_kfac_of_many_clients_are_those_of_each(name, monkeypatch):
    model, task, batch, _ = kind(name)
    weights = points(model, len(COUNTS))
    probe = kfacs(model, "empirical")
    together = stack(model, task, range(len(COUNTS)))
    with together.probed(probe) as of_all:
        together.gradient(weights, batch)
    monkeypatch.setattr("strategies.preconditioners.kfac_factors.AT_ONCE", 1)  # one example after another
    for client in range(len(COUNTS)):
        alone = stack(model, task, [client])
        with alone.probed(probe) as sums:
            alone.gradient(weights[client], of_client(batch, client))
        for layer, vector in sums.items():
            torch.testing.assert_close(of_all[layer][client], vector[0], rtol=1e-4, atol=1e-6)


def test_targets_are_drawn_alike_however_clients_are_divided():
    model, task, _, layers = kind("convolutional")
    probe, weights = Factors(model, layers), points(model, 1)[0]
    probe.drawn = True
    made = {}
    for chunk, clients in ((100, range(3)), (2, range(3)), (100, [1]), (2, [1])):
        some = stack(model, task, clients)
        some._chunk = chunk
        plain = some.full_gradient(weights, "mean")
        with some.probed(probe) as sums:
            for seen, known in zip(some.full_gradient(weights, "mean"), plain, strict=True):
                torch.testing.assert_close(seen, known)
        made[chunk, len(clients)] = sums["0"]
        counts = torch.tensor([COUNTS[client] for client in clients])
        assert some.differentiated == (3 * counts).tolist()  # one pass without the probe, two with it
    torch.testing.assert_close(made[100, 3], made[2, 3], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made[100, 3][1:2], made[100, 1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made[100, 1], made[2, 1], rtol=1e-4, atol=1e-6)
    other = stack(model, task, [1])
    other._round += 1
    with other.probed(probe) as sums:
        other.full_gradient(weights, "mean")
    assert (sums["0"] - made[100, 1]).norm() > 0.01 * made[100, 1].norm()


@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
def test_terms_on_features_that_are_given(together):
    model, task, batch, layers = kind("convolutional")
    layer = Layout.of_parameters(model).modules[-1]
    assert layer == layers[-1]
    weights, consensus, last = (scale * points(model, 3) for scale in (1.0, 0.7, 1.3))
    for clients in [range(3)] if together else [[0], [1], [2]]:
        some = stack(model, task, clients)
        own = batch if together else of_client(batch, clients[0])
        rows = list(clients)
        given = {
            "consensus": some.outputs(consensus[0], own, [layer]).inputs[layer],
            "last": some.outputs(last[rows], own, [layer]).inputs[layer],
            "first": torch.zeros(own.weights.shape, dtype=torch.int64),
        }
        term = Term(lambda forward, given: 5 * contrast(layer, forward, given), [layer], given)
        gradients, losses = some.gradient(weights[rows], own, term)
        without = some.gradient(weights[rows], own)
        assert torch.equal(losses, without[1])
        for place, client in enumerate(rows):
            inputs = batch.data["inputs"][client, : COUNTS[client]]
            targets = batch.data["targets"][client, : COUNTS[client]]
            plain = at(model, weights[client])
            features = plain[:3](inputs)
            kept = [at(model, point)[:3](inputs).detach() for point in (consensus[0], last[client])]
            likeness = torch.stack([cosine_similarity(features, other) for other in kept], dim=1)
            loss = cross_entropy(plain[3](features), targets)
            extra = -torch.log_softmax(2 * likeness, dim=1)[:, 0].mean()
            expected = torch.autograd.grad(loss + 5 * extra, list(plain.parameters()))
            flat = torch.cat([part.flatten() for part in expected])
            torch.testing.assert_close(gradients[place], flat, rtol=1e-4, atol=1e-6)
            assert (flat - without[0][place]).norm() > 0.01 * flat.norm()


def test_outputs_are_those_of_an_evaluation():
    model, task, batch, _ = kind("twice")
    model.drop.p = 0.5
    some, weights = stack(model, task, range(3)), points(model, 3)
    seen = some.outputs(weights, batch, ["last"])
    for client in range(3):
        plain = at(model, weights[client]).eval()
        torch.testing.assert_close(seen.output[client], plain(batch.data["inputs"][client]))
        torch.testing.assert_close(plain.last(seen.inputs["last"][client]), seen.output[client])
    assert some._model.module.training
    normed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    one, own = stack(normed, task, [0]), of_client(batch, 0)
    before = one.buffers.clone()
    output = one.outputs(points(normed, 1)[0], own).output[0]
    torch.testing.assert_close(output, at(normed, points(normed, 1)[0]).eval()(own.data["inputs"][0]))
    assert torch.equal(one.buffers, before)


@pytest.mark.parametrize("name", ["convolutional", "gpt"])
@pytest.mark.parametrize("at_once", [2**28, 1])
def test_norms_of_single_examples(name, at_once, monkeypatch):
    monkeypatch.setattr("pisa_fl.clients.flat_model.GRADIENT_BYTES", at_once)
    model, task, batch, _ = kind(name)
    weights = points(model, 3)
    norms = stack(model, task, range(3)).example_norms(weights, batch)
    assert torch.equal(norms > 0, batch.weights > 0)
    alone = stack(model, task, [1]).example_norms(weights[1], of_client(batch, 1))
    torch.testing.assert_close(alone[0], norms[1, : COUNTS[1]])
    for client in range(3):
        plain = at(model, weights[client])
        for row in range(COUNTS[client]):
            one = example(batch, client, row)
            loss = task.losses(task.output(plain, one), one).sum()
            flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(plain.parameters()))])
            torch.testing.assert_close(norms[client, row], flat.norm(), rtol=1e-4, atol=1e-6)


def test_what_cannot_be_watched():
    model, task, batch, _ = kind("convolutional")
    some, weights = stack(model, task, range(3)), points(model, 3)
    with pytest.raises(ValueError, match="the model has no layer 'head'"):
        some.outputs(weights, batch, ["head"])

    class Tuples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 5)

        def forward(self, inputs):
            return self.out(self.lstm(inputs.unsqueeze(1))[0].squeeze(1))

    with pytest.raises(ValueError, match="layer 'lstm', a LSTM, must take one tensor and give one"):
        stack(Tuples(), task, [0]).outputs(points(Tuples(), 1)[0], of_client(kind("twice")[2], 0), ["lstm"])
    normed = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    with pytest.raises(ValueError, match="has no gradient in a model with running statistics"):
        stack(normed, task, [0]).example_norms(points(normed, 1)[0], of_client(batch, 0))
