"""The command line with wrong input, with runs that fail, and with sweeps."""

import gzip
import json
import os
import struct
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
import yaml
from safetensors.torch import save_file

QUICK = ("model=logistic", "rounds=1", "engine.threads=1", "progress=false")


def lines_of(text):
    return [line for line in text.splitlines() if line.strip()]


def refused(command, tmp_path, *arguments):
    """The one sentence that a wrong command ends with; it must leave the folder as it was."""
    before = sorted(tmp_path.rglob("*"))
    flags = [text for text in arguments if text.startswith("--")]
    ended = command(*flags, *QUICK, *(text for text in arguments if text not in flags))
    (line,) = lines_of(ended.err)
    assert ended.status == 2
    assert line.startswith("pisa-fl: ")
    assert "Traceback" not in ended.out
    assert sorted(tmp_path.rglob("*")) == before
    return line.removeprefix("pisa-fl: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # names
        ("strategy=nope", ["strategy=nope does not exist", "fedavg, ", "sisa"]),
        ("partition=nope", ["partition=nope does not exist", "label_skew"]),
        ("data=nope", ["data=nope does not exist", "mnist_mini"]),
        ("model=nope", ["model=nope does not exist", "simple_cnn"]),
        ("tracker=[csv,nope]", ["tracker=nope does not exist", "pisa-fl --help"]),
        ("~tracker.tensorboard tracker=5", ["tracker=5: a group is chosen by its name"]),
        ("+tracker._target_=mine.Mine", ["tracker._target_=mine.Mine", "`mine: {_target_: mine.Mine}`"]),
        (
            "+tracker.mine._target_=builtins.dict",
            ["tracker.mine._target_=builtins.dict must give a Observer"],
        ),
        ("redraw=-1", ["redraw must be a number of seconds"]),
        ("engine=nope", ["engine=nope does not exist", "local"]),
        ("strategy/preconditioner=nope", ["strategy/preconditioner=nope does not exist", "second_moment"]),
        ("nonsense=1", ["nonsense is no key", "--cfg job"]),
        ("cliens=3", ["cliens is no key", "did you mean clients?"]),
        ("strategy=sisaa", ["did you mean sisa?"]),
        ("experiment=papr", ["experiment=papr does not exist", "did you mean paper?"]),
        ("strategy.nonsense=1", ["strategy.nonsense is no key"]),
        ("+rounds=3", ["rounds"]),
        ("rounds", ["rounds cannot be read as key=value"]),
        ("targets=[0.1", ["targets=[0.1 cannot be read as key=value"]),
        ("strategy=sisa,fedavg", ["strategy=sisa,fedavg", "--multirun"]),
        ("--config-dir=nowhere", ["nowhere", "not found"]),
        # values of the root keys
        ("rounds=abc", ["rounds must be a whole number", "got abc"]),
        ("rounds=-1", ["rounds must be a whole number of at least 0", "got -1"]),
        ("clients=0", ["clients must be a whole number of at least 1", "got 0"]),
        ("clients=2.5", ["clients must be a whole number", "got 2.5"]),
        ("batch_size=0", ["batch_size must be a whole number of at least 1"]),
        ("seed=-1", ["seed must be a whole number of at least 0"]),
        ("participation=0", ["participation must be above 0 and at most 1", "got 0"]),
        ("participation=2", ["participation must be above 0 and at most 1", "got 2"]),
        ("participation=nan", ["participation must be above 0 and at most 1", "got nan"]),
        ("checkpoint.every=0", ["checkpoint.every must be a whole number of at least 1"]),
        ("targets=[2]", ["targets must be values of accuracy, at most 1, in a list"]),
        ("targets=0.9", ["targets must be numbers in a list, such as [0.9]"]),
        ("targets=[true]", ["targets must be", "got [True]"]),
        ("targets=null", ["targets must be", "got null"]),
        ("round_timeout=inf", ["round_timeout must be a number of seconds from 0 to 2000000, got inf"]),
        ("round_timeout=3000000", ["round_timeout must be a number of seconds", "got 3000000"]),
        ("patience=nan", ["patience must be a number of seconds", "got nan"]),
        ("seed=1180591620717411303424", ["seed must be a whole number of at most 9223372036854775807"]),
        ("seed=", ["seed must be a whole number of at least 0, got an empty text"]),
        ("seed=010", ["seed must be a whole number", "got 010"]),
        ("clients=1000000000000", ["clients must be a whole number of at most"]),
        ("checkpoint.every=1e9", ["checkpoint.every must be a whole number", "got 1000000000.0"]),
        ("engine.workers=1000000", ["engine.workers must be a whole number of at most 1024 or auto"]),
        # a scalar, null or nothing where keys are expected
        ("strategy=null", ["strategy=null: a group is chosen by its name"]),
        ("data=5", ["data=5: a group is chosen by its name"]),
        ("hydra=null", ["hydra=null: a group is chosen by its name"]),
        ("checkpoint=5", ["checkpoint must be a group of keys, got 5"]),
        ("~strategy", ["strategy must be a group of keys, got nothing"]),
        ("~clients", ["clients", "not found"]),
        ("~strategy.server", ["strategy.server must be a group of keys", "a server half"]),
        ("strategy.client=5", ["strategy.client must be a group of keys, got 5", "a client half"]),
        ("data.augment=5", ["data.augment must be keys with a _target_ or null, got 5"]),
        # targets that are none, or give something else
        ("strategy.server._target_=5", ["strategy.server._target_=5 is no name"]),
        ("strategy.server._target_=torch", ["strategy.server._target_=torch is a module"]),
        (
            "partition._target_=builtins.dict",
            ["partition._target_=builtins.dict must give a Partitioner", "dict"],
        ),
        (
            "strategy.client._target_=builtins.dict",
            ["strategy.client._target_=builtins.dict must give a ClientHalf"],
        ),
        ("seed=${seed}", ["Recursive interpolation"]),
        ("partition.num_partitions=7", ["partition.num_partitions=7 and clients=10 disagree"]),
        ("progress=perhaps", ["progress must be true or false", "got perhaps"]),
        ("engine.stack=0", ["engine.stack must be a whole number"]),
        ("device=nonsense", ["device=nonsense is no device", "device", "cpu"]),
        ("device=meta", ["device=meta is no device that PyTorch can use here"]),
        # values of the groups, by the key that the user set
        ("strategy.lr=-1", ["strategy.lr must be positive, got -1"]),
        ("model.hidden=abc", ["model.hidden must be a list", "got abc"]),
        ("model=simple_cnn model.hidden=[10]", ["model.hidden must have 2 numbers", "got [10]"]),
        ("model=simple_cnn model.channels=[1,2,3]", ["model.channels must have 2 numbers"]),
        ("model=simple_cnn model.kernel=0", ["model.kernel must hold whole numbers of at least 1"]),
        ("model=vgg9 model.channels=[]", ["model.channels=[] is empty"]),
        ("model=simple_cnn model.kernel=15", ["model.kernel=15", "use larger images, a smaller kernel"]),
        ("data.mean=abc", ["data.mean must be a number or a list", "got abc"]),
        ("data.std=[0.0]", ["data.std=[0.0] must be positive"]),
        (
            "partition.classes_per_client=11",
            ["classes_per_client=11 is more than the 10 classes", "lower it"],
        ),
        ("partition=dirichlet partition.alpha=0", ["partition.alpha must be positive, got 0"]),
        ("partition=dirichlet partition.alpha=-1", ["partition.alpha must be positive, got -1"]),
        (
            "partition=dirichlet partition.alpha=0.001 clients=900 partition.max_redraws=3",
            ["4 draws never gave", "raise partition.alpha=0.001 or partition.max_redraws"],
        ),
        ("partition=from_file", ["partition.path has no default: give it as partition.path=..."]),
        (
            "partition=from_file partition.path=none.json",
            ["partition.path=none.json cannot be read: No such file"],
        ),
        ("data=imagefolder", ["data.path has no default: give it as data.path=..."]),
        ("data=imagefolder data.path=none", ["data.path=none has no folder 'train'"]),
        ("data=mnist data.root=none", ["data.root=none is not a folder"]),
        ("strategy.server._target_=nowhere.Server", ["strategy.server._target_=nowhere.Server", "nowhere"]),
        # files
        ("init=none.safetensors", ["init=none.safetensors cannot be read", "No such file"]),
        ("hydra.run.dir=file/run", ["file/run: Not a directory"]),
    ],
)
def test_wrong_input_gets_one_sentence(command, tmp_path, arguments, words):
    (tmp_path / "file").touch()
    sentence = refused(command, tmp_path, *arguments.split())
    assert [word for word in words if word not in sentence] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: 1\nb: [1\n", "bad.yaml, line 3: expected ',' or ']'"),
        (b"a: 1\na: 2\n", "bad.yaml, line 2: found duplicate key a"),
        (b"a:\tb:\n\t- 1\n", "bad.yaml, line 1: "),
        (b"\xff\xfe\x00", "bad.yaml cannot be read as YAML"),
        (
            b"a: &a [*a]\n",
            "bad.yaml cannot be read as YAML: the configuration is nested too deeply, or holds itself",
        ),
    ],
)
def test_a_mistake_in_a_file_of_the_users_is_named(command, tmp_path, content, words):
    (tmp_path / "own" / "strategy").mkdir(parents=True)
    (tmp_path / "own" / "strategy" / "bad.yaml").write_bytes(content)
    assert words in refused(command, tmp_path, "strategy=bad", "--config-dir=own")


def test_a_config_dir_that_is_none(command, tmp_path):
    assert refused(command, tmp_path, "--config-dir=").startswith("--config-dir= is not a folder")


OWN_MODELS = """
from torch import nn

class Linear(nn.Module):
    def __init__(self, inputs=784, outputs=10):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, images):
        return self.layer(images.flatten(1))

class Pair(Linear):
    def forward(self, images):
        logits = super().forward(images)
        return (logits, logits) if self.training else logits

class Named(Linear):
    def forward(self, images):
        return {"logits": super().forward(images)}

class Label(Linear):
    def forward(self, images):
        return super().forward(images).argmax(1)

class Infinite(Linear):
    def forward(self, images):
        return super().forward(images) / 0

def few(): return Linear(outputs=7)
def other_size(): return Linear(inputs=100)
def a_class(): return Linear
def nothing(): return None
def leaves(): raise SystemExit(3)
def recurs(): return recurs()
def looks_up(): return {}["x"]
"""


def test_models_that_do_not_fit(command, tmp_path, monkeypatch):
    """One sentence before the first round, with nothing written."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "models_of_mine.py").write_text(OWN_MODELS)
    (tmp_path / "own" / "model" / "mine.yaml").write_text("_target_: ???\n")
    logits = "must give logits, one float tensor of (examples, classes), and gives"
    expected = {
        "Pair": f"Pair {logits} a tuple in training",
        "Named": f"Named {logits} a dict in evaluation",
        "Label": f"Label {logits} torch.int64 of shape (4,) for 4 examples",
        "Infinite": f"Infinite {logits} numbers that are not finite",
        "few": f"Linear {logits} 7 numbers an example for 10 classes",
        "other_size": "Linear cannot take images of (channels, height, width) (1, 28, 28): RuntimeError",
        "a_class": "must give a Module and gives the class Linear",
        "nothing": "must give a Module and gives a NoneType",
        "leaves": "model._target_=models_of_mine.leaves: SystemExit: 3",
        "recurs": "model._target_=models_of_mine.recurs: RecursionError",
        "looks_up": "model._target_=models_of_mine.looks_up: KeyError: 'x'",
    }
    for name, words in expected.items():
        chosen = ["--config-dir=own", "model=mine", f"model._target_=models_of_mine.{name}"]
        assert words in refused(command, tmp_path, *chosen)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(command, tmp_path):
    assert refused(command, tmp_path, "device=cuda") == (
        "device=cuda asks for a GPU and there are 0: use device=auto or device=cpu"
    )


def test_initial_weights_that_are_none(command, tmp_path):
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 100)
    assert "cannot be read as safetensors" in refused(command, tmp_path, "init=garbage.safetensors")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"conv1.weight": (6, 1, 5, 5)}, "1.weight is missing there and (10, 784) in the model"),
        ({"1.weight": (10, 5), "1.bias": (10,)}, "1.weight is (10, 5) there and (10, 784) in the model"),
        ({"1.weight": (10, 784), "1.bias": (10,), "2.bias": (3,)}, "it holds 2.bias, which the model lacks"),
    ],
)
def test_initial_weights_of_another_model(command, tmp_path, tensors, words):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "other.safetensors")
    sentence = refused(command, tmp_path, "init=other.safetensors")
    assert sentence.startswith("init=other.safetensors is of another model")
    assert words in sentence


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (float("nan"), torch.float32, "holds numbers in 1.bias that are not finite"),
        (1e300, torch.float64, "holds numbers in 1.bias that are not finite in torch.float32"),
        (1, torch.int32, "1.bias is torch.int32 there and torch.float32 in the model"),
    ],
)
def test_initial_weights_that_are_no_weights(command, tmp_path, value, dtype, words):
    bias = torch.full((10,), value, dtype=dtype)
    save_file({"1.weight": torch.zeros(10, 784), "1.bias": bias}, tmp_path / "odd.safetensors")
    assert words in refused(command, tmp_path, "init=odd.safetensors")


def test_a_pipe_is_not_waited_for(command, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refused(command, tmp_path, "init=pipe").startswith("init=pipe is no file")
    sentence = refused(command, tmp_path, "partition=from_file", "partition.path=pipe")
    assert sentence.startswith("partition.path=pipe is a pipe")


def test_a_corrupt_idx_file(command, tmp_path):
    for split, count in (("train", 20), ("t10k", 10)):
        images = struct.pack(">4BIII", 0, 0, 8, 3, count, 28, 28) + bytes(count * 784)
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        labels = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(count)
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(labels[:-1])
    sentence = refused(command, tmp_path, "data=mnist", f"data.root={tmp_path}", "data.cache=null")
    assert "t10k-labels-idx1-ubyte is not a whole idx file" in sentence


def test_a_partition_file_of_other_clients(command, tmp_path):
    (tmp_path / "partition.json").write_text('{"0": [0], "1": [1]}')
    sentence = refused(command, tmp_path, "partition=from_file", "partition.path=partition.json")
    assert sentence.endswith("set clients=2")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(command, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "note").write_text("mine")
    folder.chmod(0o500)
    assert "Permission denied" in refused(command, tmp_path, f"hydra.run.dir={folder}/run")
    assert "Permission denied" in refused(command, tmp_path, f"hydra.run.dir={folder}")


def test_a_run_directory_that_is_a_file(command, tmp_path):
    (tmp_path / "taken").write_text("")
    assert "taken: File exists" in refused(command, tmp_path, "hydra.run.dir=taken")


def test_a_refused_run_leaves_the_users_own_folder(command, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "note").write_text("mine")
    refused(command, tmp_path, "strategy.lr=-1")
    command("hydra.run.dir=.", "strategy.lr=-1")
    assert (tmp_path / "runs" / "note").read_text() == "mine"


def test_the_traceback_is_there_for_who_asks(command, monkeypatch):
    setenv = monkeypatch.setenv
    monkeypatch.setattr(monkeypatch, "setenv", lambda name, _: setenv(name, "1"))
    with pytest.raises(ValueError, match=r"strategy\.lr must be positive"):
        command("model=logistic", "strategy.lr=-1")


def test_the_process_says_so_too(tmp_path):
    """Exit status and output of a real process, and an error that comes before Hydra and one after."""
    for argument in ("strategy=nope", "clients=0"):
        line = [sys.executable, "-m", "pisa_fl", argument]
        ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 2
        assert ended.stdout == ""
        assert len(lines_of(ended.stderr)) == 1
    assert list(tmp_path.iterdir()) == []


# --- runs that fail

RAISING = """
from strategies import ClientHalf

class Raising(ClientHalf):
    def __init__(self, layout):
        self.layout = layout

    def solve(self, stack, instruction, state):
        raise ZeroDivisionError("my own mistake")
"""


def user_folder(tmp_path, code, client):
    folder = tmp_path / "own"
    (folder / "strategy").mkdir(parents=True)
    (folder / f"{client.partition('.')[0]}.py").write_text(code)
    halves = {"server": {"_target_": "flwr.serverapp.strategy.FedAvg"}, "client": {"_target_": client}}
    halves["server"] |= {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}
    (folder / "strategy" / "mine.yaml").write_text(yaml.safe_dump(halves))
    return folder


def test_clients_that_all_raise(command, tmp_path, two_workers):
    folder = user_folder(tmp_path, RAISING, "raising_half.Raising")
    ended = command(f"--config-dir={folder}", *QUICK, "strategy=mine", "hydra.run.dir=run")
    assert ended.status == 1
    (line,) = lines_of(ended.err)
    assert line == (
        "pisa-fl: no client gave an acceptable reply in round 1; client 0: ZeroDivisionError: my own mistake"
    )
    assert ended.out.count("Traceback (most recent call last)") == 1
    assert 'raise ZeroDivisionError("my own mistake")' in ended.out
    failures = [json.loads(text) for text in lines_of((tmp_path / "run" / "failures.jsonl").read_text())]
    assert [(failure["round"], failure["client"]) for failure in failures] == [(1, i) for i in range(10)]
    assert {"ZeroDivisionError" in failure["reason"] for failure in failures} == {True}


def test_a_run_that_diverges_keeps_its_metrics(command, tmp_path):
    ended = command(*QUICK, "strategy=fedavg", "strategy.lr=1e12", "hydra.run.dir=run")
    assert ended.status == 1
    (line,) = lines_of(ended.err)
    assert line.startswith("pisa-fl: no client gave an acceptable reply in round 1; client 0: ")
    assert "NaN" in line
    (metrics,) = lines_of((tmp_path / "run" / "metrics.jsonl").read_text())
    assert json.loads(metrics)["round"] == 0
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "run" / "partition.png").exists()


def test_a_mistake_in_the_users_server_shows_its_traceback(tmp_path, command):
    code = (
        "from flwr.serverapp.strategy import FedAvg\n"
        "class Broken(FedAvg):\n"
        "    def aggregate_train(self, server_round, replies):\n"
        "        raise ValueError('my own mistake')\n"
    )
    folder = user_folder(tmp_path, code, "broken_server.Broken")
    mine = folder / "strategy" / "mine.yaml"
    halves = yaml.safe_load(mine.read_text())
    halves["server"]["_target_"] = "broken_server.Broken"
    halves["client"] = {"_target_": "strategies.LocalSgd", "lr": 0.1, "momentum": 0.0}
    halves["client"] |= {"weight_decay": 0.0, "local_epochs": 1}
    mine.write_text(yaml.safe_dump(halves))
    with pytest.raises(ValueError, match="my own mistake"):
        command(f"--config-dir={folder}", *QUICK, "strategy=mine", "hydra.run.dir=run")


# --- sweeps


def test_a_sweep_makes_a_directory_for_each_run(command, tmp_path):
    ended = command("--multirun", *QUICK, "strategy=sisa,pisa", "seed=0,1")
    assert (ended.status, ended.err) == (0, "")
    runs = sorted(path.parent for path in tmp_path.glob("multirun/*/*/*/config.yaml"))
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    assert [run.name for run in runs] == ["0", "1", "2", "3"]
    assert [(config["name"], config["seed"]) for config in configs] == [
        ("sisa", 0),
        ("sisa", 1),
        ("pisa", 0),
        ("pisa", 1),
    ]
    assert all((run / "model.safetensors").is_file() for run in runs)
    assert [path.name for path in tmp_path.iterdir()] == ["multirun"]


WORTH = """
from importlib.metadata import version
from pathlib import Path
from hydra.experimental.callback import Callback

class Worth(Callback):
    def on_job_end(self, config, job_return, **_):
        with Path("worth").open("a") as file:
            print(repr(job_return.return_value), file=file)
"""


def test_a_run_of_a_sweep_is_worth_its_final_accuracy(command, tmp_path):
    """As Hydra's sweepers (Optuna's, Nevergrad's) ask for it."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "worth_of_runs.py").write_text(WORTH)
    watched = ["+hydra.callbacks.worth._target_=worth_of_runs.Worth", "hydra.sweep.dir=out"]
    watched.append("hydra.launcher.jobs=1")  # in their order
    assert command("--config-dir=own", "--multirun", *QUICK, "seed=0,1", *watched).status == 0
    finals = [json.loads((tmp_path / "out" / n / "summary.json").read_text())["final_accuracy"] for n in "01"]
    assert [float(line) for line in lines_of((tmp_path / "worth").read_text())] == finals
    assert finals[0] != finals[1]


def test_a_run_of_a_sweep_that_fails_says_which_and_the_others_go_on(command, tmp_path):
    ended = command("--multirun", *QUICK, "strategy=pisa", "strategy.lr=-1,0.1")
    assert ended.status == 2
    said = [line for line in lines_of(ended.err) if line.startswith("pisa-fl: ")]
    assert len(said) == 1
    assert said[0] == "pisa-fl: run 1 of 2 (strategy.lr=-1): strategy.lr must be positive, got -1"
    assert "Traceback" not in ended.err
    (summary,) = tmp_path.glob("multirun/*/*/*/summary.json")
    assert summary.parent.name == "1"
    assert [path.name for path in summary.parent.parent.iterdir() if path.is_dir()] == ["1"]


def test_the_version(command):
    ended = command("--version")
    assert (ended.status, ended.out) == (0, f"pisa-fl {version('pisa-fl')}\n")


def test_a_quiet_run_prints_its_directory_and_nothing_else(command, tmp_path):
    (tmp_path / "file").touch()
    quiet = command(*QUICK, "progress=quiet", "data.cache=file/in", "hydra.run.dir=out")
    assert (quiet.status, quiet.out) == (0, f"{tmp_path / 'out'}\n")
    assert "data.cache: going without" in " ".join(quiet.err.split())
