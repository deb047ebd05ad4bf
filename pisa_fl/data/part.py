"""Some of a data set's training examples in the place of all."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pisa_fl.data.data_set import DataSet, Fields
from pisa_fl.tasks import Task


class Part(DataSet):
    """A data set of which some training examples are there.

    What is stored stays as it is: where it follows from all training examples, as a table's scales do, it follows from
    those that are not there too.

    Args:
        whole: The data set.
        kept: Which training examples are there, (n,).
        test: What is measured on.
    """

    def __init__(self, whole: DataSet, kept: NDArray[np.bool_], test: Fields) -> None:
        self._whole = whole
        self.fitted = whole.fitted  # type: ignore[misc]
        self._train, self._test = rows_of(whole.train, kept), test
        self._groups = whole.groups[kept]

    @property
    def train(self) -> Fields:
        """The training examples that are kept."""
        return self._train

    @property
    def test(self) -> Fields:
        """What is measured on."""
        return self._test

    @property
    def groups(self) -> NDArray[np.int64]:
        """What partitioners deal by, of each training example that is kept."""
        return self._groups

    @property
    def group_names(self) -> tuple[str, ...]:
        """As of the whole."""
        return self._whole.group_names

    @property
    def shape(self) -> tuple[int, ...]:
        """As of the whole."""
        return self._whole.shape

    @property
    def output_names(self) -> tuple[str, ...]:
        """As of the whole."""
        return self._whole.output_names

    def usual_task(self) -> Task:
        """As of the whole."""
        return self._whole.usual_task()

    def trial(self, examples: int) -> dict[str, Tensor]:
        """As of the whole."""
        return self._whole.trial(examples)

    @property
    def said(self) -> str:
        """As of the whole."""
        return self._whole.said

    def ready(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As of the whole."""
        return self._whole.ready(batch)

    @property
    def augments(self) -> bool:
        """As of the whole."""
        return self._whole.augments

    def augmented(self, batch: Mapping[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
        """As of the whole."""
        return self._whole.augmented(batch, draw)

    def noisy(self, batch: Mapping[str, Tensor], std: float, draw: torch.Generator) -> dict[str, Tensor]:
        """As of the whole."""
        return self._whole.noisy(batch, std, draw)


def rows_of(fields: Fields, taken: NDArray[np.bool_]) -> dict[str, NDArray]:
    """Some of the examples."""
    return {name: field[taken] for name, field in fields.items()}
