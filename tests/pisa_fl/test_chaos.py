"""Runs whose replies are lost, doubled, late and replayed, and whose clients go away."""

import copy
import json
import logging
import os
import random
import signal
from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import numpy as np
import pytest
from flwr.app import Error, Message

import pisa_fl
from pisa_fl import federation
from pisa_fl.clients.host import CLIENT_FAILED, ClientState
from pisa_fl.engines import local
from pisa_fl.engines.local import LocalGrid
from pisa_fl.from_config import prepare
from pisa_fl.results.console import Display
from pisa_fl.results.result import Interrupted
from strategies.base.messages import vectors

CLIENTS = 10
QUICK = ("model=logistic", "engine.threads=1", "progress=false")


def model_of(directory):
    return (directory / "model.safetensors").read_bytes()


# --- replies that are lost, doubled, late and replayed


class Chaos(LocalGrid):
    """Loses a fifth of the replies, doubles a tenth, delivers a tenth in a later round, and old ones again and again.

    Now and then a client loses its state. `heard` holds the reply that came first and in time, by client.
    """

    def __init__(self, host, seed):
        super().__init__(host)
        self.rng = random.Random(seed)
        self.late, self.old, self.heard = [], [], {}
        self.counts = dict.fromkeys(("lost", "doubled", "late", "replayed", "forgotten"), 0)

    def deliver(self, messages, timeout):
        rng, counts = self.rng, self.counts
        for message in messages:
            if rng.random() < 0.05:
                self.host.states[message.metadata.dst_node_id] = ClientState()
                counts["forgotten"] += 1
        rng.shuffle(self.late)
        half = len(self.late) // 2
        replies = self.late[half:] + [copy.deepcopy(r) for r in rng.choices(self.old, k=3 if self.old else 0)]
        counts["replayed"] += len(replies) - len(self.late[half:])
        counts["late"] += len(self.late[half:])
        del self.late[half:]
        for reply in super().deliver(messages, timeout):
            self.old = self.old[:30] + self.old[30:][-29:] + [copy.deepcopy(reply)]
            fate = rng.random()
            if fate < 0.2:
                counts["lost"] += 1
            elif fate < 0.3:
                self.late.append(reply)
            else:
                doubled = rng.random() < 0.1
                counts["doubled"] += doubled
                replies += [reply, copy.deepcopy(reply)] if doubled else [reply]
                if reply.has_content():
                    self.heard[reply.metadata.src_node_id] = vectors(reply.content["arrays"])
        rng.shuffle(replies)
        return replies


class Book:
    """The ledger kept a second time, by a plain loop over the replies that came in time."""

    def __init__(self, examples):
        self.examples, self.weights, self.duals = examples, {}, {}

    def take(self, heard, consensus, sigma):
        for client, reply in heard.items():
            weights = reply["weights"].numpy()
            self.weights[client] = weights
            dual = self.duals.get(client, np.zeros_like(weights))
            self.duals[client] = dual if sigma is None else dual + sigma * (weights - consensus)

    def imbalance(self, consensus, sigma, lambda_):
        """|w (sigma + lambda) - sum alpha_i (sigma w_i + pi_i)| in double precision, and the size of its terms."""
        total, sigma = sum(self.examples[i] for i in self.weights), np.float64(sigma)
        terms = [
            self.examples[i] / total * (sigma * np.float64(self.weights[i]) + np.float64(self.duals[i]))
            for i in self.weights
        ]
        left = np.float64(consensus) * (sigma + lambda_)
        return np.linalg.norm(left - sum(terms)), sum(np.linalg.norm(t) for t in terms)


def sigma_of(strategy, round_number):
    sigma = strategy.penalty.sigma_at(round_number, strategy.preconditioner.scale(strategy._shared))
    return None if sigma is None else sigma.numpy().copy()


def test_sisa_keeps_its_books_and_its_accuracy_whatever_happens_to_the_replies():
    rounds, overrides = 40, (*QUICK, "strategy=sisa", "strategy.lr=0.02", "partition.classes_per_client=2")
    undisturbed = list(prepare(pisa_fl.compose(*overrides)).rounds(rounds))
    logging.getLogger("pisa_fl.server.gateway").setLevel(logging.CRITICAL)
    fed = prepare(pisa_fl.compose(*overrides), lambda c: Chaos(c.host(c.rows, "auto", 250), seed=0))
    strategy, ledger, grid = fed.strategy, fed.strategy.ledger, fed.grid
    book, accepted, measured = Book(grid.sizes), 0, fed.rounds(100 * rounds)
    next(measured)
    while accepted < rounds * CLIENTS:
        grid.heard.clear()
        consensus, sigma = vectors(fed.arrays)["weights"].numpy(), sigma_of(strategy, fed.round + 1)
        line = next(measured)
        book.take(grid.heard, consensus, sigma)
        accepted += len(grid.heard)
        assert (line["clients_ok"], line["clients_failed"]) == (len(grid.heard), CLIENTS - len(grid.heard))
        assert sorted(ledger.clients) == sorted(book.duals)
        for client, dual in book.duals.items():
            # no reply counted twice, none of another round, none left out: to the bit
            assert np.array_equal(ledger.dual(client).numpy(), dual)
            state = grid.host.states[client]
            if client in grid.heard:
                assert ledger.accepted_round(client) == fed.round == state.pending_round
                assert np.array_equal(state.pending["dual"].numpy(), dual)
        now, sigma = vectors(fed.arrays)["weights"].numpy(), sigma_of(strategy, fed.round + 1)
        if sigma is not None:
            error, size = book.imbalance(now, sigma, strategy.lambda_)
            assert error <= 1e-6 * size
    logging.getLogger("pisa_fl.server.gateway").setLevel(logging.NOTSET)
    assert min(grid.counts.values()) >= 15, grid.counts
    assert {f.reason for f in fed.gateway.failures} <= {
        "no reply",
        "a second reply to one message",
        "a reply to something that was not asked of it now",
        *(f"client {c} does not hold the state that the server accepted" for c in range(CLIENTS)),
    }
    assert line["test_accuracy"] >= undisturbed[-1]["test_accuracy"] - 0.005


def test_pisa_keeps_its_books_and_its_accuracy_whatever_happens_to_the_replies():
    rounds, overrides = 15, (*QUICK, "partition.classes_per_client=2")
    undisturbed = list(prepare(pisa_fl.compose(*overrides, f"rounds={rounds}")).rounds(rounds))
    logging.getLogger("pisa_fl.server.gateway").setLevel(logging.CRITICAL)
    chosen = pisa_fl.compose(*overrides, f"rounds={2 * rounds}")
    fed = prepare(chosen, lambda c: Chaos(c.host(c.rows, "auto", 250), seed=0))
    ledger, grid = fed.strategy.ledger, fed.grid
    measured, seen = fed.rounds(2 * rounds), set()
    next(measured)
    for number in range(1, 2 * rounds + 1):
        grid.heard.clear()
        # without what friction takes from all alike
        before = {client: ledger.row(client).clone() for client in ledger.clients}
        line = next(measured)
        heard = set(grid.heard)
        seen |= heard
        assert (line["clients_ok"], line["clients_failed"]) == (len(heard), CLIENTS - len(heard))
        assert set(ledger.clients) == seen
        for client in seen:
            assert (ledger.accepted_round(client) == number) == (client in heard)
            moved = client not in before or not before[client].equal(ledger.row(client))
            assert moved == (client in heard)
        # the table's average and the consensus are those of the rows
        shares = {client: grid.sizes[client] / sum(grid.sizes[c] for c in seen) for client in seen}
        table = sum(shares[client] * ledger.statistic(client).double() for client in seen)
        duals = sum(shares[client] * ledger.dual(client).double() for client in seen)
        assert (ledger._table / sum(grid.sizes[c] for c in seen) - table).norm() <= 1e-6 * table.norm()
        left = duals - chosen.strategy["lambda"] * vectors(fed.arrays)["weights"].double()
        assert line["dual_residual"] == pytest.approx(float(left.norm()), rel=1e-3)
    logging.getLogger("pisa_fl.server.gateway").setLevel(logging.NOTSET)
    assert min(grid.counts.values()) >= 10, grid.counts
    # who answers is another draw every round, of clients of two classes: a point and a half here
    assert line["test_accuracy"] >= undisturbed[-1]["test_accuracy"] - 0.03


# --- a run that is stopped after every round, while replies are lost


class Lossy(LocalGrid):
    """Loses a quarter of the replies, always the same, whatever process it is in."""

    def deliver(self, messages, timeout):
        kept = []
        for message, reply in zip(messages, super().deliver(messages, timeout), strict=True):
            address = f"{message.content['config']['server-round']} {reply.metadata.src_node_id}"
            if crc32(address.encode()) % 4:
                kept.append(reply)
        return kept


def test_stopped_after_each_of_its_rounds_a_lossy_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    def engine(clients):
        return Lossy(clients.host(clients.rows, "auto", 250))

    rounds = 6
    config = pisa_fl.compose(*QUICK, "strategy=sisa", f"rounds={rounds}", "participation=0.7")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = pisa_fl.run(config, whole, engine)
    assert sum(line["clients_failed"] for line in result.metrics) >= rounds
    show = Display.round

    def show_and_stop(display, metrics):
        show(display, metrics)
        if metrics["round"] == last:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "round", show_and_stop)
    for last in range(rounds):
        with pytest.raises(Interrupted, match=f"stopped after round {last} of {rounds}"):
            pisa_fl.resume(parts, engine) if last else pisa_fl.run(config, parts, engine)
    last = None
    ended = pisa_fl.resume(parts, engine)
    assert model_of(parts) == model_of(whole)
    assert [{**line, "seconds": 0} for line in ended.metrics] == [
        {**line, "seconds": 0} for line in result.metrics
    ]


# --- clients that go away, stay silent or err


def lines_of(directory):
    metrics = directory / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


SOME = frozenset({7, 8, 9})
ROUNDS, REACHED = 4, 2


@dataclass(frozen=True)
class Fault:
    """Clients that cannot be reached, that do not answer, and that answer with an error."""

    away: frozenset[int] = frozenset()
    silent: frozenset[int] = frozenset()
    erring: frozenset[int] = frozenset()


class Tidal(LocalGrid):
    """A grid whose clients come and go by a plan: the faults of every attempt at a round, then none."""

    plan: ClassVar[list[Fault]] = []
    timeouts: ClassVar[list[float | None]] = []

    def get_node_ids(self):
        self.fault = self.plan.pop(0) if self.plan else Fault()
        return [node for node in super().get_node_ids() if node not in self.fault.away]

    def deliver(self, messages, timeout):
        self.timeouts.append(timeout)
        for reply in super().deliver(messages, timeout):
            node = reply.metadata.src_node_id
            if node in self.fault.erring:
                asked = next(m for m in messages if m.metadata.dst_node_id == node)
                yield Message(Error(CLIENT_FAILED, "RuntimeError: broken\nTraceback ..."), reply_to=asked)
            elif node not in self.fault.silent:
                yield reply


@pytest.fixture
def tide(monkeypatch):
    """The plan, from the round after REACHED on; nobody waits long for its clients."""

    def plan(*faults):
        Tidal.plan[:] = [Fault()] * REACHED + list(faults)
        Tidal.timeouts.clear()

    plan()
    monkeypatch.setattr(local, "LocalGrid", Tidal)
    monkeypatch.setattr(federation, "WAIT", 0.01)
    return plan


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A run without faults."""
    directory = tmp_path_factory.mktemp("calm")
    pisa_fl.run(pisa_fl.compose(*QUICK, "strategy=sisa", f"rounds={ROUNDS}"), directory)
    return directory


def measured_in(directory):
    """The metrics of a run, but for its seconds and the bytes that passed."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "bytes_up", "bytes_down")} for line in lines
    ]


def overrides(*more):
    return [*QUICK, "strategy=sisa", f"rounds={ROUNDS}", "hydra.run.dir=run", *more]


TOO_FEW = {
    "away": "clients that can be reached in round 3: 7, min_clients=8 are needed",
    "silent": "7 clients gave an acceptable reply in round 3, min_clients=8 are needed; client 7: no reply",
    "erring": (
        "7 clients gave an acceptable reply in round 3, min_clients=8 are needed; client 7: RuntimeError: broken"
    ),
}


def assert_ended_and_goes_on(ended, sentence, command, tmp_path, calm):
    assert ended.status == 1
    assert ended.err == f"pisa-fl: {sentence}\n"
    assert lines_of(tmp_path / "run") == REACHED + 1
    assert (tmp_path / "run" / "checkpoint" / f"round-{REACHED:06d}" / "state.json").is_file()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    Tidal.plan.clear()
    assert command("resume=run").status == 0
    assert model_of(tmp_path / "run") == model_of(calm)


def test_with_too_few_clients_a_run_ends_and_goes_on_once_they_are_back(tide, command, tmp_path, calm):
    tide(Fault(silent=SOME))
    ended = command(*overrides("min_clients=8", "patience=0"))
    assert_ended_and_goes_on(ended, TOO_FEW["silent"], command, tmp_path, calm)


@pytest.mark.parametrize("accept", ["min_clients=8", "accept_failures=false"])
def test_for_clients_that_are_away_or_silent_the_round_is_begun_again(accept, tide, command, tmp_path, calm):
    away = [Fault(away=SOME), Fault(away=frozenset(range(CLIENTS)))] if accept == "min_clients=8" else []
    tide(Fault(silent=SOME), *away, Fault(silent=frozenset({0, 3, *SOME})))
    ended = command(*overrides(accept, "patience=30"))
    assert (ended.status, ended.err) == (0, "")
    assert Tidal.plan == []
    assert model_of(tmp_path / "run") == model_of(calm)
    assert measured_in(tmp_path / "run") == measured_in(calm)
    lines = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert [(line["round"], line["client"]) for line in lines] == [(3, i) for i in (7, 8, 9, 0, 3, 7, 8, 9)]


def test_patience_ends(tide, command, tmp_path, calm):
    tide(*[Fault(away=SOME)] * 10_000)
    ended = command(*overrides("min_clients=8", "patience=0.1"))
    assert len(Tidal.plan) < 10_000 - 1
    assert_ended_and_goes_on(ended, TOO_FEW["away"], command, tmp_path, calm)


def test_nobody_waits_for_clients_that_err(tide, command, tmp_path, calm, monkeypatch):
    def sleep(seconds):
        raise AssertionError("waited")

    tide(Fault(erring=SOME))
    with monkeypatch.context() as patch:
        patch.setattr(federation.time, "sleep", sleep)
        ended = command(*overrides("min_clients=8", "patience=3600"))
    assert_ended_and_goes_on(ended, TOO_FEW["erring"], command, tmp_path, calm)


@pytest.mark.parametrize("fault", [Fault(silent=frozenset({4})), Fault(erring=frozenset({4}))])
def test_without_accepting_failures_a_run_ends_at_the_first(fault, tide, command, tmp_path, calm):
    tide(fault)
    ended = command(*overrides("accept_failures=false", "patience=0"))
    reason = "no reply" if fault.silent else "RuntimeError: broken"
    sentence = f"a client failed in round 3 and accept_failures=false; client 4: {reason}"
    assert_ended_and_goes_on(ended, sentence, command, tmp_path, calm)


def test_enough_clients_are_enough_and_a_round_waits_for_the_others_as_long_as_it_is_told(
    tide, command, tmp_path
):
    tide(Fault(silent=SOME), Fault(erring=SOME))
    assert command(*overrides("min_clients=7", "patience=0", "round_timeout=7.5")).status == 0
    assert Tidal.timeouts == [7.5] * ROUNDS
    counts = [(line["clients_ok"], line["clients_failed"]) for line in measured_in(tmp_path / "run")]
    assert counts == [(0, 0), (10, 0), (10, 0), (7, 3), (7, 3)]
