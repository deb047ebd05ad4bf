"""Private runs: the same bits whatever happens to them, and sentences about what would be no privacy."""

import json

import pytest

import pisa_fl
from pisa_fl.engines.local import LocalGrid
from pisa_fl.federation import TooFewClientsError
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


def test_every_try_of_a_round_that_failed_is_paid_for(tmp_path, monkeypatch):
    """Who is asked answers with fresh noise, though the round comes to nothing and the run ends."""
    system = (*QUICK, *KINDS["local"], "participation=1", "privacy.randomness=system", "engine.workers=0")
    config = pisa_fl.compose(*system, "min_clients=6", "patience=4")
    deliver = LocalGrid.deliver
    asked = []

    def lose_one_in_round_two(grid, messages, timeout):
        messages = list(messages)
        asked.append(len(messages))
        replies = list(deliver(grid, messages, timeout))
        return replies[:-1] if len(asked) >= 2 and asked is tries else replies

    tries = asked
    monkeypatch.setattr(LocalGrid, "deliver", lose_one_in_round_two)
    with pytest.raises(TooFewClientsError):
        pisa_fl.run(config, tmp_path / "run")
    failed = len(asked) - 1
    assert failed >= 2
    tries = None
    result = pisa_fl.resume(tmp_path / "run")
    assert result.summary["privacy"]["releases"] == 3 + failed == len(asked)
    (tmp_path / "run" / "asked.json").write_text("[")
    with pytest.raises(pisa_fl.ConfigurationError, match=r"asked\.json is damaged"):
        pisa_fl.resume(tmp_path / "run", rounds=4)


def test_a_run_that_waits_for_clients_stops_when_it_is_asked_to(tmp_path, monkeypatch):
    config = pisa_fl.compose(*QUICK, "strategy=fedavg", "engine.workers=0", "patience=600", "min_clients=6")
    deliver = LocalGrid.deliver
    rounds = []

    def lose_one(grid, messages, timeout):
        rounds.append(1)
        if len(rounds) == 3:
            (tmp_path / "run" / "stop").touch()
        return list(deliver(grid, messages, timeout))[: None if len(rounds) == 1 else -1]

    monkeypatch.setattr(LocalGrid, "deliver", lose_one)
    with pytest.raises(Interrupted, match="stopped after round 1 of 3; go on with"):
        pisa_fl.run(config, tmp_path / "run")
    assert len(rounds) == 3
    monkeypatch.setattr(LocalGrid, "deliver", deliver)
    (tmp_path / "run" / "stop").unlink(missing_ok=True)
    assert len(pisa_fl.resume(tmp_path / "run").metrics) == 4
