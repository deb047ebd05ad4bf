"""The examples of docs/extending.md: their files, written to a folder, and their commands do what the page says."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from strategies import Layout

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
SECTIONS = {text.partition("\n")[0]: text for text in PAGE.split("\n## ")[1:]}
BLOCK = re.compile(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^    pisa-fl (.*)$", re.MULTILINE)


@pytest.fixture
def example(command, tmp_path):
    """Writes the files of a section of the page, and runs its command with more arguments, into the directory `run`."""

    def run(section, *more, status=0):
        for name, content in BLOCK.findall(SECTIONS[section]):
            path = tmp_path / "mine" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        (line,) = COMMAND.findall(SECTIONS[section])
        ended = command(*shlex.split(line), "engine.threads=1", "hydra.run.dir=run", *more)
        assert ended.status == status, ended.err
        assert status or not ended.err
        return lines(tmp_path / "run" / "metrics.jsonl")

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_section_with_code_is_run_here():
    named = {"A task", "A preconditioner", "An algorithm", "A data set", "A tracker"}
    assert {section for section, text in SECTIONS.items() if "```" in text} == named


def test_the_task_is_learnt(example, tmp_path):
    sizes = np.random.default_rng(0).normal(size=400)
    table = "".join(f"{size},{3 * size + 1}\n" for size in sizes)
    (tmp_path / "TABLE.csv").write_text("size,COLUMN\n" + table)
    first, *_, last = example("A task", "clients=5", "rounds=20", "model.hidden=[8]", "strategy.lr=0.1")
    assert first["test_within"] < 0.8 < last["test_within"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["compared_by"] == "within"


def test_the_preconditioner_is_adagrad_and_is_used(example, command, tmp_path):
    chosen = ["model=logistic", "clients=5", "strategy.warmup=0", "strategy.horizon=8"]
    own = example("A preconditioner", *chosen, "rounds=5")
    assert own[-1]["test_accuracy"] > 0.6
    moment = [f"strategy.preconditioner.{key}" for key in ("beta=0.9", "floor=0", "eps=1e-8")]
    chosen += ["strategy/preconditioner=second_moment", "strategy.lr=0.05", "rounds=1", "hydra.run.dir=other"]
    assert command(*chosen, *moment, "engine.threads=1").status == 0
    one_gradient = lines(tmp_path / "other" / "metrics.jsonl")[1]["test_loss"]
    assert own[1]["test_loss"] == pytest.approx(one_gradient, rel=1e-4)

    adagrad = importlib.import_module("own_preconditioner").AdaGrad(Layout({"w": (3,)}), eps=1e-8)
    state, sigma = adagrad.nothing(), torch.tensor(0.0)
    gradients = torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(0))
    for count, gradient in enumerate(gradients, start=1):
        state = adagrad.accumulate(state, adagrad.statistic(gradient, gradient))
        expected = 0.1 * gradient / (gradients[:count].square().sum(0).sqrt() + 1e-8)
        torch.testing.assert_close(adagrad.solve(state, gradient, sigma, rho=1 / 0.1), expected)


def test_the_algorithm_goes_on_beyond_the_average(example, command, tmp_path):
    chosen = ["model=logistic", "rounds=1", "strategy.local_epochs=1"]
    own = example("An algorithm", *chosen)[-1]
    chosen += ["partition=dirichlet", "partition.alpha=0.3", "engine.threads=1", "hydra.run.dir=plain"]
    assert command("strategy=fedavg", *chosen).status == 0
    before, average, after = (
        np.concatenate([array.ravel() for array in load_file(tmp_path / path).values()])
        for path in ("run/initial.safetensors", "plain/model.safetensors", "run/model.safetensors")
    )
    rate = own["squared_length"] / (2 * (np.square(average - before).sum() + 1e-3))
    assert own["server_rate"] == pytest.approx(rate, rel=1e-4)
    assert rate > 1
    np.testing.assert_allclose(after, before + rate * (average - before), atol=1e-5)
    assert own["test_accuracy"] > 0.3


def test_the_data_set_is_dealt_by_person_and_learnt(example, tmp_path):
    draw = np.random.default_rng(0)
    activity, person = draw.integers(0, 3, 600), draw.integers(0, 6, 600)
    waves = np.sin(np.arange(20) * (1 + activity)[:, None] / 3 + draw.normal(0, 0.2, (600, 1)))
    windows = (1000 * (1 + person / 5)[:, None, None] * waves[:, None]).astype(np.int16)
    named = {"activity": np.array(["sit", "run", "walk"])[activity], "person": person}
    np.savez(tmp_path / "RECORDINGS.npz", windows=windows, test=np.arange(600) % 4 == 0, **named)
    metrics = example("A data set", "rounds=15", "model.hidden=[16]", "strategy.lr=0.1")
    assert metrics[-1]["test_accuracy"] > 0.9 > metrics[0]["test_accuracy"]
    partition = json.loads((tmp_path / "run" / "partition.json").read_text())
    trained = person[np.arange(600) % 4 > 0]
    assert [set(trained[rows]) for rows in partition.values()] == [{number} for number in range(6)]
    recordings = importlib.import_module("own_data").Recordings
    digests = [recordings(tmp_path / "RECORDINGS.npz", unit).digest for unit in (0.001, 0.001, 0.002)]
    assert digests[0] == digests[1] != digests[2]


def test_the_tracker_is_told_everything_and_may_stop_the_run(example, command, tmp_path):
    chosen = ["model=logistic", "clients=5", "rounds=2", "tracker=[csv,diary]", "name=n"]
    example("A tracker", *chosen, "tracker.diary.hours=0", status=130)
    assert command("--config-dir=mine", "resume=run").status == 0
    told = lines(tmp_path / "diary.jsonl")
    assert [(line["event"], line.get("rounds_before", line.get("round"))) for line in told] == [
        *(("started", 0), ("round", 0), ("round", 1), ("stopped", None)),
        *(("started", 2), ("round", 2), ("finished", None)),
    ]
    assert {line["run"] for line in told} == {"n"}
    assert [line["test_loss"] for line in told if line["event"] == "round"] == [
        line["test_loss"] for line in lines(tmp_path / "run" / "metrics.jsonl")
    ]
    assert "stopped after round 1 of 2" in told[3]["reason"]
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 1 + 3
