"""Trackers, in the forms that need no server: every round once, also of a run that was killed and goes on."""

import csv
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pisa_fl.config import ConfigurationError, compose
from pisa_fl.from_config import trackers

QUICK = (
    "model=logistic",
    "clients=5",
    "rounds=4",
    "engine.threads=1",
    "progress=false",
    "checkpoint.every=2",
)
KILLED = """
import os, signal
from pisa_fl.cli.main import main
from pisa_fl.results.pictures import PartitionPicture

draw = PartitionPicture.round
def kill(picture, line):
    draw(picture, line)
    if line["round"] == 4:  # the trackers know of round 3, the last checkpoint is of round 2
        os.kill(os.getpid(), signal.SIGKILL)
PartitionPicture.round = kill
main()
"""


def killed_and_resumed(folder, *overrides, **environment):
    """A run that is killed in its fourth round and goes on; its metrics."""
    environment = os.environ | environment
    chosen = [*QUICK, *overrides, "hydra.run.dir=run"]
    ended = subprocess.run([sys.executable, "-c", KILLED, *chosen], cwd=folder, env=environment)
    assert ended.returncode == -signal.SIGKILL
    line = [sys.executable, "-m", "pisa_fl", "resume=run"]
    ended = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "left out" not in ended.stdout
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def needs(package):
    found = importlib.util.find_spec(package)
    return pytest.mark.skipif(found is None or found.origin is None, reason=f"{package} is not installed")


def test_tensorboard_and_csv(tmp_path):
    metrics = killed_and_resumed(tmp_path, "+tracker=csv")
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for key in ("test_loss", "clients_ok"):
        read = [(event.step, event.value) for event in events.Scalars(key)]
        assert read == [(line["round"], pytest.approx(line[key])) for line in metrics]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test_loss"]) for row in rows] == [line["test_loss"] for line in metrics]
    assert [row["primal_residual"] == "" for row in rows] == [True, False, False, False, False]


@needs("mlflow")
def test_mlflow_in_a_local_store(tmp_path):
    """Asked through MLflow's own client."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/store.db"
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true"}
    metrics = killed_and_resumed(tmp_path, "tracker=mlflow", f"tracker.mlflow.tracking_uri={uri}", **quiet)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("pisa-fl")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("pisa", "FINISHED")
    assert (run.data.params["clients"], run.data.params["model._target_"]) == ("5", "pisa_fl.models.mlp.mlp")
    assert run.data.tags["run_id"] == metrics[0]["run_id"]
    for key in ("test_loss", "bytes_up"):
        history = client.get_metric_history(run.info.run_id, key)
        assert [(m.step, m.value) for m in history] == [(line["round"], line[key]) for line in metrics]


def records(log):
    """The records of a wandb file: 7 bytes, then LevelDB's log format, blocks of 32 KiB."""
    position, data = 7, b""
    while position < len(log):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        size, kind = struct.unpack("<4xHB", log[position : position + 7])
        data += log[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield data
            data = b""


@needs("wandb")
def test_wandb_offline(tmp_path):
    """What it would upload."""
    from wandb.proto.wandb_internal_pb2 import Record

    metrics = killed_and_resumed(tmp_path, "tracker=wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    losses, ids = {}, set()
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = Record.FromString(data)
            ids |= {record.run.run_id} - {""}
            items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            if "test_loss" in items:
                assert items["_step"] not in losses
                losses[items["_step"]] = items["test_loss"]
    assert losses == {line["round"]: line["test_loss"] for line in metrics}
    (number,) = ids
    assert number.startswith(metrics[0]["run_id"])


@pytest.mark.parametrize(("name", "called"), [("mlflow", "MLflow"), ("wandb", "Weights & Biases")])
def test_a_package_that_is_not_installed(command, tmp_path, monkeypatch, name, called):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *p: None if n == name else find_spec(n, *p))
    ended = command(*QUICK, f"tracker={name}")
    assert (ended.status, ended.err) == (
        2,
        f"pisa-fl: tracker={name} needs {called}: pip install 'pisa-fl[{name}]'\n",
    )
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        ConfigurationError, match=f"tracker={name} needs"
    ):  # Flower's launcher asks before it starts
        compose_and_launch(name)


def compose_and_launch(name):
    trackers(compose(f"tracker={name}", "engine=flower"))


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("seed=0", ["TensorBoard"]),
        ("tracker=csv", ["Csv"]),
        ("tracker=[csv,tensorboard]", ["Csv", "TensorBoard"]),
        ("+tracker=csv", ["TensorBoard", "Csv"]),
        ("tracker=none", []),
        ("tracker=[]", []),
    ],
)
def test_what_is_chosen(override, names):
    assert [tracker.name for tracker in trackers(compose(override))] == names
