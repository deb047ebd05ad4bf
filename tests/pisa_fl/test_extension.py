"""A user's own model, data, partitioner and strategy, from a folder outside the repository."""

import json
import subprocess
import sys
from uuid import uuid4

import numpy as np
import pytest
import yaml

import pisa_fl
from pisa_fl.config import own_code

OWN = '''
"""Everything of mine."""

import numpy as np
from flwr.serverapp.strategy import FedAvg
from flwr_datasets.partitioner import Partitioner
from torch import nn

from pisa_fl import ImageData
from strategies import ClientHalf, Update
from strategies.base.messages import WEIGHTS


class Net(nn.Module):
    def __init__(self, shape, classes, width):
        super().__init__()
        self.hidden = nn.Linear(int(np.prod(shape)), width)
        self.out = nn.Linear(width, classes)

    def forward(self, images):
        return self.out(self.hidden(images.flatten(1)).relu())


def bars(examples, noise):
    """Images of 6 x 6 with one bright row, whose place is the class."""
    rng = np.random.default_rng(0)

    def split(count):
        labels = np.arange(count) % 3
        images = noise * rng.random((count, 1, 6, 6), dtype=np.float32)
        images[np.arange(count), 0, 2 * labels] += 1
        return images, labels

    return ImageData(*split(examples), *split(30), classes=("top", "middle", "bottom"), mean=(0.0,), std=(1.0,))


class EveryNth(Partitioner):
    """Deals like cards."""

    def __init__(self, players):
        super().__init__()
        self.players = players

    @property
    def num_partitions(self):
        return self.players

    def load_partition(self, partition_id):
        return self.dataset.shard(self.players, partition_id, contiguous=False)


class LoudAverage(FedAvg):
    """FedAvg that reports how many answered."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        metrics["who-answered"] = len(replies)
        return arrays, metrics


class SignStep(ClientHalf):
    """One step along the sign of the gradient."""

    def __init__(self, layout, step):
        self.layout, self.step = layout, step

    def solve(self, stack, instruction, state):
        weights = instruction.arrays[WEIGHTS]
        gradient, loss = stack.full_gradient(weights, "mean")
        return Update({WEIGHTS: weights - self.step * gradient.sign()}, loss)
'''

GROUPS = {
    "model/mine": {"_target_": "{module}.Net", "width": 8},
    "data/mine": {"_target_": "{module}.bars", "examples": 60, "noise": 0.5},
    "partition/mine": {"_target_": "{module}.EveryNth", "players": "${clients}"},
    "strategy/mine": {
        "step": 0.01,
        "server": {
            "_target_": "{module}.LoudAverage",
            "fraction_evaluate": 0.0,
            "min_train_nodes": 1,
            "min_available_nodes": 1,
        },
        "client": {"_target_": "{module}.SignStep", "step": "${..step}"},
    },
}
CHOSEN = ["model=mine", "data=mine", "partition=mine", "clients=4", "rounds=30", "engine.threads=1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder; its module has a name that no other test imports."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "my own, folder"
    module = f"own_{uuid4().hex}"
    folder.mkdir()
    (folder / f"{module}.py").write_text(OWN)
    for name, content in GROUPS.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(content).replace("{module}", module))
    return folder


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_from_the_command_line_alone(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    line = [sys.executable, "-m", "pisa_fl", "--config-dir", str(folder)]
    ended = subprocess.run(
        [*line, *CHOSEN, "strategy=mine", "hydra.run.dir=run"], cwd=empty, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    metrics = metrics_of(empty / "run")
    assert [line["who_answered"] for line in metrics[1:]] == [4.0] * 30
    assert metrics[-1]["test_accuracy"] > 0.9 > metrics[0]["test_accuracy"]
    partition = json.loads((empty / "run" / "partition.json").read_text())
    assert partition["1"] == list(range(1, 60, 4))
    config = yaml.safe_load((empty / "run" / "config.yaml").read_text())
    assert (config["name"], config["strategy"]["client"]["step"]) == ("mine", 0.01)


@pytest.mark.parametrize("flag", [["--config-dir={}"], ["--config-dir", "{}"], ["-cd", "{}"]], ids=str)
def test_every_spelling_of_the_flag_makes_the_folder_importable(folder, command, tmp_path, flag):
    given = [part.format(folder) for part in flag]
    ended = command(*given, *CHOSEN, "strategy=mine", "rounds=1", "hydra.run.dir=run")
    assert (ended.status, ended.err) == (0, "")
    assert len(metrics_of(tmp_path / "run")) == 2


def test_a_relative_folder(folder, command, tmp_path):
    folder.rename(tmp_path / "here")
    ended = command("--config-dir", "here", *CHOSEN, "strategy=mine", "rounds=1", "hydra.run.dir=run")
    assert (ended.status, ended.err) == (0, "")


def test_the_users_strategy_resumes_with_the_folder_that_the_user_trusts(
    folder, command, tmp_path, monkeypatch
):
    chosen = [*CHOSEN, "strategy=mine", "rounds=3", "checkpoint.every=1", "hydra.run.dir=run"]
    command(f"--config-dir={folder}", *chosen)
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    for path in (tmp_path / "run" / "checkpoint" / "round-000003").iterdir():
        path.unlink()
    (tmp_path / "run" / "model.safetensors").unlink()
    monkeypatch.setattr(own_code, "imported_folders", [])  # as in another process
    monkeypatch.delitem(sys.modules, next(name for name in sys.modules if name.startswith("own_")))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(folder)])
    ended = command("resume=run")
    assert ended.status == 2
    assert ended.err.startswith(f"pisa-fl: resume: {tmp_path}/run/config.yaml: ")
    assert f"or give --config-dir {folder} if you trust that" in ended.err
    ended = command(f"--config-dir={folder}", "resume=run")
    assert (ended.status, ended.err) == (0, "")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole


def test_from_python(folder, tmp_path):
    before = set(sys.modules)
    result = pisa_fl.run(pisa_fl.compose(*CHOSEN, "strategy=mine", config_dir=folder), tmp_path / "run")
    assert result.metrics[-1]["test_accuracy"] > 0.9
    assert type(result.model).__name__ == "Net"
    assert any(name.startswith("own_") for name in set(sys.modules) - before)
    pisa_fl.compose(*CHOSEN, config_dir=folder)
    assert sys.path.count(str(folder)) == 1


def test_the_users_options_are_offered(folder, command):
    ended = command(f"--config-dir={folder}", "strategy=nope")
    assert ended.status == 2
    assert ", mine, " in ended.err


def test_from_objects(tmp_path):
    """A script as one writes it in a notebook, with nothing but the package."""
    script = (
        OWN
        + """
import torch
from pisa_fl import Federation
from strategies import Layout
from partitioners import deal

data = bars(60, 0.5)
torch.manual_seed(0)
net = Net(data.shape, 3, width=8)
half = SignStep(Layout.of_parameters(net), 0.01)
server = LoudAverage(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
federation = Federation(data, deal(EveryNth(4), data.train_labels), net, server, half)
for metrics in federation.rounds(30):
    print(metrics["round"], metrics["test_accuracy"])
with torch.no_grad():
    right = net(torch.as_tensor(data.test_images)).argmax(1) == torch.as_tensor(data.test_labels)
print("net", right.float().mean().item())
"""
    )
    (tmp_path / "notebook.py").write_text(script)
    ended = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert [name for name, _ in lines] == [*map(str, range(31)), "net"]
    assert float(lines[30][1]) > 0.9
    np.testing.assert_allclose(float(lines[31][1]), float(lines[30][1]), rtol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["notebook.py"]
