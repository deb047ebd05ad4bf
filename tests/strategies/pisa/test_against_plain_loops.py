"""Whole runs of the framework against `plain_loops`, on real images."""

import pytest
import torch
from flwr.app import ConfigRecord
from plain_loops import (
    SIZES,
    MomentRule,
    NewtonSchulzRule,
    Rule,
    SpectralRule,
    admm,
    assert_moved_alike,
    everyone,
    fedavg,
    half,
    kronecker_pisa,
    make_problem,
    sgd,
)
from quadratics import duals_of

from pisa_fl import compose, prepare

# every number that a preset might tune is given, to both sides
BY_HAND = ["strategy.sigma=2.0", "strategy.rho=5.0"]
HAND = {"sigma": 2.0, "rho": 5.0}
BY_LR = ["strategy.lr=0.004", "strategy.momentum=0.9", "strategy.sigma=null", "strategy.rho=null"]
LR = {"lr": 0.004, "momentum": 0.9}
UNALIGNED = [*BY_HAND, "strategy.align_every=0"]


def sisa(*more, beta=0.9, of="gradient", average="vector", floor=0.0, by=BY_LR, strategy="sisa"):
    """Overrides of a strategy with second moments."""
    at = "strategy.preconditioner"
    moments = [at] if strategy == "sisa" else [f"{at}.others"]
    moments += [at] if strategy == "spectral" else []
    keys = [f"{where}.{key}" for where in moments for key in (f"beta={beta}", f"moment_of={of}")]
    keys += [
        f"{moments[0]}.average={average}",
        f"{moments[0]}.eps=1e-8",
        f"{moments[0]}.floor={floor}",
        f"{moments[0]}.bias_correction=exact",
    ]
    group = [] if strategy == "sisa" else [f"strategy/preconditioner={strategy}"]
    return [
        f"strategy={'sisa' if strategy == 'sisa' else 'nsisa'}",
        "strategy.bound=null",
        *group,
        *by,
        *keys,
        *more,
    ]


SHARED = {**LR, "beta": 0.9, "of": "gradient", "shared": True}
OWN = {**HAND, "beta": 0.9, "of": "gradient", "shared": False}


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return make_problem(tmp_path_factory.mktemp("problem"))


PISA = ["strategy=sisa", "strategy/preconditioner=identity"]
ADMM = {
    "pisa by hand": ([*PISA, *BY_HAND], Rule, HAND, {}),
    "pisa automatic": ([*PISA, *BY_LR], Rule, LR, {}),
    "pisa lambda": ([*PISA, *BY_HAND, "strategy.lambda=0.3"], Rule, HAND, {"lambda_": 0.3}),
    "pisa uniform": ([*PISA, *BY_HAND, "strategy.alpha=uniform"], Rule, HAND, {"uniform": True}),
    "pisa batch": (
        [*PISA, *BY_HAND, "strategy.gradient=batch", "strategy.local_steps=3"],
        *(Rule, HAND, {"gradient": "batch", "steps": 3}),
    ),
    "pisa sum": ([*PISA, *BY_HAND, "strategy.gradient=sum"], Rule, HAND, {"gradient": "sum"}),
    "pisa half": (
        [*PISA, *BY_LR, "participation=0.5"],
        *(Rule, {**LR, "participation": 0.5}, {"drawn": half}),
    ),
    "pisa growth": (
        [*PISA, *BY_LR, "strategy.gamma=0.8", "strategy.grow_every=2"],
        *(Rule, {**LR, "gamma": 0.8, "every": 2}, {}),
    ),
    "sisa": (sisa(), MomentRule, SHARED, {}),
    "sisa of the residual": (sisa(of="residual"), MomentRule, {**SHARED, "of": "residual"}, {}),
    "sisa squares": (sisa(average="square"), MomentRule, {**SHARED, "squares": True}, {}),
    "sisa beta": (sisa(beta=0.5), MomentRule, {**SHARED, "beta": 0.5}, {}),
    "sisa aligned seldom": (sisa("strategy.align_every=3"), MomentRule, SHARED, {"every": 3}),
    "sisa half lambda": (
        sisa("participation=0.5", "strategy.lambda=0.1"),
        *(MomentRule, {**SHARED, "participation": 0.5}, {"drawn": half, "lambda_": 0.1}),
    ),
    "sisa local steps": (
        sisa("strategy.local_steps=3", average="square"),
        *(MomentRule, {**SHARED, "squares": True}, {"steps": 3}),
    ),
    "sisa by hand": (sisa(by=BY_HAND), MomentRule, {**SHARED, "lr": None, "momentum": None, **HAND}, {}),
    "sisa unaligned": (
        sisa(
            "strategy.local_steps=3", "strategy.sigma=8.0", "strategy.rho=20.0", of="residual", by=UNALIGNED
        ),
        *(MomentRule, {**OWN, "sigma": 8.0, "rho": 20.0, "of": "residual"}, {"steps": 3}),
    ),
    "nsisa": (sisa(strategy="spectral"), SpectralRule, SHARED, {}),
    "nsisa unaligned": (
        sisa(strategy="spectral", of="residual", by=UNALIGNED),
        *(SpectralRule, {**OWN, "of": "residual"}, {}),
    ),
    "nsisa of its authors": (
        sisa("strategy.preconditioner.mu=0.95", of="residual", strategy="newton_schulz", by=UNALIGNED),
        *(NewtonSchulzRule, {**OWN, "of": "residual"}, {}),
    ),
}


@pytest.mark.parametrize("variant", ADMM)
def test_admm_follows_the_plain_loop(problem, variant):
    overrides, rule, settings, options = ADMM[variant]
    rounds = 8
    expected, duals = admm(problem, rounds, rule(list(problem.start), **settings), **options)
    federation, _ = problem.run(rounds, *overrides)
    # what single precision rounds is magnified: the last layer's Gram matrix is singular, and the root of a rounded
    # zero is 3e-4 of the largest root; five steps of the quintic multiply small singular values by 3.4445^5 = 485
    share = 1e-3 if rule in (SpectralRule, NewtonSchulzRule) else 1e-4
    assert_moved_alike(federation, expected, problem.start, share)
    ledger = federation.strategy.ledger
    for client, dual in duals.items():
        flat = torch.cat([t.flatten() for t in dual.values()])
        assert (ledger.dual(client).double() - flat).norm() <= 3 * share * flat.norm()


@pytest.mark.parametrize(
    ("rounds", "gamma"),
    # counted from zero, round 10 is the 11th: its growth of sigma enters the consensus that ends it
    [(22, 0.997), (10, 0.5), (11, 0.5), (12, 0.5)],
)
def test_the_authors_federated_setting(problem, rounds, gamma):
    rule = MomentRule(
        *(list(problem.start),),
        **{"sigma": 1e3, "rho": 1e2, "gamma": gamma, "every": 10},
        **{"beta": 0.999, "shared": False, "first_step": True},
    )
    expected, _ = admm(problem, rounds, rule, lambda_=5e-3, gradient="sum")
    own_gamma = [] if gamma == 0.997 else [f"strategy.gamma={gamma}"]
    federation, _ = problem.run(rounds, "strategy=sisa_official", *own_gamma)
    assert_moved_alike(federation, expected, problem.start)


@pytest.mark.parametrize(("preset", "rule"), [("sisa", MomentRule), ("nsisa", SpectralRule)])
def test_presets_follow_the_plain_loop_with_their_own_numbers(problem, preset, rule):
    numbers = compose(f"strategy={preset}").strategy
    q = numbers.preconditioner
    settings = {
        "lr": numbers.lr,
        "momentum": numbers.momentum,
        "shared": True,
        "beta": q.beta,
        "of": q.moment_of,
        "floor": q.floor if preset == "sisa" else q.others.floor,
    }
    expected, _ = admm(problem, 8, rule(list(problem.start), **settings))
    federation, _ = problem.run(8, f"strategy={preset}")
    assert_moved_alike(federation, expected, problem.start, 1e-3 if rule is SpectralRule else 1e-4)


@pytest.mark.parametrize(("drawn", "share"), [(everyone, 1.0), (half, 0.5)])
@pytest.mark.parametrize("lr", [0.01, 0.2])
def test_pisa_follows_the_plain_loop_with_its_own_numbers(problem, drawn, share, lr):
    rounds, preset = 6, compose("strategy=pisa").strategy
    numbers = {key: preset[key] for key in ("momentum", "warmup", "final", "bound", "lambda", "friction")} | {
        "lr": lr,
        "difference": share**0.5,
    }
    expected, duals = kronecker_pisa(problem, rounds, numbers, preset.preconditioner, drawn=drawn, horizon=9)
    overrides = ("strategy=pisa", f"participation={share}", f"strategy.lr={lr}", "rounds=9")
    federation, metrics = problem.run(rounds, *overrides)
    # single precision of the gradients decides over small eigenvalues
    assert_moved_alike(federation, expected, problem.start, 2e-3)
    for client, dual in duals.items():
        flat = torch.cat([t.flatten() for t in dual.values()])
        assert (federation.strategy.ledger.dual(client).double() - flat).norm() <= 5e-3 * flat.norm()
    sent = 4 * sum(t.numel() for t in problem.start.values()) + 128
    answers = sum(len(drawn(number)) for number in range(1, rounds + 1))
    assert metrics[-1]["bytes_up"] == metrics[-1]["bytes_down"] == answers * sent


def test_whatever_the_skew_the_path_is_the_same():
    small = (
        "clients=10",
        "rounds=50",
        "model=logistic",
        "progress=false",
        "engine.threads=1",
        "strategy=pisa",
    )
    losses = {}
    for classes in (1, 10):
        federation = prepare(compose(*small, f"partition.classes_per_client={classes}"))
        assert (
            sorted(len(set(federation.data.train_labels[rows])) for rows in federation.partition)
            == [classes] * 10
        )
        losses[classes] = [line["test_loss"] for line in federation.rounds(20)]
    # but for the order in which clients are summed: a rounding that each round magnifies, other on every processor
    assert losses[1][:11] == pytest.approx(losses[10][:11], rel=5e-5)
    assert losses[1] == pytest.approx(losses[10], rel=2e-3)
    assert losses[1][-1] < 0.4 * losses[1][0]


def test_the_first_round_of_an_automatic_penalty_only_measures(problem):
    federation, _ = problem.run(1, "strategy=sisa")
    for name, weights in federation.model.module.named_parameters():
        torch.testing.assert_close(weights.double(), problem.start[name], rtol=1e-6, atol=1e-9)
    assert not duals_of(federation.strategy.ledger).any()
    assert federation.strategy.ledger.clients == everyone(1)


def test_residuals_are_those_of_the_plain_loop(problem):
    rounds, rule = 4, lambda: Rule(list(problem.start), **HAND)
    w, duals = admm(problem, rounds, rule(), lambda_=0.3)
    before, earlier = admm(problem, rounds - 1, rule(), lambda_=0.3)
    alpha = {i: size / sum(SIZES) for i, size in enumerate(SIZES)}
    primal = dual = 0.0
    for name in w:
        # the dual step, solved for w_i
        local = {i: before[name] + (duals[i][name] - earlier[i][name]) / HAND["sigma"] for i in alpha}
        primal += float(sum(alpha[i] * (local[i] - w[name]).square().sum() for i in alpha))
        dual += float((sum(alpha[i] * duals[i][name] for i in alpha) - 0.3 * w[name]).square().sum())
    _, metrics = problem.run(rounds, *PISA, *BY_HAND, "strategy.lambda=0.3")
    assert metrics[-1]["primal_residual"] == pytest.approx(primal**0.5, rel=1e-4)
    assert metrics[-1]["dual_residual"] == pytest.approx(dual**0.5, rel=1e-4)


LOCAL = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "epochs": 3}
EPOCHS = ["strategy.local_epochs=3", "strategy.weight_decay=0.01"]


def test_fedavg_follows_the_plain_loop(problem):
    federation, _ = problem.run(3, "strategy=fedavg", *EPOCHS)
    assert_moved_alike(federation, fedavg(problem, 3, **LOCAL), problem.start)


def test_fedavg_with_half_of_the_clients_follows_the_plain_loop(problem):
    federation, _ = problem.run(3, "strategy=fedavg", "participation=0.5", *EPOCHS)
    assert_moved_alike(federation, fedavg(problem, 3, drawn=half, **LOCAL), problem.start)


def test_fedprox_follows_the_plain_loop(problem):
    federation, _ = problem.run(3, "strategy=fedprox", "strategy.mu=1.0", *EPOCHS)
    assert_moved_alike(federation, fedavg(problem, 3, mu=1.0, **LOCAL), problem.start)


def test_fedavgm_follows_the_plain_loop(problem):
    w, momentum = problem.start, {name: torch.zeros_like(t) for name, t in problem.start.items()}
    for number in (1, 2, 3):
        answers = [sgd(problem, w, i, number, **LOCAL) for i in everyone(number)]
        for name in w:
            average = sum(n / sum(SIZES) * a[name] for n, a in zip(SIZES, answers, strict=True))
            momentum[name] = 0.7 * momentum[name] + (w[name] - average)
        w = {name: w[name] - 0.5 * momentum[name] for name in w}
    federation, _ = problem.run(
        3, "strategy=fedavgm", "strategy.server_momentum=0.7", "strategy.server_lr=0.5", *EPOCHS
    )
    assert_moved_alike(federation, w, problem.start)


def test_local_sgd_is_pytorchs(problem):
    client, number = 2, 1
    model = problem.model
    model.load_state_dict(problem.start)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    for rows in problem.batches(client, number, epochs=3):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(problem.images[rows]), problem.labels[rows]).backward()
        optimiser.step()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    federation, _ = problem.run(0, "strategy=fedavg", *EPOCHS)
    federation.gateway.begin(number)
    [message] = [
        m
        for m in federation.strategy.configure_train(
            number, federation.arrays, ConfigRecord(), federation.gateway
        )
        if m.metadata.dst_node_id == client
    ]
    [reply] = federation.gateway.send_and_receive([message])
    federation.arrays = reply.content.array_records["arrays"]
    federation.load_weights()
    assert_moved_alike(federation, expected, problem.start)
