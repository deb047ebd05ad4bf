"""Convergence on strongly convex quadratics, whose optimum is known in closed form."""

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from quadratics import (
    ALPHA,
    EXAMPLES,
    LAYOUT,
    PRECONDITIONERS,
    Bench,
    Quadratics,
    duals_of,
    pisa_bench,
    solving,
)

from strategies import LocalSgd

EQUAL = torch.full((len(EXAMPLES),), 1 / len(EXAMPLES), dtype=torch.float64)
CURVATURE = [
    ("identity", 1),
    *((q, k) for q in ("second moment", "squares", "spectral", "kronecker") for k in (0, 1)),
]


def run(bench, problem, rounds, **options):
    with solving(problem, **options):
        for _ in range(rounds):
            bench.round()
    return bench.consensus.double()


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize(("preconditioner", "align_every"), CURVATURE)
def test_pisa_finds_the_optimum_of_different_clients(preconditioner, align_every, participation):
    problem = Quadratics.draw()
    bench = pisa_bench(preconditioner, align_every, participation=participation)
    reached, optimum = run(bench, problem, 150), problem.optimum()
    assert (reached - optimum).norm() <= 1e-5 * optimum.norm()
    slopes = problem.gradients(optimum)
    assert slopes.norm(dim=1).min() > 1  # clients pull apart, and their duals hold them
    assert (duals_of(bench.strategy.ledger).double() + slopes).norm() <= 1e-5 * slopes.norm()


@pytest.mark.parametrize(("wire", "share"), [("primal", 0.5), ("gradient", 0.5), ("gradient", 1.0)])
@pytest.mark.parametrize(
    ("friction", "preconditioner", "difference"),
    [(0.0, "kronecker", 1.0), (0.1, "kronecker", 1.0), (0.1, "kronecker", 0.4), (0.1, "squares", 1.0)],
)
def test_a_fresh_consensus_finds_the_optimum_whoever_answers(
    friction, preconditioner, wire, share, difference
):
    # the dual of an absent client is a gradient of the past, for which steps must be shorter than with everybody there
    problem, lag = Quadratics.draw(seed=4), 0 if wire == "gradient" or difference < 1 else 1
    options = {"wire": wire, "lag": lag, "participation": share, "friction": friction}
    bench = pisa_bench(preconditioner, consensus="fresh", sigma=12.0, difference=difference, **options)
    reached, optimum = run(bench, problem, 300), problem.optimum()
    assert (reached - optimum).norm() <= 1e-4 * optimum.norm()
    slopes = problem.gradients(optimum)
    held = duals_of(bench.strategy.ledger).double() + difference * slopes
    assert held.norm() <= 1e-3 * slopes.norm()


def test_with_everybody_there_both_consensuses_are_one():
    problem = Quadratics.draw()
    every, fresh = (
        run(pisa_bench("kronecker", wire="gradient", lag=0, consensus=c, sigma=None, rho=None), problem, 20)
        for c in ("all", "fresh")
    )
    assert (every - fresh).norm() <= 1e-5 * every.norm()


@pytest.mark.parametrize("preconditioner", ["second moment", "kronecker"])
@pytest.mark.parametrize(
    ("options", "lambda_", "alpha"),
    [
        ({"lambda_": 0.7}, 0.7, ALPHA),
        ({"alpha": "uniform"}, 0.0, EQUAL),
        ({"local_steps": 3}, 0.0, ALPHA),
        ({"align_every": 4}, 0.0, ALPHA),
        ({"lag": 0, "local_steps": 2}, 0.0, ALPHA),
        ({"bound": 0.3}, 0.0, ALPHA),
        ({"friction": 0.2}, 0.0, ALPHA),
        ({"friction": 0.1, "wire": "gradient", "consensus": "fresh", "lag": 0}, 0.0, ALPHA),
    ],
)
def test_pisa_finds_the_optimum_of_every_problem_it_can_be_given(preconditioner, options, lambda_, alpha):
    problem = Quadratics.draw(seed=1)
    optimum = problem.optimum(lambda_, alpha)
    reached = run(pisa_bench(preconditioner, **options), problem, 150)
    assert (reached - optimum).norm() <= 1e-5 * optimum.norm()


@pytest.mark.parametrize("preconditioner", ["second moment", "squares", "spectral"])
def test_automatic_penalty_with_growth_finds_the_optimum(preconditioner):
    # Q shrinks with the residual and sigma with Q: it is the growth that shortens the steps
    problem = Quadratics.draw()
    bench = pisa_bench(preconditioner, sigma=None, rho=None, gamma=0.8, grow_every=5)
    reached, optimum = run(bench, problem, 200), problem.optimum()
    assert (reached - optimum).norm() <= 1e-4 * optimum.norm()


def test_newton_schulz_finds_the_optimum_of_equal_clients_only():
    # it stops where sum alpha_i O(g_i) = 0, O being scale-free: that is sum alpha_i g_i = 0 if all g_i are equal
    options = {"align_every": 0, "sigma": 6.0, "rho": 3.0, "gamma": 0.9, "grow_every": 5}
    distance = {}
    for alike in (True, False):
        problem = Quadratics.draw(alike=alike)
        optimum = problem.optimum()
        reached = run(pisa_bench("newton_schulz", **options), problem, 200)
        distance[alike] = float((reached - optimum).norm() / optimum.norm())
    assert distance[True] < 5e-3
    assert distance[False] > 0.2


def test_fedavg_with_local_steps_stops_elsewhere():
    problem, lr, steps = Quadratics.draw(), 0.1, 5
    server = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    reached = run(Bench(server, LocalSgd(LAYOUT, lr, 0.0, 0.0, steps)), problem, 150)
    # K steps bring client i to m_i + M_i (w - m_i), m_i its own optimum and M_i = (I - lr A_i)^K
    one = torch.eye(LAYOUT.size, dtype=torch.float64)
    m = torch.linalg.solve(problem.a, problem.b)
    kept = torch.linalg.matrix_power(one - lr * problem.a, steps)
    pull = torch.einsum("i,ijk,ik->j", ALPHA, one - kept, m)
    stop = torch.linalg.solve(one - torch.einsum("i,ijk->jk", ALPHA, kept), pull)
    assert (reached - stop).norm() <= 1e-5 * stop.norm()
    optimum = problem.optimum()
    assert (reached - optimum).norm() > 0.1 * optimum.norm()


def test_clients_may_advance_together_or_one_by_one():
    problem = Quadratics.draw()
    together, alone = (run(pisa_bench("spectral", stack=n), problem, 10) for n in (len(EXAMPLES), 1))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def faint(problem, name, share):
    """The problem with a tensor's gradient so many times what it was."""
    a, b = problem.a.clone(), problem.b.clone()
    a[:, LAYOUT.spans[name]] *= share
    b[:, LAYOUT.spans[name]] *= share
    return Quadratics(a, b)


@pytest.mark.parametrize(
    ("share", "options"),
    [(0.0, {}), (1e-6, {}), (1e-30, {"local_steps": 3}), (0.0, {"participation": 0.5})],
)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_a_tensor_whose_gradient_wakes_up_moves_by_about_lr(preconditioner, share, options):
    problem, lr = Quadratics.draw(), 0.01
    asleep = faint(faint(problem, "matrix", share), "vector", share)
    bench = pisa_bench(preconditioner, sigma=None, rho=None, lr=lr, **options)
    for number in range(10):
        before = bench.consensus
        run(bench, asleep if number < 4 else problem, 1)
        assert (bench.consensus - before).abs().max() <= 10 * lr
        if share == 0.0 and number < 4:
            assert not LAYOUT.views(bench.consensus)["matrix"].any()
    assert LAYOUT.views(bench.consensus)["matrix"].abs().min() > 0
