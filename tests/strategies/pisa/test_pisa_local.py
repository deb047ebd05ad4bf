"""PISA with local epochs: against a plain loop on real images, on quadratics, and its limits."""

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from plain_loops import SIZES, everyone, half, make_problem, sgd
from quadratics import (
    EXAMPLES,
    LAYOUT,
    PRECONDITIONERS,
    Bench,
    Quadratics,
    QuadraticStack,
    duals_of,
    solving,
)
from test_against_plain_loops import assert_moved_alike

from strategies import Instruction, LocalSgd, Penalty, Pisa, PisaLocalClient
from strategies.base.messages import WEIGHTS

LOCAL = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "epochs": 3}
SIGMA = 0.5


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return make_problem(tmp_path_factory.mktemp("problem"))


def plain(problem, rounds, drawn):
    """The module's equations over dictionaries: the final consensus and the duals."""
    w, dual = problem.start, {}
    zero = {name: torch.zeros_like(t) for name, t in w.items()}
    for number in range(1, rounds + 1):
        present = drawn(number)
        answers = {}
        for i in present:
            answers[i] = sgd(problem, w, i, number, mu=SIGMA, slope=dual.get(i, zero), **LOCAL)
            dual[i] = {n: dual.get(i, zero)[n] + SIGMA * (answers[i][n] - w[n]) for n in w}
        here, all_ = sum(SIZES[i] for i in present), sum(SIZES[i] for i in dual)
        w = {
            n: sum(SIZES[i] / here * answers[i][n] for i in present)
            + sum(SIZES[i] / all_ * dual[i][n] for i in dual) / SIGMA
            for n in w
        }
    return w, dual


@pytest.mark.parametrize(("share", "drawn"), [(1.0, everyone), (0.5, half)])
def test_local_epochs_follow_the_plain_loop(problem, share, drawn):
    expected, duals = plain(problem, 4, drawn)
    federation, _ = problem.run(
        *(4, "strategy=pisa_local", f"strategy.sigma={SIGMA}", "strategy.lr=0.01", "strategy.momentum=0.9"),
        *("strategy.weight_decay=0.01", "strategy.local_epochs=3", "strategy.schedule=constant"),
        f"participation={share}",
    )
    assert_moved_alike(federation, expected, problem.start)
    for client, dual in duals.items():
        flat = torch.cat([t.flatten() for t in dual.values()])
        assert (federation.strategy.ledger.dual(client).double() - flat).norm() <= 3e-4 * flat.norm()


def halves(sigma, lr=0.05, momentum=0.5, epochs=5, **schedule):
    penalty = Penalty(lr, 0.0, sigma, 1.0, 1.0, 10, **schedule)
    server = Pisa(LAYOUT, PRECONDITIONERS["identity"], penalty, 0.0, 0, "examples", consensus="fresh")
    return server, PisaLocalClient(LAYOUT, penalty, momentum, 0.0, epochs)


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_it_finds_the_optimum_that_fedavg_misses(participation):
    problem = Quadratics.draw()
    optimum = problem.optimum()
    averaging = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    far, near = (
        Bench(*pair, participation)
        for pair in ((averaging, LocalSgd(LAYOUT, 0.05, 0.5, 0.0, 5)), halves(sigma=2.0))
    )
    with solving(problem):
        for _ in range(150):
            far.round(), near.round()
    assert (far.consensus - optimum).norm() > 0.1 * optimum.norm()
    assert (near.consensus - optimum).norm() <= 1e-5 * optimum.norm()
    slopes = problem.gradients(optimum)
    assert (duals_of(near.strategy.ledger).double() + slopes).norm() <= 1e-5 * slopes.norm()


def test_the_replica_of_the_dual_is_the_ledgers_whatever_is_lost():
    bench = Bench(*halves(sigma=0.3), stack=1)
    with solving(Quadratics.draw()):
        for number, (lost, forgetful) in enumerate([((), ()), ({1}, ()), ({0, 2}, {1}), ((), {3}), ((), ())]):
            bench.round(lost=lost, forgetful=forgetful)
            for client in set(range(len(EXAMPLES))) - set(lost):
                dual = bench.host.states[client].pending["dual"]
                assert torch.equal(dual, bench.strategy.ledger.dual(client)), (number, client)
                assert dual.any()


@pytest.mark.parametrize("schedule", [{}, {"schedule": "cosine", "horizon": 2, "final": 0.1}])
def test_without_penalty_and_duals_it_is_local_sgd(schedule):
    problem, clients, w = Quadratics.draw(), range(len(EXAMPLES)), torch.linspace(-1, 1, LAYOUT.size)
    _, half = halves(sigma=1e-12, **schedule)
    for number, lr in ((1, 0.05), (2, 0.005 if schedule else 0.05)):
        said = Instruction({WEIGHTS: w}, {"server-round": number})
        answers = [
            solver.solve(QuadraticStack(problem, clients), said, state).arrays[WEIGHTS]
            for solver, state in (
                (half, {"dual": torch.zeros(len(clients), LAYOUT.size)}),
                (LocalSgd(LAYOUT, lr, 0.5, 0.0, 5), {}),
            )
        ]
        torch.testing.assert_close(*answers, rtol=1e-6, atol=1e-7)
        assert (answers[0] - w).abs().max() > 0.01
