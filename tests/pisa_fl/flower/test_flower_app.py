"""The ClientApp, called as Flower calls it: what survives a process, and what a wrong node or configuration answers."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from omegaconf import OmegaConf
from test_flower_grid import write_digits

import partitioners
from pisa_fl import ConfigurationError, compose, prepare
from pisa_fl.clients.host import CLIENT_FAILED
from pisa_fl.config import resolve
from pisa_fl.config.allowed import CLIENT, SIMULATION, check_targets
from pisa_fl.engines.base import identify
from pisa_fl.engines.local import LocalGrid
from pisa_fl.flower import app as flower_app
from pisa_fl.flower.state_file import StateFile
from strategies import PisaClient
from strategies.base.messages import STATE_LOST, record, vectors

CLIENTS = 3


@pytest.fixture(autouse=True)
def new_process():
    """What a process keeps is of this test alone."""
    flower_app.hosted.cache_clear()
    if TaskIdentity._run_id is None:
        identify()
    yield
    flower_app.hosted.cache_clear()


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Where the clients of this machine keep what they remember, by its owner's word."""
    monkeypatch.setenv("PISA_FL_STATE", str(tmp_path / "states"))
    monkeypatch.setenv("PISA_FL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "states"


@pytest.fixture
def configure(tmp_path, root):
    """A federation of three on small digits."""
    write_digits(tmp_path / "digits")

    def make(*overrides):
        state = ["engine.experiment=e", "engine.threads=1"]
        data = ["data=mnist", f"data.root={tmp_path}/digits", f"data.cache={tmp_path}/cache"]
        small = ["model=logistic", f"clients={CLIENTS}", "partition=iid", "batch_size=8", "device=cpu"]
        if not any(text.startswith("strategy=") for text in overrides):
            overrides = ("strategy=sisa", *overrides)  # whose clients have something to remember
        return resolve(compose("engine=flower", *state, *data, *small, *overrides))

    return make


def context_of(config, *, run_id=7, **node_config):
    text = config if isinstance(config, str) else OmegaConf.to_yaml(config)
    return Context(run_id, 99, node_config, RecordDict(), {"hydra": text})


def introduce(context):
    question = Message(RecordDict({"config": ConfigRecord({"version": "?"})}), 99, "query")
    return flower_app.client(question, context)


def refusal(context):
    """The reason for which a client refuses to introduce itself, and to train."""
    said = set()
    for reply in (introduce(context), flower_app.client(Message(RecordDict(), 99, "train"), context)):
        assert reply.has_error()
        assert reply.error.code == CLIENT_FAILED
        said.add(reply.error.reason)
    [reason] = said
    return reason


class Server:
    """The server half, and messages made by it, so that every round may go wrong in its own way."""

    def __init__(self, config):
        self.federation = prepare(config, lambda clients: LocalGrid(clients.host([], 1, 250)))
        self.strategy, self.arrays = self.federation.strategy, self.federation.arrays
        self.sent, self.accepted = {}, 0

    def get_node_ids(self):
        return [0]

    def round(self, number, client, lost=False, supply=False):
        """Ask client 0 by a function; its reply may get lost on its way, or its state be sent along."""
        [message] = self.strategy.configure_train(number, self.arrays, ConfigRecord(), self)
        message.content["config"]["accepted-round"] = self.accepted
        if supply:
            message.content["state"] = self.strategy.supply(0)
        self.sent[number] = message
        reply = client(message)
        if not lost and not reply.has_error():
            self.arrays, _ = self.strategy.aggregate_train(number, [reply])
            self.accepted = number
        return reply


def as_client(context):
    """The ClientApp in a new process for each message."""

    def ask(message):
        flower_app.hosted.cache_clear()
        reply = flower_app.client(message, context)
        reply.metadata.__dict__["_src_node_id"] = context.node_config["partition-id"]
        return reply

    return ask


def as_host(config, number):
    """The same client that lives as long as the federation does."""
    grid = prepare(config, lambda clients: LocalGrid(clients.host([number], 1, 250))).grid

    def ask(message):
        [reply] = grid.host.handle([(number, message)])
        return reply

    return ask


def arrays_of(reply):
    assert not reply.has_error(), reply.error.reason
    return {name: array.numpy().tobytes() for name, array in reply.content["arrays"].items()}


def assert_same(reply, expected):
    assert arrays_of(reply) == arrays_of(expected)
    assert dict(reply.content["metrics"]) == dict(expected.content["metrics"])


# --- introducing itself


def test_a_client_says_who_it_is(configure):
    config = configure()
    federation = prepare(config, lambda clients: LocalGrid(clients.host([], 1, 250)))
    for number in range(CLIENTS):
        said = dict(introduce(context_of(config, **{"partition-id": number})).content["config"])
        assert said.pop("version")
        assert said == {
            "client": number,
            "examples": len(federation.partition[number]),
            "shape": [1, 28, 28],
            "classes": [str(digit) for digit in range(10)],
        }


# --- what survives a process


def test_a_client_of_many_processes_gives_the_same_bits_as_one_that_lives_on(configure):
    config = configure("strategy=nsisa")
    servers = Server(config), Server(config)
    clients = as_client(context_of(config, **{"partition-id": 0})), as_host(config, 0)
    for number in range(1, 6):
        reply, expected = (s.round(number, c) for s, c in zip(servers, clients, strict=True))
        assert_same(reply, expected)


def test_a_lost_reply_is_rolled_back(configure):
    config = configure("strategy.align_every=0", "strategy.sigma=5", "strategy.rho=50")
    servers = Server(config), Server(config)
    context = context_of(config, **{"partition-id": 0})
    clients = as_client(context), as_host(config, 0)
    for number in range(1, 4):
        for server, client in zip(servers, clients, strict=True):
            server.round(number, client)
    # the state file holds what was announced and never accepted; the other client was never asked
    servers[0].round(4, clients[0], lost=True)
    file = StateFile(None, "e", 0)
    assert (file.load().round, file.load().pending_round) == (3, 4)
    for number in (5, 6):
        reply, expected = (s.round(number, c) for s, c in zip(servers, clients, strict=True))
        assert_same(reply, expected)
    assert (file.load().round, file.load().pending_round) == (5, 6)


def test_a_client_killed_before_it_saved_answers_the_same_again(configure, monkeypatch):
    config = configure()
    servers = Server(config), Server(config)
    clients = as_client(context_of(config, **{"partition-id": 0})), as_host(config, 0)
    for number in range(1, 4):
        for server, client in zip(servers, clients, strict=True):
            server.round(number, client)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StateFile, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            servers[0].round(4, clients[0])
    reply, expected = (s.round(4, c) for s, c in zip(servers, clients, strict=True))
    assert_same(reply, expected)


@pytest.mark.parametrize("damage", ["deleted", "truncated", "of another experiment"])
def test_a_client_that_lost_its_state_says_so_and_goes_on_from_what_it_is_sent(configure, root, damage):
    config = configure()
    servers = Server(config), Server(config)
    context = context_of(config, **{"partition-id": 0})
    clients = as_client(context), as_host(config, 0)
    for number in range(1, 4):
        for server, client in zip(servers, clients, strict=True):
            server.round(number, client)
    path = root / "e" / "client-0.safetensors"
    if damage == "deleted":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        clients = as_client(context_of(configure("engine.experiment=f"), **{"partition-id": 0})), clients[1]
    reply = servers[0].round(4, clients[0])
    assert reply.has_error()
    assert reply.error.code == STATE_LOST
    assert_same(servers[0].round(4, clients[0], supply=True), servers[1].round(4, clients[1]))
    assert_same(servers[0].round(5, clients[0]), servers[1].round(5, clients[1]))


def test_an_evaluation_leaves_the_state_as_it_is(configure):
    config = configure()
    server, client = Server(config), as_client(context_of(config, **{"partition-id": 0}))
    for number in (1, 2):
        server.round(number, client)
    file = StateFile(None, "e", 0)
    before = file.load()
    content = RecordDict({"arrays": server.sent[2].content["arrays"]})
    reply = client(Message(content, 99, "evaluate"))
    assert set(reply.content["metrics"]) == {"num-examples", "accuracy", "loss"}
    after = file.load()
    assert (after.round, after.pending_round) == (before.round, before.pending_round) == (1, 2)
    for part in ("accepted", "pending"):
        assert all(torch.equal(getattr(after, part)[k], v) for k, v in getattr(before, part).items())


def test_runs_without_an_experiments_name_are_apart(configure):
    config = configure("engine.experiment=null")
    servers = Server(config), Server(config)
    clients = as_client(context_of(config, run_id=1, **{"partition-id": 0})), as_host(config, 0)
    for number in (1, 2):
        for server, client in zip(servers, clients, strict=True):
            server.round(number, client)
    Server(config).round(1, as_client(context_of(config, run_id=2, **{"partition-id": 0})))
    reply, expected = (s.round(3, c) for s, c in zip(servers, clients, strict=True))
    assert_same(reply, expected)


def test_an_experiment_may_have_a_number_for_a_name(configure, root):
    config = configure("engine.experiment=2024")
    assert config.engine.experiment == 2024
    assert not introduce(context_of(config, **{"partition-id": 0})).has_error()
    assert (root / "2024").is_dir()


# --- what a process costs


def test_a_new_process_maps_the_data_and_deals_nothing(configure, monkeypatch):
    config = configure()
    context = context_of(config, **{"partition-id": 1})
    first = introduce(context)
    flower_app.hosted.cache_clear()
    monkeypatch.setattr(partitioners, "deal", lambda *_: pytest.fail("dealt again"))
    monkeypatch.setattr("pisa_fl.data.mnist._read_idx_files", lambda *_: pytest.fail("decoded again"))
    again = introduce(context)
    assert dict(again.content["config"]) == dict(first.content["config"])
    host = flower_app.hosted(OmegaConf.to_yaml(config), 1, None, "e")
    assert flower_app.hosted.cache_info().hits == 1
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert isinstance(getattr(host.data, name), np.memmap)
    own = host.clients[1]
    assert own.fields["inputs"].data_ptr() == host.data.train_images.ctypes.data
    assert own.fields["targets"].data_ptr() == host.data.train_labels.ctypes.data


def test_a_process_that_lives_on_makes_a_client_once(configure, monkeypatch):
    config = configure()
    contexts = [context_of(config, **{"partition-id": number}) for number in range(CLIENTS)]
    for _ in range(3):
        for context in contexts:
            assert not introduce(context).has_error()
    assert flower_app.hosted.cache_info().misses == CLIENTS


def test_rows_are_those_that_the_server_dealt_in_every_run_of_an_experiment(configure):
    for override in ("seed=0", "seed=1", "clients=4", "strategy=fedavg"):
        config = configure(override)
        federation = prepare(config, lambda clients: LocalGrid(clients.host([], 1, 250)))
        for number in range(CLIENTS):
            host = flower_app.hosted(OmegaConf.to_yaml(config), number, None, "e")
            assert host.clients[number].rows.tolist() == federation.partition[number].tolist()


# --- what is wrong is said in one sentence


@pytest.mark.parametrize(
    ("node_config", "words"),
    [
        ({}, "node-config needs partition-id, the client's number, and has None"),
        ({"partition-id": "0"}, "node-config needs partition-id, the client's number, and has 0"),
        ({"partition-id": -1}, "has -1"),
        ({"partition-id": 1.0}, "has 1.0"),
        ({"partition-id": True}, "has True"),
        ({"partition-id": 3}, "partition-id=3 in the node-config is none of 0 to 2"),
        ({"partition-id": 2**40}, "is none of 0 to 2"),
        (
            {"partition-id": 0, "data": "/somewhere"},
            "partition=own and `data` in the node-config go together",
        ),
    ],
)
def test_a_node_that_is_configured_wrong_says_so(configure, node_config, words):
    reason = refusal(context_of(configure(), **node_config))
    assert words in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    "text",
    [
        "a: b: c",
        "[1, 2]",
        "words",
        "{a: [",
        "",
        "12",
        "\0",
        "a: ${b",
        "!!python/object/apply:os.getcwd []",
        "x: 1",
        "engine: &a [1, 1]\nb: &b [*a, *a]",
    ],
)
def test_a_configuration_that_is_none_is_said_to_be_none(text):
    reason = refusal(context_of(text, **{"partition-id": 0}))
    assert reason.startswith("the run-config key `hydra` ")
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["data.root=/nowhere/digits", "data.cache=null"],
            "client 0: data.root=/nowhere/digits is not a folder",
        ),
        (["device=cuda:77"], "client 0: device=cuda:77"),
        (["device=abacus"], "client 0: device=abacus is no device"),
        (["engine.experiment=../../up"], "engine.experiment=../../up must be"),
        (["engine.experiment=''"], "engine.experiment= must be"),
        (["clients=1000"], "client 0: "),
        (["strategy.lr=-1"], "client 0: strategy.client.penalty.lr must be positive"),
    ],
)
def test_what_is_impossible_at_a_client_is_said_in_one_sentence(configure, overrides, words):
    reason = refusal(context_of(configure(*overrides), **{"partition-id": 0}))
    assert reason.startswith(words)
    assert "\n" not in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_to_be_missing(configure):
    reason = refusal(context_of(configure("device=cuda"), **{"partition-id": 0}))
    assert reason.startswith("client 0: device=cuda asks for a GPU and there are 0")
    assert "\n" not in reason


def test_an_exception_of_the_client_half_comes_with_its_traceback_and_changes_nothing(configure, monkeypatch):
    config = configure()
    server, client = Server(config), as_client(context_of(config, **{"partition-id": 0}))
    reference, other = Server(config), as_host(config, 0)
    for number in (1, 2):
        server.round(number, client)
        reference.round(number, other)

    def solve(*_):
        raise ZeroDivisionError("in the\nhalf")

    with monkeypatch.context() as patched:
        patched.setattr(PisaClient, "solve", solve)
        reply = server.round(3, client)
    assert reply.error.code == CLIENT_FAILED
    line, _, trace = reply.error.reason.partition("\n")
    assert line == "ZeroDivisionError: in the half"
    assert trace.startswith("Traceback")
    assert "in solve" in trace
    assert_same(server.round(3, client), reference.round(3, other))


def test_an_instruction_that_is_refused_is_an_error_reply(configure):
    config = configure()
    client = as_client(context_of(config, **{"partition-id": 0}))
    for content in (
        RecordDict(),
        RecordDict(
            {"arrays": record({"weights": torch.zeros(3)}), "config": ConfigRecord({"server-round": 1})}
        ),
    ):
        reply = client(Message(content, 99, "train"))
        assert reply.error.code == CLIENT_FAILED
        assert reply.error.reason.startswith("instruction refused: ")
        assert "\n" not in reply.error.reason


# --- a configuration is code


FOREIGN = (
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "pathlib.Path.write_text",
    "shutil.rmtree",
    "pickle.loads",
    "importlib.import_module",
    "torch.load",
    "torch.hub.load",
    "torch.nn",
    "torch.nn.init.ones_",
    "torch.nn.functional.relu",
    "torch.nn.Module.load_state_dict",
    "torch.nn.modules.module.os.system",
    "torch.nn.modules.module.torch.hub.load",
    "torchvision.io.write_file",
    "torchvision.os.system",
    "torchvision.datasets.MNIST",
    "torchvision.models.get_model",
    "torchvision.models.detection.fasterrcnn_resnet50_fpn",
    "hydra.utils.get_method",
    "hydra.utils.instantiate",
    "pisa_fl.system.files.write",
    "pisa_fl.results.run_directory.write_config",
    "pisa_fl.flower.superlink.main",
    "pisa_fl.flower.launcher.subprocess.Popen",
    "pisa_fl.flower.launcher.FlowerRun",
    "pisa_fl.data.cache.cached",
    "pisa_fl.data.hub.download",
    "pisa_fl.models.mlp.mlp.__globals__",
    "pisa_fl.models.norm.norm_layer",
    "partitioners.save",
    "partitioners.draw",
    "strategies.base.rows.zeros",
    "nobody.has.this",
    "print",
    "",
    7,
    ["os.system"],
)
PLACES = (
    "data",
    "data.augment",
    "model",
    "model.hidden",
    "partition",
    "strategy.client",
    "strategy.client.preconditioner",
    "strategy.client.penalty",
)


def test_a_client_builds_nothing_but_what_a_part_of_a_federation_is_made_of(configure, monkeypatch):
    monkeypatch.setattr(flower_app, "hosted", lambda *_: pytest.fail("built"))
    config = configure()
    for place in PLACES:
        before = OmegaConf.select(config, place)
        for target in FOREIGN:
            OmegaConf.update(config, place, {"_target_": target, "_partial_": True}, merge=False)
            with pytest.raises(ConfigurationError) as error:
                check_targets(config, parts=CLIENT)
            assert str(error.value).startswith(f"{place}._target_={target} must not be built: ")
            assert "\n" not in str(error.value)
        OmegaConf.update(config, place, before, merge=False)
    flowers = {"_target_": "flwr_datasets.partitioner.IidPartitioner", "num_partitions": CLIENTS}
    for part, node in (("model", {"_target_": "torchvision.models.resnet18"}), ("partition", flowers)):
        check_targets(OmegaConf.merge(config, {part: None}, {part: node}), parts=CLIENT)
    config.model = {"_target_": "torch.nn.Sequential", "_args_": [[{"_target_": "os.system"}]]}
    said = refusal(context_of(config, **{"partition-id": 0}))
    assert said.startswith(
        "client 0: model._args_.0.0._target_=os.system must not be built: its package is none of"
    )


@pytest.mark.parametrize(
    ("place", "node", "words"),
    [
        # a data set is read for its own sake, and writes its cache where the client's owner says
        ("model", {"_target_": "pisa_fl.data.mnist.mnist", "cache": "/x"}, "must not be built"),
        ("data.augment", {"_target_": "pisa_fl.data.mnist.mnist", "cache": "/x"}, "must not be built"),
        ("data", {"_target_": "pisa_fl.data.mnist.mnist", "_args_": ["/x", "/x"]}, "by their names"),
        ("model", {"_target_": "torchvision.models.resnet18", "weights": "DEFAULT"}, "download weights"),
        ("model", {"_target_": "torchvision.models.resnet18", "pretrained": True}, "download weights"),
        ("model", {"_target_": "torchvision.models.resnet18", "_args_": [True]}, "by their names"),
        ("name", "${oc.env:HOME}", "is an interpolation"),
        ("model.hidden", ["${oc.env:HOME}"], "is an interpolation"),
        ("strategy.server.tau", "${name}", "is an interpolation"),
    ],
)
def test_what_a_configuration_may_not_say(configure, monkeypatch, place, node, words):
    monkeypatch.setattr(flower_app, "hosted", lambda *_: pytest.fail("built"))
    text = OmegaConf.to_container(configure())
    inner = text
    for key in place.split(".")[:-1]:
        inner = inner[key]
    inner[place.split(".")[-1]] = node
    assert words in refusal(context_of(yaml.safe_dump(text), **{"partition-id": 0}))


def test_a_clients_owner_allows_packages(configure, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "owners.py").write_text(
        "import os\nfrom torch import nn\nfrom torch.hub import load\n"
        "def net(shape, classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))\n"
    )
    config = configure("strategy.server._target_=servers.Own")  # a client builds no server
    for target, allow, words in (
        ("owners.net", "other owners", None),
        ("owners.net", "other", "its package is none of those allowed"),
        ("owners.net", "own", "its package is none of those allowed"),
        ("owners.os.system", "owners", "No module named 'owners.os'"),
        ("owners.load", "owners", "it must give a Module of"),
        ("owners.os", "owners", "it is neither a class nor a function"),
    ):
        config.model = {"_target_": target}
        context = context_of(config, allow=allow, **{"partition-id": 0})
        if words is None:
            assert not introduce(context).has_error()
        else:
            assert words in refusal(context)


def test_a_server_does_not_say_where_a_client_writes(configure, tmp_path, root):
    elsewhere = tmp_path / "elsewhere"
    config = configure(f"engine.state={elsewhere}", f"data.cache={elsewhere}")
    server = Server(config)
    for part in elsewhere.glob("*"):  # the server's own
        shutil.rmtree(part)
    assert not server.round(1, as_client(context_of(config, **{"partition-id": 0}))).has_error()
    assert list(elsewhere.glob("*")) == []
    assert (root / "e" / "client-0.safetensors").is_file()
    assert list((tmp_path / "cache").iterdir())


def test_in_a_simulation_the_configuration_is_its_own_users(configure, tmp_path, root, monkeypatch):
    monkeypatch.setenv(SIMULATION, "1")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_own.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))\n"
    )
    config = configure(f"engine.state={tmp_path}/chosen")
    config.model = {"_target_": "users_own.net"}
    assert not Server(config).round(1, as_client(context_of(config, **{"partition-id": 0}))).has_error()
    assert (tmp_path / "chosen" / "e" / "client-0.safetensors").is_file()
    assert not root.exists()


def test_weights_of_the_first_message_are_not_touched(configure):
    config = configure()
    server, client = Server(config), as_client(context_of(config, **{"partition-id": 0}))
    before = vectors(server.arrays)["weights"].clone()
    server.round(1, client, lost=True)
    assert torch.equal(vectors(server.sent[1].content["arrays"])["weights"], before)
