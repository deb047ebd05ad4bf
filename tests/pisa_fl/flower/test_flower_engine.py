"""`engine=flower` with Flower's own processes: a SuperLink and its simulation of the clients."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import pisa_fl
from pisa_fl import ConfigurationError
from pisa_fl.flower.launcher import News, _handed_on
from pisa_fl.results import claim, run_directory

if find_spec("ray") is None:  # imported here, it would not read what the ray engine has it read
    pytest.skip("Flower's simulation needs Ray", allow_module_level=True)

ROUNDS = 5
COMMON = (f"rounds={ROUNDS}", "engine.threads=1", "progress=false")
METHODS = {
    "pisa": ["strategy=pisa", "model=simple_cnn"],
    "fedprox": ["strategy=fedprox", "strategy.local_epochs=1", "model=logistic"],
}
NOISE = {
    "http_proxy": "http://127.0.0.1:9",
    "HTTPS_PROXY": "127.0.0.1:9",
    "all_proxy": "socks5://127.0.0.1:9",
    "no_proxy": "example.org",
    "FORCE_COLOR": "1",
    "CLICOLOR_FORCE": "1",
    "TTY_COMPATIBLE": "1",
    "COLUMNS": "20",
    "LC_ALL": "C",
}
"""What companies, notebooks and small terminals set, and must not matter."""

LONG = (
    "strategy=sisa",
    "model=logistic",
    "rounds=12",
    "participation=0.5",
    "engine.threads=1",
    "progress=false",
)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(directory):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines(directory / "metrics.jsonl")]


def assert_same_end(directory, reference):
    assert metrics_of(directory) == metrics_of(reference)
    assert (directory / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


def start(folder, *arguments):
    """The command in a process of its own; its Flower processes are its children."""
    line = [sys.executable, "-m", "pisa_fl", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_round(process, directory, number):
    metrics = directory / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > number):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


def processes(*words):
    """Processes whose command lines hold all the words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words):
            found.append(int(path.parent.name))
    return found


def descendants(pid):
    """A process's children, and theirs."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            child, rest = int(path.parent.name), path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(rest[1]), []).append(child)
    found, open_ = [], [pid]
    while open_:
        found += (below := children.get(open_.pop(), []))
        open_ += below
    return found


def port_of(process):
    """Where the SuperLink listens that a command has started."""
    [number] = set(descendants(process.pid)) & set(processes("pisa-fl-superlink"))
    line = Path("/proc", str(number), "cmdline").read_text().split("\0")
    return line[line.index("--port") + 1]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_configuration_gives_the_same_bits_as_the_local_engine(method, tmp_path, monkeypatch):
    for name, value in NOISE.items():
        monkeypatch.setenv(name, value)
    chosen = (*METHODS[method], *COMMON)
    local = pisa_fl.run(pisa_fl.compose(*chosen), tmp_path / "local")
    flower = pisa_fl.run(pisa_fl.compose("engine=flower", *chosen), tmp_path / "flower")
    assert_same_end(tmp_path / "flower", tmp_path / "local")
    assert [line["round"] for line in flower.metrics] == list(range(ROUNDS + 1))
    for name, tensor in local.model.state_dict().items():
        assert (flower.model.state_dict()[name] == tensor).all()
    for name in ("partition.json", "initial.safetensors"):
        assert (tmp_path / "flower" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert {"summary.json", "curves.png", "checkpoint", "clients"} <= {
        path.name for path in (tmp_path / "flower").iterdir()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    pisa_fl.run(pisa_fl.compose(*LONG), directory)
    return directory


def test_stopped_resumed_killed_and_resumed_again_it_ends_with_the_same_bits(tmp_path, undisturbed):
    directory = tmp_path / "run"
    process = start(tmp_path, "engine=flower", "hydra.run.dir=run", *LONG, "checkpoint.every=2")
    wait_for_round(process, directory, 2)
    with pytest.raises(urllib.error.HTTPError, match="403"):  # the secret is with who started it
        urllib.request.urlopen(f"http://127.0.0.1:{port_of(process)}/v1/control/start-run", b"")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    stopped = len(metrics_of(directory)) - 1
    assert process.returncode == 130
    assert 2 <= stopped < 7
    assert err.splitlines()[-1] == (
        f"pisa-fl: stopped after round {stopped} of 12; go on with: pisa-fl resume={directory}"
    )

    process = start(tmp_path, f"resume={directory}")
    wait_for_round(process, directory, stopped + 3)
    [server] = [p for p in descendants(process.pid) if p in processes("flwr-simulation")][:1]
    os.kill(server, signal.SIGKILL)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 1
    [said] = [line for line in err.splitlines() if line.startswith("pisa-fl: ")]
    assert said.startswith("pisa-fl: Flower's run ended as finished:failed")
    assert f"pisa-fl resume={directory}" in said
    assert not (directory / "model.safetensors").exists()

    pisa_fl.resume(directory)
    assert_same_end(directory, undisturbed)
    assert not processes(str(directory))
    assert not (directory / "stop").exists()


MODULE = """
from strategies import LocalSgd


class Moody(LocalSgd):
    def solve(self, stack, instruction, state):
        if 3 in stack.clients and instruction.config["server-round"] < 3:
            raise ArithmeticError("number three is unwell")
        return super().solve(stack, instruction, state)
"""


def test_rounds_and_failures_that_end_while_others_are_shown_are_shown_too(tmp_path, caplog):
    metrics, failures = tmp_path / "metrics.jsonl", tmp_path / "failures.jsonl"

    shown = []

    class Display:
        def round(self, line):
            shown.append(line["round"])
            if line["round"] < 5:  # meanwhile the run goes on
                number = line["round"] + 1
                with metrics.open("a") as file:
                    file.write(json.dumps({"round": number}) + "\n")
                with failures.open("a") as file:
                    file.write(json.dumps({"round": number, "client": 0, "reason": "lost"}) + "\n")

    news = News(tmp_path)
    news.show(Display())
    metrics.write_text('{"round": 0}\n')
    for _ in range(7):
        news.show(Display())
    assert shown == [0, 1, 2, 3, 4, 5]
    assert [r.args[0] for r in caplog.records if r.name == "pisa_fl.flower.launcher"] == [1, 2, 3, 4, 5]


def test_only_lines_that_are_new_and_whole_are_read(tmp_path, monkeypatch):
    """Of a run that goes on, whose last rounds are taken out and done again."""
    path, shown, passed = tmp_path / "metrics.jsonl", [], []
    display = type("Display", (), {"round": lambda _, line: shown.append(line["round"])})()
    loads = json.loads
    monkeypatch.setattr(run_directory.json, "loads", lambda text: passed.append(text) or loads(text))
    path.write_text('{"round": 0}\n{"round": 1}\n{"round": 2}\n{"rou')
    news = News(tmp_path)
    assert news.last == 2
    with path.open("a") as file:
        file.write('nd": 3}\n{"round": ')
    passed.clear()
    for _ in range(3):
        news.show(display)
    assert [len(passed), shown] == [1, [3]]
    news = News(tmp_path)
    run_directory.rewind(tmp_path, 1, "a")
    run_directory.append_line(path, {"round": 2})
    for number in (3, 4):
        run_directory.append_line(path, {"round": number})
        news.show(display)
    assert shown == [3, 4]


def test_two_launchers_do_not_begin_in_one_directory(tmp_path, command):
    """The first has handed its claim on, and the server's process has not begun."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "flower.log").touch()
    ended = command("engine=flower", "model=logistic", "hydra.run.dir=run")
    assert ended.status == 2
    assert "as its flower.log tells" in ended.err
    with claim.locked(directory / "flower.log"), pytest.raises(ConfigurationError, match="is being written"):
        _handed_on(directory, resume=True).__enter__()
    assert [path.name for path in directory.iterdir()] == ["flower.log"]


def test_the_error_of_a_client_is_shown_once_with_its_own_traceback(tmp_path):
    (tmp_path / "mine" / "strategy").mkdir(parents=True)
    (tmp_path / "mine" / "moody.py").write_text(MODULE)
    own = {"defaults": ["fedavg"], "client": {"_target_": "moody.Moody"}, "local_epochs": 1}
    (tmp_path / "mine" / "strategy" / "moody.yaml").write_text(yaml.safe_dump(own))
    chosen = ["engine=flower", "strategy=moody", "model=logistic", "rounds=4", "progress=false"]
    process = start(tmp_path, "--config-dir", "mine", *chosen, "hydra.run.dir=run")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    first, second = lines(tmp_path / "run" / "failures.jsonl")
    reason = "ArithmeticError: number three is unwell"
    assert (first["round"], first["client"], first["reason"]) == (1, 3, reason)
    assert first["traceback"].startswith("Traceback (most recent call last):")
    assert "moody.py" in first["traceback"]
    assert second == {"round": 2, "client": 3, "reason": reason}
    assert [line["clients_failed"] for line in metrics_of(tmp_path / "run")] == [0, 1, 1, 0, 0]
    shown = " ".join((out + err).split())
    assert shown.count("Traceback (most recent call last)") == 1
    assert "round 1: client 3 failed: ArithmeticError: number three is unwell" in shown
    assert "round 2: client 3 failed" in shown
    assert not any(word in shown.lower() for word in ("raylet", "grpc", "ray::"))


def test_what_is_impossible_is_said_before_anything_is_started(command, tmp_path):
    for overrides, sentence in (
        (["clients=3"], "clients=3 with partition.classes_per_client=2 cannot hold all 10 classes"),
        (["engine.cpus=0"], "engine.cpus must be at least 1"),
        (["partition=own"], "partition=own needs real clients: engine=flower engine.connection=NAME"),
    ):
        ended = command("engine=flower", *overrides)
        assert (ended.status, ended.out) == (2, "")
        assert sentence in ended.err
        assert len(ended.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_connection_that_does_not_exist_is_named(command, tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    sentence = f"engine.connection=nowhere is not in {tmp_path}/home/config.toml"
    for text in (None, "[superlink", '[superlink]\ndefault = "x"\nnowhere = "y"\n[superlink.x]\n'):
        if text is not None:
            (tmp_path / "home").mkdir(exist_ok=True)
            (tmp_path / "home" / "config.toml").write_text(text)
        ended = command("engine=flower", "engine.connection=nowhere")
        assert ended.status == 2
        assert sentence in ended.err
        assert len(ended.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_superlink_that_does_not_answer_fails_the_run(command, tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    address = 'address = "127.0.0.1:9"\ninsecure = true\n'
    (tmp_path / "home" / "config.toml").write_text(f"[superlink.away]\n{address}")
    ended = command("engine=flower", "engine.connection=away", "model=logistic")
    assert ended.status == 1
    assert ended.err.startswith("pisa-fl: Flower did not start the run: ")
    assert len(ended.err.splitlines()) == 1
