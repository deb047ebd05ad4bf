"""What `pisa-fl-credentials` makes, judged by OpenSSL, OpenSSH, bash and Flower itself."""

import os
import re
import shutil
import ssl
import subprocess
import sys
from configparser import ConfigParser
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from threading import Barrier, Thread

import pytest
import yaml
from cryptography import x509
from flwr.cli.flower_config import read_superlink_connection
from flwr.common.config import parse_config_args

from pisa_fl.flower import credentials, keeper

ADDRESS = "192.0.2.1:9092"


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The command, called in an empty folder, for three clients unless told; its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        three = [] if "--clients" in arguments else ["--clients", "3"]
        monkeypatch.setattr(sys, "argv", ["pisa-fl-credentials", *map(str, arguments), *three])
        status = 0
        try:
            credentials.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def made(call, tmp_path):
    """The credentials of three clients."""
    assert call("made", "--superlink", ADDRESS)[0] == 0
    return tmp_path / "made"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def new_in(before, folder):
    """Files that are new; those that were there must be as they were."""
    after = contents(folder)
    assert before.items() <= after.items()
    return sorted(after.keys() - before.keys())


def client_files(number):
    names = [
        f"client-{number}",
        "ca.crt",
        "start.sh",
        "start.cmd",
        "policy.example.toml",
        "compose.yaml",
        "pisa-fl@.service",
    ]
    return [f"superlink/keys/client-{number}.pub", *(f"client-{number}/{name}" for name in names)]


# --- what is there, and who may read it


def test_every_host_has_a_folder(made):
    scripts = ["environment.sh", "register.sh", "start.sh", "pisa-fl@.service"]
    scripts = [f"superlink/{name}" for name in scripts]
    certificates = ["ca.crt", "ca.key", "superlink/ca.crt", "superlink/server.key", "superlink/server.pem"]
    clients = [name for number in range(3) for name in client_files(number)]
    assert sorted(contents(made)) == sorted(certificates + scripts + clients)


def test_secrets_are_their_owners_alone(made):
    secrets = {"ca.key", "server.key", "client-0", "client-1", "client-2"}
    for path in (made, *made.rglob("*")):
        mode = path.stat().st_mode & 0o777
        if path.is_dir():
            assert mode == 0o700, path
        elif path.name in secrets:
            assert mode == 0o600, path
            assert b"PRIVATE KEY" in path.read_bytes()
        else:
            assert b"PRIVATE" not in path.read_bytes(), path
            assert mode == (0o755 if path.name in ("start.sh", "register.sh") else 0o644), path


def test_no_secret_is_in_two_places(made):
    secrets = [text for text in contents(made).values() if b"PRIVATE KEY" in text]
    assert len(set(secrets)) == len(secrets) == 5


# --- certificates


def handshake(folder, authority, name):
    """A TLS handshake in memory, of a server with the folder's certificate and a client that looks for a name."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(folder / "superlink" / "server.pem", folder / "superlink" / "server.key")
    client_context = ssl.create_default_context(cafile=authority)
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(down, up, server_hostname=name)
    server = server_context.wrap_bio(up, down, server_side=True)
    for _ in range(3):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return client.version()


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.1:9092", "192.0.2.1"),
        ("Hub.example.org:443", "hub.example.org"),
        ("[2001:db8::1]:9092", "2001:db8::1"),
    ],
)
def test_clients_accept_the_certificate_for_the_superlinks_names_alone(call, tmp_path, address, name):
    assert call("made", "--superlink", address)[0] == 0
    folder = tmp_path / "made"
    for own in (name, "localhost", "127.0.0.1", "::1"):
        assert handshake(folder, folder / "client-0" / "ca.crt", own) == "TLSv1.3"
    for other in ("192.0.2.2", "example.org", "2001:db8::2"):
        with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
            handshake(folder, folder / "ca.crt", other)


def test_clients_accept_no_certificate_of_another_authority(call, made, tmp_path):
    call("other", "--superlink", ADDRESS)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, tmp_path / "other" / "ca.crt", "192.0.2.1")


def test_certificates_are_valid_as_long_as_asked(call, tmp_path):
    call("made", "--superlink", ADDRESS, "--days", 30)
    for path in ("ca.crt", "superlink/server.pem"):
        certificate = x509.load_pem_x509_certificate((tmp_path / "made" / path).read_bytes())
        end = certificate.not_valid_after_utc - datetime.now(UTC)
        assert timedelta(days=29, hours=23) < end <= timedelta(days=30)


def test_a_certificate_that_was_removed_is_made_again_with_the_same_key_and_authority(call, made):
    certificate = made / "superlink" / "server.pem"
    old = certificate.read_bytes()
    certificate.unlink()
    before = contents(made)
    assert call("made", "--superlink", ADDRESS)[0] == 0
    assert new_in(before, made) == ["superlink/server.pem"]
    assert certificate.read_bytes() != old
    assert handshake(made, made / "ca.crt", "192.0.2.1") == "TLSv1.3"


# --- keys


def test_openssh_reads_the_clients_keys(made):
    if not shutil.which("ssh-keygen"):
        pytest.skip("OpenSSH is not installed")
    for number in range(3):
        name = f"client-{number}"
        line = ["ssh-keygen", "-y", "-P", "", "-f", made / name / name]
        public = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()
        assert public[0] == "ecdsa-sha2-nistp384"
        assert (made / "superlink" / "keys" / f"{name}.pub").read_text().split() == [*public[:2], name]


def test_a_second_call_changes_nothing(call, made):
    before = contents(made)
    assert call("made", "--superlink", ADDRESS)[0] == 0
    assert contents(made) == before


def test_an_owners_policy_stays_as_it_is(call, made):
    (made / "client-0" / "policy.toml").write_text("clients = 3")
    before = contents(made)
    assert call("made", "--superlink", ADDRESS)[0] == 0
    assert contents(made) == before


def test_a_client_is_added_to_those_that_there_are(call, made):
    for script in made.glob("client-*/start.*"):
        script.unlink()  # they say how many clients there are
    before = contents(made)
    assert call("made", "--superlink", ADDRESS, "--clients", 4)[0] == 0
    expected = client_files(3) + [f"client-{n}/start.{kind}" for n in range(3) for kind in ("cmd", "sh")]
    assert new_in(before, made) == sorted(expected)


def test_a_key_that_is_on_its_host_alone_is_not_made_again(call, made, tmp_path):
    (made / "client-0").rename(tmp_path / "away")
    (made / "ca.key").rename(tmp_path / "ca.key")
    for script in made.glob("client-*/start.*"):
        script.unlink()
    before = contents(made)
    assert call("made", "--superlink", ADDRESS, "--clients", 4)[0] == 0
    expected = client_files(3) + [f"client-{n}/start.{kind}" for n in (1, 2) for kind in ("cmd", "sh")]
    assert new_in(before, made) == sorted(expected)


def test_a_lost_key_is_replaced_when_both_halves_are_removed(call, made):
    before = contents(made)
    shutil.rmtree(made / "client-2")
    (made / "superlink" / "keys" / "client-2.pub").unlink()
    call("made", "--superlink", ADDRESS)
    after = contents(made)
    changed = sorted(name for name in after if after[name] != before[name])
    assert changed == ["client-2/client-2", "superlink/keys/client-2.pub"]


def test_a_call_that_is_broken_off_anywhere_leaves_what_the_next_one_completes(call, tmp_path, monkeypatch):
    replace, left = os.replace, 0

    def replace_a_few(source, target):
        nonlocal left
        if left == 0:
            raise OSError(28, "No space left on device", str(target))
        left -= 1
        replace(source, target)

    for done in count():
        folder = tmp_path / str(done)
        left = done
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace_a_few)
            status, _, error = call(folder, "--superlink", ADDRESS)
        before = contents(folder)
        assert len(before) == done, "every file is complete, and none is left over"
        if status == 0:
            break
        assert (status, error.count("\n"), "No space left on device" in error) == (2, 1, True), error
        assert call(folder, "--superlink", ADDRESS)[0] == 0
        assert before.items() <= contents(folder).items()
        assert handshake(folder, folder / "client-1" / "ca.crt", "192.0.2.1") == "TLSv1.3"
    assert done > 10


def test_a_call_that_is_killed_anywhere_leaves_what_the_next_one_completes(tmp_path):
    address, replace = credentials.Address.parse(ADDRESS), os.replace
    for done in count():
        folder, left = tmp_path / str(done), [None] * done
        child = os.fork()
        if child == 0:
            os.replace = lambda *names, left=left: (
                (left.pop(), replace(*names)) if left else os.kill(os.getpid(), 9)
            )
            credentials.make(folder, address, 2, "federation", 30)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        assert os.WTERMSIG(status) == 9
        whole = {name: text for name, text in contents(folder).items() if not Path(name).name.startswith(".")}
        assert len(whole) == done
        credentials.make(folder, address, 2, "federation", 30)
        assert whole.items() <= contents(folder).items()
        assert not list(folder.rglob(".*"))
        assert handshake(folder, folder / "client-1" / "ca.crt", "192.0.2.1") == "TLSv1.3"
    assert done > 10


def test_calls_at_the_same_time_make_one_federation(tmp_path):
    address, start, new = credentials.Address.parse(ADDRESS), Barrier(4), []

    def call():
        start.wait()
        new.extend(credentials.make(tmp_path / "made", address, 5, "federation", 30))

    threads = [Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(new) == len(set(new)) == 4 + 2 * 5, "no key or certificate was made twice"
    assert handshake(tmp_path / "made", tmp_path / "made" / "ca.crt", "192.0.2.1") == "TLSv1.3"


# --- what is wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--superlink", "192.0.2.1"], "'192.0.2.1' is not HOST:PORT"),
        (["--superlink", "192.0.2.1:0"], "is not HOST:PORT"),
        (["--superlink", "192.0.2.1:65536"], "is not HOST:PORT"),
        (["--superlink", "https://hub:9092"], "is not HOST:PORT"),
        (["--superlink", "2001:db8::1:9092"], "is not HOST:PORT"),
        (["--superlink", "a_b:9092"], "'a_b' is neither a DNS name nor an IP address"),
        (["--superlink", "300.0.2.1:9092"], "'300.0.2.1' is neither a DNS name nor an IP address"),
        (["--superlink", "a-.org:9092"], "'a-.org' is neither"),
        (["--superlink", "0.0.0.0:9092"], "no address that clients can connect to"),
        (["--superlink", "[::]:9092"], "no address that clients can connect to"),
        (["--superlink", ADDRESS, "--clients", "0"], "--clients: '0' is not a whole number from 1 to "),
        (["--superlink", ADDRESS, "--clients", "two"], "'two' is not a whole number"),
        (["--superlink", ADDRESS, "--days", "-1"], "--days"),
        (["--superlink", ADDRESS, "--days", "36501"], "'36501' is not a whole number from 1 to 36500"),
        (["--superlink", ADDRESS, "--name", "a.b"], "'a.b' is no name"),
        (["--superlink", ADDRESS, "--name", "default"], "'default' is no name"),
        ([], "--superlink"),
        (["--superlink", ADDRESS, "--port", "1"], "unrecognized arguments: --port 1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_writes_nothing(call, tmp_path, arguments, words):
    status, out, error = call("made", *arguments)
    assert (status, out) == (2, "")
    assert error.startswith("pisa-fl-credentials: ")
    assert error.count("\n") == 1
    assert words in error
    assert list(tmp_path.iterdir()) == []


def unreadable(path):
    path.write_text("nothing")


@pytest.mark.parametrize(
    ("name", "damage", "more", "words"),
    [
        ("ca.key", unreadable, [], "ca.key is not the key or certificate that this command wrote"),
        ("ca.crt", unreadable, [], "ca.crt is not the key"),
        ("superlink/server.pem", unreadable, [], "server.pem is not the key"),
        ("superlink/server.key", unreadable, [], "server.key is not the key"),
        ("client-1/client-1", unreadable, [], "client-1 is not the key"),
        ("superlink/server.pem", os.remove, ["no ca.key"], "ca.key is missing: it has to sign"),
        ("ca.key", lambda path: shutil.copy(path.parent / "superlink" / "server.key", path), [], "is not the key of"),
        ("ca.crt", lambda path: (path.unlink(), path.with_name("ca.key").unlink()), [], "holds other files"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_left_alone(call, made, name, damage, more, words):
    damage(made / name)
    if more:
        (made / "ca.key").unlink()
    before = contents(made)
    status, _, error = call("made", "--superlink", ADDRESS, "--clients", 4)
    assert (status, error.count("\n"), words in error) == (2, 1, True), error
    assert contents(made) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--superlink", "192.0.2.2:9092"], "server.pem is not for 192.0.2.2: remove it"),
        (["--superlink", ADDRESS, "--clients", "2"], "has 3 clients: --clients 2 would not remove any"),
    ],
)
def test_a_federation_is_not_changed_behind_its_clients_backs(call, made, arguments, words):
    before = contents(made)
    status, _, error = call("made", *arguments)
    assert (status, error.count("\n"), words in error) == (2, 1, True), error
    assert contents(made) == before


def test_a_folder_or_file_of_others_is_left_alone(call, tmp_path):
    (tmp_path / "made").mkdir(mode=0o755)
    (tmp_path / "made" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name, words in (("made", "made holds other files: give a new folder"), ("file", "file is no folder")):
        status, _, error = call(name, "--superlink", ADDRESS)
        assert (status, error.count("\n"), words in error) == (2, 1, True), error
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "made", "thesis.tex"]


# --- the scripts, with stand-ins for Flower's commands that tell how they were called


@pytest.fixture
def play(tmp_path):
    """Runs a script of a folder that was carried elsewhere, from a third folder."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("pisa-fl-superlink", "python", "flwr"):
        (commands / name).write_text(
            '#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\nenv | grep -E "^(FLWR|PISA)_" || true\n'
        )
        (commands / name).chmod(0o755)

    def run(script, *arguments, **environment):
        environment = {"PATH": f"{commands}:{os.environ['PATH']}"} | environment
        line = ["bash", script, *arguments]
        with (tmp_path / "out").open("w+") as out, (tmp_path / "err").open("w+") as err:
            status = subprocess.run(line, cwd=tmp_path, env=environment, stdout=out, stderr=err).returncode
        return status, (tmp_path / "out").read_text(), (tmp_path / "err").read_text()

    return run


@pytest.fixture
def carried(made, tmp_path):
    """The folders on their hosts, copied by someone who took no care of modes."""
    home = tmp_path / "some where"
    shutil.copytree(made, home)
    (home / "client-1").chmod(0o755)
    (home / "client-1" / "client-1").chmod(0o644)
    return home


QUIET = {
    "FLWR_TELEMETRY_ENABLED=0",
    "FLWR_DISABLE_UPDATE_CHECK=1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
}


@pytest.fixture
def kept(monkeypatch):
    """What a keeper is called with, in its own process and environment; its status, folder and arguments."""

    def run(words, folder, **environment):
        seen = []
        for name in [name for name in os.environ if name.startswith(("PISA_FL_", "FLWR_"))]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["keeper.py", *words])
        monkeypatch.setattr(keeper, "keep", lambda arguments: seen.append((Path.cwd(), arguments)) or 0)
        before, mask = dict(os.environ), os.umask(0o022)
        os.umask(mask)
        try:
            return keeper.main(), seen, {n: v for n, v in os.environ.items() if before.get(n) != v}
        finally:
            os.umask(mask)
            os.environ.clear()
            os.environ.update(before)

    return run


def on_windows(script):
    """The words that a command prompt gives Python."""
    *_, line = script.read_bytes().decode().split("\r\n")[:-1]
    assert line.startswith("@python ")
    line = line.removeprefix("@python ").replace("%~dp0.", str(script.parent)).replace("%*", "")
    return [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]


def test_a_clients_script(carried, play, kept, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "intern")
    data = tmp_path / "my 'data"
    data.mkdir()
    home = carried / "client-1"
    both = {"data": str(data), "allow": "mine other"}
    for arguments, own, environment in (
        ([], {}, {}),
        (["my 'data"], both, {"PISA_FL_ALLOW": "mine other"}),
        ([], both, {"PISA_FL_ALLOW": "mine other", "PISA_FL_DATA": str(data)}),
    ):
        status, out, error = play(home / "start.sh", *arguments)
        assert (status, error) == (0, "")
        _, *words = out.splitlines()
        assert words[:2] == ["-m", "pisa_fl.flower.keeper"]
        assert on_windows(home / "start.cmd") == [w for w in words if w not in arguments]
        status, [(where, given)], added = kept(words[2:], tmp_path, **environment)
        assert (status, where) == (0, home)
        policy = {"PISA_FL_POLICY": f"{home}/policy.toml"} if (home / "policy.toml").exists() else {}
        direct = dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost,::1,intern")
        quiet = dict(variable.split("=") for variable in QUIET)
        folders = {"FLWR_HOME": f"{home}/flwr", "PISA_FL_STATE": f"{home}/state"}
        assert added == quiet | folders | policy | direct
        options = dict(zip(given[::2], given[1::2], strict=True))
        node = parse_config_args([options.pop("--node-config")])
        assert node == {"partition-id": 1, "num-partitions": 3} | own
        assert options == {
            "--superlink": ADDRESS,
            "--root-certificates": "ca.crt",
            "--auth-supernode-private-key": "client-1",
            "--port": "9095",
        }
        (home / "policy.toml").touch()
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "client-1").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "--"], "nowhere: there is no such folder"),
        (["a", "b", "--"], "one folder at most, and these are 2: a b"),
        (["both'\"", "--"], "has both kinds of quotation marks, which Flower cannot be told"),
        (
            ["--", "--node-config", "", "--auth-supernode-private-key", "key"],
            "key: No such file or directory",
        ),
        ([], "this start.sh is of an earlier version: take a new one from pisa-fl-credentials"),
    ],
)
def test_a_keeper_that_is_told_what_cannot_be(kept, tmp_path, capsys, words, said):
    for name in ("a", "b", "both'\""):
        (tmp_path / name).mkdir()
    assert kept([str(tmp_path), *words], tmp_path)[:2] == (2, [])
    error = capsys.readouterr().err
    assert (error.count("\n"), said in error) == (1, True), error


@pytest.mark.parametrize("path", [r"C:\Users\me\my data", "/it's", r"/it's\here"])
def test_flower_reads_the_data_path_as_it_is(path):
    words = keeper.own_words(None, path)
    assert parse_config_args([f"partition-id=1{words}"]) == {"partition-id": 1, "allow": path}


WITHOUT = """
import importlib, os, signal, sys
for module in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[module] = None
for module, names in (
    (os, "fork killpg setsid getuid geteuid getpgid mkfifo nice"),
    (signal, "SIGHUP SIGKILL SIGUSR1 SIGUSR2 SIGALRM SIGQUIT"),
):
    for name in names.split():
        delattr(module, name)
for module in ("keeper", "supernode", "superexec", "app"):
    importlib.import_module(f"pisa_fl.flower.{module}")
"""


def test_a_client_needs_nothing_that_windows_lacks_to_start():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_superlinks_script(carried, play):
    home = carried / "superlink"
    lines = play(home / "start.sh")[1].splitlines()
    assert lines[0] == str(home)
    assert QUIET | {f"FLWR_HOME={home}/flwr"} <= set(lines)
    words = (
        "--host 0.0.0.0 --port 9092 --ssl-ca-certfile ca.crt --ssl-certfile server.pem --ssl-keyfile server.key"
        " --enable-supernode-auth --database state.db --disable-runtime-dependency-installation"
    )
    assert lines[1 : 1 + len(words.split())] == words.split()


def test_docker_and_systemd_are_told_to_start_again_what_has_ended(made):
    service = yaml.safe_load((made / "client-2" / "compose.yaml").read_text())["services"]["client-2"]
    assert (service["command"], service["volumes"]) == (["/client/start.sh"], [".:/client"])
    assert (service["restart"], service["cap_drop"]) == ("always", ["ALL"])
    unit = ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(made / "client-2" / "pisa-fl@.service")
    started = {"ExecStart": "%f/start.sh", "EnvironmentFile": "%f/service.env", "Restart": "always"}
    assert started.items() <= dict(unit["Service"]).items()


def test_flower_reads_the_connection(call, tmp_path, monkeypatch):
    call("made", "--superlink", "[2001:db8::1]:9092", "--name", "three-hosts")
    home = tmp_path / "made" / "superlink"
    subprocess.run(["bash", "-c", f". '{home}/environment.sh'"], check=True, cwd="/")
    monkeypatch.setenv("FLWR_HOME", str(home / "flwr"))
    for name in ("three-hosts", None):
        connection = read_superlink_connection(name)
        assert (connection.name, connection.address) == ("three-hosts", "[::1]:9092")
        assert connection.root_certificates == str(home / "ca.crt")
        assert not connection.insecure


def test_the_command_lines_are_printed(call):
    status, out, error = call("made", "--superlink", ADDRESS)
    assert (status, error) == (0, "")
    assert "pisa-fl-superlink --host 0.0.0.0 --port 9092" in out
    for number in range(3):
        assert f"--auth-supernode-private-key client-{number} --port {9094 + number}" in out
        assert f'--node-config "partition-id={number} num-partitions=3"' in out
    assert "new in made: ca.key, ca.crt," in out
    assert "new in made: nothing" in call("made", "--superlink", ADDRESS)[1]
