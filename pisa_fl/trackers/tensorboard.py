"""TensorBoard's events in the run directory, up to the present round."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from pisa_fl.metric import Metrics
from pisa_fl.results.observer import Observer, Run
from pisa_fl.system.files import write
from pisa_fl.trackers.numbers import numbers


class TensorBoard(Observer):
    """One file of events: of a run that goes on, all rounds are written anew, so that none is there twice."""

    def __init__(self) -> None:
        self._run: Run | None = None
        self._path: Path | None = None

    def started(self, run: Run) -> None:
        """As `Observer.started`."""
        self._run = run

    def round(self, line: Metrics) -> None:
        """Write it; round 0 with the next one, which would wait for TensorBoard's import."""
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(_records(line, time.time()))
        elif line["round"] > 0:
            self._write_all()

    def finished(self, summary: Mapping[str, Any]) -> None:
        """As `Observer.finished`."""
        if self._path is None:
            self._write_all()

    def _write_all(self) -> None:
        if self._run is None or self._run.directory is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event

        now, lines = time.time(), self._run.metrics
        content = _record(Event(wall_time=now, file_version="brain.Event:2"))
        for line in lines:  # as long ago as they took
            content += _records(line, now + line["seconds"] - lines[-1]["seconds"])
        path = self._run.directory / f"events.out.tfevents.{int(now)}.{platform.node()}"
        write(path, content)
        for other in self._run.directory.glob("events.out.tfevents.*"):
            if other != path:
                other.unlink()
        self._path = path


def _records(line: Metrics, wall_time: float) -> bytes:
    """A round's events, as they lie in the file."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=key, simple_value=value) for key, value in numbers(line).items()]
    return _record(Event(wall_time=wall_time, step=int(line["round"]), summary=Summary(value=values)))


def _record(event: Any) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = BytesIO()
    RecordWriter(content).write(event.SerializeToString())
    return content.getvalue()
