"""Keeps a client running: its SuperNode and its SuperExec, both started again whenever one of them dies.

`python -m pisa_fl.flower.keeper`, which `start.sh` calls, in the client's folder, with the arguments of
`pisa-fl-supernode`. It ends, and they with it, when it is told to, by Ctrl-C or a signal. A lock in the folder keeps a
second one out; it falls with the process, however that ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

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


def main() -> int:
    """Keep a client running until told to end; the exit status."""
    try:
        lock = take(Path(LOCK))
    except HeldError:
        print(f"{Path.cwd()}: this client runs already", file=sys.stderr)
        return 1
    stop, pause = threading.Event(), SHORTEST
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    try:
        while True:
            began = time.monotonic()
            who = _live(sys.argv[1:], stop)
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
