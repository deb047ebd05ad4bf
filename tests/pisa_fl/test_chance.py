"""Runs that learn nothing, or whose numbers run away, are told from the others, and need not go on."""

import json

import pytest
import torch
from safetensors.torch import save_file

import pisa_fl
from pisa_fl.data.mnist import mnist_mini
from pisa_fl.results.finished import read
from pisa_fl.results.report import report
from pisa_fl.tasks.classification import Classification
from pisa_fl.tasks.next_character import NextCharacter
from pisa_fl.tasks.regression import Regression

QUICK = ("model=logistic", "partition=iid", "clients=3", "engine.workers=0", "progress=false", "tracker=none")
STILL = ("strategy=fedavg", "strategy.lr=1e-12", "strategy.local_epochs=1", "strategy.weight_decay=0")
"""The weights stay where they begin."""


def test_what_a_guess_is_worth():
    assert Classification().chance(torch.tensor([2, 0, 2, 1, 2])) == pytest.approx(0.6)
    assert NextCharacter().chance(torch.tensor([[2, 0], [2, 1]])) == pytest.approx(0.5)
    targets = torch.tensor([1.0, 2.0, 6.0])
    task = Regression()
    mean = {"output": targets.mean().expand(3), "batch": {"targets": targets}}
    loss = float(task.losses(**mean).mean())
    totals = {name: float(total) for name, total in task.totals(**mean).items()}
    assert task.chance(targets) == pytest.approx(task.measure(totals, 3, loss)["r2"], abs=1e-6)


@pytest.fixture
def always_one(tmp_path):
    """Initial weights with which a model always gives the most frequent class, and its share."""
    labels = torch.from_numpy(mnist_mini(cache=None, mean=0.1307, std=0.3081).test_labels)
    share = float((labels == labels.mode().values).float().mean())
    weights = pisa_fl.prepare(pisa_fl.compose(*QUICK)).model.state_dict()
    for name, tensor in weights.items():
        tensor.zero_()
        if name.endswith("bias"):
            tensor[labels.mode().values] = 5.0
    save_file(weights, tmp_path / "one.safetensors")
    return f"init={tmp_path / 'one.safetensors'}", share


def test_a_run_at_chance_says_so_ends_early_and_goes_on_if_asked_to(always_one, tmp_path, caplog, capsys):
    init, share = always_one
    chosen = [*QUICK, *STILL, init, "rounds=5", "stop_at_chance=2", "evaluate_every=2"]
    result = pisa_fl.run(pisa_fl.compose(*chosen), tmp_path / "run")
    # the untrained model counts for nothing
    assert [line["round"] for line in result.metrics] == [0, 1, 2, 3, 4]
    assert result.summary["rounds"] == 4
    assert result.summary["at_chance"] is True
    assert result.summary["chance"] == result.summary["final_accuracy"] == pytest.approx(share)
    assert "ended after round 4 of 5: accuracy was no better than a guess" in caplog.text
    assert "at chance" in capsys.readouterr().out
    text = report([tmp_path / "run"], tmp_path / "report", "")
    assert f"ended AT CHANCE: its accuracy is no better than {100 * share:.2f} %" in text
    # its checkpoint is whole: it goes on with the numbers of one that was never to end early
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("stop_at_chance: 2", "stop_at_chance: null"))
    went_on = pisa_fl.resume(tmp_path / "run")
    whole = pisa_fl.run(pisa_fl.compose(*chosen, "stop_at_chance=null"), tmp_path / "whole")
    assert went_on.summary["rounds"] == 5
    assert [line["test_loss"] for line in went_on.metrics if "test_loss" in line] == [
        line["test_loss"] for line in whole.metrics if "test_loss" in line
    ]


def test_a_run_that_learns_is_not_at_chance(tmp_path):
    result = pisa_fl.run(pisa_fl.compose(*QUICK, "rounds=3", "stop_at_chance=1"), tmp_path)
    assert result.summary["rounds"] == 3
    assert result.summary["at_chance"] is False
    assert result.summary["chance"] == pytest.approx(0.1)
    assert read(tmp_path).chance is None


def test_losses_that_are_not_finite_end_a_run_that_is_to(tmp_path, monkeypatch):
    evaluate = pisa_fl.Federation._evaluate

    def runs_away(federation):
        found = evaluate(federation)
        return found | {"loss": float("inf")} if federation.round == 2 else found

    monkeypatch.setattr(pisa_fl.Federation, "_evaluate", runs_away)
    for stop, rounds in (("true", 2), ("false", 4)):
        chosen = pisa_fl.compose(*QUICK, "rounds=4", f"stop_at_nan={stop}")
        assert pisa_fl.run(chosen, tmp_path / stop).summary["rounds"] == rounds
    summary = json.loads((tmp_path / "true" / "summary.json").read_text())
    assert summary["final_loss"] is None
