"""Starting the sides of a comparison, and having them take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from experiments.benchmarks.task import Task

ROOT = Path(__file__).resolve().parents[2]
"""The folder from which the sides are imported."""

PATIENCE = 60
"""Seconds that a side gets to end by itself."""


Round = dict[str, Any]
"""What a side says of a round: its `seconds`, the `examples` it differentiated, and more."""

Rounds = dict[str, list[Round]]
"""What each side said of each of its rounds; an empty list: it is not installed."""


class SideError(RuntimeError):
    """A side ended before its time; the end of what it said."""


class MissingError(RuntimeError):
    """A side's framework is not installed."""


@dataclass(frozen=True)
class Side:
    """What to start.

    Attributes:
        name: As it is shown.
        module: Of `sides`.
        task: The work.
        options: For the module.
        python: Which has the framework.
        processes: More than one: started by torchrun, as so many.
        gpu: Let it see GPUs.
    """

    name: str
    module: str
    task: Task
    options: tuple[str, ...] = ()
    python: str = sys.executable
    processes: int = 1
    gpu: bool = False

    @property
    def command(self) -> list[str]:
        """The command line."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        launcher = torchrun if self.processes > 1 else []
        module = ["-m", "experiments.benchmarks.sides", self.module, self.task.dumps(), *self.options]
        return [self.python, *launcher, *module]

    @property
    def environment(self) -> dict[str, str]:
        """The environment: the same ways for all."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        shared = os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
        return shared if self.gpu else shared | {"CUDA_VISIBLE_DEVICES": ""}


class Running:
    """A side that has been started and is warm.

    Args:
        side: What was started.
        process: Its process, which speaks on its standard output.
        words: What else it says.

    Raises:
        MissingError: Its framework is not installed.
        SideError: It failed.
    """

    def __init__(self, side: Side, process: subprocess.Popen[str], words: IO[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self._side, self._words = side, words
        self._orders, self._answers = process.stdin, process.stdout
        warm_up = self._answer()
        if "missing" in warm_up:
            raise MissingError(f"{side.name}: {warm_up['missing']} is not installed")

    def round(self) -> Round:
        """One round."""
        self._orders.write("\n")
        self._orders.flush()
        return self._answer()

    def _answer(self) -> Round:
        if line := self._answers.readline():
            return json.loads(line)
        self._words.seek(0)
        raise SideError(f"{self._side.name} ended:\n{self._words.read()[-2000:]}")


@contextmanager
def start(side: Side) -> Iterator[Running]:
    """Start a side, warm it up, and end it when the context ends."""
    pipe = subprocess.PIPE
    with (
        TemporaryFile("w+") as words,
        subprocess.Popen(
            side.command, env=side.environment, stdin=pipe, stdout=pipe, stderr=words, text=True
        ) as process,
    ):
        try:
            yield Running(side, process, words)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def take_turns(sides: Sequence[Side], repeats: int) -> Rounds:
    """Warm all sides up, then have them do a round each, `repeats` times."""
    with ExitStack() as stack:
        running = {}
        for side in sides:
            with suppress(MissingError):
                running[side.name] = stack.enter_context(start(side))
        rounds: Rounds = {side.name: [] for side in sides}
        for _ in range(repeats):
            for name, one in running.items():
                rounds[name].append(one.round())
        return rounds
