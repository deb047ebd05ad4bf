"""Tables: a CSV file of one's own, and Adult."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pisa_fl.data.data_set import DataSet, digest_of
from pisa_fl.data.hold_out import share_of
from pisa_fl.system.files import expand
from pisa_fl.tasks import Classification, Regression, Task
from pisa_fl.tasks.base import INPUTS, TARGETS

if TYPE_CHECKING:
    from pandas import DataFrame, Series

DECILES = 10
"""Groups into which partitioners see a target that is a number."""


@dataclass(frozen=True, eq=False)
class TableData(DataSet):
    """Rows of standardised numbers, and what is to be told of them.

    Attributes:
        train_rows: (n, k) float32.
        train_targets: (n,) int64 positions in `targets`, or float32 standardised numbers.
        test_rows: (m, k) float32.
        test_targets: (m,), as `train_targets`.
        columns: Names of the k columns; of a category, `name=value`.
        targets: Names of the classes; of a number, its own.
        row_groups: (n,) int64, what partitioners deal by.
        groups_said: Names of those groups.
    """

    fitted: ClassVar[bool] = True

    train_rows: NDArray[np.float32]
    train_targets: NDArray
    test_rows: NDArray[np.float32]
    test_targets: NDArray
    columns: tuple[str, ...]
    targets: tuple[str, ...]
    row_groups: NDArray[np.int64]
    groups_said: tuple[str, ...]

    @cached_property
    def train(self) -> dict[str, NDArray]:
        """Rows and targets for training."""
        return {INPUTS: self.train_rows, TARGETS: self.train_targets}

    @cached_property
    def test(self) -> dict[str, NDArray]:
        """Rows and targets for testing."""
        return {INPUTS: self.test_rows, TARGETS: self.test_targets}

    @property
    def groups(self) -> NDArray[np.int64]:
        """Class of each row, tenth of the targets in which it lies, or value of the column that was asked for."""
        return self.row_groups

    @property
    def group_names(self) -> tuple[str, ...]:
        """Their names."""
        return self.groups_said

    @property
    def shape(self) -> tuple[int, ...]:
        """(k,)."""
        return (len(self.columns),)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The classes, or the target."""
        return self.targets

    @property
    def said(self) -> str:
        """What one input is, in words."""
        return f"rows of {len(self.columns)} numbers"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that training and evaluation read, in hexadecimal."""
        arrays = (self.train_rows, self.train_targets, self.test_rows, self.test_targets, self.row_groups)
        return digest_of(repr((self.columns, self.targets)), *arrays)

    def usual_task(self) -> Task:
        """Classification of classes, regression of numbers."""
        return Classification() if self.train_targets.dtype == np.int64 else Regression()

    def trial(self, examples: int) -> dict[str, Tensor]:
        """Rows at random, all of the last class, or with targets at random."""
        rows = torch.randn(examples, *self.shape)
        if self.train_targets.dtype == np.int64:
            return {INPUTS: rows, TARGETS: torch.full((examples,), len(self.targets) - 1)}
        return {INPUTS: rows, TARGETS: torch.randn(examples)}

    def noisy(self, batch: dict[str, Tensor], std: float, draw: torch.Generator) -> dict[str, Tensor]:  # type: ignore[override]
        """With noise on the standardised numbers."""
        rows = batch[INPUTS]
        return {**batch, INPUTS: rows + (torch.randn(rows.shape, generator=draw) * std).to(rows.device)}


def csv(
    path: str,
    test: str | float,
    target: str,
    target_is: Literal["class", "number"],
    names: Sequence[str] | None = None,
    missing: Sequence[str] = ("", "?"),
    ignore: Sequence[str] = (),
    group_by: str | None = None,
) -> TableData:
    """Read a table from CSV files, packed or not.

    A column of numbers has its missing values replaced by the median and is standardised; any other column becomes one
    column of zeros and ones for each of its values, a missing one being a value too. Medians, means, deviations and
    values are those of the training rows alone: nothing is learnt from the test rows, whose new values are all zeros.

    Args:
        path: The training rows, with a line of column names unless `names` gives them.
        test: A file of test rows likewise, or the share of the rows of `path` that are test rows, every k-th in the
            order of a shuffle by a fixed seed.
        target: The column to be told.
        target_is: `class`, or `number`: standardised.
        names: Names of the columns of files without a line of them.
        missing: What stands for a missing value.
        ignore: Columns that are left out.
        group_by: Column by which partitioners deal, which is left out too; None: by the target.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file is no table, a column is missing, or what is in it cannot be used.
    """
    train = _read("data.path", path, names, missing)
    if isinstance(test, str):
        held_out = _read("data.test", test, names, missing)
    else:
        taken, left = share_of(len(train), test, "data.test")
        held_out, train = train.iloc[taken], train.iloc[left]
    return of_frames(train, held_out, target, target_is, ignore, group_by)


def of_frames(
    train: DataFrame,
    held_out: DataFrame,
    target: str,
    target_is: Literal["class", "number"],
    ignore: Sequence[str],
    group_by: str | None,
) -> TableData:
    """Make a data set of training and test rows, as `csv` does.

    Raises:
        ValueError: A column is missing, or what is in it cannot be used.
    """
    for key, column in (("target", target), ("group_by", group_by), *(("ignore", name) for name in ignore)):
        if column is not None and column not in train.columns:
            raise ValueError(
                f"data.{key}={column} is none of the columns {', '.join(map(str, train.columns))}"
            )
    lacking = [name for name in train.columns if name not in held_out.columns]
    if lacking:
        raise ValueError(f"data: the test rows lack the column {lacking[0]}, which the training rows have")
    for which, rows in (("training", train), ("test", held_out)):
        if not len(rows):
            raise ValueError(f"data: there are no {which} rows")
        if rows[target].isna().any():
            raise ValueError(f"data.target={target} is missing in some {which} rows; leave them out")
    told = _classes if target_is == "class" else _numbers
    targets, (train_targets, test_targets) = told(target, train[target], held_out[target])
    columns, train_rows, test_rows = [], [], []
    for name in train.columns:
        if name in (target, group_by, *ignore):
            continue
        said, own, tested = _column(str(name), train[name], held_out[name])
        columns += said
        train_rows.append(own)
        test_rows.append(tested)
    if not columns:
        raise ValueError("data: there is no column left beside the target")
    groups_said, groups = _groups(train, group_by, targets, train_targets)
    return TableData(
        np.concatenate(train_rows, axis=1), train_targets, np.concatenate(test_rows, axis=1), test_targets,
        tuple(columns), targets, groups, groups_said,
    )  # fmt: skip


ADULT = (
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship",
    "race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income",
)  # fmt: skip


def adult(root: str, group_by: str | None = None) -> TableData:
    """Adult (Becker and Kohavi 1996, UCI): whether a person's income exceeds 50,000 dollars a year.

    32,561 training and 16,281 test rows of 14 attributes, from `adult.data` and `adult.test`, gzipped or not.

    Args:
        root: The folder of the two files.
        group_by: As in `csv`.

    Raises:
        FileNotFoundError: The folder or one of the files is missing.
        ValueError: A file is damaged.
    """
    folder = expand(root, "data.root")
    files = []
    for name in ("adult.data", "adult.test"):
        found = [file for file in (folder / name, folder / f"{name}.gz") if file.is_file()]
        if not found:
            raise FileNotFoundError(f"data.root={root} has no {name} or {name}.gz; fetch them from UCI")
        files.append(str(found[0]))
    return csv(files[0], files[1], "income", "class", ADULT, group_by=group_by)


def _read(key: str, path: str, names: Sequence[str] | None, missing: Sequence[str]) -> DataFrame:
    """The rows of a file; UCI's comment line and full stops of `adult.test` are left out."""
    import pandas as pd

    file = Path(expand(path, key))
    if not file.is_file():
        raise FileNotFoundError(f"{key}={path} is not a file; give a CSV file")
    try:
        rows = pd.read_csv(
            file,
            header=None if names else "infer",
            names=list(names) if names else None,
            na_values=list(missing),
            keep_default_na=False,
            skipinitialspace=True,
            comment="|",
        )
    except (ValueError, OSError, EOFError) as error:  # what pandas' parsers raise of damaged files
        raise ValueError(f"{key}={path} cannot be read as CSV: {' '.join(str(error).split())}") from error
    last = rows.columns[-1]
    if names and rows[last].dtype.kind not in "fiub":
        rows[last] = rows[last].str.rstrip(".")
    return rows


def _classes(
    target: str, train: Series, test: Series
) -> tuple[tuple[str, ...], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Names of the classes, and every row's."""
    train, test = train.astype(str), test.astype(str)
    names = sorted(train.unique())
    if len(names) < 2:
        raise ValueError(f"data.target={target} has a single class, {names[0]}: there is nothing to learn")
    if new := sorted(set(test.unique()) - set(names)):
        raise ValueError(f"data.target={target} has the class {new[0]} in test rows and not in training rows")
    of = {name: number for number, name in enumerate(names)}
    return tuple(names), (_as(train.map(of), np.int64), _as(test.map(of), np.int64))


def _numbers(
    target: str, train: Series, test: Series
) -> tuple[tuple[str, ...], tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The target's name, and every row's, standardised."""
    if train.dtype.kind not in "fiub" or test.dtype.kind not in "fiub":
        raise ValueError(f"data.target={target} has values that are no numbers: use data.target_is=class")
    (_, own, tested) = _column(target, train, test)
    return (target,), (own[:, 0], tested[:, 0])


def _column(
    name: str, train: Series, test: Series
) -> tuple[list[str], NDArray[np.float32], NDArray[np.float32]]:
    """A column as one or more of numbers: their names, and (rows, columns) of training and test."""
    if train.dtype.kind in "fiub" and test.dtype.kind in "fiub":
        median = train.median() if train.notna().any() else 0.0
        numbers = train.fillna(median).to_numpy(np.float64)
        mean, std = numbers.mean(), numbers.std()
        if not (np.isfinite(mean) and np.isfinite(std)):
            raise ValueError(f"data: the column {name} has numbers that are not finite")
        scale = std if std > 0 else 1.0
        both = (numbers, test.fillna(median).to_numpy(np.float64))
        own, tested = (((column - mean) / scale).astype(np.float32)[:, None] for column in both)
        return [name], own, tested
    train, test = (column.astype(object).where(column.notna(), "?").astype(str) for column in (train, test))
    values = sorted(train.unique())
    own, tested = (
        np.stack([_as(column == value, np.float32) for value in values], axis=1) for column in (train, test)
    )
    return [f"{name}={value}" for value in values], own, tested


def _groups(
    train: DataFrame, group_by: str | None, targets: tuple[str, ...], train_targets: NDArray
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names of the groups by which partitioners deal, and each row's."""
    if group_by is not None:
        values = train[group_by].astype(object).where(train[group_by].notna(), "?").astype(str)
        names = sorted(values.unique())
        return tuple(names), _as(values.map({name: i for i, name in enumerate(names)}), np.int64)
    if train_targets.dtype == np.int64:
        return targets, train_targets
    ranks = np.argsort(np.argsort(train_targets, kind="stable"), kind="stable")
    return tuple(f"tenth {i + 1}" for i in range(DECILES)), ranks * DECILES // len(ranks)


def _as(column: Series, kind: type) -> NDArray:
    return column.to_numpy(kind)
