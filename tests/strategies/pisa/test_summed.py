"""PISA of sums: the path of the ledger with rows, and the solution, whoever drops out and whatever is lost."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from quadratics import EXAMPLES, LAYOUT, PRECONDITIONERS, Quadratics, QuadraticStack, pisa_bench, solving

from strategies import Instruction, Penalty, PisaSummed, PisaSummedClient
from strategies.base.messages import WEIGHTS, record, vectors

SETTINGS = {"lr": 0.1, "momentum": 0.9, "gamma": 1.0, "grow_every": 10, "consensus": "fresh"}
BY_HAND = {"sigma": 6.0, "rho": 1.0}
AUTOMATIC = {"sigma": None, "rho": None}


class Summed:
    """Rounds of the two halves, with sums by a plain loop in double precision, and states by what was accepted."""

    def __init__(
        self, problem, name, penalty, align_every=1, lambda_=0.0, friction=0.0, bound=None, difference=1.0
    ):
        make, penalty = PRECONDITIONERS[name], Penalty(**SETTINGS | penalty)
        self.problem, self.number = problem, 0
        self.strategy = PisaSummed(LAYOUT, make, penalty, lambda_, align_every, bound, friction, difference)
        self.half = PisaSummedClient(LAYOUT, make, penalty, align_every, "mean", friction, difference)
        self.arrays, self.accepted = record({WEIGHTS: torch.zeros(LAYOUT.size)}), {}

    def get_node_ids(self):
        return range(len(EXAMPLES))

    @property
    def consensus(self):
        return vectors(self.arrays)[WEIGHTS]

    def round(self, lost=(), forgetful=()):
        self.number += 1
        messages = self.strategy.configure_train(self.number, self.arrays, ConfigRecord(), self)
        for client in forgetful:
            self.strategy.lost(client)
        there = [m for m in messages if m.metadata.dst_node_id not in lost]
        sums, weight = {}, sum(EXAMPLES[m.metadata.dst_node_id] for m in there)
        for message in there:
            client = message.metadata.dst_node_id
            arrays, config = vectors(message.content["arrays"]), dict(message.content["config"])
            assert set(arrays) == set(self.half.instruction_fields(config))
            anew = client in forgetful or self.strategy.begins_anew(client)
            held = {} if anew else self.accepted[client]
            state = {name: held.get(name, torch.zeros(1, n)) for name, n in self.half.state_sizes().items()}
            instruction = Instruction(arrays, config, self.half.prepare(arrays, config))
            update = self.half.solve(QuadraticStack(self.problem, [client]), instruction, state)
            assert set(update.arrays) == set(self.half.reply_fields(config))
            self.accepted[client] = update.state(update.arrays)
            for name, rows in update.arrays.items():
                sums[name] = sums.get(name, 0) + EXAMPLES[client] / weight * rows[0].double()
        clients = [m.metadata.dst_node_id for m in there]
        who = {"clients": clients, "num-examples": [EXAMPLES[c] for c in clients]}
        content = {"arrays": record(sums), "metrics": MetricRecord({}), "config": ConfigRecord(who)}
        reply = Message(RecordDict(content), reply_to=there[0])
        self.arrays, _ = self.strategy.aggregate_train(self.number, [reply])


def losses(rounds, seed=0):
    """Who drops out in each round: up to two of four."""
    generator = np.random.default_rng(seed)
    return [set(generator.choice(4, generator.integers(3), replace=False).tolist()) for _ in range(rounds)]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("identity", {**BY_HAND}),
        ("second moment", {**BY_HAND, "align_every": 2, "lambda_": 0.1}),
        ("squares", {**BY_HAND, "friction": 0.2}),
        ("kronecker", {**AUTOMATIC, "friction": 0.1, "lambda_": 0.01, "bound": 0.5}),
        ("kronecker", {**AUTOMATIC, "friction": 0.1, "difference": 0.4}),
    ],
)
def test_it_goes_the_way_of_the_ledger_with_rows(name, settings):
    problem, settings = Quadratics.draw(), dict(settings)
    penalty = {key: settings.pop(key) for key in ("sigma", "rho")}
    mine = Summed(problem, name, penalty, **settings)
    theirs = pisa_bench(name, wire="gradient", lag=0, consensus="fresh", **penalty, **settings)
    with solving(problem):
        for lost in losses(15):
            before = theirs.consensus
            mine.round(lost)
            theirs.round(lost=lost)
            step = (theirs.consensus - before).norm()
            assert (mine.consensus - theirs.consensus).norm() < 1e-3 * step


def test_it_finds_the_solution_though_clients_drop_out_and_one_loses_its_dual():
    problem = Quadratics.draw()
    mine = Summed(problem, "identity", BY_HAND)
    for number, lost in enumerate(losses(400, seed=1)):
        mine.round(lost, forgetful=[2] if number == 100 else [])
    torch.testing.assert_close(mine.consensus.double(), problem.optimum(), rtol=0, atol=1e-4)


def test_it_keeps_no_more_of_the_past_than_some_dual_has_still_to_step_with():
    mine = Summed(Quadratics.draw(), "second moment", BY_HAND)
    for lost in ({3}, {0, 3}, {1}, {1, 2}):
        mine.round(lost)
    state = mine.strategy.state_dict()
    held = {name.split(".")[1] for name in state if name.startswith("held.")}
    assert held == {"4", "3", "2"}  # of clients 0 and 3, of 2, and of 1
    again = Summed(mine.problem, "second moment", BY_HAND)
    again.strategy.load_state_dict(state)
    again.number, again.arrays, again.accepted = mine.number, mine.arrays, dict(mine.accepted)
    for one in (mine, again):
        one.round()
    assert torch.equal(mine.consensus, again.consensus)
