"""A federation on three hosts, over TLS with the keys that `pisa-fl-credentials` makes."""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
from hosts import Federation, federation_of_three, wait_for, why_not

import pisa_fl
from pisa_fl.launcher import BUNDLE

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
    others = Federation(tmp_path / "strangers", tmp_path, federation.superlink, federation.clients)
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
    again = federation.here(f"{federation.home}/register.sh")
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


def test_the_superlinks_own_host_alone_registers_keys_and_starts_runs(federation, strangers, tmp_path):
    """Whoever starts a run runs code on every host; a client's host has all that a stranger could have."""
    (tmp_path / "flwr").mkdir()
    ca = federation.credentials / "ca.crt"
    text = f"[superlink.there]\naddress = '{federation.address}'\nroot-certificates = '{ca}'\n"
    (tmp_path / "flwr" / "config.toml").write_text(text)
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "pyproject.toml").write_text(BUNDLE.format(version="1.0.0"))
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": f"{tmp_path}/flwr"}
    key = strangers.credentials / "superlink" / "keys" / "client-0.pub"
    for line in (["supernode", "register", key], ["run", tmp_path / "app"], ["ls"], ["supernode", "list"]):
        ended = federation.clients[0].run("flwr", *line, "there", **quiet)
        assert (ended.returncode, "403 Forbidden" in ended.stderr) == (1, True), ended
    assert federation.status() == ONLINE
    assert json.loads(federation.flwr("ls", "--format", "json").stdout)["runs"] == []


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
