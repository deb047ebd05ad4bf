"""Text: plays, whose speakers are a natural partition."""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pisa_fl.data.data_set import DataSet, digest_of
from pisa_fl.system.files import expand
from pisa_fl.tasks import NextCharacter, Task
from pisa_fl.tasks.base import INPUTS, TARGETS


@dataclass(frozen=True, eq=False)
class TextData(DataSet):
    """Sequences of characters, by number.

    Attributes:
        train_text: (n, T+1) integers, positions in `alphabet`: T characters and the one after them.
        test_text: (m, T+1), likewise.
        alphabet: The characters.
        speaker: (n,) int64, who says a training sequence.
        speakers: Their names.
    """

    train_text: NDArray[np.integer]
    test_text: NDArray[np.integer]
    alphabet: tuple[str, ...]
    speaker: NDArray[np.int64]
    speakers: tuple[str, ...]

    @cached_property
    def train(self) -> dict[str, NDArray]:
        """Characters, and the ones after them, for training."""
        return {INPUTS: self.train_text[:, :-1], TARGETS: self.train_text[:, 1:]}

    @cached_property
    def test(self) -> dict[str, NDArray]:
        """The same for testing."""
        return {INPUTS: self.test_text[:, :-1], TARGETS: self.test_text[:, 1:]}

    @property
    def groups(self) -> NDArray[np.int64]:
        """Who says each training sequence."""
        return self.speaker

    @property
    def group_names(self) -> tuple[str, ...]:
        """The speakers."""
        return self.speakers

    @property
    def shape(self) -> tuple[int, ...]:
        """(T,)."""
        return (self.train_text.shape[1] - 1,)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The characters."""
        return self.alphabet

    @property
    def said(self) -> str:
        """What one input is, in words."""
        return f"sequences of {self.shape[0]} characters, numbered 0 to {len(self.alphabet) - 1}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that training and evaluation read, in hexadecimal."""
        known = repr((self.alphabet, self.speakers))
        return digest_of(known, self.train_text, self.test_text, self.speaker)

    def usual_task(self) -> Task:
        """Next-character prediction."""
        return NextCharacter()

    def trial(self, examples: int) -> dict[str, Tensor]:
        """Characters at random, each followed by the last of the alphabet."""
        last = len(self.alphabet) - 1
        inputs = torch.randint(0, last + 1, (examples, *self.shape))
        return {INPUTS: inputs, TARGETS: torch.full_like(inputs, last)}

    def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """With int64 numbers."""
        return {name: field.long() for name, field in batch.items()}


def plays(path: str, length: int, test: float, least: int) -> TextData:
    """Read plays, packed or not: blocks of a line `SPEAKER:` and what is said, with an empty line between them.

    What a speaker says is put together in the order of the file; the last share of it is for testing, and both parts
    are cut into sequences that do not overlap. Nothing of a test sequence is in a training sequence.

    Args:
        path: The file, UTF-8.
        length: Characters of a sequence; LEAF's Shakespeare (arXiv 1812.01097): 80.
        test: Share of every speaker's text that is for testing.
        least: Speakers with fewer characters in all are left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has no such blocks, or nothing is left of it.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if not 0 < test < 1:
        raise ValueError(f"test must be between 0 and 1, got {test}")
    said = _speeches(_read(path))
    alphabet = sorted({character for text in said.values() for character in text})
    number = {character: i for i, character in enumerate(alphabet)}
    kind = np.uint8 if len(alphabet) <= 256 else np.int32
    train: list[NDArray] = []
    tests: list[NDArray] = []
    names: list[str] = []
    for name, text in said.items():
        if len(text) < least:
            continue
        numbers = np.array([number[character] for character in text], kind)
        cut = len(numbers) - round(test * len(numbers))
        own, tested = _sequences(numbers[:cut], length), _sequences(numbers[cut:], length)
        if len(own):
            names.append(name)
            train.append(own)
            tests.append(tested)
    if not names or not sum(map(len, tests)):
        raise ValueError(
            f"data.path={path} has no speaker with so much to say: lower data.least={least} or data.length={length}"
        )
    speaker = np.repeat(np.arange(len(names)), [len(part) for part in train])
    return TextData(np.concatenate(train), np.concatenate(tests), tuple(alphabet), speaker, tuple(names))


def _read(path: str) -> str:
    file = expand(path, "data.path")
    if not file.is_file():
        raise FileNotFoundError(f"data.path={path} is not a file; give a text of plays")
    content = file.read_bytes()
    try:
        return (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"data.path={path} cannot be read as a text: {error}") from error


def _speeches(text: str) -> dict[str, str]:
    """What every speaker says, in the order in which they first speak; a speech that names nobody is the last's."""
    said: dict[str, list[str]] = {}
    speaker = None
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").strip()):
        first, _, rest = block.partition("\n")
        if first.endswith(":") and rest:
            speaker, block = first[:-1].strip(), rest
        if speaker is not None:
            said.setdefault(speaker, []).append(block)
    if not said:
        raise ValueError("data.path has no block that begins with a line `SPEAKER:`")
    return {name: "\n".join(speeches) + "\n" for name, speeches in said.items()}


def _sequences(numbers: NDArray, length: int) -> NDArray:
    """(n, length+1), each beginning with the last character of the one before."""
    count = max(0, (len(numbers) - 1) // length)
    starts = np.arange(count)[:, None] * length
    return numbers[starts + np.arange(length + 1)]
