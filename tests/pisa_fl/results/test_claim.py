"""Whose a run directory is: of one run, written by one process, taken back only by who made it."""

import json
import multiprocessing
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra

import pisa_fl
from pisa_fl.cli.main import main
from pisa_fl.identity import run_id
from pisa_fl.results import claim
from pisa_fl.results.result import Interrupted

QUICK = ("model=logistic", "clients=5", "rounds=1", "engine.threads=1", "engine.workers=0", "progress=false")


def content(directory):
    """Every file below a folder, and what it holds."""
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in directory.rglob("*")
    }


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that a file `stop`, there before it began, stopped after round 0."""
    directory = tmp_path_factory.mktemp("stopped")
    (directory / "stop").touch()
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(Interrupted):
        pisa_fl.run(pisa_fl.compose(*QUICK), directory)
    assert not (directory / "stop").exists()
    return directory


@pytest.mark.parametrize("engine", ["local", "ray", "flower"])
def test_a_second_run_is_refused_and_changes_nothing(stopped, command, tmp_path, engine):
    before = content(stopped)
    sentence = f"{stopped} holds a run already, as its config.yaml tells"
    remedy = f"go on with that run: pisa-fl resume={stopped}"
    threads = [f"engine={engine}", "engine.threads=1"]
    chosen = ["model=logistic", "clients=5", "rounds=3", "seed=1", *threads]
    ended = command(*chosen, f"hydra.run.dir={stopped}")
    assert ended.status == 2
    assert ended.err.startswith(f"pisa-fl: {sentence}")
    assert ended.err.endswith(f"{remedy}\n")
    with pytest.raises(pisa_fl.ConfigurationError, match="holds a run already"):
        pisa_fl.run(pisa_fl.compose(*chosen), stopped)
    assert content(stopped) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", [*(name for name in claim.FILES if "*" not in name), "events.out.tfevents.1.host"]
)
def test_any_file_of_a_run_tells_that_there_is_one(command, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("of somebody")
    ended = command(*QUICK, "hydra.run.dir=out")
    assert ended.status == 2
    assert f"as its {name} tells" in ended.err
    assert content(tmp_path) == {"out": None, f"out/{name}": b"of somebody"}


@pytest.mark.parametrize("launcher", ["parallel", "basic"])
def test_a_run_of_a_sweep_leaves_the_directory_of_another_alone(command, tmp_path, launcher):
    """And takes the next one, but with Hydra's own launcher, where it is refused."""
    sweep = ["--multirun", *QUICK, "hydra.sweep.dir=out"]
    assert command(*sweep, "seed=0").status == 0
    first = content(tmp_path / "out" / "0")
    ended = command(*sweep, "seed=1,2", f"hydra/launcher={launcher}")
    assert content(tmp_path / "out" / "0") == first
    seeds = [yaml.safe_load(path.read_text())["seed"] for path in sorted(tmp_path.glob("out/*/config.yaml"))]
    if launcher == "parallel":
        assert (ended.status, seeds) == (0, [0, 1, 2])
    else:
        assert (ended.status, seeds) == (2, [0, 2])
        assert "holds a run already" in ended.err


def test_a_directory_that_somebody_writes_is_refused_before_it_is_looked_at(command, tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    with FileLock(directory / ".lock"):
        for overrides in (QUICK, ("engine=flower", "model=logistic")):
            ended = command(*overrides, "hydra.run.dir=out")
            assert ended.status == 2
            assert f"{directory} is being written by a run that goes on" in ended.err
            assert f"pisa-fl resume={directory}" in ended.err
    assert content(tmp_path) == {"out": None, "out/.lock": b""}
    assert command(*QUICK, "hydra.run.dir=out").status == 0
    assert not (directory / ".lock").exists()


def test_only_folders_that_the_command_made_are_taken_back(command, tmp_path):
    (tmp_path / "theirs" / "empty").mkdir(parents=True)
    (tmp_path / "sweep" / "0").mkdir(parents=True)
    before = content(tmp_path)
    wrong = "strategy.lr=-1"
    for directory in ("theirs/empty", "theirs", "theirs/mine/deep", "mine", "."):
        assert command(*QUICK, wrong, f"hydra.run.dir={directory}").status == 2
        assert command(*QUICK, "resume=nowhere", f"hydra.run.dir={directory}").status == 2
    assert command("--multirun", *QUICK, wrong, "seed=0,1", "hydra.sweep.dir=sweep").status == 2
    assert content(tmp_path) == before | {
        f"sweep/{name}": (tmp_path / "sweep" / name).read_bytes() for name in ("multirun.yaml", "sweep.json")
    }
    with pytest.raises(pisa_fl.ConfigurationError):
        pisa_fl.run(pisa_fl.compose(*QUICK, wrong), tmp_path / "theirs" / "from" / "python")
    with pytest.raises(pisa_fl.ConfigurationError):
        pisa_fl.run(pisa_fl.compose(*QUICK, wrong), tmp_path / "theirs" / "empty")
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == ["empty"]


def test_a_folder_that_was_taken_back_meanwhile_is_made_again(tmp_path, monkeypatch):
    """Between making it and claiming it, another process that had made it first is refused and removes it."""
    directory, make = tmp_path / "a" / "b", claim.make

    def lose_it(path):
        monkeypatch.setattr(claim, "make", make)
        make(path)
        path.rmdir()
        path.parent.rmdir()

    monkeypatch.setattr(claim, "make", lose_it)
    with claim.claimed(directory):
        (directory / "x").touch()
    assert (directory / "x").exists()


AT_ONCE = """
from hydra.core import utils
class datetime:
    now = staticmethod(lambda: datetime)
    strftime = staticmethod(lambda pattern: "same")
utils.datetime = datetime  # what Hydra's ${now:...} is made of
"""


def run_at_once(folder, seed):
    os.chdir(folder)
    exec(AT_ONCE, {})
    sys.argv = ["pisa-fl", *QUICK, "rounds=0", f"seed={seed}"]
    GlobalHydra.instance().clear()
    main()


def test_runs_of_the_same_second_have_directories_of_their_own(tmp_path):
    new = multiprocessing.get_context("fork").Process
    processes = [new(target=run_at_once, args=(tmp_path, seed)) for seed in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert seeds_below(tmp_path / "runs/same", ("same-pisa", "same-pisa-2")) == [0, 1]


def test_sweeps_of_the_same_second_have_folders_of_their_own(command, tmp_path, monkeypatch):
    monkeypatch.setattr("hydra.core.utils.datetime", None)
    exec(AT_ONCE, {})
    for seeds in ("0,1", "2,3"):
        assert command("--multirun", *QUICK, "rounds=0", f"seed={seeds}").status == 0
    assert seeds_below(tmp_path / "multirun/same", ("same/0", "same/1", "same-2/0", "same-2/1")) == [
        0,
        1,
        2,
        3,
    ]


def seeds_below(folder, names):
    assert {path.parent for path in folder.rglob("config.yaml")} == {folder / name for name in names}
    return sorted(yaml.safe_load((folder / name / "config.yaml").read_text())["seed"] for name in names)


NAMES = (
    "plain",
    "my runs, old",
    "a=b",
    "$HOME $(id) `id`",
    'it\'s "so"',
    "[a]{b}: (c)",
    "Läufe",
    "back\\slash\\'quote\\\"",
    "end\\",
    "$x y$",
    "#1 & 2; 3 *?",
    " around ",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_command_works_in_a_shell(stopped, command, tmp_path, name):
    directory = tmp_path / name
    (directory / "x").mkdir(parents=True)
    said = claim.resume_command(directory / "x")
    arguments = subprocess.check_output(
        ["bash", "-c", said.replace("pisa-fl ", "printf '%s' ", 1)], text=True
    )
    assert shlex.split(said) == ["pisa-fl", arguments]
    ended = command(arguments)
    assert ended.err == f"pisa-fl: resume: {directory / 'x'} is not a run directory, it has no config.yaml\n"


NO_ROUND = ("rounds=0", "strategy.horizon=1")
"""Of a run that is planned as the stopped one was."""


def test_a_run_id_is_in_every_file_and_is_the_same_for_the_same_run(stopped, tmp_path):
    pisa_fl.run(pisa_fl.compose(*QUICK, "engine.workers=1", "name=other", *NO_ROUND), tmp_path / "again")
    given = [f"partition.path={stopped}/partition.json", f"init={stopped}/initial.safetensors"]
    pisa_fl.run(pisa_fl.compose(*QUICK, "partition=from_file", *given, *NO_ROUND), tmp_path / "file")
    found = {ids(directory) for directory in (stopped, tmp_path / "again", tmp_path / "file")}
    assert len(found) == 1
    others = [
        "seed=1",
        "batch_size=32",
        "participation=0.5",
        "strategy.lr=0.1",
        "data.mean=[0.2]",
        "partition=iid",
    ]
    for other in others:
        federation = pisa_fl.prepare(pisa_fl.compose(*QUICK, *NO_ROUND, other))
        found.add(run_id(federation.identity))
    assert len(found) == 1 + len(others)


def ids(directory: Path) -> str:
    """The one id that all files of a run have."""
    states = [json.loads(path.read_text()) for path in directory.glob("checkpoint/*/state.json")]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    summaries = [json.loads(path.read_text()) for path in directory.glob("summary.json")]
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert states
    assert lines
    [number] = {part["run_id"] for part in (*states, *lines, *summaries, config)}
    return number
