"""What a client's owner decides: configurations of hostile servers, given to the ClientApp as Flower gives them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from omegaconf import OmegaConf
from test_flower_app import context_of
from test_flower_grid import SuperLink, app, configure, failures_in, write_digits

from pisa_fl import ConfigurationError, prepare, run
from pisa_fl.clients.host import CLIENT_FAILED
from pisa_fl.config.allowed import SIMULATION
from pisa_fl.engines.base import identify
from pisa_fl.engines.local import LocalGrid
from pisa_fl.flower import app as flower_app
from pisa_fl.flower.grid import FlowerGrid
from pisa_fl.flower.policy import TEMPLATE, VARIABLE, Policy, fingerprint
from strategies.base.messages import record

CANARY = """
from pathlib import Path
from torch import nn

def sing(*arguments, **named):
    with Path(__file__).with_suffix(".sang").open("a") as file:
        file.write("x")
    return nn.Flatten()

sing()
"""


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A real client's host: images, a link that leads out of their folder, and a module that tells if it is run."""
    monkeypatch.delenv(SIMULATION, raising=False)
    for name, folder in (("PISA_FL_STATE", "states"), ("PISA_FL_CACHE", "cache"), (VARIABLE, "policy.toml")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("SECRET", "s3cret")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "canary.py").write_text(CANARY)
    write_digits(tmp_path / "digits")
    (tmp_path / "digits" / "out").symlink_to("/etc")
    (tmp_path / "policy.toml").write_text(TEMPLATE)
    if TaskIdentity._run_id is None:
        identify()
    flower_app.hosted.cache_clear()
    yield tmp_path
    flower_app.hosted.cache_clear()


def says(host, *lines):
    (host / "policy.toml").write_text("\n".join(lines))


def answers(config, kind="query", content=None, **node_config):
    """What client 0 answers to a message of a server with this configuration: its reason to refuse, or None."""
    message = Message(content or RecordDict({"config": ConfigRecord({})}), 99, kind)
    reply = flower_app.client(message, context_of(config, **{"partition-id": 0} | node_config))
    assert not reply.has_error() or reply.error.code == CLIENT_FAILED
    return reply.error.reason if reply.has_error() else None


SYSTEM = {"_target_": "os.system", "_args_": ["touch canary.sang"]}
SING = {"_target_": "canary.sing"}
BUILT, TEXT = "must not be built", "cannot be read"
READ, ALLOWS = "nothing to be read outside", "its owner allows "
HOSTILE = {
    # code
    "a command": ("model", SYSTEM, BUILT),
    "a process": ("model", {"_target_": "subprocess.Popen", "args": ["touch", "canary.sang"]}, BUILT),
    "eval": ("model", {"_target_": "builtins.eval", "_args_": ["__import__('canary')"]}, BUILT),
    "exec": ("task", {"_target_": "builtins.exec", "_args_": ["import canary"]}, BUILT),
    "nested": ("model", {"_target_": "torch.nn.Sequential", "_args_": [SING]}, BUILT),
    "in lists of lists": ("model.hidden", [[[SING]]], BUILT),
    "under an argument": ("partition.seed", SING, BUILT),
    "not instantiated by Hydra": (
        "model",
        {"_target_": "torch.nn.Sequential", "_recursive_": False, "_args_": [SING]},
        BUILT,
    ),
    "converted": ("model", {"_convert_": "object", "_partial_": True, **SING}, BUILT),
    "partial": ("strategy.client.optimizer", {"_target_": "functools.partial", "_args_": [SING]}, BUILT),
    "get_method": ("model", {"_target_": "hydra.utils.get_method", "path": "canary.sing"}, BUILT),
    "instantiate": ("model", {"_target_": "hydra.utils.instantiate", "config": SING}, BUILT),
    "a module that runs": ("data", {"_target_": "canary.nothing"}, BUILT),
    "an import": ("data", {"_target_": "importlib.import_module", "name": "canary"}, BUILT),
    "an augmentation": ("data.augment", SING, BUILT),
    "through a module of ours": ("model", {"_target_": "pisa_fl.models.resnet.os.system"}, BUILT),
    "globals": ("model", {"_target_": "pisa_fl.models.mlp.mlp.__globals__"}, BUILT),
    "unpickling": ("model", {"_target_": "torch.load", "f": "model.pt", "weights_only": False}, BUILT),
    "pickle": ("data", {"_target_": "pickle.loads", "_args_": ["cos\nsystem\n."]}, BUILT),
    "numpy's pickle": ("data", {"_target_": "numpy.load", "file": "x.npy", "allow_pickle": True}, BUILT),
    "a download": ("model", {"_target_": "torchvision.models.resnet18", "weights": "DEFAULT"}, BUILT),
    "no name": ("model", {"_target_": ["canary.sing"]}, BUILT),
    # interpolations
    "the environment": ("name", "${oc.env:SECRET}", "is an interpolation"),
    "the environment for a target": ("model._target_", "${oc.env:SECRET}", BUILT),
    "decoded": ("batch_size", "${oc.decode:'${oc.env:SECRET}'}", "is an interpolation"),
    "created": ("model.hidden", ["${oc.create:{a: 1}}"], "is an interpolation"),
    # files
    "a folder": ("data.root", "/etc", READ),
    "a way out": ("data.root", "HOST/digits/../../../../../../etc", READ),
    "a link": ("data.root", "HOST/digits/out", READ),
    "a home": ("data.root", "~root", READ),
    "a file": ("data", {"_target_": "pisa_fl.data.table.csv", "path": "/etc/passwd", "target": "root"}, READ),
    "a second file": ("data.test", "/etc/shadow", READ),
    "a set of the hub": ("data", {"_target_": "pisa_fl.data.huggingface.images", "name": "a/set"}, READ),
    "a folder that is here": (
        "data",
        {"_target_": "pisa_fl.data.huggingface.images", "name": "states"},
        READ,
    ),
    "a set below": ("data.augment", {"name": "a/set"}, READ),
    "an address": ("data.root", "file:///etc", READ),
    "a deal": ("partition", {"_target_": "partitioners.FromFilePartitioner", "path": "/etc/passwd"}, READ),
    "where state lies": ("engine.experiment", "../../etc", "engine.experiment=../../etc must be"),
    # expense
    "rounds": ("rounds", 10**9, ALLOWS + "20 passes in all, and this makes 1e+09"),
    "epochs": ("strategy.client.local_epochs", 10**9, ALLOWS + "2 passes a round, and this makes 1e+09"),
    "no number": ("strategy.client.local_epochs", "1e9", "strategy.client.local_epochs=1e9 is no number"),
    "a batch": ("batch_size", 10**9, ALLOWS + "mini-batches of 64 examples"),
    "a batch of no size": ("batch_size", -1, "batch_size must be a whole number of at least 1"),
    "alone": ("min_clients", 1, ALLOWS + "federations of at least 3 clients, and min_clients=1"),
    "10^12 parameters": ("model.hidden", [10**6, 10**6], "larger than 100000 numbers"),
    "tensors without end": (
        "model",
        {"_target_": "pisa_fl.models.gpt.GPT", "layers": 10**12, "heads": 1, "width": 1},
        "100000 numbers in 10000 tensors",
    ),
}
TEXTS = {
    "a Python object": "model: !!python/object/apply:os.system ['touch canary.sang']\n",
    "aliases": "engine: &a [1, 1]\nmodel: [*a, *a]\n",
    "a longer one": "a: 1\n" * 300_000,
    "no end of brackets": "[" * 100_000,
}


def test_no_configuration_of_a_hostile_server_has_anything_run_read_or_spent(host, monkeypatch):
    limits = ["passes_per_round = 2", "passes = 20", "batch_size = 64", "parameters = 100_000", "clients = 3"]
    says(host, f"data = ['{host}/digits']", *limits)
    began, reset = [], torch.nn.Linear.reset_parameters
    monkeypatch.setattr(
        torch.nn.Linear, "reset_parameters", lambda layer: (began.append(layer), reset(layer))
    )
    good = configure(host, "strategy=fedavg", "strategy.local_epochs=1")
    assert answers(good) is None
    assert began, "a client builds a model of what it allows"
    began.clear()
    for number, (what, (place, node, words)) in enumerate(HOSTILE.items()):
        bad = OmegaConf.to_container(good)
        inner, keys = bad, place.split(".")
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = node.replace("HOST", str(host)) if isinstance(node, str) else node
        said = answers(json.dumps(bad), ("query", "train")[number % 2])
        assert said is not None, what
        assert words in said, (what, said)
        assert said.startswith("client 0: ") or words.startswith("engine.experiment"), (what, said)
        assert "\n" not in said, what
        assert "s3cret" not in said, what
    for what, text in TEXTS.items():
        assert TEXT in answers(text), what
    text = OmegaConf.to_yaml(good)
    for value in ("!!python/object/apply:pathlib.PosixPath [/etc]", "!!binary L2V0Yw=="):
        assert READ in answers(text.replace(f"root: {host}/digits", f"root: {value}")), value
    # in place of one of these a client would read its own folder
    both = OmegaConf.merge(good, {"data": {"path": "/etc", "root": "/etc"}})
    assert "data.root=/etc" in answers(both, data=str(host / "digits"))
    assert len(HOSTILE) + len(TEXTS) >= 30
    assert not list(host.glob("*.sang"))
    assert not Path("canary.sang").exists()
    assert "canary" not in sys.modules
    assert sum(layer.weight.numel() for layer in began) < 100_000, "no more than that is filled with numbers"


def test_an_owner_pins_the_experiment(host, tmp_path):
    config = configure(host, "strategy=fedavg")
    says(host, f"experiments = ['0', '{fingerprint(config)}']")
    assert answers(config) is None
    # where files lie, how the run is watched and which engine's threads it has is no part of it
    moved = OmegaConf.merge(config, {"name": "other", "progress": True, "data": {"cache": "/x"}})
    assert answers(moved) is None
    for change in (
        {"seed": 1},
        {"rounds": 5},
        {"strategy": {"client": {"lr": 0.02}}},
        {"strategy": {"server": {"fraction_evaluate": 0.5}}},
        {"model": {"hidden": [10]}},
        {"partition": {"seed": 1}},
        {"min_clients": 2},
        {"data": {"validation": 0.5}},
        {"secure": {"threshold": 0.7}},
    ):
        other = OmegaConf.merge(config, change)
        assert answers(other) == (
            f"client 0: its owner allows the experiments 0, {fingerprint(config)} alone,"
            f" and this is {fingerprint(other)}"
        )
    # the owner is sent what the server's user prints, and pins what the command prints of it
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    line = [sys.executable, "-m", "pisa_fl.flower.policy", tmp_path / "config.yaml", host / "policy.toml"]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, f"{fingerprint(config)}\n"), ended.stderr
    says(host, "clients = 9")
    ended = subprocess.run(line, capture_output=True, text=True)
    words = "pisa-fl-policy: its owner allows federations of at least 9 clients, and clients=4\n"
    assert (ended.returncode, ended.stderr) == (2, words)
    # it refuses what a client refuses, whatever else the file is
    text, laugh = OmegaConf.to_yaml(config), "a: &a [1]\nb: &b [*a,*a]\n"
    for bad, words in (
        (text.replace("_target_: pisa_fl.models.", "_target_: os."), "must not be built"),
        (text + laugh, "it has YAML aliases"),
        (text.replace("min_clients: null", "min_clients: ???"), "min_clients is missing"),
        (text.replace("min_clients: null\n", ""), "is no configuration of a run"),
        ("[1, 2]", "it is no configuration"),
        ("a: [", "cannot be read"),
    ):
        assert bad != text
        (tmp_path / "config.yaml").write_text(bad)
        ended = subprocess.run(line, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout.count("\n") < 2) == (2, True)
        assert words in ended.stderr
        assert ended.stderr.count("\n") == 1


def test_a_client_makes_no_more_passes_than_its_owner_allows_in_all_runs_together(host):
    """MOON reads its examples with two other models as well, which its configuration does not say."""
    config = configure(host, "strategy=moon", "strategy.local_epochs=1", "rounds=3")
    federation = prepare(config, lambda clients: LocalGrid(clients.host([], 1, 250)))

    class Grid:
        def get_node_ids(self):
            return [0]

    def train(config, number):
        [message] = federation.strategy.configure_train(number, federation.arrays, ConfigRecord(), Grid())
        message.content["config"]["accepted-round"] = 0
        return answers(config, "train", message.content)

    def made():
        path = host / "states" / "passes-client-0.json"
        return json.loads(path.read_text()) if path.exists() else {}

    says(host, "passes_per_round = 1")
    assert answers(config) is None, "a pass is what it speaks of"
    assert train(config, 1) == "its owner allows 1 passes now, and this takes more"
    first = made()["e"]
    assert 0.5 < first <= 1 + 1 / 3, "what was made before that counts, though nothing was sent"
    says(host, f"passes = {first + 5}")
    assert train(config, 2) is None
    assert made()["e"] == pytest.approx(first + 5 / 3), "two thirds are outputs of two other models"
    assert train(config, 3) is None
    other = OmegaConf.merge(config, {"engine": {"experiment": "another"}})
    assert train(other, 4) == f"client 0: its owner allows {first + 5:g} passes in all, and this makes 3" + (
        f" after {made()['e']:g} for others"
    )
    assert train(config, 4) is None
    assert train(config, 5).endswith("passes now, and this takes more")
    assert sum(made().values()) <= first + 5 + 1 / 3
    (host / "states" / "passes-client-0.json").write_text("[]")
    assert "passes-client-0.json cannot be read" in train(config, 6)


def test_noise_of_at_least_so_much_is_in_what_a_client_builds(host):
    says(host, "[privacy]", "target = 'mine.Noise'", "multiplier = 1.1", "randomness = 'system'")
    policy, config = Policy.of_owner(), configure(host, "strategy=fedavg")
    good = {"_target_": "mine.Noise", "multiplier": 1.1, "randomness": "system"}
    with_it = {"strategy": {"client": {"transforms": [good]}}}
    policy.check(OmegaConf.merge(config, with_it))
    for node in (
        {**good, "multiplier": 1.0},
        {**good, "multiplier": "2"},
        {**good, "multiplier": float("nan")},
        {**good, "multiplier": True},
        {"_target_": "mine.Noise", "randomness": "system"},
        {**good, "randomness": "seed"},
        {**good, "_target_": "mine.Other"},
        {"transform": good["_target_"]},
    ):
        bad = OmegaConf.merge(config, with_it)
        bad.strategy.client.transforms = [node]
        with pytest.raises(
            ConfigurationError, match=r"through mine\.Noise with multiplier 1\.1, randomness system"
        ):
            policy.check(bad)
    with pytest.raises(ConfigurationError, match="nothing to be sent but"):
        policy.check(OmegaConf.merge(config, {"strategy": {"server": {"transforms": [good]}}}))


def test_all_that_a_client_tells_is_noised_whatever_the_server_lets_pass(host):
    says(host, "[privacy]", "target = 'pisa_fl.privacy.Local'", "noise = 0.5")
    config = configure(host, "strategy=fedavg", "strategy.local_epochs=1", "model=logistic", "privacy=local")
    weights = record({"weights": torch.zeros(7850)})
    content = RecordDict({"arrays": weights, "config": ConfigRecord({"server-round": 1})})
    assert answers(config, "train", content) is None
    assert "its metrics would tell of its examples" in answers(config, "evaluate", content)
    layers = [("Flatten", {}), ("BatchNorm1d", {"num_features": 784})]
    layers.append(("Linear", {"in_features": 784, "out_features": 10}))
    nodes = [{"_target_": f"torch.nn.{name}", **given} for name, given in layers]
    scaffold = {**OmegaConf.to_container(config.strategy.client), "_target_": "strategies.ScaffoldClient"}
    for key, node, words in (
        (
            "model",
            {"_target_": "torch.nn.Sequential", "_args_": nodes},
            "keeps running statistics of examples",
        ),
        ("strategy.client", scaffold, "ScaffoldClient sends weights, control"),
    ):
        bad = config.copy()
        OmegaConf.update(bad, key, node, merge=False)
        for kind in ("query", "train"):
            said = answers(bad, kind, content)
            assert words in said
            assert "\n" not in said


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["epochs = 3"], "there is no key epochs: there are experiments, data, "),
        (["clients = 0"], "clients must be a whole number of at least 1, got 0"),
        (["clients = true"], "clients must be a whole number"),
        (["passes = -1"], "passes must be a number of at least 0"),
        (["passes = nan"], "passes must be a number of at least 0"),
        (["data = '/srv'"], "data must be texts in a list"),
        (["[privacy]", "noise = 1"], "privacy must be a table with target"),
        (["clients = "], "Invalid value"),
        (None, "No such file"),
    ],
)
def test_a_client_whose_policy_cannot_be_read_takes_part_in_nothing(host, lines, words):
    (host / "policy.toml").unlink()
    if lines is not None:
        says(host, *lines)
    said = answers(configure(host, "strategy=fedavg"))
    assert said.startswith("client 0: its owner's policy, policy.toml, cannot be read (")
    assert words in said


def test_every_key_of_a_policy_is_explained_and_may_be_left_out(host):
    """The template is a policy when the sign of comments is taken from its keys, too."""
    assert Policy.read(host / "policy.toml") == Policy()
    text = TEMPLATE.replace("\n# ", "\n").partition("\n\n")[2]
    (host / "policy.toml").write_text(text)
    policy = Policy.read(host / "policy.toml")
    assert all(value for value in vars(policy).values())


def test_the_server_is_told_why_a_client_takes_no_part(host, monkeypatch, capsys):
    config = configure(host, "strategy=fedavg", "strategy.local_epochs=1", "rounds=1", "min_clients=2")
    link, table = SuperLink(), host / "nodes.txt"
    says(host, "clients = 10")

    def before(number):
        """Of all clients on this host, it is client 1's policy."""
        flower_app.hosted.cache_clear()
        monkeypatch.setenv(VARIABLE, str(host / "policy.toml") if number == 1 else "/dev/null")

    nodes = {n: link.join(app(config, n, lambda message, n=n: before(n))) for n in range(4)}
    table.write_text("".join(f"{node} client-{number} KEY\n" for number, node in nodes.items()))
    run(config, host / "run", lambda clients: FlowerGrid(clients, link, table))
    words = "its owner allows federations of at least 10 clients, and clients=4"
    assert failures_in(host / "run") == [{"round": 0, "client": 1, "reason": f"turned away: {words}"}]
    assert json.loads((host / "run" / "summary.json").read_text())["turned_away"] == [f"client 1: {words}"]
    assert "client 1: its owner allows" in capsys.readouterr().out
