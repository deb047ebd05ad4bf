"""What a sweep's folder holds: which run directory is of which configuration, and how far its run is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from pisa_fl.config import located
from pisa_fl.metric import Measures, Metrics
from pisa_fl.results import claim, finished, settings
from pisa_fl.results.run_directory import read_metrics

State = Literal["done", "running", "interrupted", "left"]
"""Of a run: it came to its end, a process writes it, it can go on, it has not begun."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        state: See there.
        round: The last that was measured.
        rounds: How many there are to be; None if that is not known yet.
        seconds: Of training, so far.
        quality: What it is worth after the last round that was evaluated, for people; empty if there is none.
    """

    state: State
    round: int = 0
    rounds: int | None = None
    seconds: float = 0.0
    quality: str = ""


def identify(config: DictConfig) -> str:
    """A text for a configuration, resolved or stored: the same for runs that have the same bits."""
    plain: Any = OmegaConf.to_container(located(config))
    return _identify(plain)


def _identify(plain: Mapping[str, Any]) -> str:
    (setting,) = settings.identify([plain])
    return f"{plain.get('seed')} {setting}"


def progress(directory: Path) -> Progress:
    """How far the run in a directory is, which need not be there."""
    state: State = "running" if claim.is_held(directory) else "interrupted"
    config: Mapping[str, Any]
    lines: Sequence[Metrics]
    try:
        run = finished.read(directory)
        state = state if state == "running" else "done"
        config, lines, quality = run.config, run.metrics, run.measures.quality
    except (ValueError, OSError):
        try:
            config, lines = _stored(directory), read_metrics(directory)
            quality = Measures.read(config.get("metrics")).quality
        except (ValueError, TypeError, OSError):  # nothing is there yet, or it is damaged
            nothing = state == "interrupted" and claim.first_file(directory) is None
            return Progress("left" if nothing else state)
    last: Metrics = lines[-1] if lines else {"round": 0}
    tested = [line[quality.key] for line in lines if quality.key in line]
    shown = quality.shown(tested[-1]) if tested else ""
    return Progress(state, last["round"], config.get("rounds"), last.get("seconds", 0.0), shown)


def worth(directory: Path) -> float | None:
    """What a run that is done is worth, as `Result.worth`."""
    summary = json.loads((directory / "summary.json").read_text())
    found: float | None = summary[f"final_{summary['compared_by']}"]
    return found


class Folder:
    """Finds the directory of a run by its configuration.

    Args:
        root: The sweep's folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, Path] = {}
        self._given: set[Path] = set()
        for path in sorted(root.rglob("config.yaml"), key=finished.natural):
            if (identity := _identity(path.parent)) is not None:
                self._known.setdefault(identity, path.parent)

    def find(self, identity: str, own: str) -> Path:
        """The directory of a run: where it has begun, else one that no other run has.

        Args:
            identity: Of its configuration, as `identify` tells it.
            own: Name of the directory that is its own if it is free; else one is that follows it.
        """
        known = self._known.get(identity)
        if known is None or (claim.first_file(known) is not None and _identity(known) != identity):
            # none, or it was held and told nothing yet, and is another's
            self._known[identity] = next(d for d in _following(self._root / own) if self._fits(d, identity))
        directory = self._known[identity]
        self._given.add(directory)
        return directory

    def _fits(self, directory: Path, identity: str) -> bool:
        """Whether a directory is free, or has that run."""
        if directory in self._given or (directory.exists() and not directory.is_dir()):
            return False
        # one that is held and tells nothing yet may be this run: it is left to who holds it, and looked at again
        return claim.first_file(directory) is None or _identity(directory) == identity


def _identity(directory: Path) -> str | None:
    """Of the configuration in a directory; None if it has none that can be read."""
    try:
        return _identify(_stored(directory))
    except (ValueError, OSError):
        return None


def _stored(directory: Path) -> Mapping[str, Any]:
    """The configuration in a directory.

    Raises:
        ValueError: It is none.
        OSError: It cannot be read.
    """
    try:
        config = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
    except OSError:
        raise
    except Exception as error:  # whatever the file makes the YAML parser raise
        raise ValueError("config.yaml is damaged") from error
    if not isinstance(config, dict):
        raise ValueError("config.yaml is damaged")
    return {str(key): value for key, value in config.items()}


def _following(directory: Path) -> Iterator[Path]:
    """A directory, and those whose names follow: 8 and 9 after 7, a-2 and a-3 after a."""
    yield directory
    name = directory.name
    for number in count(1):
        yield directory.with_name(str(int(name) + number) if name.isdecimal() else f"{name}-{number + 1}")
