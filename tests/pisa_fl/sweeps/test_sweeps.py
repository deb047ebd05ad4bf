"""Sweeps: side by side or not, killed or not, they end with the same table and the same bits."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from sweeping import begun, done, ended, held, started, times, until

import pisa_fl
from pisa_fl import ConfigurationError
from pisa_fl.engines.base import SHARE
from pisa_fl.sweeps.folder import Progress
from pisa_fl.sweeps.launcher import share
from pisa_fl.sweeps.table import command_in, estimate

QUICK = ("model=logistic", "clients=5", "rounds=4", "engine.workers=0", "checkpoint.every=2")
SIX = ("--multirun", *QUICK, "strategy=sisa,pisa", "seed=0,1,2")


def bits(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    config = yaml.safe_load((directory / "config.yaml").read_text())
    return (
        (config["name"], config["seed"]),
        (directory / "model.safetensors").read_bytes(),
        [line | {"seconds": 0} for line in lines],
    )


def ends(folder):
    return sorted(bits(path.parent) for path in folder.glob("*/summary.json"))


def table(folder):
    """The table of a sweep as it was printed last, without times."""
    rows = [
        line.split("│") for line in Path(f"{folder}.txt").read_text().splitlines() if line.startswith("│")
    ]
    return [[cell.strip() for cell in row[1:6]] for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The six runs, with nothing in between."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert ended(started(folder, *SIX)) == 0
    assert len(done(folder)) == 6
    return folder


def test_a_sweep_that_is_killed_again_and_again_ends_like_one_that_is_not(whole, tmp_path):
    folder = tmp_path / "out"
    for how, status, least in ((signal.SIGTERM, 130, 0), (signal.SIGKILL, -9, 1), (signal.SIGKILL, -9, 3)):
        before = times(folder, done(folder))
        number = started(folder, *SIX)
        until(lambda least=least: len(done(folder)) >= least and begun(folder))
        os.kill(number, how)
        assert ended(number) == status
        until(lambda: not held(folder), seconds=30)  # no run goes on by itself
        for name in begun(folder):
            assert list((folder / name / "checkpoint").glob("*/state.json"))
        assert times(folder, before) == before
        if how == signal.SIGTERM:
            printed = Path(f"{folder}.txt").read_text()
            assert f"go on with: pisa-fl {' '.join(SIX)} hydra.sweep.dir={folder}" in printed
    before = times(folder, done(folder))
    assert before.keys() != done(whole)
    assert ended(started(folder, *SIX)) == 0
    assert times(folder, before) == before
    assert ends(folder) == ends(whole)
    told = table(folder)
    assert told == table(whole)
    assert [row[2] for row in told] == ["done"] * 6
    assert "6 runs: 6 done;" in Path(f"{folder}.txt").read_text()


def test_one_after_the_other_the_bits_are_the_same(whole, command, tmp_path):
    chosen = ("--multirun", *QUICK, "strategy=sisa,pisa", "seed=2", "hydra.launcher.jobs=1")
    assert command(*chosen, "hydra.sweep.dir=out").status == 0
    assert ends(tmp_path / "out") == [end for end in ends(whole) if end[0][1] == 2]


def test_every_line_tells_of_which_run_it_is(whole):
    lines = Path(f"{whole}.txt").read_text().splitlines()
    rounds = [line for line in lines if " round " in line and "/4  accuracy" in line]
    assert len(rounds) == 6 * 5
    assert {line[: len("run 3 of 6  ")] for line in rounds} == {f"run {n} of 6  " for n in range(1, 7)}


def test_runs_are_known_by_their_configuration(whole, command, tmp_path):
    """Not by their number; a run that another process writes is left to it."""
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    before = times(folder, done(folder))
    changed = ("--multirun", *QUICK, "engine.threads=1", "name=other", "strategy=pisa", "seed=2,7")
    assert command(*changed, "hydra.sweep.dir=out").status == 0
    assert times(folder, before) == before
    assert done(folder) - before.keys() == {"6"}
    written = json.loads((folder / "sweep.json").read_text())["entries"]
    assert [(entry["words"], entry["directory"]) for entry in written] == [("seed=2", "5"), ("seed=7", "6")]
    (folder / "5" / "summary.json").unlink()
    with FileLock(folder / "5" / ".lock"):
        left = command(*changed, "hydra.sweep.dir=out")
    assert (left.status, left.err) == (0, "")
    assert "2 runs: 1 done, 1 running" in left.out
    assert not (folder / "5" / "summary.json").exists()
    assert command(*changed, "hydra.sweep.dir=out").status == 0
    assert bits(folder / "5") == bits(whole / "5")


KILLER = """
import os, signal
from hydra.experimental.callback import Callback

class Killer(Callback):
    def on_job_start(self, config, **_):
        if config.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_dies_is_reported_and_the_others_go_on(command, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "killer_of_runs.py").write_text(KILLER)
    sweep = ("--config-dir=own", "--multirun", *QUICK, "seed=0,1,2", "hydra.sweep.dir=out")
    failed = command(*sweep, "+hydra.callbacks.killer._target_=killer_of_runs.Killer")
    assert failed.err == "pisa-fl: run 2 of 3 (seed=1): its process ended by SIGKILL\n"
    assert failed.status == 1
    assert "3 runs: 2 done, 1 failed" in failed.out
    assert done(tmp_path / "out") == {"0", "2"}
    before = times(tmp_path / "out", "02")
    again = command(*sweep)
    assert (again.status, again.err) == (0, "")
    assert "3 runs: 3 done;" in again.out
    assert times(tmp_path / "out", "02") == before


@pytest.mark.parametrize("jobs", ["0", "many"])
def test_a_number_of_jobs_that_is_none(command, jobs):
    told = command("--multirun", *QUICK, f"hydra.launcher.jobs={jobs}", "hydra.sweep.dir=out")
    assert told.status == 2
    assert (
        told.err == f"pisa-fl: hydra.launcher.jobs must be a whole number of at least 1 or auto, got {jobs}\n"
    )


def test_runs_side_by_side_have_no_more_cores_than_there_are(monkeypatch):
    monkeypatch.setenv(SHARE, "8")
    plain, wide = pisa_fl.compose("device=cpu"), pisa_fl.compose("device=cpu", "engine.workers=3")
    assert share([plain] * 20, "auto") == (8, 1)
    assert share([plain] * 3, "auto") == (3, 2)
    assert share([plain, wide, plain], "auto") == (2, 4)
    assert share([plain] * 20, 3) == (3, 2)
    assert share([pisa_fl.compose("device=cpu", "engine=ray")] * 3, "auto") == (1, 8)
    with pytest.raises(ConfigurationError, match=r"jobs=3 runs, of which one takes 3 cores.*set it to 2"):
        share([wide] * 3, 3)


def test_the_time_that_is_left_follows_from_the_pace():
    runs = [Progress("done", 10, 10, 40.0), Progress("running", 5, 10, 10.0), Progress("left")]
    assert estimate(runs) == [0.0, 10.0, 30.0]
    assert estimate([Progress("left")]) == [None]


def test_a_sweep_that_was_moved_goes_on_where_it_is(tmp_path):
    words = ["pisa-fl", "--multirun", "seed=0,1", f"hydra.sweep.dir={tmp_path}/before"]
    assert command_in(words, tmp_path / "it's here") == (
        f"""pisa-fl --multirun seed=0,1 'hydra.sweep.dir="{tmp_path}/it'"'"'s here"'"""
    )
    assert command_in(words, None) == "pisa-fl --multirun seed=0,1"


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=a,b"],
        ["seed=0,1", "stop_at_chance=-1"],
        ["seed=0,1", "hydra.launcher.jobs=0"],
        ["seed=0,1", "hydra.launcher.jobs=1000"],
        ["strategy=pisa,nope"],
        ["hydra/sweeper=optuna", "data.validation=0.1", "strategy.foo=interval(0,1)"],
    ],
)
def test_a_sweep_that_is_refused_leaves_nothing(overrides, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = command("--multirun", *overrides)
    assert ended.status == 2
    assert not list(tmp_path.iterdir())
