"""A federation on three hosts, over TLS with the keys that `pisa-fl-credentials` makes, and with kills.

One federation for all tests, which leave it as they found it; the last one is a whole run on it.
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import hosts
import pytest
import torch
from hosts import Federation, federation_of_three, ip, wait_for, why_not
from omegaconf import OmegaConf
from safetensors.torch import load, load_file

import pisa_fl
from pisa_fl.config import resolve
from pisa_fl.flower.bundle import BUNDLE
from pisa_fl.flower.state_file import DIGEST_SIZE
from strategies.base.messages import vectors

ONLINE = {"client-0": "online", "client-1": "online"}
HEALTH = """
import http.client, ssl
for connection in (
    http.client.HTTPSConnection({address!r}, timeout=10, context=ssl.create_default_context(cafile={ca!r})),
    http.client.HTTPConnection({address!r}, timeout=10),
):
    try:
        connection.request("GET", "/health")
        print(connection.getresponse().status)
    except (http.client.HTTPException, OSError):
        print("refused")
"""
ACQUIRE = """
import ssl, urllib.error, urllib.request
request = urllib.request.Request({url!r}, b"", {{"content-type": "application/protobuf"}})
try:
    print(urllib.request.urlopen(request, context=ssl.create_default_context(cafile={ca!r})).status)
except urllib.error.HTTPError as refused:
    print(refused.code)
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory) -> Iterator[Federation]:
    """A SuperLink and two clients, online, on hosts of their own."""
    if reason := why_not():
        pytest.skip(reason)
    with federation_of_three(tmp_path_factory.mktemp("federation")) as federation:
        yield federation


@pytest.fixture(scope="module")
def strangers(federation, tmp_path_factory) -> Federation:
    """Credentials that others made for the same address."""
    folder = tmp_path_factory.mktemp("strangers")
    hosts = federation.superlink, federation.clients, federation.stranger
    others = Federation(folder / "strangers", folder, *hosts)
    others.make(2)
    return others


def test_registering_again_changes_nothing(federation):
    before = (federation.home / "nodes.txt").read_text()
    noise = "FORCE_COLOR=1 TTY_COMPATIBLE=1 COLUMNS=20 https_proxy=http://127.0.0.1:9"
    again = federation.here(f"{noise} {federation.home}/register.sh")
    assert (again.returncode, again.stdout) == (0, "")
    assert federation.status() == ONLINE
    assert (federation.home / "nodes.txt").read_text() == before


def test_supernodes_that_do_not_belong_are_refused(federation, strangers, tmp_path):
    """An unregistered key, none, no TLS, and a client that trusts another authority; all start at once."""
    ca, key = federation.credentials / "ca.crt", federation.credentials / "client-0" / "client-0"
    trusted, keyed = "--root-certificates", "--auth-supernode-private-key"
    other = strangers.credentials
    tried = {
        "Failed to activate SuperNode": (trusted, ca, keyed, other / "client-0" / "client-0"),
        "SuperNode authentication is enabled": (trusted, ca),
        "Failed to initialize the connection": ("--insecure",),
        "CERTIFICATE_VERIFY_FAILED": (trusted, other / "ca.crt", keyed, key),
    }

    def refused(number, options):
        line = ["flower-supernode", "--superlink", federation.address, "--port", str(9190 + number)]
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        home = {"FLWR_HOME": str(tmp_path / f"flwr-{number}")}
        host = federation.clients[0]
        return host.run(*line, "--max-retries", "1", *options, timeout=180, **quiet, **home)

    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(refused, range(len(tried)), tried.values()))
    for words, one in zip(tried, ended, strict=True):
        said = one.stdout + one.stderr
        assert (one.returncode, words in said, "SuperNode ID" in said) == (1, True, False), said
    log = (federation.disks / "superlink.log").read_text()
    assert "No SuperNode found with the given public key" in log
    asked = federation.clients[0].run("python", "-c", HEALTH.format(address=federation.address, ca=str(ca)))
    assert asked.stdout.split() == ["403", "refused"], asked.stderr


def test_the_superlinks_user_alone_registers_keys_and_starts_runs(federation, strangers, tmp_path):
    """Whoever starts a run runs code on every host; a client's host has all that a stranger could have."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "pyproject.toml").write_text(BUNDLE.format(version="1.0.0"))
    key = strangers.credentials / "superlink" / "keys" / "client-0.pub"
    lines = ["supernode", "register", key], ["run", tmp_path / "app"]
    for host, address, tried in (
        (federation.clients[0], federation.address, lines),
        (federation.superlink, f"127.0.0.1:{federation.port}", lines[1:]),
    ):
        home = tmp_path / host.address
        home.mkdir()
        ca = federation.credentials / "ca.crt"
        (home / "config.toml").write_text(
            f"[superlink.there]\naddress = '{address}'\nroot-certificates = '{ca}'\n"
        )
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(home)}
        for line in tried:
            ended = host.run("flwr", *line, "there", **quiet)
            assert (ended.returncode, "403 Forbidden" in ended.stderr) == (1, True), ended
    assert federation.status() == ONLINE
    assert json.loads(federation.flwr("ls", "--format", "json").stdout)["runs"] == []
    for name in ("credentials.yaml", "superexec-secret"):
        assert (federation.home / "flwr" / name).stat().st_mode & 0o777 == 0o600


def test_no_other_process_takes_the_work_of_a_run_or_of_a_client(federation):
    ca, url = federation.credentials / "ca.crt", "/v1/runtime/acquire-task"
    for host, address, scheme in (
        (federation.superlink, f"127.0.0.1:{federation.port}", "https"),
        (federation.clients[0], "127.0.0.1:9094", "http"),
        (federation.clients[1], "127.0.0.1:9095", "http"),
    ):
        asked = host.run("python", "-c", ACQUIRE.format(url=f"{scheme}://{address}{url}", ca=str(ca)))
        assert asked.stdout.strip() in ("401", "403"), asked


@pytest.fixture
def stranger(federation):
    """Runs functions of hostile.py on the stranger's host; what they return."""

    def call(name, *arguments):
        script = Path(hosts.__file__).with_name("hostile.py")
        said = [federation.address, str(federation.credentials), *map(str, arguments)]
        ended = federation.stranger.run("python", script, name, *said, timeout=120)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return call


def superlink(federation):
    """The SuperLink's folder in /proc."""
    for pid in ip("netns", "pids", federation.superlink.namespace).split():
        if b"pisa-fl-superlink" in Path("/proc", pid, "cmdline").read_bytes():
            return Path("/proc", pid)
    raise AssertionError("there is no SuperLink")


def memory(process):
    """Resident memory, in pages."""
    return int((process / "statm").read_text().split()[1])


def test_nothing_long_is_read_of_strangers(federation, stranger):
    process = superlink(federation)
    rest = memory(process)
    assert stranger("bodies") == {
        "without headers": 401,
        "headers of no form": 401,
        "a key of its own, long": 413,
        "a key of its own, without end": 413,
        "a client's key, signed by another": 401,
        "a path for the host": 400,
        "an upgrade": 401,
        "a client, long": 413,
        "a client, a part too long": 413,
    }
    assert memory(process) < 1.2 * rest


def test_no_spelling_of_a_path_leads_past_the_door(stranger):
    assert set(stranger("paths").values()) <= {400, 403}


def test_idle_connections_lock_nobody_out(federation, stranger):
    process = superlink(federation)
    rest, before = memory(process), lives(federation)
    files = len(list((process / "fd").iterdir()))
    with ThreadPoolExecutor() as pool:
        attack = pool.submit(stranger, "connections", 400)
        most = most_files = 0
        told: dict[str, str] = {}
        while not attack.done():
            most = max(most, memory(process))
            most_files = max(most_files, len(list((process / "fd").iterdir())))
            if files + 200 < most_files and not told:
                told = federation.status()
            time.sleep(0.1)
    assert told == ONLINE
    assert attack.result() == 0, "after a while all are closed"
    assert files + 200 < most_files < files + 256 + 20
    assert most < 2 * rest
    wait_for(lambda: all(lives(federation)[node] > before[node] for node in before if before[node]), str, 90)


def test_clients_come_back_to_a_superlink_that_was_killed(federation):
    federation.superlink.kill()
    assert federation.status() == {}
    federation.start_superlink()
    assert federation.status() == ONLINE
    # every sign of life of a client puts off the moment at which it would be taken for offline
    at_first = lives(federation)
    assert len(at_first) == len(ONLINE)
    wait_for(
        lambda: all(lives(federation)[node] > at_first[node] for node in at_first),
        lambda: f"{at_first}, {lives(federation)}",
        seconds=90,
    )


def lives(federation):
    """Until when the SuperLink takes each node for online, by its own database."""
    with closing(sqlite3.connect(federation.home / "state.db")) as database:
        return {
            node: until or 0.0 for node, until in database.execute("select node_id, online_until from node")
        }


HOSTILE = """
import json
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from pathlib import Path

server = ServerApp()
client = ClientApp()
Path("{told}").with_name("loaded-" + __name__.replace(".", "-")).touch()

@server.main()
def main(grid, context):
    nodes = sorted(grid.get_node_ids())
    content = RecordDict({{"config": ConfigRecord({{}})}})
    replies = grid.send_and_receive([Message(content, node, "query") for node in nodes], timeout=60)
    said = [reply.error.reason if reply.has_error() else str(reply.content) for reply in replies]
    Path("{told}").write_text(json.dumps(said))

@client.query()
def query(message, context):
    return Message(RecordDict({{"config": ConfigRecord({{"in": "wrong hands"}})}}), reply_to=message)
"""


def test_a_server_has_no_code_of_its_own_run_by_a_client(federation, tmp_path):
    """The bundle is Flower's own way to a client's host: it names the module that is the client's app."""
    app = tmp_path / "app"
    (app / "pisa_fl").mkdir(parents=True)
    bundle = BUNDLE.format(version="0.0.1").replace("pisa_fl.flower.app:server", "hostile:server")
    (app / "pyproject.toml").write_text(bundle.replace("pisa_fl.flower.app:client", "hostile:client"))
    (app / "hostile.py").write_text(HOSTILE.format(told=tmp_path / "told.json"))
    (app / "pisa_fl" / "__init__.py").write_text("")
    (app / "pisa_fl" / "flower_app.py").write_text(HOSTILE.format(told=tmp_path / "told.json"))
    config = resolve(pisa_fl.compose("engine=flower", "clients=2", "model=logistic"))
    config.model = {"_target_": "pathlib.Path", "_args_": [f"{tmp_path}/written"]}
    (tmp_path / "settings.toml").write_text(f"hydra = {json.dumps(OmegaConf.to_yaml(config))}\n")
    line = f"flwr run {app} three-hosts --run-config {tmp_path}/settings.toml --stream"
    ended = federation.here(line)
    assert (tmp_path / "told.json").is_file(), ended.stdout + ended.stderr
    said = json.loads((tmp_path / "told.json").read_text())
    words = "client {}: model._target_=pathlib.Path must not be built"
    assert sorted(reason.partition(" built")[0] + " built" for reason in said) == [
        words.format(number) for number in range(2)
    ]
    # what stands in pisa-fl's place in the bundle was not imported anywhere
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("loaded")} == {"loaded-hostile"}
    for number in range(2):
        bundles = (federation.disks / f"client-{number}" / "flwr").rglob("*.py")
        assert list(bundles) == [], "nothing of it is on a client's disk"


# --- a run, from a client that is added to it to the removal of that client


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_until(condition, run, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert run.is_alive(), "the run has ended"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)


def running(host, known):
    """Processes on a host whose command lines, in words, are known as those that are looked for."""
    found = []
    for pid in ip("netns", "pids", host.namespace).split():
        try:
            if known(Path("/proc", pid, "cmdline").read_bytes().split(b"\0")):
                found.append(int(pid))
        except OSError:
            continue
    return found


def solving(host):
    """Client processes on a host: forks of the one that waits with everything imported."""
    servers, parents = running(host, lambda words: any(b"multiprocessing.forkserver" in w for w in words)), {}
    for pid in servers:
        with suppress(OSError):
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return [pid for pid, parent in parents.items() if parent in servers]


@pytest.fixture
def thief(federation):
    """A third client, which is registered and online, and says that it is client 0; removed, it never returns."""
    federation.make(3)
    home, log = federation.copy("client-2"), federation.disks / "client-2.log"
    start = home / "start.sh"
    start.write_text(start.read_text().replace("partition-id=2", "partition-id=0"))
    key = "keys/client-2.pub"
    shutil.copy(federation.credentials / "superlink" / key, federation.home / key)
    added = federation.here(f"{federation.home}/register.sh")
    assert added.stdout.startswith("registered client-2 as node "), added.stderr
    process = federation.stranger.start(start, log=log)
    federation.wait_for_client(2)
    assert federation.status() == ONLINE | {"client-2": "online"}
    yield
    node = added.stdout.split()[-1]
    assert federation.flwr("supernode", "unregister", node, "three-hosts").returncode == 0
    federation.here(f"{federation.home}/register.sh")
    wait_for(lambda: "Failed to activate SuperNode" in log.read_text(), log.read_text)
    process.terminate()
    assert process.wait(60) == 0, "it would have tried for ever"
    assert federation.status() == ONLINE | {"client-2": "unregistered"}


def test_a_run_has_the_local_engines_bits_and_goes_on_without_clients_that_are_killed(
    federation, thief, tmp_path
):
    """Undisturbed at first; then a client is killed in the middle of a solve, and another with its whole host."""
    directory, sigma = tmp_path / "run", 20
    overrides = [
        *("strategy=sisa", f"strategy.sigma={sigma}", "strategy.rho=200", "model=logistic", "clients=2"),
        *("partition.classes_per_client=5", "rounds=100", "checkpoint.every=1", "checkpoint.keep=100"),
        *("round_timeout=600", "patience=200", "progress=false"),
    ]
    line = ["pisa-fl", "engine=flower", "engine.connection=three-hosts", f"hydra.run.dir={directory}"]
    ended: list[subprocess.CompletedProcess] = []
    run = threading.Thread(
        target=lambda: ended.append(federation.here(" ".join([*line, *overrides]), cwd=tmp_path))
    )
    run.start()
    metrics, checkpoints = directory / "metrics.jsonl", directory / "checkpoint"
    first, second = federation.clients

    def in_a_solve(host):
        wait_until(lambda: not solving(host), run)  # the one of the round before has gone
        wait_until(lambda: solving(host), run)
        time.sleep(0.2)  # into its solve

    wait_until(lambda: len(lines(metrics)) > 2, run)
    in_a_solve(first)
    killed = solving(first)
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    second.kill()
    gone = len(lines(metrics))
    # the first's SuperNode starts another process within half a minute; the second host's is taken for offline within
    # a minute, and the SuperLink answers in its place
    wait_until(lambda: any(one["clients_ok"] == 1 for one in lines(metrics)[gone:]), run)
    federation.start_client(1)
    back = len(lines(metrics))
    wait_until(lambda: any(one["clients_ok"] == 2 for one in lines(metrics)[back:]), run)
    [command] = running(federation.superlink, lambda words: b"engine=flower" in words)
    os.kill(command, signal.SIGINT)
    run.join(300)
    assert ended, "the run did not end"
    assert ended[0].returncode == 130, ended[0].stderr

    told = lines(metrics)
    rounds = len(told) - 1
    go_on = f"pisa-fl: stopped after round {rounds} of 100; go on with: pisa-fl resume={directory}"
    assert ended[0].stderr.splitlines()[-1] == go_on
    assert not (directory / "stop").exists()
    assert [one["round"] for one in told] == list(range(rounds + 1))
    failures = lines(directory / "failures.jsonl")
    assert failures[0] == {
        "round": 0,
        "client": 0,
        "reason": "turned away: client 0 is not who it says: its key is client 2's",
    }
    assert {one["client"] for one in failures[1:]} >= {1}
    assert all(one["clients_ok"] >= 1 for one in told[1:])
    assert told[-1]["clients_ok"] == 2, "both are together again"
    assert told[-1]["test_loss"] < told[0]["test_loss"]

    # as long as nobody was killed, every bit is the local engine's
    local = pisa_fl.prepare(pisa_fl.compose("engine.threads=1", *overrides))
    for one, other in zip(told, list(local.rounds(2)), strict=False):
        but = {"seconds", "run_id", "clients_turned_away"}
        assert {k: v for k, v in one.items() if k not in but} == {
            k: v for k, v in other.items() if k not in but
        }
    server = load_file(checkpoints / "round-000002" / "server-0000.safetensors")
    assert torch.equal(server["arrays.weights"], vectors(local.arrays)["weights"])

    # the ledger balances, and every client's replica of its dual is the ledger's
    server = load_file(checkpoints / f"round-{rounds:06d}" / "server-0000.safetensors")
    ledger = {name.removeprefix("strategy.ledger."): value for name, value in server.items()}
    alpha = ledger["shares"].double() / ledger["shares"].sum()
    left = server["arrays.weights"].double() * sigma
    right = alpha @ (sigma * ledger["weights.0"].double() + ledger["duals.0"].double())
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    for number in range(2):
        (file,) = (federation.disks / f"client-{number}" / "state").glob("*/client-*.safetensors")
        assert file.name == f"client-{number}.safetensors"
        head, _, body = file.read_bytes().partition(b"\n")
        assert json.loads(head)["pending_round"] == rounds
        row = ledger["clients"].tolist().index(number)
        assert torch.equal(load(body[:-DIGEST_SIZE])["pending.dual"], ledger["duals.0"][row])
