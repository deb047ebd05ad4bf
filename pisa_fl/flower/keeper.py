"""Keeps a client running: its SuperNode and its SuperExec, both started again whenever one of them dies.

    python -m pisa_fl.flower.keeper HOME [FOLDER] -- ARGUMENTS

which `start.sh` and `start.cmd` call with the client's folder, one that holds data of its own, if any, and the
arguments of `pisa-fl-supernode`. It ends, and they with it, when it is told to, by Ctrl-C or a signal. A lock in the
client's folder keeps a second one out; it falls with the process, however that ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from pisa_fl.flower.scripts import HERE, QUIET
from pisa_fl.system.locks import HeldError, let_go, take

KEEPER = "PISA_FL_KEEPER"
"""Environment variable with the process id of a SuperNode's keeper, with which it ends."""

LOCK = ".running"
"""File that a keeper holds in the client's folder."""

SECRET = "superexec-secret"
"""File with what the SuperNode knows its SuperExec by: its work is for no other process of this host."""

PORT = "9094"
"""Flower's default of the port that a SuperNode opens to its own host."""

SHORTEST, LONGEST = 1.0, 30.0
"""Seconds before the next start: at first, and after lives that were short, each twice as long as before."""

WELL = 60.0
"""Seconds after which a life was not short."""

LOOK = 0.2
"""Seconds between looks whether both are alive."""

PATIENCE = 10.0
"""Seconds in which a process has to end when it is told to."""


def environment(home: Path, given: Mapping[str, str]) -> dict[str, str]:
    """What the environment of a client in a folder has beyond the one given."""
    own = QUIET | {"FLWR_HOME": str(home / "flwr")}
    own["PISA_FL_STATE"] = given.get("PISA_FL_STATE") or str(home / "state")
    policy = home / "policy.toml"
    if not given.get("PISA_FL_POLICY") and policy.exists():
        own["PISA_FL_POLICY"] = str(policy)
    direct = given.get("no_proxy") or given.get("NO_PROXY") or ""
    if direct != "*" and not direct.startswith("127.0.0.1,"):
        direct = f"{HERE},{direct}" if direct else HERE
    return own | {"no_proxy": direct, "NO_PROXY": direct}


def own_words(folder: Path | None, allowed: str | None) -> str:
    """What its owner adds to a node's configuration: where its data are, and what packages it allows.

    Raises:
        ValueError: There is no such folder, or Flower cannot be told its name.
    """
    said = {"data": folder and str(folder), "allow": allowed}
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    words = ""
    for key, value in said.items():
        if value and "'" not in value:
            words += f" {key}='{value}'"
        elif value and '"' not in value:
            escaped = value.replace("\\", "\\\\")
            words += f' {key}="{escaped}"'
        elif value:
            raise ValueError(f"{value} has both kinds of quotation marks, which Flower cannot be told")
    return words


def main() -> int:
    """Keep a client running until told to end; the exit status."""
    try:
        return keep(_at_home(sys.argv[1:]))
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    except ValueError as error:
        print(error, file=sys.stderr)
    return 2


def _at_home(words: Sequence[str]) -> list[str]:
    """Go to the client's folder, keep it to its owner, and tell Flower by the environment; the SuperNode's arguments.

    Raises:
        ValueError: What was said cannot be.
        OSError: The folder or the key is not there.
    """
    if "--" not in words:
        raise ValueError("this start.sh is of an earlier version: take a new one from pisa-fl-credentials")
    mark = words.index("--")
    (home, *given), arguments = words[:mark], list(words[mark + 1 :])
    if len(given) > 1:
        raise ValueError(f"one folder at most, and these are {len(given)}: {' '.join(given)}")
    folder = given[0] if given else os.environ.get("PISA_FL_DATA")
    words_of_owner = own_words(
        Path(os.path.abspath(folder)) if folder else None, os.environ.get("PISA_FL_ALLOW")
    )
    arguments[arguments.index("--node-config") + 1] += words_of_owner
    os.chdir(home)
    os.umask(0o077)
    Path().chmod(0o700)
    Path(arguments[arguments.index("--auth-supernode-private-key") + 1]).chmod(0o600)
    os.environ |= environment(Path.cwd(), os.environ)
    return arguments


def keep(arguments: Sequence[str]) -> int:
    """Keep the client of this folder running until told to end; the exit status."""
    try:
        lock = take(Path(LOCK))
    except HeldError:
        print(f"{Path.cwd()}: this client runs already", file=sys.stderr)
        return 1
    stop, pause = threading.Event(), SHORTEST
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):  # the last two are not on all systems
        if (number := getattr(signal, name, None)) is not None:
            signal.signal(number, lambda *_: stop.set())
    try:
        while True:
            began = time.monotonic()
            who = _live(arguments, stop)
            if stop.is_set():
                return 0
            if time.monotonic() - began >= WELL:
                pause = SHORTEST
            print(f"{who} has ended: both are started again in {pause:g} s", file=sys.stderr, flush=True)
            if stop.wait(pause):
                return 0
            pause = min(2 * pause, LONGEST)
    finally:
        let_go(lock)


def _live(arguments: Sequence[str], stop: threading.Event) -> str:
    """One life of both, to the end of the first of them; which it was."""
    secret = Path(SECRET)
    secret.unlink(missing_ok=True)
    with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(os.urandom(32))
    ours = ["--superexec-auth-secret-file", SECRET]
    port = dict(pairwise(arguments)).get("--port", PORT)
    started: list[subprocess.Popen[bytes]] = []
    try:
        node = _start(["pisa-fl-supernode", *arguments, "--isolation", "process", *ours])
        started.append(node)
        address = ["--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
        started.append(_start(["pisa-fl-superexec", *address, "--parent-pid", str(node.pid), *ours]))
        while not stop.wait(LOOK):
            for process in started:
                if process.poll() is not None:
                    return str(process.args[0])  # type: ignore[index]
        return ""
    finally:
        for process in started:
            _end(process)


def _start(line: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a process, out of reach of this terminal's Ctrl-C."""
    return subprocess.Popen(line, env=os.environ | {KEEPER: str(os.getpid())}, start_new_session=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
