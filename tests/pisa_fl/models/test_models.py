"""Models against parameter formulas, hand-written twins and torchvision's own."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torchvision
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy

CONF = Path(__file__).parents[3] / "conf" / "model"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem not in ("gpt", "lstm"))  # of images
MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def build(name, shape=MNIST, classes=10, seed=0, **changes):
    torch.manual_seed(seed)
    return instantiate(OmegaConf.load(CONF / f"{name}.yaml"), shape=shape, classes=classes, **changes)


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def conv(inputs, outputs, kernel):
    return outputs * (inputs * kernel**2 + 1)


def dense(*widths):
    return sum(outputs * (inputs + 1) for inputs, outputs in pairwise(widths))


def test_the_names_promised_exist():
    assert {"simple_cnn", "mlp", "logistic", "vgg9", "resnet18"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [MNIST, CIFAR, (2, 40, 24)])
def test_maps_images_of_any_shape_to_logits(name, shape):
    assert build(name, shape, classes=7)(torch.randn(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize(("shape", "published", "pixels"), [(MNIST, 44_426, 4), (CIFAR, 62_006, 5)])
def test_simple_cnn_is_niid_benchs(shape, published, pixels):
    model = build("simple_cnn", shape)
    formula = conv(shape[0], 6, 5) + conv(6, 16, 5) + dense(16 * pixels**2, 120, 84, 10)
    assert size(model) == formula == published
    twin = nn.Sequential(
        *(nn.Conv2d(shape[0], 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * pixels**2, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )
    twin.load_state_dict(dict(zip(twin.state_dict(), model.state_dict().values(), strict=True)))
    images = torch.randn(4, *shape)
    torch.testing.assert_close(model(images), twin(images))


def test_simple_cnn_has_pytorchs_initialisation():
    model = build("simple_cnn")
    torch.manual_seed(0)
    twin = [
        nn.Conv2d(1, 6, 5),
        nn.Conv2d(6, 16, 5),
        nn.Linear(256, 120),
        nn.Linear(120, 84),
        nn.Linear(84, 10),
    ]
    expected = [parameter for module in twin for parameter in module.parameters()]
    assert all(map(torch.equal, model.parameters(), expected))


def test_simple_cnn_needs_16_pixels():
    assert build("simple_cnn", (1, 16, 16))(torch.zeros(1, 1, 16, 16)).shape == (1, 10)
    with pytest.raises(Exception, match=r"kernel=5 leaves nothing of 15 x 16 images.*use larger images"):
        build("simple_cnn", (1, 15, 16))


def test_mlp_and_logistic_sizes():
    assert size(build("mlp")) == dense(784, 200, 200, 10) == 199_210
    assert size(build("logistic", CIFAR)) == dense(3072, 10)
    model = build("logistic")
    weight, bias = model.parameters()
    images = torch.randn(5, *MNIST)
    torch.testing.assert_close(model(images), images.reshape(5, -1) @ weight.T + bias)


def test_mlp_is_not_linear():
    model = build("mlp")
    images = torch.randn(5, *MNIST)
    assert not torch.allclose(model(images) + model(-images), 2 * model(torch.zeros(1, *MNIST)), atol=1e-3)


def test_vgg9_size_and_norms():
    channels = [3, 32, 64, 128, 128, 256, 256]
    convolutions = sum(conv(a, b, 3) for a, b in pairwise(channels))
    plain = convolutions + dense(4096, 512, 512, 10)
    assert size(build("vgg9", CIFAR)) == plain == 3_491_530
    assert size(build("vgg9", CIFAR, norm="batch")) == plain + 2 * sum(channels[1:])
    convolution = ["Conv2d", "Identity", "ReLU"]
    linear = ["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"]
    kinds = [type(module).__name__ for module in build("vgg9", CIFAR)]
    assert kinds == [*convolution, *convolution, "MaxPool2d"] * 3 + linear
    grouped = build("vgg9", CIFAR, norm="group")
    assert size(grouped) == plain + 2 * sum(channels[1:])
    groups = [module for module in grouped if isinstance(module, nn.GroupNorm)]
    assert [module.num_groups for module in groups] == [2, 4, 8, 8, 16, 16]
    mnist = build("vgg9", MNIST, hidden=[1024, 512])
    assert size(mnist) == convolutions - 2 * 9 * 32 + dense(2304, 1024, 512, 10)
    with pytest.raises(Exception, match=r"3 pools leave nothing of 7 x 32 images"):
        build("vgg9", (3, 7, 32))


def test_resnet18_with_batch_norm_is_torchvisions():
    ours = build("resnet18", (3, 64, 64), norm="batch").eval()
    twin = torchvision.models.resnet18(num_classes=10).eval()
    ours.load_state_dict(twin.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), twin(images))


def test_resnet18_small_images_get_the_cifar_stem():
    large, small = build("resnet18", (3, 64, 64)), build("resnet18", (3, 63, 64))
    assert size(large) - size(small) == 64 * 3 * (7**2 - 3**2)
    assert size(build("resnet18", CIFAR)) == 11_173_962
    last = {}
    small.layer4.register_forward_hook(lambda module, images, output: last.update(shape=output.shape))
    small(torch.zeros(1, *CIFAR))
    assert last["shape"] == (1, 512, 4, 4)
    # He's initialisation, as all other convolutions of the network
    assert small.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.1)
    assert large.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 49)), rel=0.1)


def test_resnet18_group_norm_is_the_default_and_keeps_no_statistics():
    model = build("resnet18", CIFAR)
    groups = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert len(groups) == 20
    assert {module.num_channels // module.num_groups for module in groups} == {16}
    assert not list(model.buffers())


@pytest.mark.parametrize("name", ["vgg9", "resnet18"])
def test_batch_norm_keeps_running_statistics_as_buffers(name):
    model = build(name, CIFAR, norm="batch")
    before = {key: value.clone() for key, value in model.named_buffers()}
    model(torch.randn(4, *CIFAR))
    changed = {key for key, value in model.named_buffers() if not torch.equal(value, before[key])}
    assert changed == set(before) != set()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"norm": "layer"}, "norm must be none, batch or group, got layer"),
        ({"norm": "group", "group_channels": 24}, "group_channels=24 must divide a layer's"),
        ({"norm": "group", "group_channels": 0}, "group_channels=0 must divide a layer's"),
    ],
)
@pytest.mark.parametrize("name", ["vgg9", "resnet18"])
def test_impossible_norms_are_refused(name, changes, sentence):
    with pytest.raises(Exception, match=sentence) as caught:
        build(name, CIFAR, **changes)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("name", "shape", "changes"),
    [
        ("simple_cnn", (1, 16, 16), {}),
        ("mlp", (1, 8, 8), {}),
        ("logistic", (1, 8, 8), {}),
        ("vgg9", (3, 8, 8), {}),
        ("vgg9", (3, 8, 8), {"norm": "group"}),
        ("resnet18", (3, 8, 8), {}),
    ],
)
def test_clients_in_one_vmap_have_the_gradients_of_a_loop(name, shape, changes):
    """Two clients with weights and images of their own, and both at shared weights."""
    models = [build(name, shape, seed=seed, **changes).double() for seed in (0, 1)]
    parameters, _ = stack_module_state(models)
    torch.manual_seed(2)
    images, labels = torch.randn(2, 3, *shape, dtype=torch.double), torch.randint(10, (2, 3))

    def loss(weights, batch, targets):
        return cross_entropy(functional_call(models[0], weights, (batch,)), targets)

    own = vmap(grad(loss))(parameters, images, labels)
    shared = vmap(grad(loss), in_dims=(None, 0, 0))(dict(models[0].named_parameters()), images, labels)
    for client, model in enumerate(models):
        for gradients, at in ((own, model), (shared, models[0])):
            at.zero_grad()
            cross_entropy(at(images[client]), labels[client]).backward()
            for key, parameter in at.named_parameters():
                torch.testing.assert_close(gradients[key][client], parameter.grad)
