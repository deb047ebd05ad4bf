"""One sentence for what went wrong, and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


def explain(error: BaseException) -> str:
    """One sentence for an exception that a wrong configuration raised."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: {error.problem or 'this is no YAML'}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file'}: {error.strerror}"
    if isinstance(error, RecursionError):
        return "the configuration is nested too deeply, or holds itself"
    if override := getattr(error, "override", None):
        return f"{override} cannot be read as key=value: quote a value that holds special characters"
    if text.startswith("Ambiguous value"):
        return f"{lines[0]}: add --multirun to sweep over it, or quote it"
    if match := re.match(r"Could not override '(.+?)'", text):
        return f"{match[1]} is no key of the configuration: {_alternative(match[1], error.__cause__)}"
    if match := re.search(r"Could not find '(.+?)/([^/]+?)'", text):
        options = [line for line in lines[_after(lines, "Available options") :] if " " not in line]
        return f"{match[1]}={match[2]} does not exist: {meant(match[2], options)}choose one of {', '.join(options)}"
    if match := re.search(r"Could not load '(.+?)/([^/]+?)'", text):  # one of several
        return f"{match[1]}={match[2]} does not exist: `pisa-fl --help` lists those there are"
    cause = error.__cause__
    if text.startswith("Error merging") and cause is not None:
        return f"{lines[0]}: {first_line(cause)}"
    return " ".join(lines[0].split()) if lines else type(error).__name__


def meant(word: str, words: Iterable[str]) -> str:
    """`did you mean ...? `, with the word that is the most like this one; nothing if none is."""
    known = list(words)
    group, _, last = word.rpartition(".")
    beside = {w.rpartition(".")[2]: w for w in known if w.rpartition(".")[0] == group}
    # another spelling of a key, or the key of a group given without it
    close = [beside[w] for w in get_close_matches(last, beside, 1)]
    close = close or sorted((w for w in known if w.endswith(f".{last}")), key=len)
    return f"did you mean {close[0]}? " if close else ""


def mistake_in(folder: Path) -> str | None:
    """What is wrong with the first of a folder's configuration files that cannot be read, if there is one."""
    for path in sorted(path for path in folder.rglob("*.yaml") if path.is_file()):
        try:
            content = OmegaConf.load(path)
        except yaml.MarkedYAMLError as error:
            return explain(error)
        except Exception as error:  # whatever the file makes the YAML parser raise
            return f"{path} cannot be read as YAML: {explain(error)}"
        if not isinstance(content, DictConfig):
            return f"{path} must hold keys with values, as in key: value"
    return None


def first_line(error: BaseException) -> str:
    """An exception's text up to its first line break, or its name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shown(value: Any) -> str:
    """A value in a sentence: one line, and not too long."""
    said = (
        "null"
        if value is None
        else str(OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value)
    )
    return repr(said)[1:-1][:100] or "an empty text"


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, dotted, without Hydra's own."""
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        for key in node:
            if prefix or key != "hydra":
                yield f"{prefix}{key!s}"
                yield from _keys(node._get_node(key), f"{prefix}{key!s}.")


def _alternative(key: str, cause: BaseException | None) -> str:
    """What to do instead of setting a key that does not exist."""
    known: list[str] = []
    if isinstance(cause, OmegaConfBaseException) and isinstance(cause.parent_node, Container):
        known = list(_keys(cause.parent_node._get_root()))
    return f"{meant(key, known)}`pisa-fl --cfg job` prints those there are"


def _after(lines: list[str], start: str) -> int:
    """Position behind the first line that starts so; the end if none does."""
    return next((i + 1 for i, line in enumerate(lines) if line.startswith(start)), len(lines))
