"""Two wires, one path: who takes the primal and dual step does not matter; and what the messages then hold."""

from contextlib import nullcontext

import pytest
import torch
from quadratics import EXAMPLES, LAYOUT, PRECONDITIONERS, Quadratics, pisa_bench, solving

from strategies.preconditioners import Kronecker

AUTOMATIC = {"sigma": None, "rho": None}
VECTOR = 4 * LAYOUT.size + 128
"""Bytes of a vector of the model's size, with NumPy's header."""


@pytest.mark.parametrize(
    ("penalty", "friction"), [(AUTOMATIC, 0.2), ({}, 0.0)], ids=["automatic, friction", "by hand"]
)
@pytest.mark.parametrize(("lag", "consensus"), [(0, "all"), (0, "fresh"), (1, "all")])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_both_wires_take_the_same_path(preconditioner, consensus, lag, penalty, friction):
    options = {"lag": lag, "consensus": consensus, "stack": 1, "align_every": 2, "bound": 0.5, **penalty}
    options |= {"friction": friction}
    problem = Quadratics.draw(seed=3)
    primal, gradient = (
        pisa_bench(preconditioner, wire=wire, lambda_=0.2, **options) for wire in ("primal", "gradient")
    )
    with solving(problem):
        for number in range(9):
            lost = {0: {1, 3}, 1: {1}, 4: {0, 2}, 5: {3}}.get(number, ())
            for bench in (primal, gradient):
                bench.round(lost=lost, forgetful={2} if number in (3, 6) else ())
            assert torch.equal(primal.consensus, gradient.consensus), number
    for client in range(len(EXAMPLES)):
        assert torch.equal(primal.strategy.ledger.dual(client), gradient.strategy.ledger.dual(client))
    assert primal.consensus.norm() > 0.1


@pytest.mark.parametrize(("lag", "times"), [(0, 4), (1, 1)])
def test_steps_are_trusted_further_by_a_q_of_their_own_round(lag, times, monkeypatch):
    options = {"lag": lag, "wire": "gradient", **AUTOMATIC}
    plain = pisa_bench("kronecker", bound=0.05 * times, **options)
    monkeypatch.setattr(Kronecker, "trust", 4.0)
    trusted = pisa_bench("kronecker", bound=0.05, **options)
    with solving(Quadratics.draw()):
        for _ in range(4):
            plain.round()
            trusted.round()
    assert torch.equal(plain.consensus, trusted.consensus)
    assert plain.consensus.any()


def test_both_wires_weigh_differences_alike_and_everybodys_cancel():
    """A difference is weighed where few answer; where all do, their average is zero, whatever its weight."""
    problem = Quadratics.draw(seed=3)
    options = {"lag": 0, "consensus": "fresh", **AUTOMATIC}
    whole, *benches = (
        pisa_bench("kronecker", wire=wire, difference=weight, stack=stack, **options)
        for wire, weight, stack in (("gradient", 1.0, 1), ("primal", 0.3, 2), ("gradient", 0.3, 1))
    )
    with solving(problem):
        for number in range(12):
            for bench in (whole, *benches):
                bench.round(lost={number % 4, 0} if number > 5 else (), forgetful={2} if number == 8 else ())
            assert torch.equal(benches[0].consensus, benches[1].consensus), number
            apart = (whole.consensus - benches[0].consensus).norm() / whole.consensus.norm()
            assert apart < 1e-5 if number < 6 else apart > 1e-4, number


@pytest.mark.parametrize("consensus", ["all", "fresh"])
def test_one_vector_each_way_and_no_state(consensus):
    bench = pisa_bench("kronecker", wire="gradient", lag=0, consensus=consensus, **AUTOMATIC)
    with solving(Quadratics.draw()):
        for _ in range(5):
            bench.round()
    traffic = bench.gateway.traffic
    assert traffic.bytes_up == traffic.bytes_down == 5 * len(EXAMPLES) * VECTOR
    assert traffic.differentiated == 5 * len(EXAMPLES)
    assert bench.half.state_sizes() == {}
    assert all(not state.accepted and not state.pending for state in bench.host.states.values())


def test_the_primal_wire_asks_first_for_a_q_of_this_round():
    bench = pisa_bench("kronecker", wire="primal", lag=0, **AUTOMATIC)
    with solving(Quadratics.draw()):
        for _ in range(3):
            bench.round()
            traffic = bench.gateway.traffic
            assert (traffic.clients_ok, traffic.clients_failed) == (len(EXAMPLES), 0)
            assert traffic.examples == sum(EXAMPLES)
    # the gradient twice, of which the first is sent, and w_i
    assert traffic.differentiated == 2 * 3 * len(EXAMPLES)
    assert traffic.bytes_up == 2 * 3 * len(EXAMPLES) * VECTOR


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, "gradient"),
        ({"local_steps": 2}, "primal"),
        ({"align_every": 0}, "primal"),
        ({"align_every": 3}, "gradient"),
    ],
)
def test_the_gradient_is_sent_where_that_is_possible(options, chosen):
    assert pisa_bench("second moment", wire="auto", **options).half.by_gradient == (chosen == "gradient")
    with nullcontext() if chosen == "gradient" else pytest.raises(ValueError, match="wire=gradient needs"):
        pisa_bench("second moment", wire="gradient", **options)


def test_both_halves_take_steps_that_suit_the_preconditioner():
    bench = pisa_bench("mfac", lr=0.5, **AUTOMATIC)
    assert bench.strategy.penalty.lr == bench.half.penalty.lr == 0.05


def test_without_a_q_of_its_own_no_alignment_is_needed():
    assert pisa_bench("identity", 0, wire="auto").half.by_gradient


def test_a_gradient_out_of_all_proportion_is_refused():
    bench = pisa_bench("kronecker", wire="gradient", lag=0, stack=1, **AUTOMATIC)
    problem = Quadratics.draw()
    wild = Quadratics(problem.a, problem.b.clone())
    wild.b[1] *= 1e4
    bench.gateway._max_update = 20.0
    with solving(problem):
        bench.round()
    before = bench.consensus
    with solving(wild), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pisa_fl.server.gateway.COMPARED", 3)
        bench.round()
    assert bench.gateway.traffic.clients_failed == 1
    assert "times as long as the greatest median of a round" in bench.gateway.failures[0].reason
    assert (bench.consensus - before).norm() < 1
