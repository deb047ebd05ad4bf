"""A share of the training examples in place of the test set, to choose settings by, or in place of all of them."""

from __future__ import annotations

from pisa_fl.data.data_set import DataSet, digest_of
from pisa_fl.data.hold_out import stratified
from pisa_fl.data.part import Part, rows_of
from pisa_fl.randomness import numpy_generator


class Validation(Part):
    """A data set of which a stratified share of the training examples is measured on, and dealt to no client.

    As a table's scales follow from the share too, its validation is a little kinder than its test.

    Args:
        whole: The data set; its test set is not read.
        share: Of the training examples, group by group, in (0, 1).
        seed: Seed of the run; it says which are drawn.

    Raises:
        ValueError: The share has no example.
    """

    def __init__(self, whole: DataSet, share: float, seed: int) -> None:
        taken = stratified(whole.groups, share, numpy_generator(seed, "validation"))
        if not taken.any():
            raise ValueError(
                f"validation={share:g} of {len(taken)} training examples is none: raise it, or set it to 0"
            )
        super().__init__(whole, ~taken, rows_of(whole.train, taken))

    @property
    def digest(self) -> str:
        """SHA-256 of the whole, and of what is measured on."""
        return digest_of(self._whole.digest, *(self._test[name] for name in sorted(self._test)))


class Fraction(Part):
    """A data set of which only a stratified share of the training examples is there; the test set is the whole one's.

    Args:
        whole: The data set.
        share: Of the training examples, group by group, in (0, 1).
        seed: Seed of the run; it says which are drawn.

    Raises:
        ValueError: The share has no example.
    """

    def __init__(self, whole: DataSet, share: float, seed: int) -> None:
        kept = stratified(whole.groups, share, numpy_generator(seed, "fraction"))
        if not kept.any():
            raise ValueError(f"fraction={share:g} of {len(kept)} training examples is none: raise it")
        super().__init__(whole, kept, whole.test)

    @property
    def digest(self) -> str:
        """SHA-256 of the whole, and of what is kept."""
        return digest_of(self._whole.digest, *(self._train[name] for name in sorted(self._train)))
