"""What watches a run: the run directory, the console, pictures, trackers. All are told the same; none knows another.

A tracker of your own is a class derived from `Observer`, named by a file of `conf/tracker` or of your `--config-dir`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig

from pisa_fl.config.explain import explain
from pisa_fl.metric import Measures, Metrics
from pisa_fl.system.text import visible

if TYPE_CHECKING:
    from pisa_fl.federation import Federation

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Run:
    """A run, as its observers see it.

    Attributes:
        id: Follows from what the bits follow from: a repetition has it too.
        config: Its configuration, resolved.
        directory: Its run directory; None if nothing is written.
        metrics: The lines of metrics.jsonl so far; a run that goes on begins with those of before.
        federation: What is run; to be looked at only.
    """

    id: str
    config: DictConfig
    directory: Path | None
    metrics: Sequence[Metrics]
    federation: Federation

    @property
    def name(self) -> str:
        """What the user calls it."""
        return str(self.config.name)

    @property
    def measures(self) -> Measures:
        """What is measured in every round."""
        return self.federation.task.measures

    @property
    def rounds(self) -> int:
        """How many rounds it is to have."""
        return int(self.config.rounds)


class Observer:
    """Watches a run; any of these methods may be left out.

    Of `finished` and `stopped` one is called, once.

    Attributes:
        essential: What it raises ends the run. Any other observer that raises something is left out from there on, with
            a warning, and the run goes on.
    """

    essential = False

    @property
    def name(self) -> str:
        """What a warning calls it."""
        return type(self).__name__

    def started(self, run: Run) -> None:
        """The run is about to begin, or to go on."""

    def waiting(self, line: str | None) -> None:
        """Clients are waited for, as a line tells; None when they are there. Else the run is stopped."""

    def round(self, line: Metrics) -> None:
        """A round was measured, of which this is the line of metrics.jsonl; round 0 is the untrained model."""

    def asks_to_stop(self) -> bool:
        """Whether the run is to stop after the present round, to go on another time."""
        return False

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is at its end, with these contents of summary.json."""

    def stopped(self, reason: BaseException) -> None:
        """The run ends before its end, and may go on another time: it was asked to stop (`Interrupted`) or failed."""


class Observers:
    """Tells all observers of a run.

    Args:
        observers: In the order in which they are told.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = list(observers)

    @contextmanager
    def of(self, run: Run) -> Iterator[None]:
        """Tell that the run begins, and if something ends it meanwhile, that it is stopped."""
        try:
            self._tell(lambda observer: observer.started(run))
            yield
        except BaseException as reason:
            self._stopped(reason)
            raise

    def waiting(self, line: str | None) -> None:
        """As `Observer.waiting`."""
        self._tell(lambda observer: observer.waiting(line))

    def round(self, line: Metrics) -> None:
        """As `Observer.round`."""
        self._tell(lambda observer: observer.round(line))

    def ask_to_stop(self) -> bool:
        """Whether any of them asks to stop."""
        asked = [
            self._ask(observer, lambda observer: observer.asks_to_stop()) for observer in [*self._observers]
        ]
        return any(asked)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """As `Observer.finished`."""
        self._tell(lambda observer: observer.finished(summary))

    def _stopped(self, reason: BaseException) -> None:
        with ExitStack() as stack:  # every one is told, whatever another raises
            for observer in reversed(self._observers):
                stack.callback(self._ask, observer, lambda observer: observer.stopped(reason))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        for observer in [*self._observers]:
            self._ask(observer, what)

    def _ask(self, observer: Observer, what: Callable[[Observer], Answer]) -> Answer | None:
        """An observer's answer; None, now and later, from one that fails."""
        try:
            return what(observer)
        except (Exception, SystemExit) as error:  # whatever a library makes of what users wrote
            if observer.essential:
                raise
            self._observers.remove(observer)
            log.warning("%s is left out from here on: %s", observer.name, visible(explain(error)))
            return None
