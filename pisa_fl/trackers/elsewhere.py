"""What trackers share whose runs are kept elsewhere: their packages, and how a run that goes on is found again."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pisa_fl.config import ConfigurationError
from pisa_fl.results.observer import Run
from pisa_fl.system.files import write


def need(package: str, called: str) -> None:
    """Check that an optional package is installed.

    Args:
        package: Its name, that of its tracker and of the extra that brings it.
        called: Its name for people.

    Raises:
        ConfigurationError: It is not.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # a folder of its name is no package
        raise ConfigurationError(f"tracker={package} needs {called}: pip install 'pisa-fl[{package}]'")


def recall(run: Run, tracker: str) -> dict[str, Any]:
    """What the tracker noted of the run when it was last here; nothing of a new run."""
    path = None if run.directory is None else run.directory / f"tracker-{tracker}.json"
    return json.loads(path.read_text()) if path is not None and path.is_file() else {}


def note(run: Run, tracker: str, **values: Any) -> None:
    """Note something for when the run goes on."""
    if run.directory is not None:
        write(run.directory / f"tracker-{tracker}.json", json.dumps(values) + "\n")


def flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
