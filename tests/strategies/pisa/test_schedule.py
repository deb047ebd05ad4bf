"""The automatic penalty's schedule."""

import pytest
import torch

from pisa_fl import compose, prepare
from strategies import Penalty

BY_LR = {"lr": 0.02, "momentum": 0.9, "sigma": None, "rho": None, "gamma": 1.0, "grow_every": 10}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.46, 0.63, 0.76, 0.68, 0.6, 0.52, 0.44, 0.36, 0.28, 0.2, 0.2, 0.2]),
    ],
)
def test_lr_grows_and_falls(schedule, expected):
    penalty = Penalty(**BY_LR, schedule=schedule, warmup=4, horizon=11, final=0.2)
    found = [penalty.lr_at(number) / 0.02 for number in range(1, 14)]
    assert found == pytest.approx(expected)


def test_a_cosine_is_pytorchs_and_stays_at_its_end():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.02)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.02 * 0.05)
    penalty = Penalty(**BY_LR, schedule="cosine", warmup=0, horizon=11, final=0.05)
    for number in range(1, 12):
        assert penalty.lr_at(number) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert penalty.lr_at(500) == penalty.lr_at(11) == pytest.approx(0.001)


def test_sigma_and_rho_follow_lr():
    penalty = Penalty(**BY_LR, schedule="cosine", warmup=3, horizon=20)
    scale = torch.tensor([1.0, 3.0])
    for number in (1, 2, 7, 30):
        lr = penalty.lr_at(number)
        torch.testing.assert_close(penalty.sigma_at(number, scale), scale / lr)
        assert penalty.rho_at(number) == pytest.approx(9 / lr)
    by_hand = Penalty(**BY_LR | {"sigma": 2.0, "rho": 5.0}, schedule="cosine", warmup=3, horizon=20)
    assert (float(by_hand.sigma_at(7, None)), by_hand.rho_at(7)) == (2.0, 5.0)


@pytest.mark.parametrize(("consensus", "share"), [("all", 0.1), ("fresh", 1.0)])
def test_only_rows_of_absent_clients_hold_the_consensus_back(consensus, share):
    penalty = Penalty(**BY_LR, participation=0.1, consensus=consensus)
    assert float(penalty.sigma_at(1, torch.ones(()))) == pytest.approx(share / 0.02)
    assert penalty.rho_at(1) == pytest.approx(share * 9 / 0.02)


@pytest.mark.parametrize(
    ("key", "value"),
    [("schedule", "step"), ("consensus", "some"), ("warmup", -1), ("horizon", 1.5), ("final", 0.0)],
)
def test_impossible_numbers(key, value):
    with pytest.raises(ValueError, match=rf"^{key} must be"):
        Penalty(**BY_LR, **{key: value})


def test_the_horizon_belongs_to_what_a_run_is():
    small = ("clients=5", "model=logistic", "engine.workers=0", "rounds=3")
    ids = {
        name: prepare(compose(*small, *more)).identity
        for name, more in {
            "three": (),
            "four": ("rounds=4",),
            "planned for four": ("strategy.horizon=4",),
            "constant": ("strategy=sisa",),
            "constant, four": ("strategy=sisa", "rounds=4"),
        }.items()
    }
    assert ids["three"] != ids["four"] == ids["planned for four"]
    assert ids["constant"] == ids["constant, four"]
