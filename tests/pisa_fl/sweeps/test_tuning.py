"""Optuna's trials: of one budget, judged by held-out examples, the same after an interruption."""

import json
import os
import signal

import pytest
import yaml
from sweeping import done, ended, started, times, until

optuna = pytest.importorskip("optuna")

TUNE = (
    *("--multirun", "hydra/sweeper=optuna", "model=logistic", "clients=5", "rounds=1", "engine.workers=0"),
    *("data.validation=0.1", "hydra.sweeper.trials=3", "hydra.sweeper.batch=1", "strategy=sisa"),
    "strategy.lr=tag(log,interval(0.001,0.3))",
)


def studies(folder):
    storage = f"sqlite:///{folder}/optuna.db"
    found = [
        optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)
    ]
    return [[(trial.params, trial.value) for trial in study.trials] for study in found]


def test_a_tuning_that_is_killed_goes_on_with_the_same_trials(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert ended(started(whole, *TUNE)) == 0
    number = started(killed, *TUNE)
    until(lambda: done(killed))
    os.kill(number, signal.SIGKILL)
    ended(number)
    first = times(killed, "0")
    assert len(done(killed)) < 3
    assert ended(started(killed, *TUNE)) == 0
    assert done(killed) == {"0", "1", "2"}
    assert times(killed, "0") == first
    assert studies(killed) == studies(whole)
    (trials,) = studies(whole)
    summaries = [json.loads((whole / n / "summary.json").read_text()) for n in "012"]
    assert [value for _, value in trials] == [summary["final_accuracy"] for summary in summaries]
    assert {summary["validation"] for summary in summaries} == {0.1}
    best = yaml.safe_load((killed / "best.yaml").read_text())["best"]
    assert best["accuracy"] == max(value for _, value in trials)
    lr = yaml.safe_load((killed / best["directory"] / "config.yaml").read_text())["strategy"]["lr"]
    assert best["overrides"] == [f"strategy.lr={lr}"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["data.validation=0"], "data.validation must be above 0 to tune"),
        (["strategy.lr=0.1"], "nothing to look for"),
        (["strategy.lr=tag(log,interval(0,1))"], "strategy.lr=tag(log,interval(0,1)) is no range"),
        (
            ["strategy.lr=interval(0.01,inf)"],
            "strategy.lr=interval(0.01,inf) is no range: its ends must be finite",
        ),
        (["hydra.sweeper.trials=0"], "hydra.sweeper.trials must be a whole number of at least 1"),
        (["strategy.mu=interval(0,1)"], "strategy.mu is no key"),
    ],
)
def test_what_cannot_be_tuned_is_told_before_anything_runs(command, tmp_path, changed, words):
    named = [text.partition("=")[0] for text in changed]
    kept = [text for text in TUNE if text.partition("=")[0] not in named]
    told = command(*kept, *changed, "hydra.sweep.dir=out")
    assert told.status == 2
    assert words in told.err
    assert not done(tmp_path / "out")


def test_every_method_has_the_same_rounds(command, tmp_path):
    kept = [text for text in TUNE if not text.startswith(("rounds=", "strategy="))]
    told = command(*kept, "strategy=pisa,fedavg", "hydra.sweep.dir=out")
    assert told.status == 2
    assert "rounds differ (100 with strategy=pisa, 10 with strategy=fedavg)" in told.err


def test_a_setting_that_diverges_is_the_worst_and_no_failure(command, tmp_path):
    ranges = ["strategy.lr=interval(1e11,1e12)", "hydra.sweeper.trials=1"]
    kept = [text for text in TUNE if not text.startswith(("strategy.lr=", "hydra.sweeper.trials="))]
    for _ in range(2):
        told = command(*kept, *ranges, "strategy=fedavg", "strategy.local_epochs=1", "hydra.sweep.dir=out")
        assert told.status == 0
        assert "no trial came to its end with a finite accuracy" in told.out
    [[(_, value)]] = studies(tmp_path / "out")
    assert value == float("-inf")
