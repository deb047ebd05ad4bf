"""A Q that is made of what goes on in the layers: federations with K-FAC, however they are computed and interrupted."""

from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from pisa_fl.data import ImageData
from pisa_fl.engines.local import local_engine
from pisa_fl.federation import Federation, RunError
from pisa_fl.tasks import Classification
from strategies import Layout, Penalty, Pisa, PisaClient
from strategies.preconditioners import Kfac
from strategies.preconditioners.base import PROBED

SIZES = (9, 14, 5, 12, 7)


def federate(
    wire="auto", align_every=1, lag=0, workers=0, stack=1, participation=1.0, task=None, schedule="adaptive"
):
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 3, sum(SIZES))
    images = draw.integers(0, 120, (sum(SIZES), 1, 5, 5)) + 40 * labels[:, None, None, None]
    images = images.astype(np.uint8)
    data = ImageData(images, labels, images[:20], labels[:20], ("a", "b", "c"), (0.4,), (0.2,))
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(18), nn.Linear(18, 3))
    q = partial(
        *(Kfac,),
        **{"beta": 0.9, "damping": 0.01, "schedule": schedule, "final": 0.1, "horizon": 9, "kl_clip": 1.0},
        **{"gain": 10.0, "fisher": "sampled", "form": "eigen"},
        **{"max_side": 100, "refresh": 2, "eps": 1e-8},
    )
    penalty = Penalty(0.05, 0.5, None, None, 1.0, 10, consensus="fresh")
    layout, both = Layout.of_parameters(model), {"lag": lag, "wire": wire, "friction": 0.1}
    return Federation(
        *(data, np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1]), model),
        Pisa(layout, q, penalty, 1e-3, align_every, "examples", consensus="fresh", **both),
        PisaClient(layout, q, penalty, align_every, 1, "mean", **both),
        partial(local_engine, workers=workers, threads=1, stack=stack),
        **{"batch_size": 4, "participation": participation, **({"task": task} if task else {})},
    )


def outcome(federation, rounds=4):
    with closing(federation.grid):
        lines = [{k: v for k, v in line.items() if k != "seconds"} for line in federation.rounds(rounds)]
    federation.load_weights()
    return lines, federation.model.weights.clone()


def test_however_clients_are_computed_it_is_the_same_path():
    alone = outcome(federate())
    assert alone[0][-1]["train_loss"] < 0.7 * alone[0][1]["train_loss"]
    lines, weights = outcome(federate(workers=2))
    assert lines == alone[0]
    assert torch.equal(weights, alone[1])
    _, weights = outcome(federate(stack=len(SIZES)))
    torch.testing.assert_close(weights, alone[1], rtol=1e-3, atol=1e-4)
    # the wire on which clients take the steps: each round asks first for the statistic
    lines, weights = outcome(federate(wire="primal"))
    assert torch.equal(weights, alone[1])


@pytest.mark.parametrize("lag", [0, 1])
def test_factors_travel_in_rounds_that_measure(lag):
    federation = federate(align_every=3, lag=lag, participation=0.6)
    probed = federation.strategy.preconditioner.statistic_fields()[PROBED].size
    gradient = 4 * federation.model.layout.size + 128
    lines, _ = outcome(federation, 5)
    up = np.diff([line["bytes_up"] for line in lines])
    told = (4 * probed + 128) + (4 + 128)  # the factors, and the loss that damping adapts by
    assert list(up) == [3 * (gradient + told * due) for due in (1, 0, 0, 1, 0)]
    passes = np.diff([line["passes"] for line in lines])
    assert (passes[[0, 3]] > 0.8).all()  # targets are drawn for a second backward pass


def test_it_goes_on_from_a_checkpoint():
    first = federate(participation=0.6)
    saved = {}
    with closing(first.grid):
        for line in first.rounds(4):
            if line["round"] == 2:
                saved = {name: value.clone() for name, value in first.strategy.state_dict().items()}
    second = federate(participation=0.6)
    with closing(second.grid):
        for line in second.rounds(4):
            if line["round"] == 2:
                second.strategy._shared = second.strategy.preconditioner.nothing()
                second.strategy.load_state_dict(saved)
    for federation in (first, second):
        federation.load_weights()
    assert torch.equal(first.model.weights, second.model.weights)
    assert saved["shared.grams"].dtype == torch.float64
    assert saved["shared.step"].any()


class Undefined(Classification):
    """A task that knows nothing of distributions."""

    def drawn(self, output, batch):
        return super(Classification, self).drawn(output, batch)


def test_a_task_without_a_distribution_is_told_so(caplog):
    federation = federate(task=Undefined())
    with closing(federation.grid), pytest.raises(RunError):
        list(federation.rounds(1))
    assert "Undefined says of no distribution that targets could be drawn from" in caplog.text
