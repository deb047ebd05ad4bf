"""The ledger against one kept by hand, whoever answers, fails, forgets, and whosever reply is lost."""

from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratics import EXAMPLES, LAYOUT, Quadratics, pisa_bench, solving

from pisa_fl.clients.host import ClientState
from strategies import Layout
from strategies.base.messages import STATE_LOST
from strategies.pisa.ledger import Ledger

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
    options = {"lambda_": LAMBDA, "gamma": GAMMA, "grow_every": EVERY, "stack": 1}
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
            assert sorted(ledger.clients) == sorted(book.rows)
            for i, (weights, dual) in book.rows.items():
                torch.testing.assert_close(ledger.primal(i).double(), weights, rtol=1e-6, atol=0)
                torch.testing.assert_close(ledger.dual(i).double(), dual, rtol=1e-5, atol=1e-5)
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
    whole, bench = pisa_bench("identity", stack=1), pisa_bench("identity", stack=1)
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
    bench = pisa_bench("identity", stack=1)
    with solving(PROBLEM), patch.object(ClientState, "settle", lambda state, accepted: False):
        assert all(reply.error.code == STATE_LOST for reply in bench.round())
    assert bench.strategy.ledger.clients == []


@pytest.mark.parametrize("known", [True, False])
def test_clients_follow_a_server_that_was_set_back(known):
    """A server restored to an earlier round, in which it knew a client or had never heard of it."""
    bench = pisa_bench("identity", stack=1)
    with solving(PROBLEM):
        bench.round(drawn=CLIENTS if known else {0, 1, 2})
        saved, arrays = {k: v.clone() for k, v in bench.strategy.state_dict().items()}, bench.arrays
        accepted = dict(bench.gateway.accepted)
        for _ in range(3):
            bench.round()
        bench.strategy.load_state_dict(saved)
        bench.arrays, bench.gateway.accepted = arrays, accepted
        replies = bench.round()
        assert not any(r.has_error() for r in replies)
        for i in CLIENTS:
            assert torch.equal(bench.host.states[i].pending["dual"], bench.strategy.ledger.dual(i))


@pytest.mark.parametrize("preconditioner", ["identity", "second moment", "spectral"])
def test_state_dict_goes_on_with_the_same_bits(preconditioner):
    options = {"sigma": None, "rho": None, "stack": 1}
    straight, first, second = (pisa_bench(preconditioner, **options) for _ in range(3))
    with solving(PROBLEM):
        for _ in range(6):
            straight.round()
        for _ in range(3):
            first.round({0, 1, 2, 3})
        second.strategy.load_state_dict(first.strategy.state_dict())
        second.arrays, second.number, second.host.states = first.arrays, first.number, first.host.states
        second.gateway.accepted = first.gateway.accepted
        for _ in range(3):
            second.round()
    assert torch.equal(straight.consensus, second.consensus)


@dataclass
class PlainLedger:
    """The ledger's sums as they are written down in the paper, in double precision, over all its rows each time."""

    rows: dict = field(default_factory=dict)

    def accept(self, weights, examples, consensus, sigma):
        for client, w in weights.items():
            dual = self.rows[client][1] if client in self.rows else torch.zeros_like(w, dtype=torch.float64)
            step = 0.0 if sigma is None else sigma.double() * (w.double() - consensus.double())
            self.rows[client] = w.double(), dual + step, examples[client]

    def sums(self, sigma, lambda_):
        w, pi, n = zip(*self.rows.values(), strict=True)
        alpha = torch.tensor(n, dtype=torch.float64)[:, None] / sum(n)
        sigma, w, pi = sigma.double(), torch.stack(w), torch.stack(pi)
        consensus = (alpha * (sigma * w + pi)).sum(0) / (sigma + lambda_)
        primal = (alpha * (w - consensus) ** 2).sum().sqrt()
        return consensus, primal, ((alpha * pi).sum(0) - lambda_ * consensus).norm()


def accept(ledger, number, weights, examples, consensus, sigma, gone=()):
    ledger.begin(number, weights, examples, consensus, sigma, sigma, gone)
    ledger.commit()


def test_forgotten_clients_leave_the_sums_and_come_back_as_new_ones():
    layout, draw = Layout({"w": (70,)}), torch.Generator().manual_seed(6)
    ledger, plain = Ledger(layout, uniform=False), PlainLedger()
    again, consensus, sigma = Ledger(layout, uniform=False), torch.zeros(70), torch.full((70,), 2.0)
    clients, gone = range(100), [3, 99, 0, 98, 64, 97, 50]
    for number in range(1, 6):
        picked = [i for i in clients if number < 3 or ((i + number) % 3 and (number == 5 or i not in gone))]
        weights = {i: consensus + 0.1 * torch.randn(70, generator=draw) for i in picked}
        examples = {i: 3 + i for i in picked}
        leaving = gone if number == 3 else []
        for client in leaving:
            del plain.rows[client]
        if number == 3:
            again.load_state_dict(ledger.state_dict())
        for book in (ledger, again) if number >= 3 else (ledger,):
            accept(book, number, weights, examples, consensus, sigma, leaving)
        plain.accept(weights, examples, consensus, sigma)
        if number == 3:
            assert sorted(ledger.clients) == sorted(set(clients) - set(gone))
            assert [ledger.accepted_round(i) for i in gone] == [0] * len(gone)
        expected, primal, dual = plain.sums(sigma, 0.3)
        consensus = ledger.consensus(sigma, 0.3)
        assert (consensus.double() - expected).norm() <= 1e-6 * expected.norm()
        assert ledger.primal_residual(consensus) == pytest.approx(float(primal), rel=1e-5)
        assert ledger.dual_residual(consensus, 0.3) == pytest.approx(float(dual), rel=1e-5)
        if number >= 3:
            assert torch.equal(again.consensus(sigma, 0.3), consensus)
    for client, (weights, dual, _) in plain.rows.items():
        assert torch.equal(ledger.primal(client).double(), weights)
        torch.testing.assert_close(ledger.dual(client).double(), dual, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("align_every", "penalty"), [(0, "by hand"), (1, "automatic")])
def test_a_client_that_stays_away_is_forgotten_and_begins_anew(align_every, penalty):
    options = {"lambda_": LAMBDA, "stack": 1, **PENALTIES[penalty]}
    bench = pisa_bench("second moment", align_every, forget_after=2, **options)
    others, gone = set(CLIENTS) - {1}, 1
    ledger = bench.strategy.ledger
    with solving(PROBLEM):
        for drawn, known in ((None, True), (None, True), (others, True), (None, True), (others, True)):
            bench.round(drawn)
            assert (gone in ledger.clients) is known
        before = ledger.dual(gone).clone()
        assert before.any()
        bench.round(others)  # the second in a row
        assert set(ledger.clients) == others
        [*_, reply] = [r for r in bench.round() if r.metadata.src_node_id == gone]
        assert not reply.has_error(), "nothing of what it remembers was asked for"
        assert gone in ledger.clients
        for client in CLIENTS:
            assert torch.equal(bench.host.states[client].pending["dual"], ledger.dual(client))
        state = bench.host.states[gone]
        assert (state.round, dict(state.accepted)) == (0, {})


def test_without_a_number_nobody_is_forgotten():
    with pytest.raises(ValueError, match=r"^forget_after must be a whole number of 1 or more, got 0"):
        pisa_bench("identity", forget_after=0)
    never, late = pisa_bench("identity", stack=1), pisa_bench("identity", stack=1, forget_after=9)
    with solving(PROBLEM):
        for bench in (never, late):
            for drawn in (None, {0}, {0}, {0}, None):
                bench.round(drawn)
    assert torch.equal(never.consensus, late.consensus)


@pytest.mark.parametrize(("uniform", "on_disk"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("clients", [3, 150])
def test_sums_are_those_of_all_rows_whoever_took_part(uniform, on_disk, clients):
    layout = Layout({"w": (700,)})
    ledger, plain = Ledger(layout, uniform, on_disk), PlainLedger()
    draw = torch.Generator().manual_seed(5)
    consensus = torch.randn(700, generator=draw)
    for number in range(1, 12):
        share = [1.0, 0.05, 0.5][number % 3] if number > 4 else 0.4
        picked = [i for i in range(clients) if torch.rand((), generator=draw) < share] or [1]
        examples = {i: 1 if uniform else 3 + i + 2 * (number > 6) for i in picked}
        weights = {i: consensus + 0.1 * torch.randn(700, generator=draw) for i in picked}
        sigma = None if number == 1 else torch.rand(700, generator=draw) + 0.5
        for book in (partial(accept, ledger, number), plain.accept):
            book(weights, examples, consensus, sigma)
        sigma = torch.rand(700, generator=draw) + 0.5
        expected, primal, dual = plain.sums(sigma, 0.3)
        average = ledger.average(weights, examples)
        assert (
            average.double()
            .sub(sum(examples[i] * w for i, w in weights.items()) / sum(examples.values()))
            .norm()
            < 1e-5
        )
        consensus = ledger.consensus(sigma, 0.3)
        assert (consensus.double() - expected).norm() <= 1e-6 * expected.norm()
        assert ledger.primal_residual(consensus) == pytest.approx(float(primal), rel=1e-5)
        assert ledger.dual_residual(consensus, 0.3) == pytest.approx(float(dual), rel=1e-5)
        for i in picked:
            assert torch.equal(ledger.primal(i), weights[i])
            assert ledger.accepted_round(i) == number
    assert ledger.accepted_round(clients) == 0
    again = Ledger(layout, uniform, on_disk)
    again.load_state_dict(ledger.state_dict())
    for book in (ledger, again):
        accept(book, 12, {1: consensus + 1}, {1: 1}, consensus, sigma)
    assert torch.equal(ledger.consensus(sigma, 0.3), again.consensus(sigma, 0.3))
    assert ledger.clients == again.clients
    assert all(torch.equal(ledger.dual(i), again.dual(i)) for i in ledger.clients)
