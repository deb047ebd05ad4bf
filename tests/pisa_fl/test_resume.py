"""Runs that are stopped and go on: the same bits as if nothing had happened."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import kills
import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

import pisa_fl
from pisa_fl import ConfigurationError, runner
from pisa_fl.checkpoint import SUMS, _is_whole, checkpoints
from pisa_fl.engines.local import LocalGrid
from pisa_fl.results.console import Display
from pisa_fl.results.result import Interrupted

ROUNDS = 4
NAMES = ("server-0000.safetensors", "clients-0000.safetensors", "state.json")
QUICK = ("model=logistic", "engine.threads=1", "progress=false", "participation=0.5")
METHODS = {
    "aligned": ["strategy=sisa"],
    "gradients": ["strategy=pisa", "strategy.compression=int8"],
    "own moments": ["strategy=sisa_official"],
    "adaptive server": ["strategy=fedadam", "strategy.local_epochs=1"],
    "control variates": ["strategy=scaffold", "strategy.local_epochs=1", "engine.workers=2"],
    "weights of their own": [
        *(
            "strategy=ditto",
            "strategy.local_epochs=1",
            "strategy.personal_epochs=1",
            "evaluate_clients_every=1",
        )
    ],
}


def overrides(method, *more):
    return [*QUICK, f"rounds={ROUNDS}", *METHODS[method], *more]


def metrics_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_end(directory, reference):
    assert (directory / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert metrics_of(directory) == metrics_of(reference)
    measured = [folder / "clients.jsonl" for folder in (directory, reference)]
    assert len({file.read_bytes() if file.exists() else b"" for file in measured}) == 1
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


def test_stopped_twice_it_ends_with_the_same_bits(method, reference, tmp_path, monkeypatch):
    """By a signal, and by a file `stop`; test_chaos.py stops a run after each of its rounds."""
    show = Display.round

    def show_and_stop(display, metrics):
        show(display, metrics)
        if metrics["round"] == last:
            os.kill(os.getpid(), signal.SIGINT) if last % 2 else (tmp_path / "stop").touch()

    monkeypatch.setattr(Display, "round", show_and_stop)
    for last in (1, 2):
        with pytest.raises(Interrupted) as stopped:
            pisa_fl.resume(tmp_path) if last > 1 else pisa_fl.run(
                pisa_fl.compose(*overrides(method)), tmp_path
            )
        assert str(stopped.value) == (
            f"stopped after round {last} of {ROUNDS}; go on with: pisa-fl resume={tmp_path}"
        )
        assert len(metrics_of(tmp_path)) == last + 1
        assert not (tmp_path / "model.safetensors").exists()
        assert not (tmp_path / "stop").exists()
    last = None
    result = pisa_fl.resume(tmp_path)
    assert_same_end(tmp_path, reference)
    assert [line["round"] for line in result.metrics] == list(range(ROUNDS + 1))
    seconds = [line["seconds"] for line in result.metrics]
    assert seconds == sorted(set(seconds))


def test_a_client_whose_last_reply_was_lost_rolls_back_after_the_resume_too(tmp_path, monkeypatch):
    """It holds a state that the server never accepted, and the one before; both must come back."""
    send_and_receive = LocalGrid.send_and_receive

    def lose_one(grid, messages, **kwargs):
        replies = send_and_receive(grid, list(messages), **kwargs)
        return [r for r in replies if r.metadata.src_node_id != 0 or federations[-1].round != 1]

    federations = []
    prepare = runner.prepare
    monkeypatch.setattr(
        runner, "prepare", lambda *given: federations.append(prepare(*given)) or federations[-1]
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


def test_a_run_may_not_be_cut_short_at_a_round_that_was_not_evaluated(tmp_path):
    chosen = overrides("aligned", "evaluate_every=3", "checkpoint.every=1", f"checkpoint.keep={ROUNDS}")
    pisa_fl.run(pisa_fl.compose(*chosen), tmp_path)
    edit(tmp_path, rounds=2)
    for later in range(3, ROUNDS + 1):
        shutil.rmtree(tmp_path / "checkpoint" / f"round-{later:06d}")
    sentence = "rounds=2 in .*config.yaml ends with a round that was not evaluated .*: set it to 3 or more"
    with pytest.raises(ConfigurationError, match=sentence):
        pisa_fl.resume(tmp_path)
    edit(tmp_path, rounds=3)
    assert pisa_fl.resume(tmp_path).summary["rounds"] == 3


def test_the_signal_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    pisa_fl.run(pisa_fl.compose(*overrides("aligned", "rounds=0")), tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# --- processes that are stopped from outside

LONG = 12
SLOWLY = """
import time
from pisa_fl.cli import main
from pisa_fl.results.console import Display
show = Display.round
Display.round = lambda display, metrics: (show(display, metrics), time.sleep(0.5))
main.main()
"""  # the command, with half a second a round for the signal to arrive in


def start(tmp_path, *arguments):
    """The command in a process of its own, in the middle of a round."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
    line = [sys.executable, "-c", SLOWLY, *arguments]
    process = subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not (
        metrics.is_file() and metrics.read_text().count("\n") > max(done, 2)
    ):
        time.sleep(0.02)
    return process


def test_a_process_is_asked_to_stop_twice_and_killed_and_ends_with_the_same_bits(tmp_path, command):
    chosen = overrides("own moments", f"rounds={LONG}", "checkpoint.every=5")
    pisa_fl.run(pisa_fl.compose(*chosen), tmp_path / "reference")
    directory, arguments = tmp_path / "run", [*chosen, "hydra.run.dir=run"]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(tmp_path, *arguments)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        stopped = len(metrics_of(directory)) - 1
        assert process.returncode == 130
        assert 2 <= stopped < LONG
        assert err == (
            f"pisa-fl: stopped after round {stopped} of {LONG}; go on with: pisa-fl resume={directory}\n"
        )
        assert (directory / "checkpoint" / f"round-{stopped:06d}" / "state.json").is_file()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["reference", "run"]
        arguments = [err.split()[-1]]

    process = start(tmp_path, *arguments)
    process.send_signal(signal.SIGSTOP)  # so that it does not end meanwhile
    ended = command(*arguments)
    assert ended.status == 2
    assert ended.err.startswith(f"pisa-fl: {directory} is being written by a run that goes on")
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (directory / "model.safetensors").exists()
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"round": 9')  # what a kill in the middle of a line leaves

    ended = command("resume=run")
    assert (ended.status, ended.err) == (0, "")
    assert_same_end(directory, tmp_path / "reference")


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


DAMAGES = (truncate, flip, os.remove, lambda path: path.write_text("null"))


def test_a_damaged_checkpoint_is_passed_over(copy, finished, caplog):
    flip(copy / "checkpoint" / "round-000004" / "clients-0000.safetensors")
    (copy / "model.safetensors").unlink()
    pisa_fl.resume(copy)
    assert "checkpoint round-000004 is damaged" in caplog.text
    assert_same_end(copy, finished)


def test_no_bit_of_a_checkpoint_changes_silently(copy):
    checkpoint = copy / "checkpoint" / "round-000004"
    assert _is_whole(checkpoint)
    draw = random.Random(0)
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        for _ in range(10):
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(changed)
            assert not _is_whole(checkpoint)
        for damage in DAMAGES:
            file.write_bytes(content)
            damage(file)
            assert not _is_whole(checkpoint)
        file.write_bytes(content)
    assert _is_whole(checkpoint)


def test_a_checkpoint_that_does_not_load_is_passed_over(copy, finished, caplog):
    folder = copy / "checkpoint" / "round-000004"
    state = json.loads((folder / "state.json").read_text())
    del state["seconds"]
    (folder / "state.json").write_text(json.dumps(state))
    sums = subprocess.run(["sha256sum", *NAMES], cwd=folder, capture_output=True, text=True, check=True)
    (folder / SUMS).write_text(sums.stdout)
    pisa_fl.resume(copy)
    assert "checkpoint round-000004 is damaged ('seconds'), trying the one before" in caplog.text
    assert_same_end(copy, finished)


def test_checkpoints_are_in_the_order_of_their_rounds(tmp_path):
    for number in (1_000_000, 999_999, 20):
        (tmp_path / f"round-{number:06d}").mkdir()
    (tmp_path / "round-x").mkdir()
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["round-000020", "round-999999", "round-1000000"]


def test_killed_before_any_of_its_file_operations_a_run_goes_on(tmp_path):
    """A cheap part of them; its rounds are also given up for want of replies, with a single checkpoint kept."""
    line = [sys.executable, kills.__file__, str(tmp_path), "1", "5", "47"]
    ended = subprocess.run(line, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[:-1] == []


def test_a_run_without_a_checkpoint_yet_begins_again(finished, tmp_path):
    (tmp_path / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    (tmp_path / ".initial.safetensors.77").touch()
    (tmp_path / "metrics.jsonl").write_text('{"round": 0}\n{"rou')
    pisa_fl.resume(tmp_path)
    assert_same_end(tmp_path, finished)
    assert (tmp_path / "initial.safetensors").read_bytes() == (finished / "initial.safetensors").read_bytes()
    assert not (tmp_path / ".initial.safetensors.77").exists()


class Broken(LocalGrid):
    """Raises in round 3."""

    def deliver(self, messages, timeout):
        if any(message.content["config"]["server-round"] == 3 for message in messages):
            raise RuntimeError("broken")
        return super().deliver(messages, timeout)


def test_a_run_that_fails_leaves_a_checkpoint_of_its_last_round(finished, tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        pisa_fl.run(
            pisa_fl.compose(*overrides("own moments", "checkpoint.every=10")),
            tmp_path,
            lambda clients: Broken(clients.host(clients.rows, 1, 250)),
        )
    assert [path.name for path in checkpoints(tmp_path / "checkpoint")][1:] == ["round-000002"]
    pisa_fl.resume(tmp_path)
    assert_same_end(tmp_path, finished)


@pytest.mark.parametrize("limit", [10_000, 400_000])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(command, tmp_path, finished, limit):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        ended = command(*overrides("own moments", "checkpoint.every=1", "hydra.run.dir=run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run = tmp_path / "run"
    file = {10_000: "initial.safetensors"}.get(limit, "checkpoint/round-00000")
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert ended.err.startswith(f"pisa-fl: {run}/{file}")
    assert ended.err.endswith(f": File too large; go on with: pisa-fl resume={run}\n")
    assert not list(run.glob("**/.*"))
    assert command("resume=run").status == 0
    assert_same_end(run, finished)


DAMAGE = {
    "no JSON": ("metrics.jsonl", 2, '{"round": 2, '),
    "no line": ("metrics.jsonl", 2, "[1, 2]"),
    "no round": ("metrics.jsonl", 1, '{"test_accuracy": 0.5}'),
    "no numbers": ("metrics.jsonl", 1, '{"round": 1, "test_accuracy": "high"}'),
    "zeros": ("metrics.jsonl", 0, "\0\0\0"),
    "empty": ("metrics.jsonl", 0, None),
    "a failure": ("failures.jsonl", 0, "nothing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_lines_that_a_checkpoint_presumes_are_told(copy, command, kind):
    name, number, text = DAMAGE[kind]
    (copy / "failures.jsonl").write_text(2 * '{"round": 2, "client": 1, "reason": "x"}\n')
    lines = (copy / name).read_text().splitlines()
    lines[number:] = [] if text is None else [text, *lines[number + 1 :]]
    (copy / name).write_text("".join(f"{line}\n" for line in lines))
    before = (copy / "metrics.jsonl").read_bytes()
    assert f"line {number + 1} of {copy / name} is damaged or missing" in refused(command, f"resume={copy}")
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_damaged_lines_of_rounds_that_are_done_again_are_not_needed(copy, finished):
    shutil.rmtree(copy / "checkpoint" / "round-000004")
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_bytes(b"".join(lines[:4]) + b"\0\xff\n[\n\0\0")
    pisa_fl.resume(copy)
    assert_same_end(copy, finished)


def test_what_a_kill_left_of_a_checkpoint_is_not_looked_at(copy, finished):
    (copy / "checkpoint" / "round-000004").rename(copy / "checkpoint" / ".round-000004")
    pisa_fl.resume(copy)
    assert_same_end(copy, finished)


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
    assert line == f"pisa-fl: resume: {tmp_path / folder} is not a run directory, it has no config.yaml"
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
        (
            text.replace("pisa_fl.models.mlp.mlp", "pisa_fl.system.files.write"),
            "model._target_=pisa_fl.system.files.write",
        ),
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
    for trusting in (
        ["allow=[users]"],
        ["--config-dir", str(tmp_path)],
    ):  # it may be built, and is another run's
        ended = command(f"resume={copy}", *trusting)
        assert ended.status == 2
        assert 'model._target_ is "users.net" in config.yaml and was' in ended.err


def test_other_overrides_beside_resume_are_refused(copy, command):
    line = refused(command, f"resume={copy}", "rounds=9", "seed=9")
    assert line == "pisa-fl: resume uses the run's own configuration: leave out seed=9"
    assert yaml.safe_load((copy / "config.yaml").read_text())["rounds"] == ROUNDS


@pytest.mark.parametrize(("own", "warned"), [([], True), (["strategy.schedule=constant"], False)])
def test_a_finished_run_has_more_rounds(command, tmp_path, own, warned):
    """Those of a run that was planned to learn as this one was, and to be as long as it is now."""
    chosen = [*QUICK, "engine.workers=0", *own]
    assert command(*chosen, "rounds=2", "hydra.run.dir=run").status == 0
    assert "rounds=1 is less than the 2 rounds" in refused(command, "resume=run", "rounds=1")
    assert "rounds must be a whole number" in command("resume=run", "rounds=many").err
    ended = command("resume=run", "rounds=4")
    assert ended.status == 0
    assert ("lr was planned to fall until round 2" in " ".join(ended.out.split())) == warned
    longer = pisa_fl.compose(*chosen, "rounds=4", "strategy.horizon=2")
    pisa_fl.run(longer, tmp_path / "longer")
    assert_same_end(tmp_path / "run", tmp_path / "longer")
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (stored["rounds"], stored["strategy"]["horizon"]) == (4, 2)
    assert command("resume=run").status == 0


# --- what is not as it was when the run began


IMAGES = (
    "data=imagefolder",
    "data.path=data",
    "data.cache=null",
    "data.channels=1",
    "batch_size=4",
    "clients=4",
)


def write_images(folder, first, last):
    rng = np.random.default_rng(first)
    for split in ("train", "test"):
        for shade, name in enumerate("abcd"):
            below = folder / split / name
            below.mkdir(parents=True, exist_ok=True)
            for number in range(first, last):
                pixels = (rng.integers(0, 120, (8, 8)) + 40 * shade).astype(np.uint8)
                Image.fromarray(pixels).save(below / f"{number:03}.png")


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """A folder with images, an init file, a partition file, and a run on them that was stopped after round 0."""
    folder = tmp_path_factory.mktemp("pictured")
    write_images(folder / "data", 0, 8)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        pisa_fl.run(pisa_fl.compose(*QUICK, *IMAGES, "rounds=0", "seed=3"), "first")
        files = [
            "init=first/initial.safetensors",
            "partition=from_file",
            "partition.path=first/partition.json",
        ]
        (folder / "run").mkdir()
        (folder / "run" / "stop").touch()
        with pytest.raises(Interrupted):
            pisa_fl.run(pisa_fl.compose(*QUICK, *IMAGES, *files, "rounds=2"), "run")
        config = pisa_fl.compose(*QUICK, *IMAGES, *files, "rounds=2")
        pisa_fl.run(config, "whole")
    return folder


@pytest.fixture
def pictures(pictured, tmp_path):
    return shutil.copytree(pictured, tmp_path / "pictures")


def edit(directory, **changes):
    """Edit config.yaml by hand: dots are double underscores."""
    config = OmegaConf.load(directory / "config.yaml")
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    OmegaConf.save(config, directory / "config.yaml")


def test_a_copied_run_goes_on_elsewhere_without_what_it_does_not_need(pictures, pictured, command, tmp_path):
    """From another working directory, without init and partition file, with the data where they were."""
    shutil.rmtree(pictures / "first")
    copied = shutil.copytree(pictures / "run", tmp_path / "copied")
    shutil.rmtree(pictured / "first")
    assert command(f"resume={copied}").status == 0
    assert_same_end(copied, pictured / "whole")
    assert not (pictured / "run" / "model.safetensors").exists()


def test_other_data(pictures, command):
    edit(pictures / "run", data__path=str(pictures / "data"))
    whole = content(pictures / "run")
    write_images(pictures / "data", 8, 9)
    line = refused(command, f"resume={pictures / 'run'}")
    assert line == "pisa-fl: resume: the data are not those of the run: put them back as they were"
    for path in pictures.glob("data/*/*/008.png"):
        path.unlink()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(pictures / "data" / "test" / "a" / "000.png")
    assert refused(command, f"resume={pictures / 'run'}") == line
    assert content(pictures / "run") == whole


def swap(path):
    """The last two examples of the first client change places."""
    deal = json.loads(path.read_text())
    deal["0"][-2:] = reversed(deal["0"][-2:])
    path.write_text(json.dumps(deal))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("partition.json", swap, "partition.json is not what was dealt"),
        ("initial.safetensors", flip, "initial.safetensors does not hold the weights"),
    ],
)
def test_other_files(copy, command, name, damage, words):
    damage(copy / name)
    before = content(copy)
    assert words in refused(command, f"resume={copy}")
    assert content(copy) == before


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"strategy__server__lambda_": 0.5},
        {"engine__precision": "bfloat16"},
    ],
    ids=str,
)
def test_another_configuration(copy, command, change):
    edit(copy, **change)
    before = content(copy)
    [(key, value)] = change.items()
    line = refused(command, f"resume={copy}")
    assert line.startswith(f"pisa-fl: resume: {key.replace('__', '.')} is {json.dumps(value)} in config.yaml")
    assert content(copy) == before


def test_another_model_of_the_same_configuration(copy, command, monkeypatch):
    def wider(shape, classes, hidden) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 11))

    wider.__module__ = "pisa_fl.models.mlp"
    monkeypatch.setattr("pisa_fl.models.mlp.mlp", wider)
    assert "the model's tensors are not those of the run" in refused(command, f"resume={copy}")


def test_what_only_says_how_the_run_is_made_may_be_edited(copy, finished, command, tmp_path):
    edit(
        copy,
        name="other",
        rounds=ROUNDS + 1,
        checkpoint__every=3,
        progress=True,
        engine__workers=0,
        targets=[0.1],
    )
    assert command(f"resume={copy}").status == 0
    longer = tmp_path / "longer"
    pisa_fl.run(pisa_fl.compose(*overrides("own moments", f"rounds={ROUNDS + 1}")), longer)
    assert_same_end(copy, longer)
    edit(copy, rounds=ROUNDS)
    before = content(copy)
    assert f"rounds={ROUNDS} in" in (line := refused(command, f"resume={copy}"))
    assert f"less than the {ROUNDS + 1} rounds that are done" in line
    assert content(copy) == before


def test_files_of_another_run(copy, command, tmp_path):
    other = tmp_path / "other"
    pisa_fl.run(pisa_fl.compose(*overrides("own moments", "seed=1", "rounds=1")), other)
    whole = shutil.copytree(copy, tmp_path / "saved")
    shutil.copy(other / "metrics.jsonl", copy)
    assert "metrics.jsonl has lines of run" in refused(command, f"resume={copy}")
    shutil.copy(whole / "metrics.jsonl", copy)
    shutil.copytree(other / "checkpoint" / "round-000001", copy / "checkpoint" / "round-000009")
    assert command(f"resume={copy}").status == 0
    shutil.rmtree(copy / "checkpoint")
    shutil.copytree(other / "checkpoint", copy / "checkpoint")
    assert "put the files of one run together" in refused(command, f"resume={copy}")


def test_a_run_of_a_version_without_ids(copy, command):
    config = OmegaConf.load(copy / "config.yaml")
    del config["run_id"]
    OmegaConf.save(config, copy / "config.yaml")
    assert "was written by another version of pisa-fl" in refused(command, f"resume={copy}")


def content(directory):
    """Every file below a folder, and what it holds."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
