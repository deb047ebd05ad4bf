"""The `ray` engine: the local engine's bits, whoever dies, is slow, or errs."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from uuid import uuid4

import pytest
import torch
from diary import CLIENTS, Trouble, federate, remembered, troubled
from flwr.app import Message

import pisa_fl
import pisa_fl.engines
from pisa_fl.config import ConfigurationError
from pisa_fl.engines.host_sum import HostSum
from pisa_fl.engines.local import LocalGrid
from pisa_fl.engines.ray_actors import RayGrid, room, start_ray
from pisa_fl.results.console import Display
from pisa_fl.results.result import Interrupted
from strategies.base.messages import vectors

ray = pytest.importorskip("ray", reason="Ray runs the actors")

COMMON = ("model=logistic", "partition=iid", "rounds=5", "engine.threads=1", "progress=false")
RAY = ("engine=ray", "engine.actors=2")
# Ray's own words about what happens to its processes
RAYS_WORDS = ("raylet", "ray::", "RayTaskError", "ActorDied", "Worker ID")


QUIETLY = {"log_to_driver": False, "logging_level": logging.ERROR}


@pytest.fixture(scope="module")
def machines():
    """One Ray for this module: a cluster of two machines with a processor each."""
    from ray.cluster_utils import Cluster

    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}  # a lost machine is missed
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def two_processors(machines):
    """Ray runs in this process, on both machines."""
    if not ray.is_initialized():
        ray.init(address=machines.address, **QUIETLY)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module of the user's into a folder that this process imports from; gives its name."""
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def write(source):
        name = f"own_{uuid4().hex}"
        (folder / f"{name}.py").write_text(source)
        return name

    return write


def run(directory, *overrides):
    return pisa_fl.run(pisa_fl.compose(*COMMON, *overrides), directory)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(directory):
    left_out = {"seconds", "run_id"}  # a client half that does something more makes another run
    return [
        {k: v for k, v in line.items() if k not in left_out} for line in lines_of(directory / "metrics.jsonl")
    ]


def weights_of(directory):
    return (directory / "model.safetensors").read_bytes()


def assert_same_run(directory, reference):
    assert metrics_of(directory) == metrics_of(reference)
    assert weights_of(directory) == weights_of(reference)


def assert_not_rays_words(*texts):
    assert not [(word, text) for word in RAYS_WORDS for text in texts if word in text]


def after_round(monkeypatch, number, act):
    """Do something when a round is over, before the next begins."""
    show = Display.round

    def show_and_act(display, metrics):
        show(display, metrics)
        if metrics["round"] == number:
            act()

    monkeypatch.setattr(Display, "round", show_and_act)


# --- the same bits


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """PISA on the local engine."""
    run(directory := tmp_path_factory.mktemp("undisturbed") / "local")
    return directory


def test_stopped_and_resumed_it_ends_with_the_bits_of_the_local_engine(two_processors, tmp_path, monkeypatch):
    """The official form's clients keep moments that the ledger does not have."""
    chosen = ["strategy=sisa_official", "partition=quantity", "participation=0.5"]
    run(tmp_path / "local", *chosen)
    stored, fetched = [], []
    put, get = ray.put, ray.get

    def watched_get(refs, **options):
        fetched.append(get(refs, **options))
        return fetched[-1]

    monkeypatch.setattr(ray, "put", lambda value: stored.append(type(value).__name__) or put(value))
    monkeypatch.setattr(ray, "get", watched_get)
    after_round(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        run(tmp_path / "ray", *RAY, *chosen)
    assert len(metrics_of(tmp_path / "ray")) == 3
    metrics = pisa_fl.resume(tmp_path / "ray").metrics
    assert_same_run(tmp_path / "ray", tmp_path / "local")
    # whatever the number of actors, what a round sends to everyone is stored once; every client answers once
    assert stored == ["Clients", *2 * ["ArrayRecord"], "Clients", *3 * ["ArrayRecord"]]
    replies = [value for value in fetched if isinstance(value, Message)]
    assert len(replies) == sum(line["clients_ok"] for line in metrics)


# --- actors that die

KILLED = """
import os, signal
from pathlib import Path
from strategies import PisaClient

HERE = Path(__file__).parent


def first_time(name):
    try:
        (HERE / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Killed(PisaClient):
    def solve(self, stack, instruction, state):
        (HERE / f"pid-{os.getpid()}").touch()
        update = super().solve(stack, instruction, state)
        if stack.clients == [4] and instruction.config["server-round"] == 4 and first_time("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        return update


class KilledTwice(PisaClient):
    def solve(self, stack, instruction, state):
        number = instruction.config["server-round"]
        if stack.clients == [4] and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if stack.clients == [5] and number in (2, 3):
            raise ArithmeticError("no such thing")
        return super().solve(stack, instruction, state)
"""


def test_no_client_is_lost_when_actors_are_killed(
    two_processors, undisturbed, tmp_path, monkeypatch, own_module, caplog, capfd
):
    """Once between two rounds, once in the middle of a client's solution."""
    capfd.readouterr()

    def kill():
        [path] = (tmp_path / "mine").glob("pid-*")
        os.kill(int(path.name.removeprefix("pid-")), signal.SIGKILL)

    after_round(monkeypatch, 2, kill)
    one = ("engine=ray", "engine.actors=1", f"strategy.client._target_={own_module(KILLED)}.Killed")
    run(tmp_path / "ray", *one)
    assert len(list((tmp_path / "mine").glob("pid-*"))) == 3
    assert [line["clients_failed"] for line in metrics_of(tmp_path / "ray")] == [0] * 6
    # those who lost their state were asked twice, so more was sent
    counted = [{k: v for k, v in m.items() if k != "bytes_down"} for m in metrics_of(tmp_path / "ray")]
    assert counted == [{k: v for k, v in m.items() if k != "bytes_down"} for m in metrics_of(undisturbed)]
    assert weights_of(tmp_path / "ray") == weights_of(undisturbed)
    said = "the actor of clients 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 ended (its process died) and was replaced"
    assert [record.getMessage() for record in caplog.records] == [said, said]
    assert_not_rays_words(caplog.text, *capfd.readouterr())


def test_a_client_that_kills_every_actor_or_errs_is_left_out_alone(
    two_processors, tmp_path, own_module, caplog, capfd
):
    """A client's error is reported once with its own traceback."""
    one = ("engine=ray", "engine.actors=1", f"strategy.client._target_={own_module(KILLED)}.KilledTwice")
    run(tmp_path, *one, "rounds=3")
    counts = [(m["clients_ok"], m["clients_failed"]) for m in metrics_of(tmp_path)[1:]]
    assert counts == [(9, 1), (9, 1), (9, 1)]
    killed, first, second = lines_of(tmp_path / "failures.jsonl")
    reason = "its actor ended a second time: its process died"
    assert killed == {"round": 1, "client": 4, "reason": reason}
    traceback = first.pop("traceback")
    assert first == {"round": 2, "client": 5, "reason": "ArithmeticError: no such thing"}
    assert second == first | {"round": 3}
    assert 'raise ArithmeticError("no such thing")' in traceback
    assert caplog.text.count("Traceback (most recent call last)") == 1
    assert len([record for record in caplog.records if "ArithmeticError" in record.getMessage()]) == 2
    assert_not_rays_words(traceback, caplog.text, *capfd.readouterr())


# --- actors that sum

SUMS = ("strategy=pisa_summed", "strategy/preconditioner=second_moment", "max_update=null")


def test_sums_of_actors_have_the_bits_of_secure_ones_with_any_number_of_actors(
    two_processors, tmp_path, monkeypatch
):
    """Which come from another protocol; one run is stopped and resumed, another keeps its clients' duals on disk."""
    common = (*SUMS, "partition=quantity", "participation=0.5", "rounds=3")
    run(tmp_path / "secure", *common, "secure=secagg", "engine.workers=0")
    fetched = []
    get = ray.get
    monkeypatch.setattr(ray, "get", lambda refs, **o: fetched.append(get(refs, **o)) or fetched[-1])
    run(tmp_path / "disk", *common, "engine=ray", "engine.actors=1", "engine.sums=true", "state=disk")
    after_round(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        run(tmp_path / "ray", *common, *RAY, "engine.sums=true")
    pisa_fl.resume(tmp_path / "ray")
    assert weights_of(tmp_path / "ray") == weights_of(tmp_path / "disk") == weights_of(tmp_path / "secure")
    # one answer an actor and round, however many clients
    assert sum(isinstance(value, HostSum) for value in fetched) == 3 + 2 * 3
    assert not any(isinstance(value, Message) for value in fetched)


def test_clients_that_lost_their_duals_to_a_dead_actor_begin_anew(
    two_processors, tmp_path, monkeypatch, own_module, caplog
):
    """Sums hold what nobody has: all begin anew, from the weights that there are; nobody is left out."""

    def kill():
        [path] = (tmp_path / "mine").glob("pid-*")
        os.kill(int(path.name.removeprefix("pid-")), signal.SIGKILL)

    source = KILLED.replace("PisaClient", "PisaSummedClient")
    one = ("engine=ray", "engine.actors=1", f"strategy.client._target_={own_module(source)}.Killed")
    after_round(monkeypatch, 2, kill)
    run(tmp_path / "ray", *SUMS, *one, "engine.sums=true")
    assert [line["clients_ok"] for line in metrics_of(tmp_path / "ray")[1:]] == [10] * 5
    said = "clients 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 have lost what they remembered: all begin anew"
    assert [m for m in caplog.messages if "lost" in m] == [f"round {number}: {said}" for number in (3, 4)]


def test_a_client_that_kills_every_actor_or_errs_is_in_no_sum(two_processors, tmp_path, own_module):
    source = KILLED.replace("PisaClient", "PisaSummedClient")
    one = ("engine=ray", "engine.actors=1", f"strategy.client._target_={own_module(source)}.KilledTwice")
    run(tmp_path, *SUMS, *one, "engine.sums=true", "rounds=3")
    counts = [(m["clients_ok"], m["clients_failed"]) for m in metrics_of(tmp_path)[1:]]
    assert counts == [(9, 1), (9, 1), (9, 1)]
    killed, first, second = lines_of(tmp_path / "failures.jsonl")
    reason = "its actor ended a second time: its process died"
    assert killed == {"round": 1, "client": 4, "reason": reason}
    assert 'raise ArithmeticError("no such thing")' in first.pop("traceback")
    assert first == {"round": 2, "client": 5, "reason": "ArithmeticError: no such thing"}
    assert second == first | {"round": 3}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("strategy=pisa", "max_update=null", "engine.sums=true"), "Pisa needs every client's own message"),
        (
            ("strategy=pisa_summed", "engine.sums=true"),
            "max_update=20 compares clients' updates, which engine.sums",
        ),
        (
            ("strategy=pisa_summed", "secure=secagg", "engine.sums=true"),
            "hides updates from hosts too: leave out engine.sums=true",
        ),
        (("strategy=pisa_summed", "engine.sums=1"), "engine.sums must be true or false"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_actors_cannot_sum_is_refused_in_a_sentence(two_processors, tmp_path, settings, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        run(tmp_path, "engine=ray", "engine.actors=1", *settings)


# --- clients that are slow

SLOW = """
import time
from pathlib import Path
from strategies import PisaClient

HERE = Path(__file__).parent


class Slow(PisaClient):
    def solve(self, stack, instruction, state):
        (client,), number = stack.clients, instruction.config["server-round"]
        (HERE / f"solved-{number}-{client}").touch()
        while (client, number) == (4, 2) and not (HERE / "go-on").exists():
            time.sleep(0.01)
        return super().solve(stack, instruction, state)
"""


def test_late_replies_count_as_none(two_processors, tmp_path, monkeypatch, own_module):
    """The actor of the even clients works on client 4 for two rounds: 0 and 2 have answered in the first of them."""
    late = {2: (4, 6, 8), 3: (0, 2, 4, 6, 8)}
    rounds, limits = iter(range(1, 6)), iter([None, 6, 6, None, None])
    deliver, deliver_late = LocalGrid.deliver, RayGrid.deliver

    def lose_some(grid, messages, timeout):
        lost = late.get(next(rounds), ())
        return [r for r in deliver(grid, messages, timeout) if r.metadata.src_node_id not in lost]

    monkeypatch.setattr(LocalGrid, "deliver", lose_some)
    run(tmp_path / "local", "strategy=sisa_official")

    monkeypatch.setattr(RayGrid, "deliver", lambda grid, sent, _: deliver_late(grid, sent, next(limits)))
    after_round(monkeypatch, 3, (tmp_path / "mine" / "go-on").touch)
    slow = f"strategy.client._target_={own_module(SLOW)}.Slow"
    run(tmp_path / "ray", *RAY, "strategy=sisa_official", slow)
    assert lines_of(tmp_path / "ray" / "failures.jsonl") == [
        {"round": number, "client": client, "reason": "no reply"}
        for number in late
        for client in late[number]
    ]
    assert_same_run(tmp_path / "ray", tmp_path / "local")
    # the round that was over when the actor had time again was spared it
    solved = {path.name for path in (tmp_path / "mine").glob("solved-*")}
    even = {f"solved-3-{client}" for client in late[3]}
    assert solved == {f"solved-{n}-{c}" for n in range(1, 6) for c in range(10)} - even


def test_actors_remember_what_was_accepted(two_processors):
    """For any algorithm, in any trouble: what the local engine's clients remember."""

    class TroubledRay(Trouble, RayGrid):
        """Ray's actors in trouble."""

    ends = []
    for engine in (partial(TroubledRay, actors=2), partial(troubled, workers=0)):
        federation = federate(engine)
        federation.grid.forgetful = False  # an actor's client cannot be made to from here
        with closing(federation.grid):
            for number in range(1, 9):
                federation.grid.begin(number)
                list(federation.rounds(number))
            states = dict(federation.grid.states())
            ends.append(
                (
                    federation.gateway.accepted,
                    vectors(federation.arrays)["weights"].tolist(),
                    {c: {n: v.tolist() for n, v in remembered(states[c], 8).items()} for c in CLIENTS},
                )
            )
    assert ends[0] == ends[1]


# --- starting and ending

SLOWLY = """
import time
from pisa_fl.cli import main
from pisa_fl.results.console import Display
show = Display.round
Display.round = lambda display, metrics: (show(display, metrics), time.sleep(0.5))
main.main()
"""  # the command, with half a second a round for the signal to arrive in


def group_members(group):
    """Processes of a group that still run, each with its whole command line, however wide the terminal."""
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pgid,stat,args"], capture_output=True, text=True, check=True
    )
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()[1:]]
    return [args for pgid, stat, args in rows if int(pgid) == group and not stat.startswith("Z")]


def test_ctrl_c_reaches_every_process_and_leaves_a_checkpoint_and_nobody(tmp_path):
    """A terminal sends it to the command and to the Ray that the command started."""
    arguments = [*COMMON, "engine=ray", "engine.actors=1", "rounds=60", "hydra.run.dir=run"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    members = group_members(process.pid)
    assert any("raylet" in line for line in members), members
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    stopped = len(metrics_of(tmp_path / "run")) - 1
    assert 2 <= stopped < 60
    assert err == (
        f"pisa-fl: stopped after round {stopped} of 60; go on with: pisa-fl resume={tmp_path / 'run'}\n"
    )
    assert process.returncode == 130
    assert [line["clients_failed"] for line in metrics_of(tmp_path / "run")] == [0] * (stopped + 1)
    deadline = time.monotonic() + 60
    while (left := group_members(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.actors=many", "engine.actors must be a whole number of at least 1 or auto, got many"),
        ("engine.actors=3", "engine.actors=3: Ray has room for 2 actors"),
        ("engine.cpus=4", "engine.actors=auto: Ray has room for 0 actors of engine.cpus=4"),
        ("engine.gpus=1", "room for 0 actors of engine.cpus=1 and engine.gpus=1"),
        ("engine.cpus=0", "engine.cpus must be a whole number or a share of one, got 0"),
        ("engine.gpus=1.5", "engine.gpus must be a whole number or a share of one, got 1.5"),
        ("engine.cpus=x", "engine.cpus must be a number, got x"),
    ],
)
def test_impossible_actors(two_processors, tmp_path, override, words):
    with pytest.raises(ConfigurationError) as refused:
        run(tmp_path / "run", "engine=ray", override)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()
    assert ray.is_initialized()


def test_a_gpu_is_needed_for_cuda(two_processors):
    def on_a_gpu(clients):
        return RayGrid(replace(clients, device=torch.device("cuda")))

    with pytest.raises(ConfigurationError, match=r"device=cuda needs one: set engine.gpus"):
        pisa_fl.prepare(pisa_fl.compose(*COMMON), on_a_gpu)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("nonsense", "engine.address must be null, auto or host:port, got nonsense"),
        ("127.0.0.1:{port}", "engine.address=127.0.0.1:{port}: nothing answers there: start a cluster by"),
        ("127.0.0.1:99999", "engine.address=127.0.0.1:99999: nothing answers there"),
    ],
)
def test_a_cluster_that_is_not_there(address, words):
    port = free_port()
    with pytest.raises(ConfigurationError) as refused:
        start_ray(address.format(port=port))
    assert str(refused.value).startswith(words.format(port=port))


def test_without_ray_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "pisa_fl.engines.ray_actors")
    monkeypatch.delattr(pisa_fl.engines, "ray_actors")
    with pytest.raises(ConfigurationError) as refused:
        run(tmp_path / "run", "engine=ray")
    assert str(refused.value) == "engine=ray needs Ray: pip install 'pisa-fl[ray]'"


UNFIT = f"""
import os, threading
from strategies import PisaClient

if os.getpid() != {os.getpid()}:
    raise ImportError("only where it was written")


class Elsewhere(PisaClient):
    pass


class Locked(PisaClient):
    def __init__(self, layout, **options):
        super().__init__(layout, **options)
        self.lock = threading.Lock()
"""


@pytest.mark.parametrize(
    ("half", "words"),
    [
        ("Locked", "engine=ray sends the clients to other processes: cannot pickle '_thread.lock' object"),
        ("Elsewhere", "engine=ray: an actor cannot start: ImportError: only where it was written"),
    ],
)
def test_clients_that_cannot_live_in_another_process(
    two_processors, tmp_path, own_module, half, words, capfd
):
    one = ("engine=ray", "engine.actors=1", f"strategy.client._target_={own_module(UNFIT)}.{half}")
    with pytest.raises(ConfigurationError) as refused:
        run(tmp_path / "run", *one)
    assert str(refused.value) == words
    assert_not_rays_words(*capfd.readouterr())


def test_the_clients_of_a_lost_machine_move_to_the_others(
    machines, undisturbed, tmp_path, monkeypatch, caplog
):
    """The cluster was there before the run, and is there afterwards. It is the last test of those that use it."""
    ray.shutdown()
    [other] = machines.worker_nodes
    after_round(monkeypatch, 2, lambda: machines.remove_node(other, allow_graceful=False))
    run(tmp_path / "run", "engine=ray", f"engine.address={machines.address}", "round_timeout=60")
    assert "no machine is left for the actor of clients" in caplog.records[-1].getMessage()
    assert [line["clients_failed"] for line in metrics_of(tmp_path / "run")] == [0] * 6
    assert weights_of(tmp_path / "run") == weights_of(undisturbed)
    assert not ray.is_initialized()
    ray.init(address=machines.address, **QUIETLY)
    assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42
    ray.shutdown()


@pytest.mark.parametrize(
    ("cpus", "gpus", "expected"),
    [(1, 0, 24), (0.1, 0, 240), (3, 0, 7), (1, 1, 5), (1, 0.4, 10), (1, 0.1, 24), (1, 2, 2), (8, 0.5, 3)],
)
def test_the_room_that_machines_have(cpus, gpus, expected):
    machines = [
        {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
        {"Alive": True, "Resources": {"memory": 1e9}},
    ]
    assert room(machines, cpus, gpus) == expected
