"""Worker processes: any number of them gives the same bits, and none of them is missed."""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn

from pisa_fl.config import ConfigurationError
from pisa_fl.data import ImageData
from pisa_fl.engines import workers as workers_module
from pisa_fl.engines.local import local_engine
from pisa_fl.engines.solver import Slots
from pisa_fl.engines.workers import start_method
from pisa_fl.federation import Federation
from strategies import Layout, LocalSgd, Penalty, Pisa, PisaClient
from strategies.base.rows import zeros
from strategies.preconditioners import Kronecker, SecondMoment

pytestmark = pytest.mark.skipif(start_method() != "fork", reason="processes cannot be forked here")

SIZES = (9, 14, 5, 12, 7, 3, 21)
LOCAL = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "local_epochs": 2}


def image_data():
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 3, sum(SIZES))
    images = draw.integers(0, 120, (sum(SIZES), 1, 5, 5)) + 40 * labels[:, None, None, None]
    images = images.astype(np.uint8)
    return ImageData(images, labels, images[:20], labels[:20], ("a", "b", "c"), (0.4,), (0.2,))


def network():
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))


def sisa(layout, half=PisaClient, **options):
    q = partial(
        SecondMoment,
        beta=0.9,
        eps=1e-8,
        floor=0.1,
        moment_of="residual",
        average="vector",
        bias_correction="exact",
    )
    penalty = Penalty(0.01, 0.9, None, None, 1.0, 10)
    server = Pisa(layout, q, penalty, 0.0, 1, "examples", options.get("state", "memory"))
    return server, half(layout, q, penalty, 1, 1, "mean")


def fedavg(layout, half=LocalSgd, **_):
    server = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    return server, half(layout, **LOCAL)


def federate(method, workers, half=None, participation=1.0, timeout=None, **engine):
    model = network()
    halves = method(Layout.of_parameters(model), **({"half": half} if half else {}), **engine)
    partition = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    make = partial(local_engine, workers=workers, threads=1, **engine)
    return Federation(
        image_data(),
        partition,
        model,
        *halves,
        make,
        batch_size=4,
        participation=participation,
        round_timeout=timeout,
    )


def outcome(federation, rounds=4):
    lines = [{k: v for k, v in m.items() if k != "seconds"} for m in federation.rounds(rounds)]
    federation.grid.close()
    federation.load_weights()
    return lines, federation.model.weights.clone()


def assert_same(one, other):
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    ("method", "options"),
    [(sisa, {}), (sisa, {"participation": 0.5}), (sisa, {"state": "disk"}), (fedavg, {"stack": 3})],
)
def test_any_number_of_workers_gives_the_same_bits(method, options):
    alone = outcome(federate(method, 0, **{k: v for k, v in options.items() if k != "state"}))
    assert alone[0][-1]["test_loss"] < alone[0][0]["test_loss"]
    for workers in (1, 2, 3):
        assert_same(outcome(federate(method, workers, **options)), alone)


@pytest.fixture
def anew():
    """Workers are not forked, but start anew, as they do on macOS and Windows."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_workers_that_start_anew_give_the_same_bits(anew, caplog):
    alone = outcome(federate(sisa, 0))
    federation = federate(sisa, 2)
    rounds = federation.rounds(4)
    lines = [next(rounds), next(rounds)]
    processes = [worker.process for worker in federation.grid._workers._workers]
    assert {type(process).__name__ for process in processes} == {"SpawnProcess"}
    processes[0].kill()
    lines += list(rounds)
    federation.grid.close()
    federation.load_weights()
    lines = [{k: v for k, v in m.items() if k != "seconds"} for m in lines]
    assert_same((lines, federation.model.weights), alone)
    assert caplog.text.count("a worker process ended") == 1  # the one that was killed


def test_what_cannot_be_sent_to_workers_that_start_anew(anew, two_workers, caplog):
    half = type("Mine", (PisaClient,), {"__module__": "__main__"})
    with pytest.raises(ConfigurationError, match=r"engine.workers=2: .*Mine is defined in the main program"):
        federate(sisa, 2, half)
    federation = federate(sisa, "auto", half)
    assert federation.grid._workers is None
    assert "this process computes alone: Mine is defined in the main program" in caplog.text
    federation.grid.close()


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("name", ["bfloat16", "int8", "topk"])
def test_smaller_messages_come_from_workers_as_they_are(name, stack):
    def compressed(layout, **_):
        q = partial(Kronecker, beta=0.9, eps=1e-8, max_side=8, refresh=1, factored=0.5)
        penalty, options = Penalty(0.01, 0.9, None, None, 1.0, 10), {"wire": "gradient", "lag": 0}
        return (
            Pisa(layout, q, penalty, 0.0, 1, "examples", **options),
            PisaClient(layout, q, penalty, 1, 1, "mean", **options, compression=name),
        )

    alone = outcome(federate(compressed, 0, stack=stack))
    assert alone[0][-1]["test_loss"] < alone[0][0]["test_loss"]
    assert [line["clients_failed"] for line in alone[0]] == [0] * 5
    assert_same(outcome(federate(compressed, 2, stack=stack)), alone)


class Deadly(PisaClient):
    """Ends its process at one client's turn, until a file is there or in the process that made it."""

    by, server = signal.SIGKILL, os.getpid()

    def solve(self, stack, instruction, state):
        if 2 in stack.clients and os.getpid() != self.server and not Path(self.mark).exists():
            if self.once:
                Path(self.mark).touch()
            os.kill(os.getpid(), self.by)
        return super().solve(stack, instruction, state)


def deadly(mark, once, by=signal.SIGKILL):
    return type("Marked", (Deadly,), {"mark": str(mark), "once": once, "by": by})


def test_nothing_is_lost_with_a_worker_that_is_killed(tmp_path, caplog):
    whole = outcome(federate(sisa, 2))
    federation = federate(sisa, 2, deadly(tmp_path / "mark", once=True))
    rounds = federation.rounds(4)
    (tmp_path / "mark").touch()
    lines = [next(rounds), next(rounds), next(rounds)]
    (tmp_path / "mark").unlink()
    lines += list(rounds)
    assert "a worker process ended by SIGKILL and was replaced" in caplog.text
    assert [m["clients_failed"] for m in lines] == [0] * 5
    federation.grid.close()
    federation.load_weights()
    assert torch.equal(federation.model.weights, whole[1])


def test_a_client_that_ends_every_worker_fails_alone(tmp_path, caplog):
    federation = federate(sisa, 2, deadly(tmp_path / "never", once=False, by=signal.SIGUSR1))
    lines, _ = outcome(federation, 2)
    assert [(m["clients_ok"], m["clients_failed"]) for m in lines[1:]] == [(6, 1), (6, 1)]
    [failure] = federation.gateway.failures
    assert failure.client == 2
    assert failure.reason == "the worker process that computed it ended by SIGUSR1, twice"


def test_what_is_killed_from_outside_again_and_again_is_done_by_the_server(tmp_path):
    whole = outcome(federate(sisa, 0))
    before = torch.get_rng_state()
    assert_same(outcome(federate(sisa, 2, deadly(tmp_path / "never", once=False))), whole)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_any_worker_the_server_does_all(monkeypatch, caplog):
    whole = outcome(federate(sisa, 0))

    def start(process):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(multiprocessing.get_context("fork").Process, "start", start)
    assert_same(outcome(federate(sisa, 2)), whole)
    assert "a worker process cannot be started" in caplog.text


def test_a_stopped_worker_is_replaced(monkeypatch):
    monkeypatch.setattr(workers_module, "LOOK", 0.05)
    whole = outcome(federate(sisa, 0))
    federation = federate(sisa, 2)
    rounds = federation.rounds(4)
    lines = [next(rounds), next(rounds), next(rounds)]
    for worker in federation.grid._workers._workers:
        os.kill(worker.process.pid, signal.SIGSTOP)
    lines.append(next(rounds))
    for worker in federation.grid._workers._workers:
        os.kill(worker.process.pid, signal.SIGSTOP)
    found = federation._evaluate()
    assert (found["accuracy"], found["loss"]) == (lines[-1]["test_accuracy"], lines[-1]["test_loss"])
    with (
        monkeypatch.context() as patch
    ):  # where the system does not tell that they are stopped, the time is up
        patch.setattr(workers_module, "_is_stopped", lambda process: False)
        patch.setattr(federation, "_round_timeout", 0.2)
        for worker in federation.grid._workers._workers:
            os.kill(worker.process.pid, signal.SIGSTOP)
        found = federation._evaluate()
        assert (found["accuracy"], found["loss"]) == (lines[-1]["test_accuracy"], lines[-1]["test_loss"])
    lines += list(rounds)
    federation.grid.close()
    federation.load_weights()
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in lines] == whole[0]
    assert torch.equal(federation.model.weights, whole[1])


def test_a_disk_without_room_for_the_state_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(OSError, match=r"4.0 MB are needed at once .* set TMPDIR") as refused:
            zeros(10**6, on_disk=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.filename == str(tmp_path)


def test_replies_that_are_kept_keep_their_values():
    class Keeping(FedAvg):
        kept = ()

        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            self.kept += tuple(
                (r.content["arrays"]["weights"], r.content["arrays"]["weights"].numpy()) for r in replies
            )
            return super().aggregate_train(server_round, replies)

    server = Keeping(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    federation = federate(lambda layout: (server, LocalSgd(layout, **LOCAL)), 2)
    outcome(federation, 3)
    assert len(server.kept) == 3 * len(SIZES)
    for array, values in server.kept:
        np.testing.assert_array_equal(array.numpy(), values)
    assert len({values.tobytes() for _, values in server.kept}) == len(server.kept)


class Wordy(LocalSgd):
    """Answers more than it says it would."""

    def solve(self, stack, instruction, state):
        update = super().solve(stack, instruction, state)
        update.arrays["more"] = torch.ones(len(stack.clients), 5)
        return update


class Careless(LocalSgd):
    """Writes to what it was sent."""

    def solve(self, stack, instruction, state):
        instruction.arrays["weights"].mul_(0.5)
        return super().solve(stack, instruction, state)


@pytest.mark.parametrize(
    ("half", "reason"),
    [
        (Wordy, "the client half answers 82 numbers where its reply_fields say 77"),
        (Careless, "the client half wrote to the array 'weights' of its instruction: clone it before"),
    ],
)
def test_what_a_client_half_must_not_do(half, reason):
    federation = federate(fedavg, 2, half)
    with pytest.raises(RuntimeError, match=reason):
        list(federation.rounds(1))
    federation.grid.close()


class Slow(LocalSgd):
    """Takes for ever at one client's turn, in the first round."""

    def solve(self, stack, instruction, state):
        if 2 in stack.clients and instruction.config["server-round"] == 1:
            time.sleep(600)
        return super().solve(stack, instruction, state)


def test_the_rounds_timeout_ends_a_worker_that_takes_too_long():
    federation = federate(fedavg, 2, Slow, timeout=3.0)
    start = time.monotonic()
    lines, _ = outcome(federation, 2)
    assert time.monotonic() - start < 60
    # what was queued behind the slow one is lost with it
    assert lines[1]["clients_failed"] >= 1
    assert lines[1]["clients_ok"] >= 3
    assert (lines[2]["clients_ok"], lines[2]["clients_failed"]) == (len(SIZES), 0)


def test_workers_end_with_their_parent():
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_workers as t\n"
        "f = t.federate(t.fedavg, 2); list(f.rounds(1))\n"
        "print(*[w.process.pid for w in f.grid._workers._workers], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(runs(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_state_on_disk_lies_in_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    federation = federate(sisa, 1, state="disk")
    list(federation.rounds(2))
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    # the ledger's primals and duals, what the clients remember, and what is exchanged
    assert len(maps) == 4
    assert all(line.endswith("(deleted)") for line in maps)
    assert list(tmp_path.iterdir()) == []
    federation.grid.close()


def test_slots():
    slots = Slots([7, 3], {"a": 2, "b": 1})
    assert slots.place(3, {}) == -1
    assert slots(3, -1) == {}
    state = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    assert slots.place(3, state) == 0
    for name, vector in state.items():
        assert torch.equal(slots(3, 0)[name], vector)
    slots(3, 1)["a"].fill_(9.0)
    assert slots.place(3, slots(3, 1)) == 1
    assert slots.place(3, {"a": state["a"]}) == 0
    assert slots(3, 0)["b"].tolist() == [0.0]
    assert all(not v.any() for slot in (0, 1) for v in slots(7, slot).values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"workers": -1}, "engine.workers must be auto or a whole number of at least 0, got -1"),
        ({"workers": 1.5}, "engine.workers must be auto or a whole number of at least 0, got 1.5"),
        ({"workers": 1, "state": "tape"}, "state must be memory or disk, got tape"),
        ({"workers": 0, "state": "disk"}, "state=disk needs worker processes that are forked"),
    ],
)
def test_impossible_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        federate(fedavg, **options)
