"""A federation on three hosts, over TLS with the keys that `pisa-fl-credentials` makes."""

import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import hosts
import pytest
from hosts import Federation, federation_of_three, ip, wait_for, why_not
from omegaconf import OmegaConf

import pisa_fl
from pisa_fl.config import resolve
from pisa_fl.flower.bundle import BUNDLE

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


@pytest.fixture
def strangers(federation, tmp_path) -> Federation:
    """Credentials that others made for the same address."""
    hosts = federation.superlink, federation.clients, federation.stranger
    others = Federation(tmp_path / "strangers", tmp_path, *hosts)
    others.make(2)
    return others


def supernode(federation, tmp_path, *options):
    """What becomes of a SuperNode that is started with these options on a client's host."""
    line = [
        "flower-supernode",
        "--superlink",
        federation.address,
        "--port",
        "9199",
        "--max-retries",
        "1",
        *options,
    ]
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(tmp_path / "flwr"),
    }
    ended = federation.clients[0].run(*line, timeout=90, **quiet)
    return ended.returncode, ended.stdout + ended.stderr


def test_registered_clients_get_online(federation):
    assert federation.status() == ONLINE


def test_registering_again_changes_nothing(federation):
    before = (federation.home / "nodes.txt").read_text()
    noise = "FORCE_COLOR=1 TTY_COMPATIBLE=1 COLUMNS=20 https_proxy=http://127.0.0.1:9"
    again = federation.here(f"{noise} {federation.home}/register.sh")
    assert (again.returncode, again.stdout) == (0, "")
    assert federation.status() == ONLINE
    assert (federation.home / "nodes.txt").read_text() == before


def test_a_client_whose_key_is_not_registered_is_refused(federation, strangers, tmp_path):
    ca = federation.credentials / "ca.crt"
    key = strangers.credentials / "client-0" / "client-0"
    status, said = supernode(
        federation, tmp_path, "--root-certificates", ca, "--auth-supernode-private-key", key
    )
    assert (status, "Failed to activate SuperNode" in said) == (1, True), said
    assert "SuperNode ID" not in said
    log = (federation.disks / "superlink.log").read_text()
    assert "No SuperNode found with the given public key" in log
    assert federation.status() == ONLINE


def test_a_client_without_a_key_is_refused(federation, tmp_path):
    ca = federation.credentials / "ca.crt"
    status, said = supernode(federation, tmp_path, "--root-certificates", ca)
    assert (status, "SuperNode authentication is enabled" in said) == (1, True), said
    assert "SuperNode ID" not in said
    assert federation.status() == ONLINE


def test_nothing_is_said_without_tls(federation, tmp_path):
    ca = str(federation.credentials / "ca.crt")
    asked = federation.clients[0].run("python", "-c", HEALTH.format(address=federation.address, ca=ca))
    assert asked.stdout.split() == ["403", "refused"], asked.stderr
    status, said = supernode(federation, tmp_path, "--insecure")
    assert (status, "Failed to initialize the connection" in said) == (1, True), said
    assert "SuperNode ID" not in said
    assert federation.status() == ONLINE


def test_a_client_speaks_to_no_superlink_of_another_authority(federation, strangers, tmp_path):
    ca = strangers.credentials / "ca.crt"
    key = federation.credentials / "client-0" / "client-0"
    status, said = supernode(
        federation, tmp_path, "--root-certificates", ca, "--auth-supernode-private-key", key
    )
    assert (status, "CERTIFICATE_VERIFY_FAILED" in said) == (1, True), said
    assert "SuperNode ID" not in said
    assert federation.status() == ONLINE


def test_the_superlinks_user_alone_registers_keys_and_starts_runs(federation, strangers, tmp_path):
    """Whoever starts a run runs code on every host; a client's host has all that a stranger could have."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "pyproject.toml").write_text(BUNDLE.format(version="1.0.0"))
    key = strangers.credentials / "superlink" / "keys" / "client-0.pub"
    lines = ["supernode", "register", key], ["run", tmp_path / "app"], ["ls"]
    for host, address, tried in (
        (federation.clients[0], federation.address, lines),
        (federation.superlink, f"127.0.0.1:{federation.port}", lines[:2]),
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


def memory(federation):
    """Resident memory of the SuperLink, in pages."""
    return int((superlink(federation) / "statm").read_text().split()[1])


def test_nothing_long_is_read_of_strangers(federation, stranger):
    rest = memory(federation)
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
    assert memory(federation) < 1.2 * rest
    assert federation.status() == ONLINE


def test_no_spelling_of_a_path_leads_past_the_door(stranger):
    assert set(stranger("paths").values()) <= {400, 403}


def test_idle_connections_lock_nobody_out(federation, stranger):
    rest, before = memory(federation), lives(federation)
    files = len(list((superlink(federation) / "fd").iterdir()))
    with ThreadPoolExecutor() as pool:
        attack = pool.submit(stranger, "connections", 1000)
        most = most_files = 0
        told: dict[str, str] = {}
        while not attack.done():
            most = max(most, memory(federation))
            most_files = max(most_files, len(list((superlink(federation) / "fd").iterdir())))
            if files + 200 < most_files and not told:
                told = federation.status()
            time.sleep(0.1)
    assert told == ONLINE
    assert attack.result() == 0, "after a while all are closed"
    assert files + 200 < most_files < files + 256 + 20
    assert most < 2 * rest
    wait_for(lambda: all(lives(federation)[node] > before[node] for node in before if before[node]), str, 90)


def test_a_client_that_is_added_joins_and_once_removed_never_returns(federation):
    federation.make(3)
    home = federation.copy("client-2")
    key = "keys/client-2.pub"
    shutil.copy(federation.credentials / "superlink" / key, federation.home / key)
    added = federation.here(f"{federation.home}/register.sh")
    assert added.stdout.startswith("registered client-2 as node "), added.stderr
    node = added.stdout.split()[-1]
    host, log = federation.clients[1], federation.disks / "client-2.log"
    process = host.start(home / "start.sh", log=log)
    wait_for(lambda: federation.status() == ONLINE | {"client-2": "online"}, log.read_text)

    assert federation.flwr("supernode", "unregister", node, "three-hosts").returncode == 0
    assert process.wait(60) == 0, "its next request is refused, and it ends"
    federation.here(f"{federation.home}/register.sh")
    host.start(home / "start.sh", log=log).wait(60)
    assert "Failed to activate SuperNode" in log.read_text()
    assert federation.status() == ONLINE | {"client-2": "unregistered"}


def test_clients_come_back_to_a_superlink_that_was_killed(federation):
    before = federation.status()
    federation.superlink.kill()
    assert federation.status() == {}
    federation.start_superlink()
    assert federation.status() == before
    # every sign of life of a client puts off the moment at which it would be taken for offline
    at_first = lives(federation)
    assert len(at_first) == len(before)
    online = [node for node, status in before.items() if status == "online"]
    wait_for(
        lambda: sum(lives(federation)[node] > at_first[node] for node in at_first) >= len(online),
        lambda: f"{at_first}, {lives(federation)}",
        seconds=90,
    )


def lives(federation):
    """Until when the SuperLink takes each node for online, by its own database."""
    with closing(sqlite3.connect(federation.home / "state.db")) as database:
        return {
            node: until or 0.0 for node, until in database.execute("select node_id, online_until from node")
        }


def test_a_registered_client_is_not_given_the_number_of_another(federation, tmp_path):
    host, log = federation.clients[1], federation.disks / "client-1.log"
    host.stop()
    wait_for(lambda: federation.status()["client-1"] == "offline", log.read_text, seconds=120)
    start = federation.home.parent / "client-1" / "start.sh"
    honest = start.read_text()
    start.write_text(honest.replace("partition-id=1", "partition-id=0"))
    try:
        federation.start_client(1)
        line = "pisa-fl engine=flower engine.connection=three-hosts hydra.run.dir=stolen clients=2 rounds=1"
        ended = federation.here(
            f"{line} model=logistic partition.classes_per_client=5 progress=false patience=15", cwd=tmp_path
        )
    finally:
        start.write_text(honest)
        host.stop()
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "client 0 is not who it says: its key is client 1's" in ended.stderr
    assert "1 of 2 clients are there after patience=15 seconds: not online: 1" in ended.stderr
    wait_for(lambda: federation.status()["client-1"] == "offline", log.read_text, seconds=120)
    federation.start_client(1)


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
    words = "model._target_=pathlib.Path must not be built"
    assert [reason[: len(words)] for reason in said] == [words, words]
    # what stands in pisa-fl's place in the bundle was not imported anywhere
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("loaded")} == {"loaded-hostile"}
    for number in range(2):
        bundles = (federation.disks / f"client-{number}" / "flwr").rglob("*.py")
        assert list(bundles) == [], "nothing of it is on a client's disk"


def test_it_gives_the_bits_of_the_local_engine(federation, tmp_path):
    overrides = [
        "clients=2",
        "rounds=3",
        "model=logistic",
        "partition.classes_per_client=5",
        "progress=false",
    ]
    line = [
        "pisa-fl",
        "engine=flower",
        "engine.connection=three-hosts",
        "hydra.run.dir=federated",
        *overrides,
    ]
    ended = federation.here(" ".join(line), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    pisa_fl.run(pisa_fl.compose("engine.threads=1", *overrides), tmp_path / "local")
    federated, local = metrics_of(tmp_path / "federated"), metrics_of(tmp_path / "local")
    assert [line["clients_ok"] for line in federated] == [0, 2, 2, 2]
    assert federated == local
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("federated", "local")]
    assert weights[0] == weights[1]
    states = [sorted((federation.disks / f"client-{k}" / "state").glob("*/*.safetensors")) for k in range(2)]
    assert [[path.name for path in own] for own in states] == [
        ["client-0.safetensors"],
        ["client-1.safetensors"],
    ]


def metrics_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
