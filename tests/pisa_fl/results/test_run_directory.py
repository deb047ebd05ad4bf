"""What a run leaves behind: every file, what it holds, and that the same seed gives the same bits."""

import json
import math
import re
import shutil
from itertools import chain, combinations

import numpy as np
import pytest
import yaml
from pictures import pictures
from PIL import Image
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pisa_fl
from pisa_fl.metric import Measures
from pisa_fl.results import run_directory
from pisa_fl.system import files

KEYS = {
    "round",
    "test_accuracy",
    "test_loss",
    "train_loss",
    "passes",
    "bytes_up",
    "bytes_down",
    "seconds",
    "clients_ok",
    "clients_failed",
    "clients_expected",
    "clients_reachable",
    "clients_turned_away",
    "run_id",
}
RESIDUALS = {"primal_residual", "dual_residual"}
FILES = {
    "config.yaml",
    "partition.json",
    "partition.csv",
    "partition.png",
    "initial.safetensors",
    "model.safetensors",
    "metrics.jsonl",
    "summary.json",
    "curves.png",
    "checkpoint",
}
HEADER = 128  # bytes before the numbers of an .npy array
QUICK = ("model=logistic", "engine.threads=1", "progress=false")
D = 7850  # parameters of the logistic model on MNIST


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def timeless(metrics):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics]


def simulate(directory, *overrides):
    return pisa_fl.run(pisa_fl.compose(*QUICK, "rounds=2", *overrides), directory)


@pytest.fixture(scope="module")
def sisa(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sisa") / "run"
    with pictures(drawn=True):
        simulate(directory, "strategy=sisa", "targets=[0.0,0.5,1.0]")
    return directory


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fedavg") / "run"
    simulate(directory, "strategy=fedavg", "strategy.local_epochs=1", "participation=0.3")
    return directory


def test_the_command_makes_a_dated_directory_and_names_it(command, tmp_path):
    ended = command("rounds=1", "name=mine", *QUICK)
    assert (ended.status, ended.err) == (0, "")
    (directory,) = tmp_path.glob("runs/*/*")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-mine", str(directory.relative_to(tmp_path / "runs")))
    assert {path.name for path in directory.iterdir() if "tfevents" not in path.name} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert f"run directory: {directory}\n" in ended.out


def test_every_file_is_there_and_nothing_half_written(sisa):
    names = {path.name for path in sisa.iterdir()}
    assert {name for name in names if not name.startswith("events.out.tfevents.")} == FILES
    assert len(names) == len(FILES) + 1


def test_config_is_resolved_and_runs_again(sisa):
    text = (sisa / "config.yaml").read_text()
    assert "${" not in text
    assert "hydra" not in yaml.safe_load(text)
    assert yaml.safe_load(text)["partition"]["num_partitions"] == 10


def test_partition_deals_every_example_once(sisa):
    partition = json.loads((sisa / "partition.json").read_text())
    assert list(partition) == [str(client) for client in range(10)]
    assert sorted(chain(*partition.values())) == list(range(10_000))


def test_a_run_on_its_partition_file_and_initial_weights_is_the_same_run(sisa, tmp_path):
    given = [f"partition.path={sisa / 'partition.json'}", f"init={sisa / 'initial.safetensors'}"]
    simulate(tmp_path, "strategy=sisa", "partition=from_file", *given)
    for name in ("model.safetensors", "partition.json", "initial.safetensors"):
        assert (tmp_path / name).read_bytes() == (sisa / name).read_bytes()


def test_initial_weights_win_over_the_seed(sisa, tmp_path):
    simulate(tmp_path, "rounds=0", "seed=9", f"init={sisa / 'initial.safetensors'}")
    assert (tmp_path / "model.safetensors").read_bytes() == (sisa / "initial.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["initial", "model"])
def test_weights_have_pytorchs_names_and_shapes(sisa, name):
    federation = pisa_fl.prepare(pisa_fl.compose("model=logistic"))
    own = {key: tuple(value.shape) for key, value in federation.model.module.state_dict().items()}
    stored = load_file(sisa / f"{name}.safetensors")
    assert {key: value.shape for key, value in stored.items()} == own
    if name == "initial":
        for key, value in federation.model.state_dict().items():
            np.testing.assert_array_equal(stored[key], value)


def test_training_changed_the_weights(sisa):
    first, last = load_file(sisa / "initial.safetensors"), load_file(sisa / "model.safetensors")
    assert all((first[key] != last[key]).any() for key in first)


def test_metrics_of_an_admm_method(sisa):
    metrics = metrics_of(sisa)
    assert [line["round"] for line in metrics] == [0, 1, 2]
    assert set(metrics[0]) == KEYS
    assert all(set(line) == KEYS | RESIDUALS for line in metrics[1:])
    assert [line["passes"] for line in metrics] == [0, 1, 2]
    assert [line["clients_ok"] for line in metrics] == [0, 10, 10]
    assert [line["clients_failed"] for line in metrics] == [0, 0, 0]
    for key, number in (("expected", 10), ("reachable", 10), ("turned_away", 0)):
        assert [line[f"clients_{key}"] for line in metrics] == [number] * 3
    assert metrics[0]["seconds"] == 0 < metrics[1]["seconds"] < metrics[2]["seconds"]
    assert abs(metrics[0]["test_loss"] - math.log(10)) < 0.1
    assert abs(metrics[0]["test_accuracy"] - 0.1) < 0.1
    # the training loss of a round is that of the weights it began with
    assert abs(metrics[1]["train_loss"] - metrics[0]["test_loss"]) < 0.01
    assert metrics[2]["test_loss"] < metrics[1]["test_loss"]
    assert all(line[key] >= 0 for line in metrics[1:] for key in RESIDUALS)
    assert metrics[2]["primal_residual"] > 0


def test_metrics_of_fedavg(fedavg):
    metrics = metrics_of(fedavg)
    assert all(set(line) == KEYS for line in metrics)
    assert [line["clients_ok"] for line in metrics] == [0, 3, 3]
    sizes = [len(rows) for rows in json.loads((fedavg / "partition.json").read_text()).values()]
    trios = {sum(trio) for trio in combinations(sizes, 3)}
    assert round(metrics[1]["passes"] * 10_000) in trios
    assert round((metrics[2]["passes"] - metrics[1]["passes"]) * 10_000) in trios


def test_payload_is_the_arrays_that_were_sent(sisa, fedavg):
    vector = 4 * D + HEADER
    assert [line["bytes_up"] for line in metrics_of(fedavg)] == [0, 3 * vector, 6 * vector]
    assert [line["bytes_down"] for line in metrics_of(fedavg)] == [0, 3 * vector, 6 * vector]
    # aligned SISA: weights and a statistic up; weights, the common moment and its one-number step count down
    count = 4 + HEADER
    assert [line["bytes_up"] for line in metrics_of(sisa)] == [0, 20 * vector, 40 * vector]
    down = 10 * (2 * vector + count)
    assert [line["bytes_down"] for line in metrics_of(sisa)] == [0, down, 2 * down]


def test_the_header_is_that_of_an_npy_array(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(D, np.float32))
    assert (tmp_path / "a.npy").stat().st_size == 4 * D + HEADER


def test_summary(sisa):
    summary, metrics = json.loads((sisa / "summary.json").read_text()), metrics_of(sisa)
    last, best = metrics[-1], max(metrics, key=lambda line: line["test_accuracy"])
    assert (summary["final_accuracy"], summary["final_loss"]) == (last["test_accuracy"], last["test_loss"])
    assert (summary["best_accuracy"], summary["best_round"]) == (best["test_accuracy"], best["round"])
    assert [summary[key] for key in ("rounds", "passes", "bytes_up", "bytes_down", "seconds")] == [
        last[key] for key in ("round", "passes", "bytes_up", "bytes_down", "seconds")
    ]
    assert summary["seed"] == 0
    clients = {
        key: summary[f"clients_{key}"] for key in ("expected", "reachable", "ok", "failed", "turned_away")
    }
    assert clients == {"expected": 10, "reachable": 10, "ok": 10, "failed": 0, "turned_away": 0}
    assert summary["turned_away"] == []
    assert summary["peak_memory_bytes"] > 50e6
    assert summary["versions"].keys() >= {"pisa-fl", "flwr", "torch", "python"}
    assert summary["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}", summary["git_commit"])
    assert summary["targets"]["0.0"] == {"round": 0, "passes": 0, "bytes": 0, "seconds": 0}
    assert summary["targets"]["1.0"] is None


def test_targets_are_the_first_round_at_or_above():
    line = {"passes": 0, "bytes_up": 3, "bytes_down": 4, "seconds": 0, "test_loss": 1}
    metrics = [line | {"round": i, "test_accuracy": a} for i, a in enumerate([0.1, 0.5, 0.4, 0.8])]
    targets = run_directory.summarise(metrics, [0.5, 0.6, 0.9], 0, Measures.read(None))["targets"]
    assert [reached and (reached["round"], reached["bytes"]) for reached in targets.values()] == [
        (1, 7),
        (3, 7),
        None,
    ]


@pytest.mark.parametrize("name", ["partition.png", "curves.png"])
def test_pictures_show_something(sisa, name):
    with Image.open(sisa / name) as image:
        image.verify()
    with Image.open(sisa / name) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 300
    assert pixels.std() > 10


def test_a_partition_that_was_not_drawn_yet_is_drawn_after_a_resume(sisa, tmp_path):
    copy = shutil.copytree(sisa, tmp_path / "run")
    (copy / "partition.png").unlink()
    with pictures(drawn=True):
        pisa_fl.resume(copy)
    assert (copy / "partition.png").read_bytes() == (sisa / "partition.png").read_bytes()


def test_tensorboard_reads_the_curves(sisa):
    events = EventAccumulator(str(sisa)).Reload()
    assert set(events.Tags()["scalars"]) == (KEYS | RESIDUALS) - {"round", "run_id"}
    read = [(event.step, event.value) for event in events.Scalars("test_loss")]
    for (step, value), line in zip(read, metrics_of(sisa), strict=True):
        assert step == line["round"]
        assert value == pytest.approx(line["test_loss"], rel=1e-6)


@pytest.mark.parametrize("strategy", ["pisa", "fedavg"])
def test_the_same_seed_gives_the_same_bits(tmp_path, strategy):
    chosen = [f"strategy={strategy}", "participation=0.5"]
    if strategy == "fedavg":
        chosen.append("strategy.local_epochs=1")
    for name in ("one", "two"):
        simulate(tmp_path / name, *chosen, "seed=4")
    simulate(tmp_path / "other", *chosen, "seed=5")
    one, two, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two", "other"))
    assert one == two != other
    assert timeless(metrics_of(tmp_path / "one")) == timeless(metrics_of(tmp_path / "two"))


def test_nothing_is_written_without_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = simulate(None, "rounds=1")
    assert list(tmp_path.iterdir()) == []
    assert result.directory is None
    assert [line["round"] for line in result.metrics] == [0, 1]
    assert result.summary["final_accuracy"] == result.metrics[-1]["test_accuracy"]
    assert set(dict(result.model.named_parameters())) == {"1.weight", "1.bias"}


# --- the files by themselves


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    run_directory.append_line(tmp_path / "m.jsonl", {"a": math.nan, "b": -math.inf, "c": 0.5, "d": 1})
    run_directory.write_summary(tmp_path / "summary.json", {"final_loss": math.inf, "seed": 0})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"a": None, "b": None, "c": 0.5, "d": 1}
    assert json.loads((tmp_path / "summary.json").read_text()) == {"final_loss": None, "seed": 0}


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"round": 0}\n{"round": 1}\n{"rou')
    assert run_directory.read_metrics(tmp_path) == [{"round": 0}, {"round": 1}]


def test_rewinding_takes_out_later_rounds_everywhere(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"round": 0, "run_id": "a"}\n{"round": 1, "run_id": "a"}\n{"round": 2, "run_id": "a"}\n{"rou'
    )
    (tmp_path / "failures.jsonl").write_text('{"round": 1, "client": 3}\n{"round": 2, "client": 4}\n')
    run_directory.rewind(tmp_path, 1, "a")
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"round": 0, "run_id": "a"}\n{"round": 1, "run_id": "a"}\n'
    assert (tmp_path / "failures.jsonl").read_text() == '{"round": 1, "client": 3}\n'
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    (tmp_path / "summary.json").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        files.write(tmp_path / "summary.json", "new \ud800")
    assert (tmp_path / "summary.json").read_text() == "old"


def test_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    (tmp_path / "pisa_fl").mkdir()
    monkeypatch.setattr(run_directory, "__file__", str(tmp_path / "pisa_fl" / "results" / "run_directory.py"))
    assert run_directory.git_commit() is None
    (tmp_path / ".git").mkdir()  # not a repository, or one without a commit
    assert run_directory.git_commit() is None
