"""Private runs: the same bits whatever happens to them, and sentences about what would be no privacy."""

import json

import pytest

import pisa_fl
from pisa_fl.results.console import Display
from pisa_fl.results.result import Interrupted

QUICK = (
    "model=logistic",
    "data.validation=0.95",
    "clients=6",
    "rounds=3",
    "engine.threads=1",
    "progress=false",
)
QUICK += ("tracker=none", "checkpoint.every=1")
KINDS = {
    "central": ("privacy=central", "strategy=fedadam", "strategy.local_epochs=1", "participation=0.5"),
    "local": ("privacy=local", "strategy=pisa", "participation=0.5"),
    "examples": ("privacy=examples", "strategy=fedavg", "strategy.local_epochs=1", "participation=0.5"),
}


def lines(directory):
    read = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_and_epsilons_with_workers_and_after_an_interruption(kind, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pisa_fl.run(pisa_fl.compose(*QUICK, *KINDS[kind], "engine.workers=0"), whole)
    config = pisa_fl.compose(*QUICK, *KINDS[kind], "engine.workers=2")
    with monkeypatch.context() as stopped:
        show = Display.round

        def stop(display, line):
            show(display, line)
            if line["round"] == 2:
                (parts / "stop").touch()

        stopped.setattr(Display, "round", stop)
        with pytest.raises(Interrupted):
            pisa_fl.run(config, parts)
    pisa_fl.resume(parts)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert lines(whole) == lines(parts)
    told = [json.loads((folder / "summary.json").read_text())["privacy"] for folder in (whole, parts)]
    assert told[0] == told[1]
    assert told[0]["epsilon"] == lines(whole)[-1]["epsilon"] > 0
    assert all(line["train_loss"] is None for line in lines(whole))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["privacy=central", "max_update=20"], "max_update=20 refuses an update by how long the others' are"),
        (["privacy=central", "strategy=scaffold"], "ScaffoldClient sends weights, control"),
        (["privacy=central", "strategy=krum"], "Krum works with what single clients send"),
        (["privacy=central", "participation=0.5", "min_clients=1"], "set min_clients=null"),
        (["privacy=local", "strategy=sisa"], "set strategy.wire=gradient"),
        (["privacy=local", "evaluate_clients_every=1"], "set evaluate_clients_every=null"),
        (["privacy=examples", "strategy=moon"], "MoonClient takes more of the examples"),
        (["privacy=examples", "strategy/preconditioner=kfac"], "PisaClient sends gradient, probed"),
        (["privacy=examples", "strategy=fedsam"], "optimizer=sam takes two gradients of a batch"),
        (["privacy=examples", "privacy.rate=0"], "privacy.rate must be above 0"),
        (["privacy=examples", "model=resnet18", "model.norm=batch"], "keeps running statistics"),
        (["privacy=local", "privacy.randomness=system"], "set checkpoint.every=1"),
        (["privacy=local", "privacy.delta=1"], "privacy.delta must be below 1"),
    ],
)
def test_what_would_be_no_privacy_is_one_sentence_and_exit_status_2(overrides, sentence, command):
    outcome = command(*overrides)
    assert outcome.status == 2
    assert sentence in outcome.err
    assert "Traceback" not in outcome.err


def test_the_table_says_what_is_promised(command):
    outcome = command(*QUICK, *KINDS["central"], "privacy.noise=0.3", "engine.workers=0")
    assert outcome.status == 0
    assert "epsilon (zero_out)" in outcome.out
    assert "a test for one's data gains" in outcome.out
    assert "2601.10237" in outcome.out
