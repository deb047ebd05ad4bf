"""The automatic penalty's schedule, and the bound on a round's step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pisa_fl import compose, prepare
from strategies import Layout, Penalty
from strategies.pisa.bound import SMALLEST, bounded

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


LAYOUT = Layout({"large": (3, 4), "zero": (5,), "small": (2, 2)})


@given(
    seed=st.integers(0, 1000),
    bound=st.sampled_from([1e-3, 0.1, 0.25, 2.0]),
    sizes=st.lists(st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 1e6]), min_size=3, max_size=3),
)
def test_no_tensor_moves_by_more_than_its_share_and_all_keep_their_direction(seed, bound, sizes):
    draw = torch.Generator().manual_seed(seed)
    before = torch.randn(LAYOUT.size, generator=draw)
    before[LAYOUT.spans["zero"]] = 0.0
    wanted = torch.randn(LAYOUT.size, generator=draw) * LAYOUT.expand(torch.tensor(sizes))
    found = bounded(before + wanted, before, bound, LAYOUT)
    for name, span in LAYOUT.spans.items():
        size = max(float(before[span].norm()), SMALLEST * math.sqrt(len(before[span])))
        asked, step = (before + wanted - before)[span], (found - before)[span]
        if asked.norm() <= bound * size:
            torch.testing.assert_close(step, asked, rtol=1e-4, atol=1e-6)
        else:
            assert float(step.norm()) == pytest.approx(bound * size, rel=1e-3, abs=1e-6), name
            direction = torch.nn.functional.cosine_similarity(step, asked, dim=0)
            assert float(direction) == pytest.approx(1.0, abs=1e-3)
