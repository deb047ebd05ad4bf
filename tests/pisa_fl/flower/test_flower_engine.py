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

import pisa_fl
from pisa_fl import ConfigurationError
from pisa_fl.flower.launcher import News, _handed_on
from pisa_fl.results import claim, run_directory

if find_spec("ray") is None:  # imported here, it would not read what the ray engine has it read
    pytest.skip("Flower's simulation needs Ray", allow_module_level=True)

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

ROUNDS = 6
CHOSEN = (
    *("strategy=sisa", "strategy.client._target_=moody.Moody", "model=logistic", f"rounds={ROUNDS}"),
    *("clients=6", "participation=0.5", "checkpoint.every=2", "engine.threads=1", "progress=false"),
)
MODULE = """
import time
from pathlib import Path
from strategies import PisaClient


class Moody(PisaClient):
    def solve(self, stack, instruction, state):
        number = instruction.config["server-round"]
        if UNWELL in stack.clients and number < 3:
            raise ArithmeticError("that one is unwell")
        while number == 5 and not Path(GO_ON).exists():
            time.sleep(0.05)
        return super().solve(stack, instruction, state)
"""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(directory):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines(directory / "metrics.jsonl")]


def start(folder, *arguments):
    """The command in a process of its own; its Flower processes are its children."""
    line = [sys.executable, "-m", "pisa_fl", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_checkpoint(process, directory, number):
    checkpoint = directory / "checkpoint" / f"round-{number:06d}"
    while process.poll() is None and not checkpoint.is_dir():
        time.sleep(0.1)
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


def test_killed_and_resumed_it_ends_with_the_bits_of_the_local_engine(tmp_path, monkeypatch):
    """With a strategy of the user's, one of whose clients errs in the first two rounds.

    How Ctrl-C stops a run of Flower's is seen in test_federation.py.
    """
    mine, directory, unwell = tmp_path / "mine", tmp_path / "run", 0
    mine.mkdir()
    own = MODULE.replace("UNWELL", str(unwell)).replace("GO_ON", repr(str(mine / "go-on")))
    (mine / "moody.py").write_text(own)
    (mine / "go-on").touch()
    monkeypatch.setattr(sys, "path", [*sys.path])
    local = pisa_fl.run(pisa_fl.compose(*CHOSEN, config_dir=mine), tmp_path / "local")

    (mine / "go-on").unlink()
    process = start(tmp_path, "--config-dir=mine", "engine=flower", "hydra.run.dir=run", *CHOSEN)
    wait_for_checkpoint(process, directory, 4)
    with pytest.raises(urllib.error.HTTPError, match="403"):  # the secret is with who started it
        urllib.request.urlopen(f"http://127.0.0.1:{port_of(process)}/v1/control/start-run", b"")
    [server] = [p for p in descendants(process.pid) if p in processes("flwr-simulation")][:1]
    os.kill(server, signal.SIGKILL)
    (mine / "go-on").touch()
    out, err = process.communicate(timeout=180)
    assert process.returncode == 1
    [said] = [line for line in err.splitlines() if line.startswith("pisa-fl: ")]
    assert said.startswith("pisa-fl: Flower's run ended as finished:failed")
    assert said.endswith(f"pisa-fl --config-dir {mine} resume={directory}")
    assert not (directory / "model.safetensors").exists()
    assert len(metrics_of(directory)) - 1 == 4
    # the client's error is shown once with its own traceback
    first, second = lines(directory / "failures.jsonl")
    reason = "ArithmeticError: that one is unwell"
    assert (first["round"], first["client"], first["reason"]) == (1, unwell, reason)
    assert first["traceback"].startswith("Traceback (most recent call last):")
    assert "moody.py" in first["traceback"]
    assert second == {"round": 2, "client": unwell, "reason": reason}
    shown = " ".join((out + err).split())
    assert shown.count("Traceback (most recent call last)") == 1
    assert f"round 1: client {unwell} failed: {reason}" in shown
    assert f"round 2: client {unwell} failed" in shown
    assert not any(word in shown.lower() for word in ("raylet", "grpc", "ray::"))

    for name, value in NOISE.items():
        monkeypatch.setenv(name, value)
    flower = pisa_fl.resume(directory)
    assert metrics_of(directory) == metrics_of(tmp_path / "local")
    assert [line["round"] for line in flower.metrics] == list(range(ROUNDS + 1))
    assert [line["clients_failed"] for line in flower.metrics] == [0, 1, 1] + [0] * (ROUNDS - 2)
    for name, tensor in local.model.state_dict().items():
        assert (flower.model.state_dict()[name] == tensor).all()
    for name in ("model.safetensors", "partition.json", "initial.safetensors"):
        assert (directory / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert {"summary.json", "curves.png", "checkpoint", "clients"} <= {p.name for p in directory.iterdir()}
    assert not processes(str(directory))
    assert not (directory / "stop").exists()


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
