"""`engine=flower`: has Flower run a federation, follows it, and brings back how it ended.

Without a connection a SuperLink of our own is started on this machine, with Flower's simulation of the clients; with
one, the run goes to the SuperLink of that name in Flower's `config.toml`, and to the SuperNodes connected to it. The
server's side writes the run directory, so both must see it under the same path.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from pisa_fl.config import ConfigurationError, imported_folders, literal, located, own_folders
from pisa_fl.config.allowed import SIMULATION
from pisa_fl.engines.base import Launcher
from pisa_fl.engines.local import LocalGrid
from pisa_fl.federation import RunError
from pisa_fl.flower.bundle import BUNDLE
from pisa_fl.flower.grid import NODES
from pisa_fl.flower.state_file import StateFile
from pisa_fl.from_config import prepare, trackers
from pisa_fl.identity import run_id
from pisa_fl.results import claim, run_directory
from pisa_fl.results.console import Display
from pisa_fl.results.observer import Observers, Run
from pisa_fl.results.result import Interrupted, Result
from pisa_fl.results.run_directory import FLOWER_LOG, OUTCOME, STOP, WAITING
from pisa_fl.system.signals import stop_signals

log = logging.getLogger(__name__)

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ADDRESS": "local",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "PYTHONUTF8": "1",
}
"""Environment of everything that is started: nothing phones home, nothing is installed, Ray is none that happens to run
here, and words are bare."""

LOUD = {"FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"}
"""What would have Flower's commands colour or fold what is read of them; Jupyter sets some."""

PROXIES = {"http_proxy", "https_proxy", "all_proxy"}
HERE = "127.0.0.1,localhost,::1"
"""Where no proxy leads to."""

START = 60.0
"""Seconds that a SuperLink has to start."""

LOOK = 0.2
"""Seconds between looks at the run directory."""


class FlowerError(RunError):
    """Flower could not run the federation."""


@dataclass(frozen=True)
class FlowerRun(Launcher):
    """How Flower runs a federation; the keys of conf/engine/flower.yaml.

    Attributes:
        connection: Name of a SuperLink in Flower's config.toml; None simulates on this machine.
        cpus: Processors that Flower's simulation reserves for a client.
        gpus: Share of a GPU that Flower's simulation reserves for a client.
        chunk: Examples differentiated at once where the number does not matter to the result, or `auto`.
        threads: PyTorch's threads in each process.
        state: Folder of the state files of the clients that Flower simulates; a real client chooses its own.
        experiment: Name of the experiment in the clients' state files.
        directory: Run directory as the server finds it.

    Raises:
        ValueError: A value is impossible.
    """

    connection: str | None
    cpus: int
    gpus: float
    chunk: int | Literal["auto"]
    threads: int | Literal["auto"]
    state: str | None
    experiment: str | None
    directory: str | None

    def __post_init__(self) -> None:
        if self.cpus < 1:
            raise ValueError(f"engine.cpus must be at least 1, got {self.cpus}")
        if self.gpus < 0:
            raise ValueError(f"engine.gpus must not be negative, got {self.gpus}")
        if self.state is not None and self.connection is not None:
            raise ValueError(
                "engine.state places what simulated clients remember; a real client keeps it on its own host, in"
                " $PISA_FL_STATE: leave it out"
            )
        if self.experiment is not None:
            StateFile(self.state, self.experiment, 0)  # refuses a name that cannot be a folder's

    @property
    def real_clients(self) -> bool:
        """As `Launcher`."""
        return self.connection is not None

    def launch(self, config: DictConfig, directory: Path | None, resume: bool = False) -> Result:
        """As `Launcher.launch`."""
        if self.connection is not None:
            _check_connection(self.connection)
        trackers(
            config
        )  # the server's process has its own; here, a mistake is told before anything is started
        origin = directory if resume else None
        federation = prepare(config, lambda clients: LocalGrid(clients.host([], 1, self.chunk)), origin)
        with ExitStack() as stack:
            kept = directory
            if directory is None:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pisa-fl-")))
            directory = directory.resolve()
            stack.enter_context(_handed_on(directory, resume))
            watching, before = Observers([Display(config.progress)]), run_directory.read_metrics(directory)
            with watching.of(Run(run_id(federation.identity), config, kept, before, federation)):
                self._run(self._addressed(config, directory, resume), directory, watching)
                metrics = run_directory.read_metrics(directory)
                summary = json.loads((directory / "summary.json").read_text())
                federation.model.module.load_state_dict(load_file(directory / "model.safetensors"))
                watching.finished(summary)
        return Result(metrics, summary, federation.model.module, kept)

    def _addressed(self, config: DictConfig, directory: Path, resume: bool) -> DictConfig:
        """The configuration with what only this run knows."""
        addressed = located(config)
        OmegaConf.set_struct(addressed, False)
        addressed.imports = [literal(folder) for folder in own_folders(config)]
        addressed.resume = str(directory) if resume else None
        addressed.engine.directory = str(directory)
        addressed.engine.experiment = self.experiment or f"{config.name}-{secrets.token_hex(6)}"
        if self.connection is None:
            addressed.engine.state = self.state or str(directory / "clients")
        return addressed

    def _run(self, config: DictConfig, directory: Path, watching: Observers) -> None:
        """Start the run and follow it to its end."""
        with ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pisa-fl-")))
            output = stack.enter_context((directory / FLOWER_LOG).open("a"))
            environment = _environment()
            connection = self.connection
            if connection is None:
                environment.pop(NODES, None)  # of a federation's SuperLink
                environment |= {"FLWR_HOME": str(work / "home"), SIMULATION: "1"}
                connection = "simulation"
                stack.enter_context(_superlink(work / "home", connection, environment, output))
            stop = stack.enter_context(stop_signals())
            number = self._submit(config, connection, work, environment)
            news = News(directory)
            follow = _start(
                "flwr", "log", str(number), connection, "--stream", env=environment, output=output
            )
            stack.callback(_kill, follow)
            waiting = ""
            while True:
                ended = follow.poll() is not None
                news.show(watching)
                waiting = _show_waiting(directory, waiting, watching)
                if ended:
                    break
                if stop:
                    (directory / STOP).touch()
                time.sleep(LOOK)
            status = _status(number, connection, environment)
        (directory / STOP).unlink(missing_ok=True)
        _conclude(directory, status, config.imports)

    def _submit(self, config: DictConfig, connection: str, work: Path, environment: dict[str, str]) -> int:
        """Hand the run to the SuperLink; the run's number there."""
        bundle = work / "pisa-fl"
        bundle.mkdir()
        (bundle / "pyproject.toml").write_text(BUNDLE.format(version=version("pisa-fl")))
        for folder in imported_folders:
            shutil.copytree(folder, bundle, dirs_exist_ok=True, ignore=_not_python)
        settings = work / "run-config.toml"
        settings.write_text(f"hydra = {json.dumps(OmegaConf.to_yaml(config))}\n")
        line = ["flwr", "run", str(bundle), connection, "--run-config", str(settings), "--format", "json"]
        if self.connection is None:
            cores = f"client-resources-num-cpus={self.cpus} client-resources-num-gpus={self.gpus}"
            line += ["--federation-config", f"num-supernodes={config.clients} {cores}"]
        answer = _ask(line, environment)
        if not answer.get("run-id"):
            said = " ".join(str(answer.get("error-message", answer)).split())
            raise FlowerError(f"Flower did not start the run: {said}")
        return int(answer["run-id"])


def _environment() -> dict[str, str]:
    """Environment of everything that is started."""
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in {*LOUD, SIMULATION} and _usable(name, value)
    }
    direct = own.get("no_proxy") or own.get("NO_PROXY") or ""
    if direct != "*":
        direct = f"{HERE},{direct}".rstrip(",")
    # Flower's commands find each other by PATH, which an environment that is not activated is not in
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{own.get('PATH', '')}"
    return own | QUIET | {"PATH": path, "no_proxy": direct, "NO_PROXY": direct}


def _usable(name: str, value: str) -> bool:
    """Whether a variable is no proxy of a kind that stops Flower's HTTP client even where it is not asked."""
    return (
        name.lower() not in PROXIES or "://" not in value or value.lower().startswith(("http://", "https://"))
    )


@contextmanager
def _handed_on(directory: Path, resume: bool) -> Iterator[None]:
    """A directory that the server's process may claim, and no other launcher: the log is this one's meanwhile.

    Raises:
        ConfigurationError: It is somebody else's.
    """
    with ExitStack() as stack:
        with claim.claimed(directory):
            if not resume:
                claim.check_free(directory)
            (directory / FLOWER_LOG).touch()
            stack.enter_context(claim.locked(directory / FLOWER_LOG))
            (directory / OUTCOME).unlink(missing_ok=True)
        yield


def _check_connection(name: str) -> None:
    """Look a SuperLink's name up in Flower's own configuration.

    Raises:
        ConfigurationError: It is not there.
    """
    path = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser() / "config.toml"
    try:
        known = tomllib.loads(path.read_text())["superlink"]
    except (OSError, ValueError, KeyError):
        known = {}
    if not isinstance(known.get(name), dict):
        raise ConfigurationError(
            f"engine.connection={name} is not in {path}: add it there as [superlink.{name}], or set FLWR_HOME"
        )


@contextmanager
def _superlink(home: Path, connection: str, environment: dict[str, str], output: IO[str]) -> Iterator[None]:
    """A SuperLink with Flower's simulation, on a free port of this machine, while it lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{connection}"\n\n'
        f'[superlink.{connection}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    line = ["pisa-fl-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    line += ["--disable-runtime-dependency-installation"]
    process = _start(*line, env=environment, output=output)
    try:
        end = time.monotonic() + START
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > end:
                raise FlowerError(f"Flower's SuperLink did not start: see {output.name}")
            time.sleep(LOOK)
        yield
    finally:
        _kill(process)


def _healthy(port: int) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def _start(*line: str, env: dict[str, str], output: IO[str]) -> subprocess.Popen[bytes]:
    """Start one of Flower's commands, out of reach of this terminal's Ctrl-C."""
    return subprocess.Popen(
        [_command(line[0], env), *line[1:]], env=env, stdout=output, stderr=output, start_new_session=True
    )


def _ask(line: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The JSON that one of Flower's commands answers, which may follow other words."""
    ended = subprocess.run(
        [_command(line[0], environment), *line[1:]],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    try:
        return json.loads(ended.stdout[ended.stdout.index("{") :])
    except ValueError:
        return {"error-message": _last_line(ended.stdout + ended.stderr)}


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no answer")


def _command(name: str, environment: dict[str, str]) -> str:
    """One of Flower's commands, by its whole path."""
    return shutil.which(name, path=environment["PATH"]) or name


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and those it started."""
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
        return
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def _status(number: int, connection: str, environment: dict[str, str]) -> str:
    """What Flower says of a run, such as `finished:completed`."""
    answer = _ask(["flwr", "ls", connection, "--run-id", str(number), "--format", "json"], environment)
    runs = answer.get("runs") or [{}]
    said = " ".join(str(answer.get("error-message", "")).split()) or "unknown"
    return str(runs[0].get("status", f"unknown, for the SuperLink does not answer ({said})"))


def _conclude(directory: Path, status: str, folders: Sequence[str]) -> None:
    """Raise what the server's side ended with."""
    outcome = directory / OUTCOME
    if outcome.is_file():
        said = json.loads(outcome.read_text())
        outcome.unlink()
        kinds = {"Interrupted": Interrupted, "ConfigurationError": ConfigurationError, "OSError": OSError}
        raise kinds.get(said["kind"], RunError)(said["reason"])
    if status != "finished:completed" or not (directory / "summary.json").is_file():
        raise FlowerError(
            f"Flower's run ended as {status}: see {directory}/{FLOWER_LOG}; if there is a checkpoint, go on with:"
            f" {claim.resume_command(directory, folders)}"
        )


class News:
    """What a run elsewhere writes after it began, or was resumed.

    Args:
        directory: The run directory.

    Attributes:
        last: The last round that was measured before, -1 for none.
    """

    def __init__(self, directory: Path) -> None:
        self._metrics = run_directory.NewLines(directory / "metrics.jsonl")
        self._failures = run_directory.NewLines(directory / "failures.jsonl")
        self.last = max((int(line["round"]) for line in self._metrics.read()), default=-1)
        self._failures.read()

    def show(self, watching: Observers) -> None:
        """Show the rounds and failures that were written since the last time."""
        for line in self._new(self._failures):
            trace = f"\n{line['traceback']}" if "traceback" in line else ""
            who = "a client" if line["client"] is None else f"client {line['client']}"
            log.warning("round %s: %s failed: %s%s", line["round"], who, line["reason"], trace)
        for line in self._new(self._metrics):
            watching.round(line)

    def _new(self, lines: run_directory.NewLines) -> Iterator[dict[str, Any]]:
        """Lines but for those of before, which are read again if a run that goes on takes later ones out."""
        return (line for line in lines.read() if line["round"] > self.last)


def _show_waiting(directory: Path, shown: str, watching: Observers) -> str:
    """Show for whom the run waits, if that is news; what was shown last."""
    try:
        line = (directory / WAITING).read_text()
    except FileNotFoundError:
        return ""
    if line != shown:
        watching.waiting(line)
    return line


def _not_python(folder: str, names: list[str]) -> list[str]:
    """What of a folder of the user's is left out of the bundle: all but modules."""
    return [name for name in names if not (name.endswith(".py") or Path(folder, name).is_dir())]
