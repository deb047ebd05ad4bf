"""Data sets of the library `datasets`: on the Hugging Face hub, saved on disk, or in files that it reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pisa_fl.data.cache import fingerprint
from pisa_fl.data.hold_out import share_of
from pisa_fl.data.image_data import Arrays, channels_first
from pisa_fl.system.files import expand

if TYPE_CHECKING:
    from datasets import Dataset


def source(name: str | None, path: str | None, subset: str | None) -> Iterator[str]:
    """What the content of a data set follows from: its name on the hub, or its files as they are now.

    Raises:
        FileNotFoundError: `path` is not a folder.
        ValueError: Neither or both of `name` and `path` are given, or one is impossible.
    """
    if (name is None) == (path is None):
        raise ValueError(
            "data.name and data.path: give one of them, a data set of the Hugging Face hub or a folder"
        )
    if path is not None:
        files = (file for file in sorted(_folder(path).rglob("*")) if file.is_file())
        yield from (str(subset), *fingerprint(files))
    elif not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", str(name)):
        raise ValueError(f"data.name={name} is no name of a data set on the Hugging Face hub, owner/name")
    else:
        yield from (str(subset), str(name))


def splits(
    name: str | None, path: str | None, subset: str | None, train: str, test: str | float, lacks_test: bool
) -> tuple[Dataset, Dataset]:
    """Training and test rows.

    Args:
        name: On the hub, `owner/name`.
        path: In its place, a folder: what `save_to_disk` wrote, or files in any format that `load_dataset` reads.
        subset: Which of several that go by the name.
        train: Name of the split of training rows.
        test: That of the test rows, or the share of the training rows that are test rows, drawn by a fixed seed.
        lacks_test: Whether the split of test rows may be missing; there are none then.

    Raises:
        FileNotFoundError: The hub cannot be reached, or there is no such data set.
        ValueError: It cannot be read, or lacks a split.
    """
    found = _load(name, path, subset)
    for key, split in (("train_split", train), ("test_split", test)):
        if isinstance(split, str) and split not in found and not (key == "test_split" and lacks_test):
            raise ValueError(
                f"data.{key}={split} is none of the splits {', '.join(found)}: name one of them"
                + (
                    ", or give the share of the training examples that are for testing"
                    if key == "test"
                    else ""
                )
            )
    rows = found[train]
    if not isinstance(test, str):
        taken, left = share_of(len(rows), test, "data.test_split")
        return rows.select(left), rows.select(taken)
    return rows, found[test] if test in found else rows.select([])


def check_column(key: str, column: str, rows: Dataset) -> None:
    """Check that there is a column.

    Raises:
        ValueError: There is not; the sentence names `data.<key>`.
    """
    if column not in rows.column_names:
        raise ValueError(f"data.{key}={column} is none of the columns {', '.join(rows.column_names)}")


def _load(name: str | None, path: str | None, subset: str | None) -> Mapping[str, Dataset]:
    """All splits."""
    # imported here since it takes most of a second, which a cached data set need not pay
    import datasets

    said = f"data.name={name}" if path is None else f"data.path={path}"
    folder = None if path is None else _folder(path)
    try:
        if folder is None:
            found = datasets.load_dataset(str(name), subset)
        elif any((folder / kept).is_file() for kept in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(folder)
        else:
            found = datasets.load_dataset(str(folder), subset)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        remedy = "data.path takes a folder" if folder is None else "give one that `load_dataset` reads"
        raise FileNotFoundError(f"{said} cannot be loaded ({_line(error)}); {remedy}") from error
    except (ValueError, RuntimeError, TypeError, KeyError) as error:  # what damaged files make it raise
        raise ValueError(f"{said} cannot be read ({_line(error)})") from error
    return {"train": found} if isinstance(found, datasets.Dataset) else found


def _folder(path: str) -> Path:
    folder = expand(path, "data.path")
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path={path} is not a folder; give one that holds a data set")
    return folder


def _line(error: Exception) -> str:
    """What went wrong at first, in one line."""
    cause = error.__cause__ if str(error).startswith("An error occurred while generating") else None
    return " ".join(str(cause or error).split()) or type(error).__name__


def download(name: str, image: str, classes: tuple[str, ...]) -> Arrays:
    """Fetch and decode a data set with splits `train` and `test` and a column `label`.

    Args:
        name: on the hub, `owner/name`.
        image: the column that holds the images.
        classes: the names of the classes, in the order of their labels.

    Raises:
        FileNotFoundError: if the hub cannot be reached and holds no local copy.
    """
    import datasets

    try:
        found = datasets.load_dataset(name)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"data.root is not set and {name} cannot be downloaded ({error});"
            " set data.root to a folder that holds the data, or use data=mnist_mini"
        ) from error
    arrays = {"classes": np.array(classes)}
    for split in ("train", "test"):
        pixels = np.stack([np.asarray(picture) for picture in found[split][image]])
        arrays[f"{split}_images"] = channels_first(pixels)
        arrays[f"{split}_labels"] = np.array(found[split]["label"], np.int64)
    return arrays
