"""A federation on three hosts whose clients are killed: in the middle of a solve, and with the whole host."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from hosts import federation_of_three, ip, why_not
from safetensors.torch import load, load_file

from pisa_fl.flower.state_file import DIGEST_SIZE

ROUNDS = 10


@pytest.fixture
def federation(tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    with federation_of_three(tmp_path) as federation:
        yield federation


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_until(condition, run, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert run.is_alive(), "the run has ended"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def solving(host):
    """Client processes on a host."""
    found = []
    for pid in ip("netns", "pids", host.namespace).split():
        try:
            if b"flwr-clientapp" in Path("/proc", pid, "cmdline").read_bytes():
                found.append(int(pid))
        except OSError:
            continue
    return found


def test_killed_clients_are_gone_on_without_and_come_back(federation, tmp_path):
    directory = tmp_path / "run"
    overrides = (
        f"clients=2 rounds={ROUNDS} model=logistic partition.classes_per_client=5 progress=false "
        "strategy=sisa strategy.sigma=20 strategy.rho=200 round_timeout=40 patience=200 checkpoint.every=1"
    )
    line = f"pisa-fl engine=flower engine.connection=three-hosts hydra.run.dir={directory} {overrides}"
    ended: list[subprocess.CompletedProcess] = []
    run = threading.Thread(target=lambda: ended.append(federation.here(line, cwd=tmp_path)))
    run.start()
    metrics = directory / "metrics.jsonl"
    first, second = federation.clients

    wait_until(lambda: len(lines(metrics)) > 2, run)
    wait_until(lambda: not solving(first), run)  # the one of the round before has gone
    wait_until(lambda: solving(first), run)
    time.sleep(2)  # into its start or its solve
    killed = solving(first)
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    before = len(lines(metrics))
    # its SuperNode starts another within half a minute; had it not, the round would go on without the client
    wait_until(lambda: len(lines(metrics)) > before, run)
    second.kill()
    gone = len(lines(metrics))
    wait_until(lambda: len(lines(metrics)) > gone, run)
    # a node that was killed is refused until the SuperLink takes it for offline
    wait_until(lambda: federation.status()["client-1"] == "offline", run)
    federation.start_client(1)
    run.join(400)
    assert ended, "the run did not end"
    assert ended[0].returncode == 0, ended[0].stderr

    told = lines(metrics)
    assert [one["round"] for one in told] == list(range(ROUNDS + 1))
    assert {one["client"] for one in lines(directory / "failures.jsonl")} >= {1}
    assert all(one["clients_ok"] >= 1 for one in told[1:])
    assert min(one["clients_ok"] for one in told[1:]) == 1
    assert told[-1]["clients_ok"] == 2, "both are together again"
    assert told[-1]["test_loss"] < told[0]["test_loss"]

    # the ledger balances, and every client's replica of its dual is the ledger's
    server = load_file(directory / "checkpoint" / f"round-{ROUNDS:06d}" / "server-0000.safetensors")
    ledger = {name.removeprefix("strategy.ledger."): value for name, value in server.items()}
    alpha = ledger["shares"].double() / ledger["shares"].sum()
    left = server["arrays.weights"].double() * 20
    right = alpha @ (20 * ledger["weights.0"].double() + ledger["duals.0"].double())
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    for number in range(2):
        (file,) = (federation.disks / f"client-{number}" / "state").glob("*/client-*.safetensors")
        head, _, body = file.read_bytes().partition(b"\n")
        assert json.loads(head)["pending_round"] == ROUNDS
        row = ledger["clients"].tolist().index(number)
        assert torch.equal(load(body[:-DIGEST_SIZE])["pending.dual"], ledger["duals.0"][row])
