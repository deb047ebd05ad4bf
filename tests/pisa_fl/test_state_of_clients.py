"""What clients remember follows what the server accepted, for any algorithm, whatever happens to the messages."""

import logging
from contextlib import closing
from functools import partial

import pytest
import torch
from diary import CLIENTS, SIZES, federate, remembered, troubled

from pisa_fl.checkpoint import load_checkpoint, save_checkpoint
from pisa_fl.engines.workers import start_method
from strategies.base.messages import vectors

ROUNDS = 25


class Expected:
    """What every client is to remember: kept a second time from what was heard in time."""

    def __init__(self, size):
        self.size, self.diaries = size, {client: (0, torch.zeros(size)) for client in CLIENTS}

    def take(self, heard, forgot):
        for client in forgot:
            self.diaries[client] = 0, torch.zeros(self.size)
        for client, told in heard.items():
            count, sum_told = self.diaries[client]
            self.diaries[client] = count + 1, sum_told + told


def rounds(federation, numbers, seen=None):
    for number in numbers:
        federation.grid.begin(number)
        line = next(
            federation.rounds(number) if federation.round else iter(list(federation.rounds(number))[1:])
        )
        if seen is not None:
            seen(number, line)


@pytest.fixture
def quiet():
    logger = logging.getLogger("pisa_fl.server.gateway")
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize(("workers", "stack"), [(0, 1), (0, 3), (2, 1)])
@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_clients_remember_what_was_accepted_and_nothing_else(workers, stack, participation, quiet):
    if workers and start_method() != "fork":
        pytest.skip("processes cannot be forked here")
    federation = federate(partial(troubled, workers=workers, stack=stack), participation)
    grid, expected, troubles = federation.grid, Expected(federation.model.layout.size), [0, 0]

    def check(number, line):
        expected.take(grid.heard, grid.forgot)
        assert line["clients_ok"] == len(grid.heard)
        troubles[0] += line["clients_failed"]
        troubles[1] += len(grid.forgot & set(grid.heard))
        examples = sum(SIZES[client] for client in grid.heard)
        mean = sum(SIZES[client] / examples * told.double() for client, told in grid.heard.items())
        torch.testing.assert_close(vectors(federation.arrays)["weights"].double(), mean, rtol=1e-5, atol=1e-5)
        counts = sum(SIZES[c] / examples * expected.diaries[c][0] for c in grid.heard)
        assert line["count"] == pytest.approx(counts)
        for client, (count, told) in expected.diaries.items():
            state = grid.host.states[client]
            if client in grid.heard:
                assert state.pending_round == federation.gateway.accepted[client] == number
            held = remembered(state, number if client in grid.heard else None)
            if state.round == federation.gateway.accepted.get(client, 0) or client in grid.heard:
                assert (
                    float(held.get("count", torch.zeros(1)))
                    == float(held.get("times", torch.zeros(1)))
                    == count
                )
                assert torch.equal(held.get("told", torch.zeros_like(told)), told)

    with closing(grid):
        rounds(federation, range(1, ROUNDS + 1), check)
    assert troubles[0] >= 20
    assert troubles[1] >= 2


@pytest.mark.parametrize("stop", [1, 2, 7])
def test_what_was_accepted_is_in_the_checkpoint(stop, tmp_path, quiet):
    straight, first, second = (federate(partial(troubled, workers=0)) for _ in range(3))
    rounds(straight, range(1, stop + 1))
    straight.grid.late = ()  # what is on its way when a server ends finds another one
    rounds(straight, range(stop + 1, 13))
    rounds(first, range(1, stop + 1))
    save_checkpoint(first, tmp_path, 2)
    assert load_checkpoint(second, tmp_path)
    rounds(second, range(stop + 1, 13))
    assert second.gateway.accepted == straight.gateway.accepted
    assert torch.equal(vectors(second.arrays)["weights"], vectors(straight.arrays)["weights"])
    for client in CLIENTS:
        held, other = (remembered(f.grid.host.states[client], 12) for f in (second, straight))
        assert {name: vector.tolist() for name, vector in held.items()} == {
            name: vector.tolist() for name, vector in other.items()
        }


def test_a_round_that_is_undone_leaves_what_clients_remember(monkeypatch):
    federation = federate()
    list(federation.rounds(2))
    accepted = dict(federation.gateway.accepted)
    monkeypatch.setattr(federation.strategy, "aggregate_train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(federation.rounds(3))
    monkeypatch.undo()
    assert federation.gateway.accepted == accepted == dict.fromkeys(CLIENTS, 2)
    federation.grid.begin = lambda number: None
    list(federation.rounds(3))
    held = [federation.grid.host.states[client].pending["count"] for client in CLIENTS]
    assert [float(count) for count in held] == [3] * len(held)
