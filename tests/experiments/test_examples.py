"""The README's worked examples do what it says."""

from pathlib import Path

import pytest

from experiments import from_objects
from pisa_fl import compose, prepare

OWN = Path(__file__).resolve().parents[2] / "experiments" / "bring_your_own"


def test_a_federation_from_objects_learns():
    accuracies = from_objects.main(rounds=6)
    assert len(accuracies) == 7
    assert accuracies[0] < 0.2
    assert accuracies[-1] > 0.5


@pytest.fixture
def federation():
    own = ["model=two_layer", "strategy=fedavg_clipped", "data=stripes", "partition=iid", "rounds=10"]
    return prepare(compose(*own, "device=cpu", "engine.threads=1", "engine.workers=0", config_dir=OWN))


def test_a_model_data_and_strategy_of_ones_own_learn(federation):
    metrics = list(federation.rounds(10))
    assert metrics[-1]["test_loss"] < metrics[0]["test_loss"] - 0.1
    assert federation.data.classes[0] == "row 3"


def test_the_clipped_step_is_bounded(federation):
    list(federation.rounds(1))
    half = federation.grid.host._half
    before = federation.model.weights.clone()
    half.bound = 1e-3
    list(federation.rounds(2))
    federation.load_weights()
    # the median of ten bounded steps is bounded element by element
    assert 0 < float((federation.model.weights - before).abs().max()) <= half.lr * half.bound * 1.001
