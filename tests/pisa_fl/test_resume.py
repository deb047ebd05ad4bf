"""Runs that are stopped and go on: the same bits as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

import pisa_fl
from pisa_fl import simulation
from pisa_fl.engines.local import LocalGrid

ROUNDS = 4
QUICK = ("model=logistic", "engine.threads=1", "progress=false", "participation=0.5")
METHODS = {
    "aligned": ["strategy=sisa"],
    "own moments": ["strategy=sisa_official"],
    "adaptive server": ["strategy=fedadam", "strategy.local_epochs=1"],
}


def overrides(method, *more):
    return [*QUICK, f"rounds={ROUNDS}", *METHODS[method], *more]


def metrics_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_end(directory, reference):
    assert (directory / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert metrics_of(directory) == metrics_of(reference)
    assert (directory / "summary.json").is_file()
    assert (directory / "curves.png").is_file()
    assert len(list(directory.glob("events.out.tfevents.*"))) == 1


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def reference(method, tmp_path_factory):
    """A run that nobody stopped."""
    directory = tmp_path_factory.mktemp("reference")
    pisa_fl.run(pisa_fl.compose(*overrides(method)), directory)
    return directory


@pytest.mark.parametrize("last", range(ROUNDS))
def test_stopped_after_any_round_it_ends_with_the_same_bits(method, reference, tmp_path, monkeypatch, last):
    show = simulation.Display.show

    def show_and_stop(display, metrics):
        show(display, metrics)
        if metrics["round"] == last:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(simulation.Display, "show", show_and_stop)
    with pytest.raises(simulation.Interrupted) as stopped:
        pisa_fl.run(pisa_fl.compose(*overrides(method)), tmp_path)
    assert str(stopped.value) == (
        f"stopped after round {last} of {ROUNDS}; go on with: pisa-fl resume={tmp_path}"
    )
    assert len(metrics_of(tmp_path)) == last + 1
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    result = pisa_fl.resume(tmp_path)
    assert_same_end(tmp_path, reference)
    assert [line["round"] for line in result.metrics] == list(range(ROUNDS + 1))
    assert result.metrics[-1]["seconds"] > result.metrics[last]["seconds"]


def test_a_client_whose_last_reply_was_lost_rolls_back_after_the_resume_too(tmp_path, monkeypatch):
    """It holds a state that the server never accepted, and the one before; both must come back."""
    send_and_receive = LocalGrid.send_and_receive

    def lose_one(grid, messages, **kwargs):
        replies = send_and_receive(grid, list(messages), **kwargs)
        return [r for r in replies if r.metadata.src_node_id != 0 or federations[-1].round != 1]

    federations = []
    prepare = simulation.prepare
    monkeypatch.setattr(
        simulation, "prepare", lambda *given: federations.append(prepare(*given)) or federations[-1]
    )
    monkeypatch.setattr(LocalGrid, "send_and_receive", lose_one)
    chosen = overrides("own moments", "participation=1.0", "checkpoint.every=1", f"checkpoint.keep={ROUNDS}")
    pisa_fl.run(pisa_fl.compose(*chosen), tmp_path / "whole")
    assert [line["clients_failed"] for line in metrics_of(tmp_path / "whole")] == [0, 0, 1, 0, 0]
    copy = shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    for later in (3, 4):
        shutil.rmtree(copy / "checkpoint" / f"round-{later:06d}")
    pisa_fl.resume(copy)
    assert_same_end(copy, tmp_path / "whole")


def test_the_signal_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    pisa_fl.run(pisa_fl.compose(*overrides("aligned", "rounds=0")), tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# --- processes that are stopped from outside

LONG = 12
SLOWLY = """
import time
from pisa_fl import main, simulation
show = simulation.Display.show
simulation.Display.show = lambda display, metrics: (show(display, metrics), time.sleep(0.5))
main.main()
"""  # the command, with half a second a round for the signal to arrive in


@pytest.fixture(scope="module")
def long_reference(tmp_path_factory):
    directory = tmp_path_factory.mktemp("long")
    pisa_fl.run(pisa_fl.compose(*overrides("own moments", f"rounds={LONG}")), directory)
    return directory


def start(tmp_path, *more):
    arguments = overrides("own moments", f"rounds={LONG}", "hydra.run.dir=run", *more)
    line = [sys.executable, "-c", SLOWLY, *arguments]
    process = subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_process_that_is_asked_to_stop(tmp_path, command, long_reference, number):
    process = start(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    directory = tmp_path / "run"
    stopped = len(metrics_of(directory)) - 1
    assert process.returncode == 130
    assert 2 <= stopped < LONG
    assert err == (
        f"pisa-fl: stopped after round {stopped} of {LONG}; go on with: pisa-fl resume={directory}\n"
    )
    assert (directory / "checkpoint" / f"round-{stopped:06d}" / "state.json").is_file()

    ended = command(err.split()[-1])
    assert (ended.status, ended.err) == (0, "")
    assert_same_end(directory, long_reference)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_process_that_is_killed(tmp_path, command, long_reference):
    process = start(tmp_path, "checkpoint.every=1")
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "model.safetensors").exists()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 9')  # what a kill in the middle of a line leaves
    ended = command("resume=run")
    assert (ended.status, ended.err) == (0, "")
    assert_same_end(tmp_path / "run", long_reference)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- damaged and missing checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    pisa_fl.run(pisa_fl.compose(*overrides("own moments", "checkpoint.every=1")), directory)
    return directory


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_as_many_checkpoints_are_kept_as_asked_for(finished):
    assert sorted(path.name for path in (finished / "checkpoint").iterdir()) == [
        "round-000003",
        "round-000004",
    ]


@pytest.mark.parametrize("name", ["server-0000.safetensors", "clients-0000.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, flip, os.remove, lambda path: path.write_text("null")])
def test_a_damaged_checkpoint_is_passed_over(copy, finished, caplog, name, damage):
    damage(copy / "checkpoint" / "round-000004" / name)
    (copy / "model.safetensors").unlink()
    pisa_fl.resume(copy)
    assert "checkpoint round-000004 is damaged" in caplog.text
    assert_same_end(copy, finished)


def test_what_a_kill_left_of_a_checkpoint_is_not_looked_at(copy, finished):
    (copy / "checkpoint" / "round-000004").rename(copy / "checkpoint" / ".round-000004")
    pisa_fl.resume(copy)
    assert_same_end(copy, finished)


def test_a_file_called_stop_stops_a_run_once(tmp_path, command, long_reference):
    process = start(tmp_path)
    directory = tmp_path / "run"
    (directory / "stop").touch()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(metrics_of(directory)) - 1 < LONG
    assert not (directory / "stop").exists()
    assert command(f"resume={directory}").status == 0
    assert_same_end(directory, long_reference)


def test_two_processes_do_not_write_one_run_directory(tmp_path, command):
    process = start(tmp_path)
    directory = tmp_path / "run"
    assert refused(command, f"resume={directory}").startswith(
        f"pisa-fl: resume: {directory} is being written by a run that goes on"
    )
    assert process.poll() is None
    process.kill()
    process.communicate(timeout=60)
    assert "is being written" not in command(f"resume={directory}").err


def test_resuming_a_finished_run_changes_nothing(copy, finished, command):
    ended = command(f"resume={copy}")
    assert ended.status == 0
    assert_same_end(copy, finished)
    assert (copy / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()


def test_failures_of_rounds_that_are_done_again_are_not_there_twice(copy):
    shutil.rmtree(copy / "checkpoint" / "round-000004")
    (copy / "failures.jsonl").write_text(
        '{"round": 2, "client": 1, "reason": "old"}\n{"round": 4, "client": 1, "reason": "undone"}\n'
    )
    pisa_fl.resume(copy)
    assert (copy / "failures.jsonl").read_text() == '{"round": 2, "client": 1, "reason": "old"}\n'


def refused(command, *arguments):
    ended = command(*arguments)
    (line,) = ended.err.splitlines()
    assert ended.status == 2
    assert line.startswith("pisa-fl: resume")
    return line


def test_no_whole_checkpoint(copy, command):
    for path in copy.glob("checkpoint/*/state.json"):
        truncate(path)
    before = (copy / "metrics.jsonl").read_text()
    assert refused(command, f"resume={copy}").endswith("/checkpoint holds no checkpoint that is whole")
    assert (copy / "metrics.jsonl").read_text() == before
    shutil.rmtree(copy / "checkpoint")
    assert refused(command, f"resume={copy}").endswith("/checkpoint holds no checkpoint that is whole")


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_a_folder_that_is_no_run_directory(command, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    line = refused(command, f"resume={folder}")
    assert line == f"pisa-fl: resume: {folder} is not a run directory, it has no config.yaml"
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_configuration_that_is_none(copy, command):
    (copy / "config.yaml").write_text("rounds: [")
    assert "config.yaml cannot be read" in refused(command, f"resume={copy}")
    (copy / "config.yaml").write_text("- 1\n")
    assert "config.yaml cannot be read" in refused(command, f"resume={copy}")


def test_a_strangers_configuration_has_nothing_built_that_is_not_allowed(
    copy, command, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users.py").write_text(
        "from pathlib import Path\nfrom pisa_fl.models.mlp import mlp\n"
        "def net(shape, classes, hidden):\n    Path('built').touch()\n    return mlp(shape, classes, hidden)\n"
    )
    text = (copy / "config.yaml").read_text()
    before = sorted(path.name for path in copy.iterdir())
    for own, words in (
        (text.replace("pisa_fl.models.mlp.mlp", "os.system"), "model._target_=os.system must not be built"),
        (text.replace("pisa_fl.models.mlp.mlp", "pisa_fl.files.write"), "model._target_=pisa_fl.files.write"),
        (text.replace("pisa_fl.models.mlp.mlp", "users.net"), "add it to `allow` if you trust it"),
        (text + "extra:\n- a: {_target_: subprocess.Popen}\n", "extra.0.a._target_=subprocess.Popen"),
        (text + "extra: ${oc.env:HOME}\n", "is an interpolation"),
        (text + "allow: [os, users]\n", "cannot be read"),
        (
            text.replace("mlp.mlp", "mlp.nn").replace("allow: []", "allow: [torch, pisa_fl]"),
            "must not be built",
        ),
    ):
        assert own != text
        (copy / "config.yaml").write_text(own)
        ended = command(f"resume={copy}")
        assert ended.status == 2
        assert words in ended.err
        assert ended.err.count("\n") == 1
        assert sorted(path.name for path in copy.iterdir()) == before
    (copy / "config.yaml").write_text(text.replace("pisa_fl.models.mlp.mlp", "users.net"))
    assert command(f"resume={copy}", "allow=[users]").status == 0
    assert (tmp_path / "built").exists()
    (tmp_path / "built").unlink()
    assert command(f"resume={copy}", "--config-dir", str(tmp_path)).status == 0
    assert (tmp_path / "built").exists()


def test_other_overrides_beside_resume_are_refused(copy, command):
    line = refused(command, f"resume={copy}", "rounds=9")
    assert line == "pisa-fl: resume uses the run's own configuration: leave out rounds=9"
    assert yaml.safe_load((copy / "config.yaml").read_text())["rounds"] == ROUNDS
