"""The grid of `engine=flower` on a SuperLink in memory: clients that come, go, err, are late, or are impostors."""

import copy
import json
import math
import re
import struct
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.run import Run
from omegaconf import OmegaConf
from safetensors.torch import load_file

from pisa_fl import compose, prepare, resume, run
from pisa_fl.clients.host import CLIENT_FAILED, Clients
from pisa_fl.config import resolve
from pisa_fl.config.allowed import SIMULATION
from pisa_fl.data import ImageData
from pisa_fl.federation import TooFewClientsError
from pisa_fl.flower import app as flower_app
from pisa_fl.flower import grid as flower_grid
from pisa_fl.flower.grid import FlowerGrid
from pisa_fl.results.result import Interrupted
from pisa_fl.results.run_directory import FLOWER_LOG, STOP, WAITING
from strategies.base.messages import STATE_LOST

SUPERLINK = 1  # Flower's node id of whoever answers in place of a node
NEVER = math.inf


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    """The clients are this machine's own: the configuration says where they keep what they remember."""
    monkeypatch.setenv(SIMULATION, "1")


# --- a SuperLink in memory


class Clock:
    """In place of the module `time`: nobody really waits."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds


@dataclass
class Node:
    """A SuperNode: how it answers a message, after how many seconds, and what it was sent."""

    answer: object
    delay: float = 0.0
    seen: list = field(default_factory=list)

    def kinds(self):
        return [message.metadata.message_type for message in self.seen]


class SuperLink(Grid):
    """Keeps messages and replies as Flower's does: node ids are random, and it errs in place of who is offline."""

    def __init__(self, clock=None, seed=0):
        self.clock = clock or Clock()
        self.nodes, self.online = {}, set()
        self._draw = np.random.default_rng(seed)
        self._numbers = count()
        self._waiting = {}
        self._run = Run.create_empty(run_id=7)

    def join(self, answer, node_id=None, **options):
        """A new node; its id."""
        node_id = int(self._draw.integers(2**62, 2**63 - 1)) if node_id is None else node_id
        self.nodes[node_id] = Node(answer, **options)
        self.online.add(node_id)
        return node_id

    def get_node_ids(self):
        return self._shuffled(sorted(self.online))

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{next(self._numbers)}"
            node = self.nodes[message.metadata.dst_node_id]
            sent = copy.deepcopy(message)
            reply = None
            if message.metadata.dst_node_id in self.online:
                node.seen.append(sent)
                answer = node.answer(copy.deepcopy(sent))
                if answer is not None and not isinstance(answer, Message):
                    answer = Message(answer, reply_to=sent)
                reply = copy.deepcopy(answer)
            self._waiting[message.metadata.message_id] = (sent, reply, self.clock.now + node.delay)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        replies = []
        for message_id in sorted(message_ids):
            sent, reply, ready = self._waiting[message_id]
            if sent.metadata.dst_node_id not in self.online:
                reply, ready = (
                    Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=sent),
                    0,
                )
                reply.metadata.__dict__["_src_node_id"] = SUPERLINK
            if reply is not None and ready <= self.clock.now:
                replies.append(reply)
                del self._waiting[message_id]
        return self._shuffled(replies)

    def _shuffled(self, things):
        return [things[i] for i in self._draw.permutation(len(things))]

    def set_run(self, run):
        self._run = run

    @property
    def run(self):
        return self._run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise AssertionError("the engine pushes and pulls")

    def send_and_receive(self, messages, *, timeout=None):
        raise AssertionError("the engine pushes and pulls")


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(flower_grid, "time", made)
    return made


# --- clients that follow a script

SIZES = (3, 5, 4)
CLASSES = ("cat", "dog")


def clients(own=False):
    """What the server knows of the clients; of those with data of their own, nothing."""
    images, labels = np.zeros((12, 1, 2, 2), np.uint8), np.zeros(12, np.int64)
    data = ImageData(images, labels, images, labels, CLASSES, (0.0,), (1.0,))
    rows = {} if own else dict(enumerate(np.split(np.arange(12), np.cumsum(SIZES)[:-1])))
    return Clients(data, rows, torch.nn.Identity(), None, 0, 1, torch.device("cpu"))


def words(client, /, **changes):
    """What client number `client` says of itself; changes to None leave something out."""
    examples = SIZES[client] if client < len(SIZES) else 6
    said = {"client": client, "examples": examples, "version": version("pisa-fl")}
    said |= {"shape": [1, 2, 2], "classes": list(CLASSES)} | changes
    return RecordDict({"config": ConfigRecord({k: v for k, v in said.items() if v is not None})})


def scripted(client, introduction=None, reply=None):
    """A node that introduces itself, and answers all else with its number and with what it was sent."""

    def answer(message):
        if message.metadata.message_type == "query":
            return words(client) if introduction is None else introduction
        got = dict(message.content["config"])
        return reply or RecordDict({"metrics": MetricRecord({"from": client, "number": got["number"]})})

    return answer


def instruction(client, number=0, kind="train"):
    content = {"arrays": ArrayRecord({"w": Array(np.full(3, client, np.float32))})}
    content["config"] = ConfigRecord({"number": number})
    return Message(RecordDict(content), client, kind)


def ask(grid, numbers, number=0, timeout=None, kind="train"):
    """Replies by client number; each is to the message to that client, and from it."""
    messages = [instruction(client, number, kind) for client in numbers]
    replies = list(grid.send_and_receive(messages, timeout=timeout))
    ids = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    for reply in replies:
        assert ids[reply.metadata.reply_to_message_id] == reply.metadata.src_node_id
        assert reply.metadata.message_type == kind
    assert len({reply.metadata.src_node_id for reply in replies}) == len(replies)
    return {reply.metadata.src_node_id: reply for reply in replies}


def numbers_of(replies):
    return {client: reply.content["metrics"]["number"] for client, reply in replies.items()}


def test_node_ids_become_client_numbers_there_and_back(clock):
    link = SuperLink(clock)
    nodes = {client: link.join(scripted(client)) for client in (2, 0, 1)}
    grid = FlowerGrid(clients(), link)
    for kind in ("train", "evaluate"):
        assert grid.get_node_ids() == [0, 1, 2]
        replies = ask(grid, [0, 1, 2], 5, kind=kind)
        assert {c: r.content["metrics"]["from"] for c, r in replies.items()} == {0: 0, 1: 1, 2: 2}
    for client, node in nodes.items():
        question, train, _ = link.nodes[node].seen
        assert link.nodes[node].kinds() == ["query", "train", "evaluate"]
        assert dict(question.content["config"]) == {"version": version("pisa-fl")}
        assert train.metadata.dst_node_id == node
        assert train.content["arrays"]["w"].numpy().tolist() == [client] * 3


def test_only_who_is_asked_gets_a_message(clock):
    link = SuperLink(clock)
    nodes = [link.join(scripted(client)) for client in range(3)]
    grid = FlowerGrid(clients(), link)
    grid.get_node_ids()
    assert ask(grid, [2]).keys() == {2}
    assert [link.nodes[node].kinds()[1:] for node in nodes] == [[], [], ["train"]]
    assert ask(grid, [1, 9]).keys() == {1}


def test_what_a_client_says_is_handed_on_unchanged(clock):
    link = SuperLink(clock)
    link.join(scripted(0, reply=Error(STATE_LOST, "lost")))
    sent = np.float32([[1, -0.0], [math.pi, 1e-40]])
    link.join(scripted(1, reply=RecordDict({"arrays": ArrayRecord({"a": Array(sent)})})))
    grid = FlowerGrid(clients(), link)
    grid.get_node_ids()
    replies = ask(grid, [0, 1])
    assert (replies[0].error.code, replies[0].error.reason) == (STATE_LOST, "lost")
    assert replies[1].content["arrays"]["a"].numpy().tobytes() == sent.tobytes()


def test_a_node_that_goes_away_while_it_is_asked_is_an_error_of_that_client(clock):
    link = SuperLink(clock)
    link.join(scripted(0))
    node = link.join(scripted(1))
    grid = FlowerGrid(clients(), link)
    assert grid.get_node_ids() == [0, 1]
    link.nodes[node].answer = lambda message: link.online.remove(node)
    replies = ask(grid, [0, 1])
    assert replies[1].error.code == ErrorCode.NODE_UNAVAILABLE
    assert replies[0].content["metrics"]["from"] == 0


# --- introductions that are refused

WRONG = {
    "another version": (words(1, version="0.0.1"), "client 1 has version 0.0.1, the server "),
    "no version": (words(1, version=None), "client 1 has version None"),
    "other images": (words(1, shape=[3, 2, 2]), r"client 1 has shape \[3, 2, 2\], the server \[1, 2, 2\]"),
    "other classes": (words(1, classes=["cat", "cow"]), r"client 1 has classes \['cat', 'cow'\]"),
    "classes in another order": (words(1, classes=["dog", "cat"]), r"client 1 has classes \['dog', 'cat'\]"),
    "a class less": (words(1, classes=["cat"]), r"client 1 has classes \['cat'\]"),
    "no such client": (words(3), "client 3 is none of the 3"),
    "a negative number": (words(1, client=-1), "client -1 is none of the 3"),
    "a text for a number": (words(1, client="1"), "client 1 is none of the 3"),
    "half a number": (words(1, client=0.5), "client 0.5 is none of the 3"),
    "several numbers": (words(1, client=[0, 1]), r"client \[0, 1\] is none of the 3"),
    "no number": (words(1, client=None), "client None is none of the 3"),
    "more examples": (words(1, examples=6), "client 1 has 6 examples, 5 were dealt to it"),
    "no examples": (words(1, examples=0), "client 1 says that it has 0 examples"),
    "half an example": (words(1, examples=5.5), "client 1 says that it has 5.5 examples"),
    "examples not said": (words(1, examples=None), "client 1 says that it has None examples"),
    "nothing": (RecordDict(), "client None has version None"),
    "another record": (RecordDict({"more": MetricRecord({"client": 1})}), "client None has version None"),
    "its own error": (Error(CLIENT_FAILED, "client 1: there is no data"), "client 1: there is no data"),
    "its own error without a reason": (Error(CLIENT_FAILED), "turned away"),
}
WRONG_OWN = {
    key: WRONG[key] for key in ("another version", "other classes", "no examples", "its own error")
} | {
    "a negative number": (words(1, client=-1), "client -1 is none"),
    "too many examples": (words(1, examples=2**40), "client 1 says that it has 1099511627776 examples"),
}


@pytest.mark.parametrize(
    ("own", "wrong"), [*((False, wrong) for wrong in WRONG), *((True, wrong) for wrong in WRONG_OWN)]
)
def test_who_does_not_fit_is_turned_away_once_and_the_others_go_on(own, wrong, clock, caplog):
    introduction, reason = (WRONG_OWN if own else WRONG)[wrong]
    link = SuperLink(clock)
    for client in (0, 2):
        link.join(scripted(client))
    stranger = link.join(scripted(1, introduction=introduction))
    grid = FlowerGrid(clients(own), link)
    for number in (1, 2, 3):
        assert grid.get_node_ids() == [0, 2]
        assert numbers_of(ask(grid, [0, 1, 2], number)) == {0: number, 2: number}
    assert link.nodes[stranger].kinds() == ["query"]
    [warning] = caplog.records
    assert "a client is turned away: " in warning.getMessage()
    assert re.search(reason, warning.getMessage()), warning.getMessage()


def test_who_was_turned_away_may_try_again_after_a_restart(clock):
    link = SuperLink(clock)
    node = link.join(scripted(0, introduction=words(0, version="0.0.1")))
    grid = FlowerGrid(clients(), link)
    assert grid.get_node_ids() == []
    link.online.remove(node)
    link.nodes[node].answer = scripted(0)
    assert grid.get_node_ids() == []
    link.online.add(node)
    assert grid.get_node_ids() == [0]


@pytest.mark.parametrize("newcomer", [2, 2**64 - 1], ids=["with a smaller node id", "with a greater node id"])
def test_of_two_nodes_with_one_number_the_first_to_come_stays(newcomer, clock, caplog):
    link = SuperLink(clock)
    first = link.join(scripted(1, introduction=words(1, examples=11)))
    other = link.join(scripted(0))
    grid = FlowerGrid(clients(own=True), link)
    assert grid.get_node_ids() == [0, 1]
    second = link.join(scripted(1, introduction=words(1, examples=22)), newcomer)
    for number in (1, 2):
        assert grid.get_node_ids() == [0, 1]
        assert grid.sizes == {0: 3, 1: 11}
        assert numbers_of(ask(grid, [0, 1], number)) == {0: number, 1: number}
    assert [link.nodes[node].kinds() for node in (first, second)] == [["query", "train", "train"], ["query"]]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "a second node says that it is client 1"
    ]
    # a client that was restarted without a key has a new node id, and its old one stays online for a while
    link.online.remove(first)
    assert grid.get_node_ids() == [0, 1]
    assert grid.sizes == {0: 3, 1: 22}
    assert numbers_of(ask(grid, [0, 1], 3)) == {0: 3, 1: 3}
    assert link.nodes[second].kinds() == ["query", "train"]
    assert link.nodes[other].kinds() == ["query", "train", "train", "train"]
    assert len(caplog.records) == 1


# --- coming and going

FLOWERS_OWN = sorted(
    value for name, value in vars(ErrorCode).items() if name.isupper() and isinstance(value, int)
)


@pytest.mark.parametrize("code", FLOWERS_OWN)
def test_an_error_of_flowers_own_is_no_introduction_and_it_is_asked_again(code, clock, caplog):
    link = SuperLink(clock)
    link.join(scripted(0))
    node = link.join(scripted(1, introduction=Error(code, "Flower's own")))
    grid = FlowerGrid(clients(), link)
    assert grid.get_node_ids() == [0]
    assert grid.get_node_ids() == [0]
    link.nodes[node].answer = scripted(1)
    assert grid.get_node_ids() == [0, 1]
    assert grid.get_node_ids() == [0, 1]
    assert link.nodes[node].kinds() == ["query"] * 3
    assert caplog.records == []


def test_who_comes_later_takes_part_from_the_next_round(clock):
    link = SuperLink(clock)
    grid = FlowerGrid(clients(), link)
    assert grid.get_node_ids() == []
    assert clock.now == 1000
    link.join(scripted(2))
    assert grid.get_node_ids() == [2]
    link.join(scripted(0))
    assert ask(grid, [0, 2]).keys() == {2}
    assert grid.get_node_ids() == [0, 2]
    assert ask(grid, [0, 2]).keys() == {0, 2}


def test_who_leaves_is_not_asked_and_introduces_itself_again_when_it_is_back(clock):
    link = SuperLink(clock)
    link.join(scripted(0))
    node = link.join(scripted(1, introduction=words(1, examples=8)))
    grid = FlowerGrid(clients(own=True), link)
    assert grid.get_node_ids() == [0, 1]
    link.online.remove(node)
    for number in (1, 2):
        assert grid.get_node_ids() == [0]
        assert ask(grid, [0, 1], number).keys() == {0}
    assert grid.sizes == {0: 3, 1: 8}
    link.online.add(node)
    link.nodes[node].answer = scripted(1, introduction=words(1, examples=9))
    assert grid.get_node_ids() == [0, 1]
    assert grid.sizes == {0: 3, 1: 9}
    assert ask(grid, [0, 1]).keys() == {0, 1}
    assert link.nodes[node].kinds() == ["query", "query", "train"]


def test_who_goes_away_before_it_has_introduced_itself_is_asked_when_it_is_back(clock):
    link = SuperLink(clock)
    link.join(scripted(0))
    node = link.join(scripted(1), delay=NEVER)
    grid = FlowerGrid(clients(), link)
    assert grid.get_node_ids() == [0]
    link.online.remove(node)
    assert grid.get_node_ids() == [0]
    link.online.add(node)
    link.nodes[node].delay = 0
    assert grid.get_node_ids() == [0, 1]
    assert link.nodes[node].kinds() == ["query", "query"]


def test_an_introduction_that_comes_late_but_within_the_time_is_waited_for(clock):
    link = SuperLink(clock)
    link.join(scripted(0))
    link.join(scripted(1), delay=flower_grid.INTRODUCTION - 1)
    assert FlowerGrid(clients(), link).get_node_ids() == [0, 1]


def test_who_does_not_introduce_itself_holds_up_one_round_and_no_later_one(clock):
    link = SuperLink(clock)
    link.join(scripted(0))
    silent = link.join(scripted(1), delay=3 * flower_grid.INTRODUCTION)
    grid = FlowerGrid(clients(), link)
    start = clock.now
    assert grid.get_node_ids() == [0]
    assert (
        flower_grid.INTRODUCTION <= clock.now - start <= flower_grid.INTRODUCTION + flower_grid.LONGEST_PAUSE
    )
    before = clock.now
    assert grid.get_node_ids() == [0]
    assert clock.now == before
    link.join(scripted(2))
    assert grid.get_node_ids() == [0, 2]
    assert clock.now - before < 1
    assert link.nodes[silent].kinds() == ["query"]
    clock.now = start + 3 * flower_grid.INTRODUCTION
    before = clock.now
    assert grid.get_node_ids() == [0, 1, 2]
    assert clock.now == before
    assert ask(grid, [0, 1, 2], timeout=1).keys() == {0, 2}


# --- time


def test_who_is_silent_until_the_timeout_is_left_out(clock):
    link = SuperLink(clock)
    nodes = [link.join(scripted(client)) for client in range(3)]
    grid = FlowerGrid(clients(), link)
    grid.get_node_ids()
    link.nodes[nodes[0]].delay, link.nodes[nodes[1]].delay = 20, 40
    start = clock.now
    assert ask(grid, [0, 1, 2], timeout=30).keys() == {0, 2}
    assert 30 <= clock.now - start <= 30 + flower_grid.LONGEST_PAUSE
    start = clock.now
    assert ask(grid, [0, 1, 2]).keys() == {0, 1, 2}
    assert 40 <= clock.now - start <= 40 + flower_grid.LONGEST_PAUSE


def test_a_late_reply_is_never_taken_for_one_of_a_later_round(clock):
    link = SuperLink(clock)
    node = link.join(scripted(0), delay=0)
    grid = FlowerGrid(clients(), link)
    grid.get_node_ids()
    link.nodes[node].delay = 50
    assert ask(grid, [0], 1, timeout=30) == {}
    link.nodes[node].delay = 25  # the late one comes first
    assert numbers_of(ask(grid, [0], 2, timeout=60)) == {0: 2}
    link.nodes[node].delay = 100
    assert ask(grid, [0], 3, timeout=1) == {}
    assert ask(grid, [0], 4, timeout=1) == {}
    clock.now += 1000  # both late ones are there
    link.nodes[node].delay = 0
    assert grid.get_node_ids() == [0]
    assert numbers_of(ask(grid, [0], 5, timeout=0)) == {0: 5}


# --- sizes


def test_sizes_of_what_was_dealt_are_known_from_the_start(clock):
    link = SuperLink(clock)
    link.join(scripted(1))
    grid = FlowerGrid(clients(), link)
    assert grid.sizes == dict(enumerate(SIZES))
    grid.get_node_ids()
    assert grid.sizes == dict(enumerate(SIZES))


def test_sizes_of_own_data_are_known_once_a_client_has_said_so(clock):
    link = SuperLink(clock)
    link.join(scripted(0, introduction=words(0, examples=100)))
    grid = FlowerGrid(clients(own=True), link)
    assert grid.sizes == {}
    assert grid.get_node_ids() == [0]
    assert grid.sizes == {0: 100}
    link.join(scripted(40, introduction=words(40, examples=7)))
    link.join(scripted(1, introduction=words(1, examples=0)))
    assert grid.get_node_ids() == [0, 40]
    assert grid.sizes == {0: 100, 40: 7}


# --- whole federations, of Flower's ClientApps

CLIENTS = 4
ROUNDS = 4


def write_digits(folder, train=90, test=30, classes=range(10), seed=0):
    """Four idx files of noisy pictures in which a bright row tells the class."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, number in (("train", train), ("t10k", test)):
        labels = draw.permutation(np.resize(np.array(classes, np.uint8), number))
        images = draw.integers(0, 60, (number, 28, 28), np.uint8)
        images[np.arange(number), 2 + 2 * labels.astype(int)] += 180
        header = struct.pack(">HBB", 0, 8, 3) + struct.pack(">3I", *images.shape)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">HBB", 0, 8, 1) + struct.pack(">I", number)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return folder


def configure(folder, *overrides, engine="flower", partition="iid"):
    """A small federation on digits in a folder."""
    if not (folder / "digits").exists():
        write_digits(folder / "digits")
    own = [f"engine.state={folder}/states", "engine.experiment=e"] if engine == "flower" else []
    small = ["model=logistic", f"clients={CLIENTS}", f"rounds={ROUNDS}", "batch_size=8", "device=cpu"]
    if not any(text.startswith("strategy=") for text in overrides):
        small.append("strategy=sisa")  # whose clients have something to remember, and to lose
    small += [f"partition={partition}"]
    data = ["data=mnist", f"data.root={folder}/digits", f"data.cache={folder}/cache"]
    config = compose(
        f"engine={engine}",
        "engine.threads=1",
        *own,
        *small,
        *data,
        "patience=0",
        "progress=false",
        *overrides,
    )
    return resolve(config)


def app(config, number, before=None, **node_config):
    """A node that runs the ClientApp as client `number`; `before` each message something may happen."""
    context = Context(
        run_id=7,
        node_id=number + 1,
        node_config={"partition-id": number, "num-partitions": CLIENTS} | node_config,
        state=RecordDict(),
        run_config={"hydra": OmegaConf.to_yaml(config)},
    )

    def answer(message):
        if before is not None:
            before(message)
        return flower_app.client(message, context)

    return answer


def engine_on(link):
    return lambda clients: FlowerGrid(clients, link)


def on_apps(config, directory, before=None, seed=0, start=run):
    """A run, or another start, over new nodes that join in a random order."""
    link = SuperLink(seed=seed)
    for number in np.random.default_rng(seed).permutation(config.clients):
        link.join(app(config, int(number), before))
    return start(directory, engine_on(link)) if start is resume else start(config, directory, engine_on(link))


def without(metrics, *keys):
    return [{key: value for key, value in line.items() if key not in ("seconds", *keys)} for line in metrics]


def assert_same_end(result, reference, *but):
    assert without(result.metrics, *but) == without(reference.metrics, *but)
    assert [line["round"] for line in result.metrics] == list(range(ROUNDS + 1))
    own, other = result.model.state_dict(), reference.model.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.fixture
def in_new_processes(clock):
    """Nothing that a process keeps survives from one message to the next."""
    return lambda message: flower_app.hosted.cache_clear()


METHODS = {
    "sisa, each its own moments": ["quantity", "strategy=sisa_official"],
    "pisa, half of the clients": [
        "label_skew",
        "strategy=pisa",
        "partition.classes_per_client=3",
        "participation=0.5",
    ],
    "fedavg, noisy pixels": ["feature_noise", "strategy=fedavg", "strategy.local_epochs=1"],
    "fedadmm, half of the clients": [
        "quantity",
        "strategy=fedadmm",
        "strategy.local_epochs=1",
        "participation=0.5",
    ],
    "ditto, half of the clients": [
        "quantity",
        "strategy=ditto",
        "strategy.local_epochs=1",
        "strategy.personal_epochs=1",
        "participation=0.5",
        "evaluate_clients_every=1",
    ],
}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """SISA, undisturbed, on the local engine."""
    return run(configure(tmp_path_factory.mktemp("local"), engine="local"))


@pytest.mark.parametrize("method", METHODS)
def test_client_apps_give_the_same_bits_as_the_local_engine(method, tmp_path, in_new_processes):
    partition, *overrides = METHODS[method]
    ends = [tmp_path / "local", tmp_path / "flower"]
    reference = run(configure(tmp_path, *overrides, partition=partition, engine="local"), ends[0])
    config = configure(tmp_path, *overrides, partition=partition)
    assert_same_end(on_apps(config, ends[1], in_new_processes), reference)
    measured = [(end / "clients.jsonl").read_text() for end in ends if (end / "clients.jsonl").exists()]
    assert (len(measured), len(set(measured))) == (
        (2, 1) if "evaluate_clients_every=1" in overrides else (0, 0)
    )


@pytest.mark.parametrize("lost", [(), (1,)], ids=["", "one lost its state"])
def test_stopped_and_resumed_over_other_nodes_it_ends_with_the_same_bits(tmp_path, clock, local, lost):
    config = configure(tmp_path)
    directory = tmp_path / "flower"

    def stop(message):
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
            (directory / STOP).touch()

    with pytest.raises(Interrupted):
        on_apps(config, directory, stop)
    assert not (directory / STOP).exists()
    flower_app.hosted.cache_clear()
    for number in lost:
        (Path(config.engine.state) / "e" / f"client-{number}.safetensors").unlink()
    asked = []
    result = on_apps(config, directory, asked.append, seed=1, start=resume)
    assert_same_end(result, local, *(["bytes_down"] if lost else []))
    # the server supplied each of those once, and nobody else
    supplied = [m.metadata.dst_node_id for m in asked if "state" in m.content.array_records]
    assert len(supplied) == len(set(supplied)) == len(lost)


def test_the_server_app_runs_a_federation_into_its_directory(tmp_path, in_new_processes, local):
    directory = tmp_path / "flower"
    directory.mkdir()
    config = configure(tmp_path, f"engine.directory={directory}")
    (directory / FLOWER_LOG).touch()  # as the launcher does
    link = SuperLink()
    for number in range(CLIENTS):
        link.join(app(config, number, in_new_processes))
    flower_app.server(link, Context(7, 1, {}, RecordDict(), {"hydra": OmegaConf.to_yaml(config)}))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert without(lines) == without(local.metrics)
    weights = load_file(directory / "model.safetensors")
    assert all(torch.equal(weights[name], w) for name, w in local.model.state_dict().items())
    assert not (directory / "failures.jsonl").exists()


def test_a_strategy_of_flowers_starts_on_the_grid_itself(tmp_path, in_new_processes):
    config = configure(tmp_path, "strategy=fedavg", "strategy.local_epochs=1")
    link = SuperLink()
    for number in range(CLIENTS):
        link.join(app(config, number, in_new_processes))
    ended = []
    for federation in (
        prepare(config, engine_on(link)),
        prepare(configure(tmp_path, "strategy=fedavg", "strategy.local_epochs=1", engine="local")),
    ):
        weights = ArrayRecord(federation.model.state_dict())
        ended.append(FedAvg().start(grid=federation.grid, initial_arrays=weights, num_rounds=2))
    over_flower, local = ended
    for name, array in local.arrays.items():
        # Flower's own sum is in the order in which clients answered
        np.testing.assert_allclose(over_flower.arrays[name].numpy(), array.numpy(), rtol=1e-4, atol=1e-6)
    assert over_flower.train_metrics_clientapp.keys() == {1, 2}
    assert over_flower.evaluate_metrics_clientapp[2]["accuracy"] == pytest.approx(
        local.evaluate_metrics_clientapp[2]["accuracy"]
    )


# --- a number belongs to a key


def test_nobody_takes_the_number_of_anothers_key(tmp_path, clock):
    link, table = SuperLink(clock), tmp_path / "nodes.txt"
    grid = FlowerGrid(clients(), link, table)
    thief, honest = link.join(scripted(0), 2**63 + 1), link.join(scripted(2), 2**63 + 2)
    table.write_text(f"11 client-0 old\n{thief} client-1 AAAA\n{honest} client-2 BBBB\n12 client-0 CCCC\n")
    assert grid.get_node_ids() == [2], "client 0 is offline, and its number is not to be had"
    [away] = grid.turned_away
    assert str(away) == "client 0: client 0 is not who it says: its key is client 1's"
    unknown = link.join(scripted(1), 2**63 + 3)
    assert grid.get_node_ids() == [2]
    assert grid.turned_away[1].reason.endswith("its key is in no line of nodes.txt, which register.sh writes")
    # a restarted client has the node id of its key; keys that were added meanwhile are known
    with table.open("a") as file:
        file.write(f"{unknown} client-1 DDDD\n")
    for node in (thief, unknown):
        link.online.remove(node)
    assert grid.get_node_ids() == [2]
    link.nodes[thief].answer = scripted(1)
    link.online |= {thief, unknown}
    assert grid.get_node_ids() == [1, 2]
    table.unlink()
    link.online.remove(honest)
    grid.get_node_ids()
    link.online.add(honest)
    assert grid.get_node_ids() == [1], "without the table nobody is known"


# --- clients that are missing


def failures_in(directory):
    path = directory / "failures.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


VERSION = f"client 1 has version 0.0.1, the server {version('pisa-fl')}"


def test_absent_clients_are_seen_and_counted(tmp_path, in_new_processes, capsys):
    config = configure(tmp_path, "min_clients=2")
    link = SuperLink()

    def before(message):
        in_new_processes(message)
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
            link.join(app(config, 3, in_new_processes))

    link.join(app(config, 0, before))
    link.join(scripted(1, introduction=words(1, version="0.0.1")))
    link.join(app(config, 2, in_new_processes))
    directory = tmp_path / "flower"
    result = run(config, directory, engine_on(link))
    for key, numbers in (
        ("ok", [0, 2, 2, 3, 3]),
        ("failed", [0, 0, 0, 0, 0]),
        ("expected", [4, 4, 4, 4, 4]),
        ("reachable", [2, 2, 2, 3, 3]),
        ("turned_away", [1, 1, 1, 1, 1]),
    ):
        assert [line[f"clients_{key}"] for line in result.metrics] == numbers, key
    assert failures_in(directory) == [{"round": 0, "client": 1, "reason": f"turned away: {VERSION}"}]
    summary = json.loads((directory / "summary.json").read_text())
    clients = {
        key: summary[f"clients_{key}"] for key in ("expected", "reachable", "ok", "failed", "turned_away")
    }
    assert clients == {"expected": 4, "reachable": 2, "ok": 2, "failed": 0, "turned_away": 1}
    assert summary["turned_away"] == [f"client 1: {VERSION}"]
    said = capsys.readouterr().out
    rounds = [line.split("  ")[-1] for line in said.splitlines() if line.startswith("round ")]
    assert rounds == ["2/4 clients"] * 3 + ["3/4 clients"] * 2
    assert "client 1 has version 0.0.1" in said[said.index("Result") :]


def test_a_run_begins_when_the_clients_that_it_was_asked_for_are_there(tmp_path, clock, monkeypatch, caplog):
    monkeypatch.setattr("pisa_fl.federation.time", clock)
    clock.perf_counter = clock.monotonic
    config = configure(tmp_path, "rounds=1", "patience=100")
    link, directory, told = SuperLink(clock), tmp_path / "flower", []
    for number in range(3):
        link.join(app(config, number))
    sleep = clock.sleep

    def until_the_last_comes(seconds):
        sleep(seconds)
        if (directory / WAITING).exists() and (line := (directory / WAITING).read_text()) not in told:
            told.append(line)
        if clock.now >= 1075 and len(link.nodes) < CLIENTS:
            link.join(app(config, 3))

    monkeypatch.setattr(clock, "sleep", until_the_last_comes)
    result = run(config, directory, engine_on(link))
    assert [line["clients_ok"] for line in result.metrics] == [0, 4]
    assert told == [
        f"3 of 4 clients are there, waiting for {left} seconds more: not online: 3" for left in (100, 70, 40)
    ]
    assert [record.getMessage() for record in caplog.records] == told
    assert not (directory / WAITING).exists()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_ends_when_the_clients_that_it_was_asked_for_do_not_come(tmp_path, clock, resumed):
    config = configure(tmp_path, "rounds=2", "checkpoint.every=1")
    directory = tmp_path / "flower"
    if resumed:

        def stop(message):
            if message.metadata.message_type == "train":
                (directory / STOP).touch()

        with pytest.raises(Interrupted):
            on_apps(config, directory, stop)
        flower_app.hosted.cache_clear()
    link = SuperLink(clock)
    link.join(app(config, 2))
    link.join(scripted(1, introduction=words(1, version="0.0.1")))
    link.join(scripted(0, introduction=Error(CLIENT_FAILED, "client 0: there is no data")))
    with pytest.raises(TooFewClientsError) as error:
        resume(directory, engine_on(link)) if resumed else run(config, directory, engine_on(link))
    away = [f"client 1: {VERSION}", "a client: client 0: there is no data"]
    start = "1 of 4 clients are there after patience=0 seconds: not online: 0, 3; "
    assert str(error.value).startswith(start)
    assert set(str(error.value).split("; ")[1:-1]) == {f"turned away: {one}" for one in away}
    assert str(error.value).endswith("; min_clients=1 would begin without them")
    assert {(f["client"], f["reason"]) for f in failures_in(directory)} == {
        (1, f"turned away: {VERSION}"),
        (None, "turned away: client 0: there is no data"),
    }
    # those who come later go on with it
    flower_app.hosted.cache_clear()
    result = on_apps(config, directory, start=resume)
    assert [line["clients_ok"] for line in result.metrics] == [0, 4, 4]
    assert failures_in(directory) == [], "they are of a round that was done again"
