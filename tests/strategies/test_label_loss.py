"""FedLC and FedRS: what they leave alone, and what they refuse."""

from functools import partial

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg

import pisa_fl
from pisa_fl import ConfigurationError
from pisa_fl.data import ImageData, TextData
from pisa_fl.federation import Federation
from pisa_fl.models.gpt import GPT
from strategies import FedLcClient, FedRsClient, Layout, LocalSgd
from strategies.optimizers import AdamW

LOCAL = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.0, "local_epochs": 2}
ADAMW = partial(AdamW, beta_2=0.99, eps=1e-8)
CLASSES = ("a", "b", "c", "d")


def federate(half, held, data=None, model=None, **options):
    """Clients with so many examples of each class."""
    draw = np.random.default_rng(0)
    labels = np.concatenate([np.repeat(range(4), counts) for counts in held])
    images = draw.integers(0, 255, (len(labels), 1, 2, 3), dtype=np.uint8)
    partition = np.split(np.arange(len(labels)), np.cumsum(np.sum(held, axis=1))[:-1])
    torch.manual_seed(1)
    model = model or torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4))
    data = data or ImageData(images, labels, images[:4], labels[:4], CLASSES, (0.4,), (0.2,))
    federation = Federation(
        *(data, partition, model, FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)),
        half(Layout.of_parameters(model)),
        batch_size=4,
        **options,
    )
    before = federation.model.weights.clone()
    lines = list(federation.rounds(1))
    federation.load_weights()
    moved = federation.model.weights - before
    return federation.model.layout.views(moved), lines


def fedlc(layout):
    return FedLcClient(layout, 1.0, **LOCAL)


def fedrs(layout):
    return FedRsClient(layout, 0.0, **LOCAL)


def plain(layout):
    return LocalSgd(layout, **LOCAL)


@pytest.mark.parametrize("half", [fedlc, fedrs])
def test_what_is_known_of_absent_classes_is_left_alone(half):
    moved, _ = federate(half, [[5, 0, 3, 0]])
    assert not moved["1.weight"][[1, 3]].any()
    assert (moved["1.weight"][[0, 2]].abs().sum(dim=1) > 1e-3).all()
    moved, _ = federate(plain, [[5, 0, 3, 0]])
    assert (moved["1.weight"].abs().sum(dim=1) > 1e-3).all()


def test_where_all_classes_are_equally_frequent_margins_change_nothing():
    balanced = [[3, 3, 3, 3], [2, 2, 2, 2]]
    torch.testing.assert_close(federate(fedlc, balanced)[0], federate(plain, balanced)[0])


def test_with_one_class_fedlc_learns_nothing_as_its_notes_say():
    moved, _ = federate(fedlc, [[0, 6, 0, 0], [0, 0, 6, 0]])
    assert not any(tensor.any() for tensor in moved.values())


def test_labels_at_every_place_of_an_example_are_counted():
    text = np.random.default_rng(0).integers(0, 4, (9, 6), dtype=np.uint8)
    speakers = np.zeros(9, np.int64)
    data = TextData(text, text[:2], tuple("abcd"), speakers, ("one",))
    moved, lines = federate(fedlc, [[9, 0, 0, 0]], data, GPT((5,), 4, 1, 2, 8))
    assert lines[-1]["clients_ok"] == 1
    assert all(tensor.isfinite().all() for tensor in moved.values())


@pytest.mark.parametrize("name", ["fedlc", "fedrs"])
def test_a_task_without_classes_is_refused_in_one_sentence(name, tmp_path):
    rows = [f"{x},{2 * x}" for x in range(60)]
    (tmp_path / "table.csv").write_text("\n".join(["x,y", *rows]))
    config = pisa_fl.compose(
        *("task=tabular_regression", f"data.path={tmp_path / 'table.csv'}", "data.target=y"),
        *("clients=2", "partition=iid", f"strategy={name}", "model.hidden=[3]"),
    )
    kind = {"fedlc": "FedLcClient", "fedrs": "FedRsClient"}[name]
    with pytest.raises(
        ConfigurationError, match=f"^{kind} needs targets that are classes, and Regression has"
    ):
        pisa_fl.prepare(config)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda layout: FedLcClient(layout, -0.1, **LOCAL), "tau must not be negative"),
        (lambda layout: FedRsClient(layout, 1.1, **LOCAL), "restriction must be from 0 to 1"),
        (
            lambda layout: FedRsClient(layout, 0.5, **LOCAL, optimizer=ADAMW),
            "optimizer must be sgd or sam: FedRS",
        ),
    ],
)
def test_impossible_margins_and_restrictions_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make(Layout({"weight": (4, 6)}))
