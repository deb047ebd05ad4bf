"""How a side takes turns: it waits to be asked for a round, and says how long that round took."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TextIO

import torch
from torch import Tensor

from experiments.benchmarks.task import Task


class Finished(Exception):
    """No more rounds are wanted."""


class Pace:
    """Stands between two rounds: a side calls `wait` before each, and `done` after it.

    Nobody has to ask for the first round, nor for the two with each setting that follow where there is a choice:
    they are the warm-up. From then on the side works with the setting that was fastest, be it a number of threads or
    a batch size.

    Args:
        task: The work.
        report: Where the lines go.
        name: Of what the side may choose.
        settings: What it may choose from.
    """

    def __init__(self, task: Task, report: TextIO, name: str = "", settings: Sequence[int] = (1,)) -> None:
        self._report, self._name = report, name
        self._initial = [p.detach().clone() for p in task.model().parameters()]
        self._setting = settings[0]
        self._plan = [settings[0], *(2 * list(settings) if len(settings) > 1 else [])]
        self._tried: list[tuple[float, int]] = []
        self._round, self._start = 0, 0.0

    def wait(self) -> int:
        """Until a round is wanted; the setting to work with.

        Raises:
            Finished: No more is wanted.
        """
        if self._plan:
            self._setting = self._plan[0]
        elif not sys.stdin.readline():
            raise Finished
        self._start = time.perf_counter()
        return self._setting

    def done(self, examples: int, parameters: Iterable[Tensor] = (), seconds: float | None = None) -> None:
        """Say that the round is over, if it was asked for or ends the warm-up.

        Args:
            examples: Images that it differentiated.
            parameters: The server's model, to say how far it has moved from where all sides start.
            seconds: How long it took, if that is not the time since `wait`.
        """
        if seconds is None:
            seconds = time.perf_counter() - self._start
        self._round += 1
        line: dict[str, float] = {"round": self._round, "seconds": seconds, "examples": examples}
        if self._plan:
            self._plan.pop(0)
            self._tried.append((seconds, self._setting))
            if self._plan:
                return
            self._setting = min(self._tried[1:] or self._tried)[1]
        if self._name:
            line |= {self._name: self._setting}
        if change := [(p.detach() - q).flatten() for p, q in zip(parameters, self._initial, strict=False)]:
            line |= {"parameters": sum(map(len, change)), "moved": float(torch.cat(change).norm())}
        print(json.dumps(line), file=self._report, flush=True)
