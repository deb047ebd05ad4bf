"""Numbers that algorithms are given, and rounds that must not be kept."""

import math
from types import SimpleNamespace

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedProx, MultiKrum
from quadratics import LAYOUT, PRECONDITIONERS, pisa_bench

from strategies import LocalSgd, Penalty, Pisa, PisaClient, PisaLocalClient
from strategies.base import checks
from strategies.base.messages import RoundError, record
from strategies.preconditioners import NewtonSchulz, SecondMoment, Spectral

PENALTY = {"lr": 0.1, "momentum": 0.9, "sigma": 6.0, "rho": 1.0, "gamma": 1.0, "grow_every": 10}
MOMENT = {"beta": 0.9, "eps": 1e-8, "floor": 0.0, "moment_of": "gradient", "average": "vector"}
MOMENT |= {"bias_correction": "exact"}
HALVES = {"preconditioner": PRECONDITIONERS["identity"], "penalty": Penalty(**PENALTY), "align_every": 1}
ADAM = {"eta": 0.1, "eta_l": 0.1, "tau": 1e-3, "beta_1": 0.9, "beta_2": 0.99}


def second_moment(**numbers):
    return SecondMoment(LAYOUT, **MOMENT | numbers)


MAKE = {
    "penalty": (lambda **n: Penalty(**PENALTY | n), [*PENALTY, "participation"]),
    "local sgd": (
        lambda **n: LocalSgd(
            LAYOUT, **{"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "local_epochs": 1} | n
        ),
        ["lr", "momentum", "weight_decay", "local_epochs"],
    ),
    "second moment": (second_moment, ["beta", "eps", "floor"]),
    "spectral": (
        lambda **n: Spectral(LAYOUT, **{"moment_of": "gradient", "others": PRECONDITIONERS["squares"]} | n),
        ["beta"],
    ),
    "newton_schulz": (
        lambda **n: NewtonSchulz(
            LAYOUT, **{"mu": 0.9, "steps": 5, "eps": 1e-8, "others": PRECONDITIONERS["squares"]} | n
        ),
        ["mu", "steps", "eps"],
    ),
    "pisa": (
        lambda **n: Pisa(LAYOUT, **HALVES | {"lambda_": 0.0, "alpha": "examples"} | n),
        ["lambda_", "align_every"],
    ),
    "client": (
        lambda **n: PisaClient(LAYOUT, **HALVES | {"local_steps": 1, "gradient": "mean"} | n),
        ["local_steps", "align_every"],
    ),
    "local epochs": (
        lambda sigma=6.0, **n: PisaLocalClient(
            *(LAYOUT, Penalty(**PENALTY | {"sigma": sigma})),
            **{"momentum": 0.0, "weight_decay": 0.0, "local_epochs": 1} | n,
        ),
        ["sigma", "momentum", "weight_decay", "local_epochs"],
    ),
    "adaptive": (lambda **n: checks.flowers_own(FedAdam(**ADAM | n)), list(ADAM)),
    "averaging with momentum": (
        lambda **n: checks.flowers_own(FedAvgM(**{"server_learning_rate": 1.0, "server_momentum": 0.9} | n)),
        ["server_learning_rate", "server_momentum"],
    ),
    "proximal": (lambda **n: checks.flowers_own(FedProx(**{"proximal_mu": 0.1} | n)), ["proximal_mu"]),
    "selecting": (
        lambda **n: checks.flowers_own(MultiKrum(**{"num_malicious_nodes": 1, "num_nodes_to_select": 2} | n)),
        ["num_malicious_nodes", "num_nodes_to_select"],
    ),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 1e13, True, "1"])
@pytest.mark.parametrize(("make", "key"), [(make, key) for make, keys in MAKE.values() for key in keys])
def test_impossible_numbers_are_refused_in_one_sentence(make, key, value):
    with pytest.raises(ValueError, match=rf"^(penalty\.)?{key} must (not )?be ") as refused:
        make(**{key: value})
    assert str(value) in str(refused.value)


@pytest.mark.parametrize("make", [make for make, _ in MAKE.values()])
def test_the_numbers_used_here_are_possible(make):
    make(**({"beta": 0.9} if make is MAKE["spectral"][0] else {}))


def test_a_strategy_of_the_users_own_is_left_alone():
    checks.flowers_own(SimpleNamespace(eta=-1.0))


@pytest.mark.parametrize("gamma", [1e-300, 1e-3, 0.5, 0.997, 1.0])
def test_growth_of_sigma_never_overflows(gamma):
    penalty = Penalty(**PENALTY | {"gamma": gamma, "grow_every": 1})
    values = [float(penalty.sigma_at(n, None)) for n in (1, 2, 3, 50, 10**9)]
    assert values == sorted(values)
    assert values[:3] == pytest.approx([6.0, 6.0, min(6.0 / gamma, 6e12)])
    assert math.isfinite(values[-1])


def test_a_round_whose_duals_no_message_could_hold_is_undone():
    bench = pisa_bench("second moment", sigma=1e7, rho=1.0)
    server = bench.strategy

    def answers(number, weights, clients):
        config = ConfigRecord()
        asked = list(
            server.configure_train(number, record({"weights": torch.zeros(LAYOUT.size)}), config, grid)
        )
        content = {"weights": torch.full((LAYOUT.size,), weights), "observed": torch.ones(LAYOUT.size)}
        numbers = {"server-round": number, "num-examples": 3, "train-loss": 1.0, "examples-differentiated": 3}
        return [
            Message(RecordDict({"arrays": record(content), "metrics": MetricRecord(numbers)}), reply_to=m)
            for m in asked
            if m.metadata.dst_node_id in clients
        ]

    grid = SimpleNamespace(get_node_ids=lambda: [0, 1, 2])
    server.aggregate_train(1, answers(1, 0.5, {0, 1}))
    before = {name: value.clone() for name, value in server.state_dict().items()}
    with pytest.raises(RoundError):
        server.aggregate_train(2, answers(2, 4e5, {1, 2}))
    after = server.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert server.ledger.accepted_round(2) == 0
    server.aggregate_train(2, answers(2, 0.25, {1, 2}))
    assert server.ledger.clients == [0, 1, 2]
