"""The ledger against one kept by hand, whoever answers, fails, forgets, and whosever reply is lost."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratics import EXAMPLES, LAYOUT, Quadratics, pisa_bench, solving

from pisa_fl.host import ClientState
from strategies import Layout
from strategies.ledger import Ledger
from strategies.messages import STATE_LOST

PROBLEM = Quadratics.draw(seed=2)
CLIENTS = range(len(EXAMPLES))
some = st.sets(st.sampled_from(CLIENTS))
events = st.fixed_dictionaries(
    {"drawn": st.sets(st.sampled_from(CLIENTS), min_size=1)}
    | {"lost": some, "broken": some, "forgetful": some}
)
SIGMA, GAMMA, EVERY, LAMBDA = 6.0, 0.8, 2, 0.3
PENALTIES = {
    "by hand": {"sigma": SIGMA, "rho": 1.0},
    "automatic": {"sigma": None, "rho": None},
}


def sigma_by_hand(number):
    """In rounds counted from one, sigma was divided after rounds 1 + EVERY, 1 + 2 EVERY, ..."""
    return SIGMA / GAMMA ** sum(1 for past in range(1, number) if past > 1 and (past - 1) % EVERY == 0)


class Book:
    """A ledger kept by hand in double precision."""

    def __init__(self):
        self.rows = {}

    def accept(self, client, weights, consensus, sigma):
        dual = self.rows[client][1] if client in self.rows else torch.zeros(LAYOUT.size, dtype=torch.float64)
        self.rows[client] = weights, dual if sigma is None else dual + sigma * (weights - consensus)

    def assert_balances(self, consensus, sigma):
        """w (sum alpha sigma + lambda) = sum alpha (sigma w_i + pi_i), at the rounding level of its terms."""
        total = sum(EXAMPLES[i] for i in self.rows)
        terms = [EXAMPLES[i] / total * (sigma * w + pi) for i, (w, pi) in self.rows.items()]
        left = consensus * (sigma + LAMBDA)
        assert (left - sum(terms)).norm() <= 1e-6 * sum(t.norm() for t in terms)


@pytest.mark.parametrize(
    ("preconditioner", "align_every", "penalty"),
    [
        ("identity", 1, "by hand"),
        ("second moment", 0, "by hand"),
        ("spectral", 1, "by hand"),
        ("second moment", 1, "automatic"),
        ("squares", 2, "automatic"),
    ],
)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(history=st.lists(events, min_size=3, max_size=8))
def test_nothing_is_lost(preconditioner, align_every, penalty, history):
    options = {"lambda_": LAMBDA, "gamma": GAMMA, "grow_every": EVERY, "cohort": 1}
    bench = pisa_bench(preconditioner, align_every, **options, **PENALTIES[penalty])
    ledger, states, book = bench.strategy.ledger, bench.host.states, Book()
    broken: set[int] = set()

    def sigma_now(number):
        if penalty == "by hand":
            return sigma_by_hand(number)
        scale = bench.strategy.preconditioner.scale(bench.strategy._shared)
        found = bench.strategy.penalty.sigma_at(number, scale)
        return None if found is None else found.double()

    with solving(PROBLEM, broken):
        for event in history:
            broken.clear()
            broken.update(event["broken"])
            number, sent, sigma = bench.number + 1, bench.consensus.double(), sigma_now(bench.number + 1)
            held = {i: ledger.dual(i).clone() for i in ledger.clients}
            replies = bench.round(event["drawn"], event["lost"], event["forgetful"])
            accepted = {r.metadata.src_node_id: r for r in replies if not r.has_error()}
            for i, reply in accepted.items():
                weights = torch.from_numpy(reply.content["arrays"]["weights"].numpy())
                book.accept(i, weights.double(), sent, sigma)
                # the client's replica is the ledger's, bit for bit, and it stepped from what the ledger held
                assert torch.equal(states[i].pending["dual"], ledger.dual(i))
                before = states[i].accepted.get("dual", torch.zeros(LAYOUT.size))
                assert torch.equal(before, held.get(i, torch.zeros(LAYOUT.size)))
                assert ledger.accepted_round(i) == number
            for i in set(ledger.clients) - set(accepted):
                assert torch.equal(ledger.dual(i), held[i])
            assert ledger.clients == sorted(book.rows)
            for i, (weights, dual) in book.rows.items():
                row = ledger.clients.index(i)
                torch.testing.assert_close(ledger.weights[row].double(), weights, rtol=1e-6, atol=0)
                torch.testing.assert_close(ledger.duals[row].double(), dual, rtol=1e-5, atol=1e-5)
            after = sigma_now(number + 1)
            if not accepted or after is None:
                assert torch.equal(bench.consensus.double(), sent)
            else:
                book.assert_balances(bench.consensus.double(), after)
        # what was lost is supplied again within the round
        broken.clear()
        replies = bench.round()
        assert {r.metadata.src_node_id for r in replies if not r.has_error()} == set(CLIENTS)


def test_a_client_that_lost_its_state_is_supplied_within_the_round():
    whole, bench = pisa_bench("identity", cohort=1), pisa_bench("identity", cohort=1)
    down = [0]
    with solving(PROBLEM):
        for number in range(1, 6):
            whole.round()
            replies = bench.round(forgetful={2} if number == 3 else ())
            assert not any(reply.has_error() for reply in replies)
            assert torch.equal(bench.consensus, whole.consensus)
            down.append(bench.gateway.traffic.bytes_down)
    assert bench.strategy.ledger.dual(2).any()
    first, second, supplied, *usual = (after - before for before, after in pairwise(down))
    # the consensus once more, and the dual
    assert supplied > usual[0] == usual[1] == first == second
    one = usual[0] / len(EXAMPLES)
    assert supplied == usual[0] + 2 * one


def test_a_client_that_claims_to_have_lost_what_it_never_had_is_refused():
    bench = pisa_bench("identity", cohort=1)
    with solving(PROBLEM), patch.object(ClientState, "settle", lambda state, accepted: False):
        assert all(reply.error.code == STATE_LOST for reply in bench.round())
    assert bench.strategy.ledger.clients == []


@pytest.mark.parametrize("known", [True, False])
def test_clients_follow_a_server_that_was_set_back(known):
    """A server restored to an earlier round, in which it knew a client or had never heard of it."""
    bench = pisa_bench("identity", cohort=1)
    with solving(PROBLEM):
        bench.round(drawn=CLIENTS if known else {0, 1, 2})
        saved, arrays = {k: v.clone() for k, v in bench.strategy.state_dict().items()}, bench.arrays
        for _ in range(3):
            bench.round()
        bench.strategy.load_state_dict(saved)
        bench.arrays = arrays
        replies = bench.round()
        assert not any(r.has_error() for r in replies)
        for i in CLIENTS:
            assert torch.equal(bench.host.states[i].pending["dual"], bench.strategy.ledger.dual(i))


@pytest.mark.parametrize("preconditioner", ["identity", "second moment", "spectral"])
def test_state_dict_goes_on_with_the_same_bits(preconditioner):
    options = {"sigma": None, "rho": None, "cohort": 1}
    straight, first, second = (pisa_bench(preconditioner, **options) for _ in range(3))
    with solving(PROBLEM):
        for _ in range(6):
            straight.round()
        for _ in range(3):
            first.round({0, 1, 2, 3})
        second.strategy.load_state_dict(first.strategy.state_dict())
        second.arrays, second.number, second.host.states = first.arrays, first.number, first.host.states
        for _ in range(3):
            second.round()
    assert torch.equal(straight.consensus, second.consensus)


def test_rows_are_in_the_order_of_the_clients_whoever_comes_first():
    layout = Layout({"w": (2,)})
    early, late = Ledger(layout, uniform=False), Ledger(layout, uniform=False)
    reports = {5: torch.tensor([1.0, 2.0]), 1: torch.tensor([3.0, 4.0]), 3: torch.tensor([5.0, 6.0])}
    zero, sigma = torch.zeros(2), torch.tensor(2.0)
    early.admit([5, 1, 3])
    for client, weights in reports.items():
        early.accept(client, 1, weights, zero, sigma, examples=client)
        late.admit([client])
        late.accept(client, 1, weights, zero, sigma, examples=client)
    for ledger in (early, late):
        assert ledger.clients == [1, 3, 5]
        torch.testing.assert_close(ledger.alpha, torch.tensor([1 / 9, 3 / 9, 5 / 9]))
        for client, weights in reports.items():
            assert torch.equal(ledger.dual(client), 2 * weights)
            assert ledger.accepted_round(client) == 1
    assert early.accepted_round(2) == 0
