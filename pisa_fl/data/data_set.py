"""What every data set is: plain arrays with a row an example, and how to turn them into what a model takes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pisa_fl.tasks import Task
from pisa_fl.tasks.base import INPUTS, TARGETS

Fields = Mapping[str, NDArray]
"""Arrays by name, `inputs` and `targets` at least, each with a row an example."""


class DataSet(ABC):
    """A training and a test set.

    Arrays may be read-only maps of files: index or copy them before you write.

    Attributes:
        fitted: Whether what is stored of an example follows from the other training examples, as a scale does: then
            examples that clients read each for itself do not fit together.
    """

    fitted: ClassVar[bool] = False

    @property
    @abstractmethod
    def train(self) -> Fields:
        """Training examples, as they are stored."""

    @property
    @abstractmethod
    def test(self) -> Fields:
        """Test examples, likewise; none at a client of a real federation."""

    @property
    def tests(self) -> int:
        """How many test examples there are."""
        return len(self.test[TARGETS])

    @property
    @abstractmethod
    def groups(self) -> NDArray[np.int64]:
        """What partitioners deal by, (n,): the class of each training example, its speaker, ..."""

    @property
    @abstractmethod
    def group_names(self) -> tuple[str, ...]:
        """Names of the groups, by number."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example's input; by default, as it is stored."""
        return self.train[INPUTS].shape[1:]

    @property
    @abstractmethod
    def output_names(self) -> tuple[str, ...]:
        """What each of the numbers stands for that a model gives, for each example or for each place of it."""

    @property
    def digest(self) -> str:
        """SHA-256 of everything that training and evaluation read, in hexadecimal: by it a data set is known again.

        By default, of the arrays and names, and of the first examples made `ready`: for what that depends on. A class
        of which something does not show there adds it.
        """
        fields = [*sorted(self.train.items()), *sorted(self.test.items())]
        first = self.ready({name: torch.tensor(field[:64]) for name, field in self.train.items()})
        known = repr(([name for name, _ in fields], sorted(first), self.output_names, self.group_names))
        arrays = [field for _, field in fields] + [first[name].numpy() for name in sorted(first)]
        return digest_of(known, self.groups, *arrays)

    @abstractmethod
    def usual_task(self) -> Task:
        """What is learnt of it, where nothing else is said."""

    @abstractmethod
    def trial(self, examples: int) -> dict[str, Tensor]:
        """A batch to try a model on: inputs drawn from PyTorch's global generator, and targets that it must allow."""

    @property
    def said(self) -> str:
        """What one input is, in words."""
        return f"inputs of shape {self.shape}"

    @property
    def ready_bytes(self) -> int:
        """Bytes of the whole training set when it is ready."""
        one = self.ready({name: torch.tensor(field[:1]) for name, field in self.train.items()})
        return len(self.groups) * sum(field.nbytes for field in one.values())

    def ready(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch as it is stored -> as the task takes it."""
        return dict(batch)

    @property
    def augments(self) -> bool:
        """Whether training batches are changed at random."""
        return False

    def augmented(self, batch: Mapping[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
        """A training batch that is ready, changed at random."""
        return dict(batch)

    def noisy(self, batch: Mapping[str, Tensor], std: float, draw: torch.Generator) -> dict[str, Tensor]:
        """A batch that is ready, with Gaussian noise on its inputs.

        Args:
            batch: The batch.
            std: Standard deviation, in the units in which inputs are stored as numbers 0..1, or else are ready.
            draw: Where it is drawn from.

        Raises:
            ValueError: These inputs take none.
        """
        raise ValueError(f"{type(self).__name__}: there is no noise for {self.said}; use another partition")


def digest_of(known: str, *arrays: NDArray) -> str:
    """SHA-256 of a text and of arrays, in hexadecimal."""
    digest = hashlib.sha256(known.encode())
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
