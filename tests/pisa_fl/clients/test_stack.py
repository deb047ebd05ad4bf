"""Stacks against plain autograd: one client or many, in chunks or at once, with running statistics and noise."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pisa_fl.clients.executor import tensors
from pisa_fl.clients.flat_model import FlatModel
from pisa_fl.clients.stack import ClientData, LocalStack, fitting_stack
from pisa_fl.data import ImageData
from pisa_fl.data.augment import CropFlip
from pisa_fl.tasks import Classification
from strategies import Instruction, LocalSgd
from strategies.base.messages import WEIGHTS

SIZES = {4: 11, 0: 3, 7: 8}
"""Examples by client number, in the order of the stack."""
SEED, ROUND, BATCH = 9, 6, 4
CPU = torch.device("cpu")
STD = (0.5, 0.25)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 5))


def normed():
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(3 * 16, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 5)),
    )


def image_data(augment=None):
    draw = np.random.default_rng(2)
    count = sum(SIZES.values())
    images = draw.integers(0, 256, (count, 2, 6, 6), dtype=np.uint8)
    labels = draw.integers(0, 5, count)
    return ImageData(images, labels, images[:1], labels[:1], tuple("abcde"), (0.3, 0.6), STD, augment)


def clients(data, noise=0.0):
    rows = torch.from_numpy(np.random.default_rng(3).permutation(len(data.train_labels)))
    parts = zip(SIZES, rows.split(list(SIZES.values())), strict=True)
    fields = tensors(data.train, CPU)
    return {client: ClientData(fields, part, noise) for client, part in parts}


def stack(examples, data, model=None, buffers=None, chunk=1000, number=ROUND):
    flat = FlatModel(network() if model is None else model, Classification(), CPU)
    return LocalStack(flat, data, examples, buffers, number, SEED, BATCH, chunk)


def plain_images(data, own, rows):
    pixels = data.train_images[own.rows[rows].numpy()].astype(np.float32) / 255
    mean, std = (np.array(v, np.float32).reshape(1, 2, 1, 1) for v in (data.mean, data.std))
    return torch.from_numpy((pixels - mean) / std), own.fields["targets"][own.rows[rows]]


def plain_gradient(model, weights, images, labels):
    """Gradient and loss by autograd on a copy of the model."""
    model = copy.deepcopy(model)
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    loss = cross_entropy(model(images), labels)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in grads]), loss.detach()


def points(count):
    flat = FlatModel(network(), Classification(), CPU)
    return flat.weights + 0.1 * torch.randn(
        count, flat.layout.size, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("own_point", [True, False])
@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_full_gradient_is_autograds(gradient, own_point, chunk):
    data = image_data()
    everyone = clients(data)
    weights = points(3) if own_point else points(1)[0]
    expected, losses = [], []
    for row, own in enumerate(everyone.values()):
        w = weights[row] if own_point else weights
        images, labels = plain_images(data, own, torch.arange(len(own)))
        whole, loss = plain_gradient(network(), w, images, labels)
        parts = [
            plain_gradient(network(), w, x, y)[0]
            for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True)
        ]
        expected.append(whole if gradient == "mean" else sum(parts))
        losses.append(loss)
    together = stack(everyone, data, chunk=chunk)
    gradients, loss = together.full_gradient(weights, gradient)
    torch.testing.assert_close(gradients, torch.stack(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, torch.stack(losses))
    assert together.differentiated == list(SIZES.values())
    for row, (client, own) in enumerate(everyone.items()):
        w = weights[row : row + 1] if own_point else weights
        alone, loss = stack({client: own}, data, chunk=chunk).full_gradient(w, gradient)
        torch.testing.assert_close(alone[0], expected[row], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(loss[0], losses[row])


def test_batches_follow_the_documented_rule():
    data = image_data()
    everyone = clients(data)
    batches = list(stack(everyone, data).batches(epochs=2))
    assert len(batches) == 2 * 3  # of the client with most examples
    for row, (client, own) in enumerate(everyone.items()):
        draw = np.random.default_rng([SEED, crc32(b"batches"), ROUND, client])
        rows = [part for _ in range(2) for part in torch.from_numpy(draw.permutation(len(own))).split(BATCH)]
        for step, batch in enumerate(batches):
            size = len(rows[step]) if step < len(rows) else 0
            assert batch.examples[row] == size
            assert batch.counts[row] == size
            assert torch.equal(batch.weights[row] > 0, torch.arange(batch.weights.shape[1]) < size)
            if size:
                images, labels = plain_images(data, own, rows[step])
                torch.testing.assert_close(batch.data["inputs"][row, :size], images)
                assert torch.equal(batch.data["targets"][row, :size], labels)
                assert float(batch.weights[row].sum()) == pytest.approx(1)


@pytest.mark.parametrize("proximal", [0.0, 0.5])
def test_local_sgd_is_pytorchs_for_clients_with_different_numbers_of_batches(proximal):
    data = image_data()
    everyone = clients(data)
    start = FlatModel(network(), Classification(), CPU).weights.clone()
    expected, losses = [], []
    for client, own in everyone.items():
        model = network()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, weight_decay=0.02)
        anchor = [p.detach().clone() for p in model.parameters()]
        draw = np.random.default_rng([SEED, crc32(b"batches"), ROUND, client])
        seen = 0.0
        for rows in (r for _ in range(2) for r in torch.from_numpy(draw.permutation(len(own))).split(BATCH)):
            images, labels = plain_images(data, own, rows)
            optimiser.zero_grad()
            loss = cross_entropy(model(images), labels)
            away = sum((p - a).square().sum() for p, a in zip(model.parameters(), anchor, strict=True))
            (loss + proximal / 2 * away).backward()
            optimiser.step()
            seen += loss.item() * len(rows)
        expected.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        losses.append(seen / (2 * len(own)))
    layout = FlatModel(network(), Classification(), CPU).layout
    half = LocalSgd(layout, lr=0.1, momentum=0.8, weight_decay=0.02, local_epochs=2)
    instruction = Instruction(
        {WEIGHTS: start}, {"server-round": 1} | ({"proximal-mu": proximal} if proximal else {})
    )
    together = stack(everyone, data)
    update = half.solve(together, instruction, {})
    torch.testing.assert_close(update.arrays[WEIGHTS], torch.stack(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(update.loss, torch.tensor(losses), rtol=1e-5, atol=0)
    assert together.differentiated == [2 * n for n in SIZES.values()]
    for row, (client, own) in enumerate(everyone.items()):
        alone = half.solve(stack({client: own}, data), instruction, {})
        torch.testing.assert_close(alone.arrays[WEIGHTS][0], expected[row], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["gradient", "sgd"])
def test_running_statistics_are_those_of_a_plain_module(how):
    data = image_data()
    client, own = next(iter(clients(data).items()))
    plain = normed().train()
    plain[1].running_mean += 0.7  # the server's statistics are not the fresh ones
    buffers = FlatModel(copy.deepcopy(plain), Classification(), CPU).buffers
    assert len(buffers) == 2 * (3 + 4)
    one = stack({client: own}, data, model=normed(), buffers=buffers)
    flat = FlatModel(normed(), Classification(), CPU)
    weights = flat.weights.clone()
    draw = np.random.default_rng([SEED, crc32(b"batches"), ROUND, client])
    if how == "gradient":
        order = [torch.arange(len(own))]
        one.full_gradient(weights, "mean")
    else:
        order = [torch.from_numpy(draw.permutation(len(own))) for _ in range(2)]
        half = LocalSgd(flat.layout, lr=0.1, momentum=0.0, weight_decay=0.0, local_epochs=2)
        half.solve(one, Instruction({WEIGHTS: weights}, {"server-round": 1}), {})
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1 if how == "sgd" else 1e-30)
    for rows in (r for o in order for r in o.split(BATCH)):
        images, labels = plain_images(data, own, rows)
        optimiser.zero_grad()
        cross_entropy(plain(images), labels).backward()
        optimiser.step()
    stored = FlatModel(plain, Classification(), CPU)
    torch.testing.assert_close(one.buffers[0], stored.buffers, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one.buffers[0], buffers, atol=1e-2)


def test_running_statistics_need_stacks_of_one():
    data = image_data()
    with pytest.raises(ValueError, match=r"needs stacks of one client: set engine.stack=1"):
        stack(clients(data), data, model=normed())


DISTURBED = {"noise": (None, 0.4), "augmentation": (CropFlip(2, True), 0.0)}


@pytest.mark.parametrize("kind", DISTURBED)
def test_draws_repeat_and_depend_on_the_round(kind):
    augment, noise = DISTURBED[kind]
    data = image_data(augment)
    everyone, weights = clients(data, noise), points(1)[0]

    def gradients(number=ROUND):
        return stack(everyone, data, number=number).full_gradient(weights, "mean")[0]

    assert torch.equal(gradients(), gradients())
    assert not torch.allclose(gradients(), gradients(ROUND + 1), rtol=1e-3)
    undisturbed = stack(clients(image_data()), image_data()).full_gradient(weights, "mean")[0]
    assert not torch.allclose(gradients(), undisturbed, rtol=1e-3)


def test_every_reading_of_an_image_is_disturbed_afresh():
    data = image_data()
    one = stack(clients(data, noise=0.4), data)
    weights = points(1)[0]
    first, second = (one.full_gradient(weights, "mean")[0] for _ in range(2))
    assert not torch.allclose(first, second, rtol=1e-3)


@pytest.mark.parametrize("how", ["mean", "sum", "batch"])
@pytest.mark.parametrize("kind", DISTURBED)
def test_draws_do_not_depend_on_stack_and_chunk(kind, how):
    augment, noise = DISTURBED[kind]
    data = image_data(augment)
    everyone, weights = clients(data, noise), points(3)

    def gradients(of, rows, chunk):
        some = stack(of, data, chunk=chunk)
        if how != "batch":
            return some.full_gradient(weights[rows], how)[0]
        return sum(some.gradient(weights[rows], batch)[0] for batch in some.batches(1))

    together = gradients(everyone, slice(None), 1000)
    torch.testing.assert_close(gradients(everyone, slice(None), 5), together, rtol=1e-4, atol=1e-6)
    for row, (client, own) in enumerate(everyone.items()):
        alone = gradients({client: own}, slice(row, row + 1), 7)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-6)


def test_noise_has_the_given_deviation_of_pixels():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (400, 2, 6, 6), dtype=np.uint8)
    labels = draw.integers(0, 5, 400)
    data = ImageData(images, labels, images[:1], labels[:1], tuple("abcde"), (0.3, 0.6), STD, None)
    own = ClientData(tensors(data.train, CPU), torch.arange(400), 0.2)
    quiet = ClientData(own.fields, own.rows)
    noisy, clean = (
        torch.cat([b.data["inputs"][0] for b in stack({0: examples}, data).batches(1)])
        for examples in (own, quiet)
    )
    pixels = (noisy - clean) * torch.tensor(STD).view(2, 1, 1)
    assert pixels.std(dim=(0, 2, 3)).tolist() == pytest.approx([0.2, 0.2], rel=0.03)
    assert abs(float(pixels.mean())) < 0.005


def test_evaluation_is_plain_accuracy_and_loss():
    data = image_data()
    flat = FlatModel(normed(), Classification(), CPU)
    images, labels = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)
    rows = torch.tensor([5, 1, 9, 20, 0])
    plain = normed().eval()
    x = (images[rows] / 255 - torch.tensor(data.mean).view(2, 1, 1)) / torch.tensor(STD).view(2, 1, 1)
    logits = plain(x)
    found = flat.evaluate(tensors(data.train, CPU), rows, data, chunk=2)
    assert found["accuracy"] == float((logits.argmax(1) == labels[rows]).float().mean())
    assert found["loss"] == pytest.approx(float(cross_entropy(logits, labels[rows])), rel=1e-5)


def test_state_dict_round_trips():
    source, target = FlatModel(normed(), Classification(), CPU), FlatModel(normed(), Classification(), CPU)
    weights, buffers = torch.randn_like(source.weights), torch.rand_like(source.buffers)
    source.load(weights, buffers)
    target.module.load_state_dict(source.state_dict())
    assert torch.equal(target.weights, weights)  # parameters are views of the flat vector
    assert torch.equal(target.buffers, buffers)
    assert set(source.state_dict()) == set(normed().state_dict())


def test_images_normalised_beforehand_give_the_same_bits():
    data = image_data()
    model = network()
    ready = FlatModel(model, Classification(), CPU).ready(tensors(data.train, CPU), data)
    for client, own in clients(data).items():
        given = ClientData(ready, own.rows, raw=False)
        gradients = [
            stack({client: one}, data).full_gradient(points(1)[0], "mean")[0] for one in (own, given)
        ]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("together", [False, True])
def test_mixed_precision_is_near(together):
    data = image_data()
    own = clients(data) if together else {0: clients(data)[0]}
    exact, loss = stack(own, data).full_gradient(points(1)[0], "mean")
    flat = FlatModel(network(), Classification(), CPU, "bfloat16")
    mixed, mixed_loss = LocalStack(flat, data, own, None, ROUND, SEED, BATCH, 1000).full_gradient(
        points(1)[0], "mean"
    )
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - exact).norm() <= 0.02 * exact.norm()
    torch.testing.assert_close(mixed_loss, loss, rtol=0.02, atol=0)


COMPILED = """
import copy, sys, torch
sys.path.insert(0, sys.argv[1])
from test_stack import *
data, make = image_data(), nn.Sequential(nn.Flatten(), nn.Linear(72, 5))
flat = FlatModel(copy.deepcopy(make), Classification(), CPU, compiled=True)
at = flat.weights.repeat(3, 1) + torch.tensor([[0.0], [0.1], [0.2]])
found = LocalStack(flat, data, clients(data), None, ROUND, SEED, BATCH, 1000).full_gradient(at, "mean")
torch.testing.assert_close(found, stack(clients(data), data, make).full_gradient(at, "mean"))
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler for PyTorch to use")
def test_compiled_gradients_are_the_same_to_rounding():
    # in a process of its own: PyTorch's compiler does not go with the test runner's imports
    here = str(Path(__file__).parent)
    alone = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # it would start more processes
    line = [sys.executable, "-c", COMPILED, here]
    done = subprocess.run(line, env=alone, capture_output=True, text=True, check=False)
    assert (done.returncode, int(done.stdout or 0) > 0) == (0, True), done.stderr


def test_what_a_pass_keeps_and_how_many_clients_fit():
    flat = FlatModel(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), Classification(), CPU)
    # the input, and the hidden layer twice: for the rectifier and for the layer after it
    assert flat.example_bytes({"inputs": torch.randn(1, 4)}) == 4 * (4 + 3 + 3)
    client, example = 16 * 4 * 23, 2 * 40
    free = 2 * (100 * example + 7 * (client + 5 * example))
    assert fitting_stack(flat, {"inputs": torch.randn(1, 4)}, batch_size=5, chunk=100, free=free) == 7
    assert fitting_stack(flat, {"inputs": torch.randn(1, 4)}, batch_size=5, chunk=100, free=free - 1) == 6
    assert fitting_stack(flat, {"inputs": torch.randn(1, 4)}, batch_size=5, chunk=100, free=0) == 1
