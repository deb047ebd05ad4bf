"""The rivals of PISA on strongly convex quadratics: where they stop, their limits, lost replies and lost state."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from flwr.serverapp.strategy import FedAvg, FedProx
from quadratics import ALPHA, EXAMPLES, LAYOUT, SHAPES, Bench, Quadratics, QuadraticStack, solving

from strategies import (
    AugmentedSgd,
    Batch,
    FedAdmm,
    FedCm,
    FedCmClient,
    FedDyn,
    FedNova,
    FedNovaClient,
    FedPac,
    FedPacClient,
    FedSmoo,
    FedSmooClient,
    FedVarp,
    Layout,
    LocalSgd,
    Mifa,
    MoonClient,
    Scaffold,
    ScaffoldClient,
)
from strategies.base.messages import RoundError, record
from strategies.base.table import Table
from strategies.optimizers import AdamW, Sam, Sgd

N = len(EXAMPLES)
ADAMW = partial(AdamW, beta_2=0.99, eps=1e-8)
LOCAL = {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.0, "local_epochs": 5}


def fedavg(**bench):
    server = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    return Bench(server, LocalSgd(LAYOUT, **LOCAL), **bench)


def scaffold(alpha="examples", server_lr=1.0, **bench):
    momentum = bench.pop("momentum", 0.0)
    return Bench(
        Scaffold(LAYOUT, N, server_lr, alpha),
        ScaffoldClient(LAYOUT, **LOCAL | {"momentum": momentum}),
        **bench,
    )


def feddyn(alpha="examples", penalty=2.0, **bench):
    return Bench(FedDyn(LAYOUT, N, penalty, alpha), AugmentedSgd(LAYOUT, penalty, **LOCAL), **bench)


def fedadmm(alpha="examples", rho=2.0, eta=None, **bench):
    return Bench(FedAdmm(LAYOUT, N, rho, eta, alpha), AugmentedSgd(LAYOUT, rho, **LOCAL), **bench)


def fedsmoo(alpha="examples", penalty=2.0, radius=1e-6, **bench):
    server = FedSmoo(LAYOUT, N, penalty, radius, alpha)
    return Bench(server, FedSmooClient(LAYOUT, penalty, radius, **LOCAL), **bench)


STATEFUL = {"scaffold": scaffold, "feddyn": feddyn, "fedadmm": fedadmm, "fedsmoo": fedsmoo}


def fedcm(mix=0.3, **bench):
    local = {name: value for name, value in LOCAL.items() if name != "momentum"}
    return Bench(FedCm(LAYOUT, LOCAL["lr"], "examples"), FedCmClient(LAYOUT, mix, **local), **bench)


def fedpac(mix=0.3, optimizer=ADAMW, **bench):
    server = FedPac(LAYOUT, LOCAL["lr"], "examples", 0.0, optimizer)
    return Bench(server, FedPacClient(LAYOUT, mix, **LOCAL, optimizer=optimizer), **bench)


KEEPING = STATEFUL | {"fedcm": fedcm, "fedpac": fedpac}
EQUAL = torch.full((N,), 1 / N, dtype=torch.float64)


def run(bench, problem, rounds, **options):
    with solving(problem, **options):
        for _ in range(rounds):
            bench.round()
    return bench.consensus.double()


def distance(point, optimum):
    return float((point - optimum).norm() / optimum.norm())


@pytest.mark.parametrize(("participation", "alpha"), [(1.0, "examples"), (0.5, "examples"), (0.5, "uniform")])
@pytest.mark.parametrize("method", STATEFUL)
def test_the_optimum_of_different_clients_is_found(method, participation, alpha):
    problem = Quadratics.draw()
    bench = STATEFUL[method](alpha, participation=participation)
    optimum = problem.optimum(alpha=ALPHA if alpha == "examples" else EQUAL)
    assert distance(run(bench, problem, 100), optimum) <= 1e-5
    # what they remember holds the pull of each client's data there
    name, sign = ("control", 1) if method == "scaffold" else ("dual", -1)
    held = torch.stack([sign * bench.strategy.tables[name][client].double() for client in range(N)])
    slopes = problem.gradients(optimum)
    assert slopes.norm(dim=1).min() > 1
    assert (held - slopes).norm() <= 1e-4 * slopes.norm()


def test_fedavg_does_not_find_it():
    problem = Quadratics.draw()
    assert distance(run(fedavg(), problem, 100), problem.optimum()) > 0.05


def test_fedadmm_with_a_number_for_eta_stops_where_its_notes_say():
    # of half of the clients a round: grad F(w) = rho (1 - 1/2) (w - w^0), if they weigh the same
    problem, rho = Quadratics.draw(), 2.0
    bench = fedadmm("uniform", rho=rho, eta=1.0, participation=0.5)
    stop = problem.optimum(-rho / 2, EQUAL)
    reached = run(bench, problem, 200)
    assert distance(reached, stop) <= 1e-4
    assert distance(reached, problem.optimum(alpha=EQUAL)) > 0.05


class Unequal(QuadraticStack):
    """Clients of which client i takes i + 1 times as many steps."""

    def batches(self, epochs):
        steps = [(client + 1) * epochs for client in self.clients]
        for number in range(max(steps)):
            more = [int(number < count) for count in steps]
            yield Batch({}, torch.ones(len(steps)), more)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_different_numbers_of_steps_are_undone(momentum, monkeypatch):
    # from the optimum, with so small a step that a client's gradient stays what it is there
    monkeypatch.setattr("quadratics.QuadraticStack", Unequal)
    problem, epochs = Quadratics.draw(), 4
    local = LOCAL | {"lr": 1e-4, "momentum": momentum, "local_epochs": epochs}
    start, moved = problem.optimum().float(), {}
    benches = {
        "fedavg": Bench(fedavg().strategy, LocalSgd(LAYOUT, **local)),
        "fednova": Bench(FedNova(LAYOUT, 1.0, "examples"), FedNovaClient(LAYOUT, **local)),
        "scaffold": Bench(Scaffold(LAYOUT, N, 1.0, "examples"), ScaffoldClient(LAYOUT, **local)),
    }
    for name, bench in benches.items():
        bench.arrays = record({"weights": start})
        moved[name] = run(bench, problem, 1) - start
    slopes = problem.gradients(problem.optimum())
    reach = LocalSgd(LAYOUT, **local).reach([(client + 1) * epochs for client in range(N)], 1e-4, 0.0)
    expected = -1e-4 * (ALPHA * reach) @ slopes
    assert (moved["fedavg"] - expected).norm() <= 0.02 * expected.norm()
    assert moved["fednova"].norm() <= 0.02 * expected.norm()
    controls = torch.stack([benches["scaffold"].strategy.controls[client] for client in range(N)]).double()
    assert (controls - slopes).norm() <= 0.02 * slopes.norm()


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("mu", [0.0, 3.0])
def test_reach_is_the_sum_of_the_papers_coefficients(momentum, mu):
    lr, steps = 0.05, 7
    half = LocalSgd(LAYOUT, lr, momentum, 0.0, 1)
    # how often the gradient of each step is in the end, by the response to one that is alone
    total = 0.0
    for at in range(steps):
        moved = buffer = 0.0
        for step in range(steps):
            buffer = momentum * buffer + (step == at) - lr * mu * moved
            moved += buffer
        total += moved
    reach = half.reach([steps, 1, 0], lr, mu)
    assert reach.tolist() == pytest.approx([total, 1.0, 0.0], rel=1e-12)
    if not mu:
        closed = (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
        assert total == pytest.approx(closed, rel=1e-12)
    if not momentum and mu:
        assert total == pytest.approx((1 - (1 - lr * mu) ** steps) / (lr * mu), rel=1e-12)


class Forgetful(ScaffoldClient):
    """Its control variates stay zero."""

    def solve(self, stack, instruction, state):
        update = super().solve(stack, instruction, state)
        return replace(update, arrays=update.arrays | {"control": torch.zeros_like(state["control"])})


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_scaffold_with_zero_control_variates_is_fedavg_to_the_bit(participation):
    problem = Quadratics.draw()
    plain = run(fedavg(participation=participation), problem, 20)
    bench = Bench(Scaffold(LAYOUT, N, 1.0, "examples"), Forgetful(LAYOUT, **LOCAL), participation)
    assert torch.equal(run(bench, problem, 20), plain)
    assert not torch.equal(run(scaffold(participation=participation), problem, 20), plain)


def test_without_a_radius_fedsam_is_fedavg_and_fedsmoo_feddyn_to_the_bit():
    problem = Quadratics.draw()
    sam = Bench(fedavg().strategy, LocalSgd(LAYOUT, **LOCAL, optimizer=partial(Sam, radius=0.0)), 0.5)
    assert torch.equal(run(sam, problem, 10), run(fedavg(participation=0.5), problem, 10))
    pair = fedsmoo(radius=0.0, participation=0.5), feddyn(participation=0.5)
    assert torch.equal(*(run(bench, problem, 10) for bench in pair))
    assert not torch.equal(run(fedsmoo(radius=0.1, participation=0.5), problem, 10), pair[1].consensus)


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_fedpac_of_plain_sgd_is_fedcm_and_without_a_velocity_fedavg(participation):
    problem = Quadratics.draw()
    averaged = run(fedavg(participation=participation), problem, 10)
    assert torch.equal(run(fedpac(1.0, Sgd, participation=participation), problem, 10), averaged)
    drawn = run(fedpac(0.3, Sgd, participation=participation), problem, 10)
    assert distance(drawn, run(fedcm(0.3, participation=participation), problem, 10)) <= 1e-6
    assert distance(drawn, averaged) > 0.05


def test_fedpac_has_clients_go_on_from_the_mean_memory():
    # of one gradient everywhere, a, in the limit of no lr: m and v are its averages over all steps of all rounds
    problem, rounds = Quadratics.draw(alike=True), 3
    server = FedPac(LAYOUT, 1e-9, "examples", 0.8, ADAMW)
    local = LOCAL | {"lr": 1e-9, "momentum": 0.8}
    bench = Bench(server, FedPacClient(LAYOUT, 0.5, **local, optimizer=ADAMW), 0.5)
    run(bench, problem, rounds)
    steps, slope = (
        rounds * LOCAL["local_epochs"],
        problem.gradients(torch.zeros(LAYOUT.size).double())[0].float(),
    )
    shares = torch.tensor([1 - 0.8**steps, 1 - 0.99**steps])
    torch.testing.assert_close(bench.strategy.kept["mass"], shares)
    torch.testing.assert_close(bench.strategy.kept["first"], shares[0] * slope, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        bench.strategy.kept["second"], shares[1] * slope.square(), rtol=1e-5, atol=1e-6
    )


def test_fedsmoo_has_clients_take_gradients_at_one_place():
    # of equal clients, h - m - s is the same everywhere: s is their own e, and from there on m stays
    problem, radius = Quadratics.draw(alike=True), 0.1
    bench = fedsmoo(radius=radius)
    run(bench, problem, 3)
    common = bench.strategy.kept["common"]
    assert float(common.norm()) == pytest.approx(radius, rel=1e-5)
    shifts = torch.stack([bench.strategy.tables["shift"][client] for client in range(N)])
    torch.testing.assert_close(shifts, shifts[:1].expand_as(shifts))
    torch.testing.assert_close(common, radius * shifts[0] / shifts[0].norm())


def test_with_alpha_going_to_zero_feddyn_is_fedavg_with_an_undamped_server():
    # its clients solve FedAvg's problem, and the server adds what they have moved in all rounds so far
    problem, penalty = Quadratics.draw(), 1e-7
    bench, plain = feddyn(penalty=penalty), fedavg()
    velocity = torch.zeros(LAYOUT.size, dtype=torch.float64)
    with solving(problem):
        for _ in range(4):
            plain.arrays = bench.arrays
            start = bench.consensus.double()
            bench.round()
            plain.round()
            moved = plain.consensus.double() - start
            velocity += moved
            torch.testing.assert_close(
                bench.consensus.double(), start + moved + velocity, rtol=1e-4, atol=1e-5
            )


def test_with_everybody_there_feddyn_and_fedadmm_are_one():
    problem = Quadratics.draw()
    assert distance(run(feddyn(), problem, 20), run(fedadmm(), problem, 20)) <= 1e-5


@pytest.mark.parametrize("rule", [FedVarp, Mifa])
def test_with_a_table_of_updates_part_of_the_clients_lead_to_where_all_of_them_do(rule):
    problem = Quadratics.draw()
    whole, part = (Bench(rule(LAYOUT, N, 0.5, "examples"), LocalSgd(LAYOUT, **LOCAL), p) for p in (1.0, 0.5))
    assert distance(run(part, problem, 100), run(whole, problem, 100)) <= 1e-4
    assert distance(run(fedavg(participation=0.5), problem, 100), whole.consensus.double()) > 0.05


def test_fednova_of_equal_steps_is_fedprox():
    problem, mu = Quadratics.draw(), 0.7
    server = FedProx(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1, proximal_mu=mu)
    prox = run(Bench(server, LocalSgd(LAYOUT, **LOCAL)), problem, 20)
    nova = run(Bench(FedNova(LAYOUT, 1.0, "examples"), FedNovaClient(LAYOUT, **LOCAL, mu=mu)), problem, 20)
    assert distance(nova, prox) <= 1e-6


def remembered(bench, client):
    state = bench.host.states[client]
    held = state.pending if state.pending_round == bench.gateway.accepted[client] else state.accepted
    return held.items()


@pytest.mark.parametrize("method", STATEFUL)
def test_lost_replies_and_lost_state_leave_server_and_clients_in_agreement(method):
    problem = Quadratics.draw()
    bench, sure = (STATEFUL[method](participation=p) for p in (1.0, 1.0))
    rounds = [
        {"drawn": {0, 1, 3}},
        {"lost": {1}},
        {"drawn": {0, 1, 2}, "lost": {0, 2}},
        {"lost": {3}},
        {"drawn": {1, 3}},
        {},
    ]
    forgetful = [(), (), {1}, (), {3, 0}, {2}]
    with solving(problem):
        for faults, lose in zip(rounds, forgetful, strict=True):
            bench.round(**faults, forgetful=lose)
            sure.round(**faults)  # a client that lost its state goes on from the server's, to the same bits
    assert torch.equal(bench.consensus, sure.consensus)
    for client in range(N):
        for name, row in remembered(bench, client):
            assert row.any()
            assert torch.equal(row, bench.strategy.tables[name][client])
    assert distance(run(bench, problem, 60), problem.optimum()) <= 1e-5


@pytest.mark.parametrize("method", KEEPING)
def test_from_a_checkpoint_it_goes_on_with_the_same_bits(method):
    problem = Quadratics.draw()
    first, second = (KEEPING[method](participation=0.5) for _ in range(2))
    run(first, problem, 3)
    state = {name: value.clone() for name, value in first.strategy.state_dict().items()}
    second.strategy.load_state_dict(state)
    second.number, second.arrays = first.number, first.arrays
    second.gateway.accepted = dict(first.gateway.accepted)  # the clients lost theirs, and are supplied
    assert torch.equal(run(first, problem, 6), run(second, problem, 6))


@pytest.mark.parametrize("method", KEEPING)
def test_a_round_beyond_what_messages_hold_leaves_all_that_is_kept_as_it_was(method):
    problem = Quadratics.draw()
    bench = KEEPING[method]()
    run(bench, problem, 2)
    before = {name: value.clone() for name, value in bench.strategy.state_dict().items()}
    step = bench.strategy.step
    bench.strategy.step = lambda *said: step(*said) * float("nan")
    with pytest.raises(RoundError), solving(problem):
        bench.round()
    after = bench.strategy.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_who_never_answered_counts_as_zero_in_a_tables_average():
    table = Table(2, 4)
    assert table.begin({1: torch.tensor([4.0, 8.0])}, {1: 3.0}).tolist() == [1.0, 2.0]
    assert 1 not in table
    table.commit()
    assert table.average.tolist() == [1.0, 2.0]
    assert table.begin({3: torch.tensor([8.0, 0.0])}, {3: 1.0}).tolist() == [2.5, 3.0]
    table.commit()
    assert table.begin({1: torch.zeros(2)}, {1: 3.0}).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Scaffold(LAYOUT, N, 0.0, "examples"), "server_lr must be positive"),
        (lambda: Scaffold(LAYOUT, N, 1.0, "equal"), "alpha must be examples or uniform"),
        (lambda: FedDyn(LAYOUT, N, 0, "examples"), "penalty must be positive"),
        (lambda: AugmentedSgd(LAYOUT, -1.0, **LOCAL), "penalty must be positive"),
        (lambda: FedAdmm(LAYOUT, N, 1.0, 0.0, "examples"), "eta must be positive"),
        (lambda: AugmentedSgd(LAYOUT, 0.0, **LOCAL), "penalty must be positive"),
        (lambda: FedSmoo(LAYOUT, N, 1.0, -1.0, "examples"), "radius must not be negative"),
        (lambda: FedSmooClient(LAYOUT, 0.0, 0.1, **LOCAL), "penalty must be positive"),
        (lambda: FedNova(LAYOUT, -1.0, "examples"), "server_lr must be positive"),
        (lambda: FedNovaClient(LAYOUT, **LOCAL, mu=-1.0), "mu must not be negative"),
        *[
            (lambda make=make: make(LAYOUT, **LOCAL | {"optimizer": ADAMW}), "optimizer must be sgd or sam: ")
            for make in (FedNovaClient, ScaffoldClient)
        ],
        (
            lambda: FedCmClient(LAYOUT, 0.1, 0.1, 0.0, 1, optimizer=ADAMW),
            "optimizer must be sgd or sam: FedCM",
        ),
        (lambda: FedCm(LAYOUT, 0.1, "examples", lr_decay=0.0), "lr_decay must be above 0 and at most 1"),
        (lambda: MoonClient(LAYOUT, -1.0, 0.5, **LOCAL), "mu must not be negative"),
        (lambda: MoonClient(LAYOUT, 1.0, 0.0, **LOCAL), "temperature must be positive"),
        (
            lambda: MoonClient(Layout(SHAPES), 1.0, 0.5, **LOCAL),
            "the last linear layer, and the model has none",
        ),
    ],
)
def test_impossible_numbers_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
