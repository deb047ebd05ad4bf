"""The ledger of a fresh consensus against sums over all its rows, in double precision, whoever answers and leaves."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratics import Quadratics, pisa_bench, solving

from strategies import Layout
from strategies.pisa.ledger import Ledger

SIZE, TABLE, CLIENTS, LAMBDA = 70, 71, 70, 0.3
LAYOUT = Layout({"w": (SIZE,)})
events = st.fixed_dictionaries(
    {
        "present": st.sets(st.integers(0, CLIENTS - 1), min_size=1),
        "everybody": st.booleans(),
        "measured": st.booleans(),
        "gone": st.sets(st.integers(0, CLIENTS - 1), max_size=3),
        "undone": st.booleans(),
        "size": st.sampled_from([1.0, 1e-5, 1e4]),
    }
)


@dataclass
class Book:
    """Duals and statistics of everybody, primals of those who answered last."""

    duals: dict = field(default_factory=dict)
    table: dict = field(default_factory=dict)
    share: dict = field(default_factory=dict)
    primals: dict = field(default_factory=dict)
    friction: float = 0.0

    def accept(self, weights, examples, statistics, gone, consensus, sigma):
        for client in gone:
            for rows in (self.duals, self.table, self.share):
                rows.pop(client, None)
        self.primals = weights
        for client, w in weights.items():
            before = self.duals.get(client, torch.zeros(SIZE, dtype=torch.float64))
            self.duals[client] = before + sigma.double() * (w.double() - consensus.double())
            self.share[client] = float(examples[client])
        average = self.mean(self.duals)
        self.duals = {client: dual - self.friction * average for client, dual in self.duals.items()}
        self.table |= {client: s.double() for client, s in statistics.items()}

    def mean(self, rows):
        total = sum(self.share[client] for client in rows)
        return sum(self.share[client] / total * row.double() for client, row in rows.items())

    def consensus(self, sigma):
        sigma = sigma.double()
        return (sigma * self.mean(self.primals) + self.mean(self.duals)) / (sigma + LAMBDA)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    history=st.lists(events, min_size=2, max_size=7),
    seed=st.integers(0, 99),
    on_disk=st.booleans(),
    friction=st.sampled_from([0.0, 0.3]),
)
def test_sums_are_those_of_the_rows(history, seed, on_disk, friction):
    draw = torch.Generator().manual_seed(seed)
    ledger, book = Ledger(LAYOUT, False, on_disk, TABLE, friction), Book(friction=friction)
    consensus, sigma = torch.zeros(SIZE), torch.full((SIZE,), 2.0)
    for number, event in enumerate(history, start=1):
        present = sorted(range(CLIENTS) if event["everybody"] else event["present"])
        gone = [c for c in sorted(event["gone"]) if c in ledger.clients and c not in present]
        weights = {c: consensus + event["size"] * torch.randn(SIZE, generator=draw) for c in present}
        examples = {c: 1 + c % 7 for c in present}
        statistics = (
            {c: event["size"] * torch.randn(TABLE, generator=draw) for c in present}
            if event["measured"] or number == 1
            else {}
        )
        observed = ledger.observe(statistics, examples, gone) if statistics else None
        if event["undone"]:  # a penalty of the next round that leads anywhere makes it possible to go back
            ledger.begin(
                number, weights, examples, consensus, sigma, torch.full((SIZE,), 1e-30), gone, observed
            )
            ledger.undo()
            assert sorted(ledger.clients) == sorted(book.duals)
        ledger.begin(number, weights, examples, consensus, sigma, sigma, gone, observed)
        ledger.commit()
        book.accept(weights, examples, statistics, gone, consensus, sigma)
        assert sorted(ledger.clients) == sorted(book.duals)
        if observed is not None:
            torch.testing.assert_close(
                observed.average.double(), book.mean(book.table), rtol=1e-6, atol=1e-6 * event["size"]
            )
        expected = book.consensus(sigma)
        consensus = ledger.consensus(sigma, LAMBDA)
        largest = max(float(row.norm()) for row in (*book.duals.values(), *weights.values()))
        assert (consensus.double() - expected).norm() <= 3e-6 * largest
        gaps = {c: (w.double() - consensus.double()).square().sum() for c, w in weights.items()}
        assert ledger.primal_residual(consensus) == pytest.approx(
            float(book.mean(gaps)) ** 0.5, rel=1e-4, abs=1e-6 * largest
        )
        left = book.mean(book.duals) - LAMBDA * consensus.double()
        assert ledger.dual_residual(consensus, LAMBDA) == pytest.approx(
            float(left.norm()), rel=1e-4, abs=3e-6 * largest
        )
        again = Ledger(LAYOUT, False, on_disk, TABLE, friction)
        again.load_state_dict(ledger.state_dict())
        assert torch.equal(again.consensus(sigma, LAMBDA), consensus)
        ledger = again
    for client, dual in book.duals.items():
        torch.testing.assert_close(ledger.dual(client).double(), dual, rtol=1e-4, atol=1e-5 * largest)
        if client in book.table:
            assert torch.equal(ledger.statistic(client).double(), book.table[client])


def test_a_statistic_whose_answer_was_lost_is_of_its_round_alone():
    """With the wire `primal` a client is asked twice; one knew client 1, the other is new."""
    draw, ledger = torch.Generator().manual_seed(3), Ledger(LAYOUT, False, False, TABLE)
    consensus, sigma = torch.zeros(SIZE), torch.ones(SIZE)
    kept, seen = {}, []
    for number, (asked, answered) in enumerate([((0, 1), (0, 1)), ((0, 1, 2), (0,)), ((0,), (0,))], start=1):
        statistics = {c: torch.randn(TABLE, generator=draw) for c in asked}
        observed = ledger.observe(statistics, dict.fromkeys(asked, 5))
        seen.append((observed.average, torch.stack([*(kept | statistics).values()]).mean(dim=0)))
        kept |= {c: statistics[c] for c in answered}
        weights = dict.fromkeys(answered, consensus)
        ledger.begin(number, weights, dict.fromkeys(answered, 5), consensus, sigma, sigma, (), observed)
        ledger.commit()
    for average, expected in seen:
        torch.testing.assert_close(average, expected)
    assert all(torch.equal(ledger.statistic(client), row) for client, row in kept.items())


def test_a_table_that_dwindles_is_not_left_with_what_was_rounded():
    # squares that were of the size of 1, and a million rounds later of 1e-12
    draw, ledger = torch.Generator().manual_seed(1), Ledger(LAYOUT, False, False, TABLE)
    consensus, sigma = torch.zeros(SIZE), torch.ones(SIZE)
    for number in range(1, 300):
        present = [number % 3, 3 + number % 2]
        squares = {c: 0.95**number * torch.rand(TABLE, generator=draw).square() for c in present}
        weights, examples = dict.fromkeys(present, consensus), dict.fromkeys(present, 5)
        observed = ledger.observe(squares, examples)
        ledger.begin(number, weights, examples, consensus, sigma, sigma, (), observed)
        ledger.commit()
    expected = torch.stack([ledger.statistic(c).double() for c in ledger.clients]).mean(0)
    torch.testing.assert_close(observed.average.double(), expected, rtol=1e-3, atol=0)


def test_who_comes_back_after_being_forgotten_begins_anew():
    bench = pisa_bench(
        "kronecker", wire="gradient", lag=0, consensus="fresh", forget_after=2, sigma=None, rho=None
    )
    ledger = bench.strategy.ledger
    with solving(Quadratics.draw(seed=2)):
        for lost in ((), (), {1}, {1}):
            bench.round(lost=lost)
        assert sorted(ledger.clients) == [0, 2, 3]
        assert bench.strategy._dual(1).norm() == 0
        bench.round()
        assert sorted(ledger.clients) == [0, 1, 2, 3]


@pytest.mark.parametrize("lag", [0, 1])
def test_state_dict_goes_on_with_the_same_bits(lag):
    options = {"wire": "gradient", "lag": lag, "consensus": "fresh", "sigma": None, "rho": None, "bound": 0.2}
    straight, first, second = (pisa_bench("kronecker", **options) for _ in range(3))
    losing = [{1}, (), {0, 3}, (), {2}, {1}]
    with solving(Quadratics.draw(seed=2)):
        for lost in losing:
            straight.round(lost=lost)
        for lost in losing[:3]:
            first.round(lost=lost)
        second.strategy.load_state_dict({k: v.clone() for k, v in first.strategy.state_dict().items()})
        second.arrays, second.number = first.arrays, first.number
        for lost in losing[3:]:
            second.round(lost=lost)
    assert torch.equal(straight.consensus, second.consensus)
