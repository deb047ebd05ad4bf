"""What is told of a run's privacy, against dp-accounting asked by itself, and against attacks that are tried."""

import math

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from experiments.study import Study
from pisa_fl import ConfigurationError, compose, prepare
from pisa_fl.privacy import Account, Local
from pisa_fl.privacy import accounting as module
from pisa_fl.privacy.accounting import Release
from strategies import Layout, LocalSgd

DELTA = 1e-5
QUICK = ("model=logistic", "data.validation=0.95", "clients=5", "engine.workers=0", "engine.threads=1")
SMALL = ("strategy=fedavg", "strategy.local_epochs=2", "privacy.noise=1.3", f"privacy.delta={DELTA}")


def independent(noise, rate, times, relation=dp.NeighboringRelation.REPLACE_SPECIAL):
    """The library's own accountant, at its own precision."""
    gaussian = dp.GaussianDpEvent(noise)
    event = gaussian if rate == 1 else dp.PoissonSampledDpEvent(rate, gaussian)
    accountant = PLDAccountant(relation)
    accountant.compose(event, times)
    return accountant.get_epsilon(DELTA), accountant.get_delta(0.0)


@pytest.mark.parametrize(
    ("overrides", "rate", "each"),
    [
        (["privacy=central"], 1, 1),
        (["privacy=central", "participation=0.4"], 0.4, 1),
        (["privacy=local", "participation=0.4"], 1, 1),
        (["privacy=examples", "privacy.rate=0.3"], 0.3, 2 * 4),
    ],
)
def test_epsilon_of_a_run_is_the_librarys(overrides, rate, each):
    federation = prepare(compose(*QUICK, *SMALL, *overrides, "rounds=3"))
    lines = list(federation.rounds(3))
    assert [lines[0][key] for key in ("epsilon", "advantage")] == [0, 0]
    # of the client that was drawn most, where each pays for itself
    most = max(federation.account.asked.values()) if "privacy=local" in overrides else 3
    epsilon, advantage = independent(1.3, rate, each * most)
    assert lines[3]["epsilon"] == pytest.approx(epsilon, rel=2e-3)
    assert lines[3]["advantage"] == pytest.approx(advantage, rel=2e-3)
    assert lines[1]["epsilon"] < lines[3]["epsilon"]
    assert all(math.isnan(line["train_loss"]) for line in lines)


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_any_other_in_its_place_costs_more(rate):
    epsilon, advantage = independent(4.0, rate, 20, dp.NeighboringRelation.REPLACE_ONE)
    spent = Release(4.0, rate, "replace_one").spent(20, DELTA)
    assert (spent.epsilon, spent.advantage) == (
        pytest.approx(epsilon, rel=2e-3),
        pytest.approx(advantage, 2e-3),
    )
    assert spent.epsilon > 1.5 * Release(4.0, rate, "zero_out").spent(20, DELTA).epsilon


@pytest.mark.parametrize("adjacency", ["zero_out", "replace_one"])
def test_the_least_advantage_is_that_of_an_attack(adjacency):
    """Who sees ten releases, and says that one was there if some release is beyond a threshold."""
    noise, rate, times, runs = 0.5, 0.1, 10, 200_000
    draw = np.random.default_rng(0)

    def largest(mean):
        there = draw.random((runs, times)) < rate
        return (mean * there + noise * draw.standard_normal((runs, times))).max(axis=1)

    otherwise = largest(0 if adjacency == "zero_out" else -1)
    with_it = largest(1)
    gains = [(with_it > h).mean() - (otherwise > h).mean() for h in np.linspace(0, 3, 61)]
    spent = Release(noise, rate, adjacency).spent(times, DELTA)
    assert spent.at_least == pytest.approx(max(gains), abs=0.005)
    assert spent.at_least <= spent.advantage


def test_the_limit_of_dp_sgd_holds_below_its_floor():
    """The published bound is for one pass in shuffled batches; chance alone leaves 1 - 1/e of it, nearly."""
    for count in (100, 10_000):
        release = Release(1 / math.sqrt(2 * math.log(count)), 1 / count, "zero_out")
        assert release.floor == pytest.approx(release.noise)
        published = (1 - 1 / math.sqrt(4 * math.pi * math.log(count))) / 2
        assert published * (1 - 1 / math.e) < release.at_least(count) < published


def test_without_noise_nothing_is_promised():
    spent = Release(0.0, 0.1, "zero_out").spent(1, DELTA)
    assert (spent.epsilon, spent.advantage, spent.at_least) == (math.inf, 1, 1)


def test_lost_replies_take_away_what_sampling_gave():
    options = (*QUICK, *SMALL, "privacy=central", "participation=0.5", "engine.lost=0.4", "clients=10")
    federation = prepare(compose(*options, "rounds=3"))
    lines = list(federation.rounds(3))
    assert any(line["clients_failed"] for line in lines)
    assert lines[3]["epsilon"] == pytest.approx(independent(1.3, 1, 3)[0], rel=1e-3)
    told = federation.account.summary()
    assert told["sampling"] == "none"
    assert "whoever chose them" in told["note"]


def test_a_round_that_the_system_draws_again_counts_again():
    half = LocalSgd(Layout({"w": (3,)}), 0.1, 0.0, 0.0, 1)
    counted = []
    for kind in ("seed", "system"):
        before, after = (Account(Local(1.0, 1.0, DELTA, "zero_out", kind), half, 1.0, 2) for _ in range(2))
        before.ask([0, 1])
        before.ask([1])
        after.restore(before.state())
        counted.append(after.times)
    assert counted == [2, 3]


def test_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'pisa-fl\[privacy\]'"):
        module._library()


def test_settings_of_the_study_are_called_by_their_epsilon():
    study = Study.read("privacy")
    for name, overrides in study.settings.items():
        if name != "none":
            federation = prepare(compose(*study.common, *overrides, "engine.workers=0"))
            federation.account.rounds = federation.account.asked[0] = 50
            assert federation.account.spent.epsilon == pytest.approx(float(name.split("-")[1]), rel=0.01)
