"""A share of the training examples in place of the test set: to choose settings by, and leave the test set alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pisa_fl.data.data_set import DataSet, Fields, digest_of
from pisa_fl.data.hold_out import stratified
from pisa_fl.randomness import numpy_generator
from pisa_fl.tasks import Task


class Validation(DataSet):
    """A data set of which a stratified share of the training examples is measured on, and dealt to no client.

    What is stored stays as it is: where it follows from all training examples, as a table's scales do, it follows from
    those of the share too. So a table's validation is a little kinder than its test.

    Args:
        whole: The data set; its test set is not read.
        share: Of the training examples, group by group, in (0, 1).
        seed: Seed of the run; it says which are drawn.

    Raises:
        ValueError: The share has no example.
    """

    def __init__(self, whole: DataSet, share: float, seed: int) -> None:
        self._whole = whole
        taken = stratified(whole.groups, share, numpy_generator(seed, "validation"))
        if not taken.any():
            raise ValueError(
                f"validation={share:g} of {len(taken)} training examples is none: raise it, or set it to 0"
            )
        self.fitted = whole.fitted  # type: ignore[misc]
        self._train, self._test = _rows(whole.train, ~taken), _rows(whole.train, taken)
        self._groups = whole.groups[~taken]

    @property
    def train(self) -> Fields:
        """Training examples outside the share."""
        return self._train

    @property
    def test(self) -> Fields:
        """The share."""
        return self._test

    @property
    def groups(self) -> NDArray[np.int64]:
        """What partitioners deal by, of each training example outside the share."""
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

    @property
    def digest(self) -> str:
        """SHA-256 of the whole, and of what is measured on."""
        return digest_of(self._whole.digest, *(self._test[name] for name in sorted(self._test)))

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


def _rows(fields: Fields, taken: NDArray[np.bool_]) -> dict[str, NDArray]:
    return {name: field[taken] for name, field in fields.items()}
