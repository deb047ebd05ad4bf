"""Noise and clipping where they are at work: what clients send and what the server goes on with."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from pisa_fl import compose, prepare
from pisa_fl.privacy.clipping import clipped
from pisa_fl.privacy.draws import Randomness
from strategies.base.messages import GRADIENT, WEIGHTS, arrays_of, vectors

CLIENTS = 5
QUICK = (
    *("model=logistic", "data.validation=0.9", f"clients={CLIENTS}", "partition=iid"),
    *("engine.workers=0", "engine.threads=1", "rounds=2"),
)
FEDAVG = ("strategy=fedavg", "strategy.local_epochs=1")
PISA = ("strategy=pisa",)


def run(*overrides, rounds=1):
    """Weights of the server after some rounds, and what it was told in each, by client."""
    federation = prepare(compose(*QUICK, *overrides))
    told = []
    aggregate = federation.server.aggregate_train

    def listen(number, replies):
        replies = list(replies)
        told.append({r.metadata.src_node_id: vectors(arrays_of(r.content)) for r in replies})
        return aggregate(number, replies)

    federation.server.aggregate_train = listen
    list(federation.rounds(rounds))
    return vectors(federation.arrays)[WEIGHTS], told


def normal(noise):
    """Whether numbers are what a standard normal distribution gives, and no two clients' the same."""
    noise = np.stack([np.asarray(row, np.float64) for row in noise])
    assert kstest(noise.ravel(), "norm").pvalue > 0.01
    if len(noise) > 1:
        off = np.corrcoef(noise) - np.eye(len(noise))
        assert abs(off).max() < 5 / math.sqrt(noise.shape[1])


@pytest.mark.parametrize("randomness", ["seed", "system"])
@pytest.mark.parametrize(("method", "name", "bound"), [(FEDAVG, WEIGHTS, 0.05), (PISA, GRADIENT, 0.3)])
def test_what_a_client_sends_is_its_clipped_update_with_normal_noise(method, name, bound, randomness):
    private = ("privacy=local", f"privacy.clip={bound}", f"privacy.randomness={randomness}")
    private += ("checkpoint.every=1",)
    start = vectors(prepare(compose(*QUICK, *method)).arrays)[WEIGHTS]
    centre = start if name == WEIGHTS else torch.zeros_like(start)
    [plain] = run(*method)[1]
    [noised] = run(*method, *private, "privacy.noise=0.7")[1]
    updates = {client: arrays[name] - centre for client, arrays in plain.items()}
    assert all(update.norm() > bound for update in updates.values())
    expected = {c: centre + bound * update / update.norm() for c, update in updates.items()}
    normal([(noised[c][name] - expected[c]) / (0.7 * bound) for c in plain])


@pytest.mark.parametrize("method", [FEDAVG, PISA])
def test_the_server_goes_on_from_the_clipped_mean_with_normal_noise(method):
    options = (*method, "privacy=central", "privacy.clip=0.3")
    seen = []
    for noise in (0.0, 0.7):
        federation = prepare(compose(*QUICK, *options, f"privacy.noise={noise}"))
        inner = federation.server.server
        aggregate = inner.aggregate_train
        inner.aggregate_train = lambda number, replies, aggregate=aggregate: (
            seen.append(vectors(arrays_of(replies[0].content))) or aggregate(number, replies)
        )
        list(federation.rounds(1))
    [(name, plain)] = seen[0].items()
    normal([(seen[1][name] - plain) * CLIENTS / (0.7 * 0.3)])
    # the mean itself, of clients that count alike
    start = vectors(prepare(compose(*QUICK, *method)).arrays)[WEIGHTS]
    centre = start if name == WEIGHTS else torch.zeros_like(start)
    [told] = run(*method)[1]
    updates = [arrays[name] - centre for arrays in told.values()]
    short = [update * min(1.0, 0.3 / float(update.norm())) for update in updates]
    torch.testing.assert_close(plain, centre + sum(short) / CLIENTS, rtol=1e-4, atol=1e-7)


def test_the_noise_of_examples_is_normal_too():
    """PISA's gradient of all examples, each clipped, with noise in proportion to 1/n."""
    private = ("privacy=examples", "privacy.clip=0.5")
    [plain], [noised] = (run(*PISA, *private, f"privacy.noise={noise}")[1] for noise in (0.0, 2.0))
    normal([(noised[c][GRADIENT] - plain[c][GRADIENT]) * 200 / (2.0 * 0.5) for c in plain])


@pytest.mark.parametrize("method", [FEDAVG, PISA])
def test_local_privacy_without_noise_and_bound_is_the_plain_method_to_the_bit(method):
    weights, _ = run(*method, rounds=2)
    private, _ = run(*method, "privacy=local", "privacy.noise=0", "privacy.clip=1e9", rounds=2)
    assert torch.equal(weights, private)


@pytest.mark.parametrize(("method", "privacy"), [(FEDAVG, "central"), (PISA, "central"), (PISA, "examples")])
def test_other_privacy_without_noise_and_bound_is_the_plain_method_but_for_rounding(method, privacy):
    """With everybody there and equal shares; of PISA central privacy keeps the average dual alone."""
    weights, _ = run(*method, rounds=2)
    private, _ = run(*method, f"privacy={privacy}", "privacy.noise=0", "privacy.clip=1e6", rounds=2)
    start = vectors(prepare(compose(*QUICK, *method)).arrays)[WEIGHTS]
    assert (private - weights).norm() < 1e-3 * (weights - start).norm()


def test_clients_are_drawn_each_by_itself_and_a_round_may_have_none():
    options = (*FEDAVG, "privacy=central", "participation=0.2", "privacy.noise=0.001", "rounds=30")
    federation = prepare(compose(*QUICK, *options))
    lines = list(federation.rounds(30))[1:]
    counts = [line["clients_ok"] for line in lines]
    assert 0 in counts
    assert len(set(counts)) > 2
    assert sum(federation.account.asked.values()) == sum(counts)
    # 150 draws with the chance 0.2: four standard deviations
    assert abs(sum(counts) - 30) < 4 * math.sqrt(150 * 0.2 * 0.8)


def test_a_vector_that_is_not_finite_is_none():
    rows = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [math.inf, 1.0], [0.3, 0.4]])
    assert clipped(rows, 1.0).tolist() == [
        pytest.approx([0.6, 0.8]),
        [0, 0],
        [0, 0],
        [rows[3, 0].item(), rows[3, 1].item()],
    ]


def test_the_systems_numbers_are_uniform_and_normal_and_never_the_same():
    draws = Randomness("system", 0).at("noise", 1)
    assert kstest(draws.uniform(20_000).numpy(), "uniform").pvalue > 1e-4
    first, second = draws.normal(20_000), draws.normal(20_000)
    assert kstest(first.double().numpy(), "norm").pvalue > 1e-4
    assert not torch.equal(first, second)
