"""Hosts on this machine: network namespaces with addresses of their own, and a federation on them.

Nothing of it is to be seen in the machine's own network: the hosts hang on a switch in a namespace of its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

TAG = "pisa-fl-test"
NUMBERS = count()
OWN = ("FLWR_", "PISA_FL_")
"""Beginnings of environment variables that a host does not take over from this process."""


def ip(*line: str) -> str:
    """What the command `ip` prints."""
    tool = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if tool is None:
        raise FileNotFoundError("there is no command `ip` (Debian: iproute2)")
    ended = subprocess.run([tool, *line], capture_output=True, text=True)
    if ended.returncode:
        raise PermissionError(f"ip {' '.join(line)}: {ended.stderr.strip()}")
    return ended.stdout


def why_not() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    try:
        with network("probe") as (host,):
            return None if host.run("true").returncode == 0 else "nothing can be run in a network namespace"
    except OSError as error:
        return str(error)


@dataclass
class Host:
    """A network namespace, and the processes started there."""

    namespace: str
    address: str
    started: list[subprocess.Popen] = field(default_factory=list)

    def line(self, *command: str | Path) -> list[str]:
        return [shutil.which("ip") or "/usr/sbin/ip", "netns", "exec", self.namespace, *map(str, command)]

    def start(self, *command: str | Path, log: Path, **environment: str) -> subprocess.Popen:
        """Start a process whose output goes to a file."""
        with log.open("w") as output:
            process = subprocess.Popen(
                self.line(*command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment() | environment,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def run(
        self, *command: str | Path, cwd: Path | None = None, timeout: float = 600, **environment: str
    ) -> subprocess.CompletedProcess:
        """Run a command to its end."""
        # into files: a pipe would be open for as long as any process that the command left behind
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            ended = subprocess.run(
                self.line(*command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env=_environment() | environment,
                timeout=timeout,
            )
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(command, ended.returncode, out.read(), err.read())

    def kill(self) -> None:
        """Kill every process on the host, as a power cut would."""
        while pids := ip("netns", "pids", self.namespace).split():
            for pid in pids:
                subprocess.run(["kill", "-9", pid], capture_output=True)
            for process in self.started:
                process.wait(30)
        self.started.clear()

    def remove(self) -> None:
        """Take the host away, and all that runs there."""
        self.kill()
        ip("netns", "del", self.namespace)


@contextmanager
def network(*names: str) -> Iterator[list[Host]]:
    """Hosts that reach each other and nobody else; at the end they are gone, with all that runs on them."""
    _remove_leftovers()
    tag = f"{TAG}-{os.getpid()}-{next(NUMBERS)}"
    switch = Host(f"{tag}-switch", "")
    hosts = [Host(f"{tag}-{name}", f"10.77.0.{number}") for number, name in enumerate(names, 1)]
    made: list[Host] = []
    try:
        for host in (switch, *hosts):
            ip("netns", "add", host.namespace)
            made.append(host)
            ip("-n", host.namespace, "link", "set", "lo", "up")
        ip("-n", switch.namespace, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch.namespace, "link", "set", "bridge", "up")
        for number, host in enumerate(hosts):
            plug = ["type", "veth", "peer", "name", f"port{number}", "netns", switch.namespace]
            ip("-n", host.namespace, "link", "add", "eth0", *plug)
            ip("-n", switch.namespace, "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.namespace, "link", "set", "eth0", "up")
        yield hosts
    finally:
        for host in made:
            host.remove()


@dataclass
class Federation:
    """A SuperLink and clients, each on a host of its own with its own copy of its folder.

    Attributes:
        credentials: The folder that `pisa-fl-credentials` made.
        disks: A folder for each host's own files.
        superlink: The SuperLink's host.
        clients: The clients' hosts, by client number.
        stranger: A host that has no business here.
        port: Where the SuperLink listens.
    """

    credentials: Path
    disks: Path
    superlink: Host
    clients: Sequence[Host]
    stranger: Host
    port: int = 9092

    @property
    def address(self) -> str:
        return f"{self.superlink.address}:{self.port}"

    @property
    def home(self) -> Path:
        """The SuperLink's folder on its host."""
        return self.disks / "superlink"

    def make(self, clients: int) -> None:
        """Make the credentials of so many clients."""
        line = [sys.executable, "-m", "pisa_fl.flower.credentials", str(self.credentials)]
        line += ["--superlink", self.address, "--clients", str(clients), "--name", "three-hosts"]
        subprocess.run(line, check=True, capture_output=True)

    def copy(self, name: str) -> Path:
        """Carry a folder to its host."""
        return shutil.copytree(self.credentials / name, self.disks / name, dirs_exist_ok=True)

    def start_superlink(self) -> subprocess.Popen:
        """Start the SuperLink, and wait until it has registered all keys that it has."""
        log, table = self.disks / "superlink.log", self.home / "nodes.txt"
        process = self.superlink.start(self.home / "start.sh", log=log)
        keys = len(list((self.home / "keys").iterdir()))
        wait_for(lambda: "Application startup complete" in log.read_text(), log.read_text)
        wait_for(lambda: table.exists() and len(table.read_text().splitlines()) == keys, log.read_text)
        wait_for(lambda: len(self.status()) == keys, log.read_text)
        return process

    def start_client(self, number: int, *arguments: str) -> subprocess.Popen:
        """Start a client's SuperNode, and wait until it is online."""
        log = self.disks / f"client-{number}.log"
        start = self.disks / f"client-{number}" / "start.sh"
        process = self.clients[number].start(start, *arguments, log=log)
        self.wait_for_client(number)
        return process

    def wait_for_client(self, number: int) -> None:
        """Wait until a client that was started is online."""
        log = self.disks / f"client-{number}.log"
        wait_for(lambda: "SuperNode ID" in log.read_text(), log.read_text)
        wait_for(lambda: self.status().get(f"client-{number}") == "online", log.read_text)

    def flwr(self, *line: str) -> subprocess.CompletedProcess:
        """One of Flower's commands on the SuperLink's host."""
        return self.here(f"flwr {' '.join(line)}")

    def here(self, line: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        """A command line on the SuperLink's host, in a shell with its environment."""
        return self.superlink.run("bash", "-c", f". {self.home}/environment.sh && {line}", cwd=cwd)

    def status(self) -> dict[str, str]:
        """Status of the nodes, by client's name where nodes.txt has it, else by node id; empty without a SuperLink."""
        answer = self.flwr("supernode", "list", "--format", "json")
        nodes = json.loads(answer.stdout).get("nodes", [])
        table = self.home / "nodes.txt"
        names = dict(line.split()[:2] for line in table.read_text().splitlines()) if table.exists() else {}
        return {names.get(node["node-id"], node["node-id"]): node["status"] for node in nodes}


@contextmanager
def federation_of_three(folder: Path) -> Iterator[Federation]:
    """A SuperLink and two clients, online, whose files are below a folder."""
    (folder / "disks").mkdir()
    with network("superlink", "client-0", "client-1", "stranger") as (superlink, *clients, stranger):
        federation = Federation(folder / "credentials", folder / "disks", superlink, clients, stranger)
        federation.make(2)
        for name in ("superlink", "client-0", "client-1"):
            federation.copy(name)
        federation.start_superlink()
        with ThreadPoolExecutor() as pool:
            list(pool.map(federation.start_client, range(2)))
        yield federation


def wait_for(condition: Callable[[], bool], explain: Callable[[], str], seconds: float = 180) -> None:
    """Wait until something is so; otherwise fail with an explanation. Flower's commands take seconds each."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, explain()
        time.sleep(0.2)


def _remove_leftovers() -> None:
    """Remove the hosts of processes that were killed before they could."""
    for line in ip("netns", "list").splitlines():
        owner = re.match(rf"{TAG}-([0-9]+)-", line)
        if owner and not Path("/proc", owner[1]).exists():
            Host(line.split()[0], "").remove()


def _environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    return own | {
        "PATH": f"{Path(sys.executable).parent}:{own['PATH']}",
        "OMP_NUM_THREADS": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
    }
