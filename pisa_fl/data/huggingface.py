"""Images and tables in any data set of the library `datasets`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import PIL
from numpy.typing import NDArray

from pisa_fl.data import hub
from pisa_fl.data.cache import cached
from pisa_fl.data.image_data import Arrays, Augmentation, ImageData, PerChannel
from pisa_fl.data.pictures import MODES, Picture, check_size, decode
from pisa_fl.data.table import TableData, of_frames

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame


def images(
    name: str | None,
    path: str | None,
    image: str,
    label: str,
    train_split: str,
    test_split: str | float,
    cache: str | None,
    mean: PerChannel,
    std: PerChannel,
    subset: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    augment: Augmentation | None = None,
) -> ImageData:
    """Load images and their classes.

    Args:
        name: On the Hugging Face hub, `owner/name`.
        path: In its place, a folder: what `save_to_disk` wrote, or files of a kind that `load_dataset` reads (Parquet,
            Arrow, CSV, JSON, folders of images).
        image: The column of the images: of the library's type, encoded bytes, or names of files in the folder.
        label: The column of their classes: names, numbers, or of the library's type, which has names.
        train_split: Name of the split of training images.
        test_split: That of the test images, or the share of the training images that are for testing. With `classes`,
            the split may be missing.
        cache: Where decoded arrays are kept; None keeps none.
        mean: Of pixel values 0..1, one for all channels or one for each.
        std: As `mean`.
        subset: Which of several that go by the name.
        image_size: Height and width to which every image is resized; None takes the first image's size.
        channels: 1 (grey) or 3 (colour); None: as the first image.
        classes: Names of all classes in the order of their labels, of which the rows may lack some; None: those of the
            column's type, or else of the training images.
        augment: Applied to normalised training batches.

    Raises:
        FileNotFoundError: There is no such data set, or the hub cannot be reached.
        ValueError: A split or column is missing, or what is in it cannot be used.
    """
    if channels is not None and (type(channels) is not int or channels not in MODES):
        raise ValueError(f"data.channels={channels} must be 1 (grey), 3 (colour) or null")
    check_size(image_size)
    named = None if classes is None else [str(each) for each in classes]
    options = (image, label, train_split, test_split, image_size, channels, named, PIL.__version__)
    follows = [repr(options), *hub.source(name, path, subset)]

    def read() -> Arrays:
        both = hub.splits(name, path, subset, train_split, test_split, lacks_test=named is not None)
        for rows in both:
            hub.check_column("image", image, rows)
            hub.check_column("label", label, rows)
        known, labels = _labels(both, label, named)
        pictures = [
            _pictures(rows, image, path or "", f"of {s}")
            for rows, s in zip(both, (train_split, test_split), strict=True)
        ]
        if not pictures[0]:
            raise ValueError(f"data.train_split={train_split} has no examples")
        decoded = decode(pictures, f"data.image={image}", image_size, channels)
        return {
            "classes": np.array(known),
            **dict(zip(("train_images", "test_images"), decoded, strict=True)),
            **dict(zip(("train_labels", "test_labels"), labels, strict=True)),
        }

    return ImageData.from_arrays(cached(cache, "huggingface", follows, read), mean, std, augment)


def table(
    name: str | None,
    path: str | None,
    train_split: str,
    test_split: str | float,
    target: str,
    target_is: Literal["class", "number"],
    subset: str | None = None,
    ignore: Sequence[str] = (),
    group_by: str | None = None,
) -> TableData:
    """Load a table; what becomes of its columns is as in `pisa_fl.data.table.csv`.

    Args:
        name: As in `images`.
        path: As in `images`.
        train_split: As in `images`.
        test_split: As in `images`.
        target: The column to be told.
        target_is: `class`, or `number`: standardised.
        subset: As in `images`.
        ignore: Columns that are left out.
        group_by: Column by which partitioners deal, which is left out too; None: by the target.

    Raises:
        FileNotFoundError: There is no such data set, or the hub cannot be reached.
        ValueError: A split or column is missing, or what is in it cannot be used.
    """
    list(hub.source(name, path, subset))  # whether they are possible
    both = hub.splits(name, path, subset, train_split, test_split, lacks_test=False)
    train, held_out = (_frame(rows, {*ignore}) for rows in both)
    return of_frames(train, held_out, target, target_is, (), group_by)


def _labels(
    both: Sequence[Dataset], label: str, classes: Sequence[str] | None
) -> tuple[Sequence[str], list[NDArray[np.int64]]]:
    """Names of the classes, and the label of every row of each split."""
    import datasets

    told, usual = [], []
    for rows in both:
        values, feature = rows[label][:], rows.features[label]
        if isinstance(feature, datasets.ClassLabel):
            usual.append(feature.names)
            told.append([None if v is None or v < 0 else feature.int2str(v) for v in values])
        elif not isinstance(feature, datasets.Value) or feature.dtype.startswith("float"):
            raise ValueError(f"data.label={label} holds {feature}: name a column of classes")
        else:
            usual.append([str(value) for value in sorted({*values} - {None})])
            told.append([None if v is None else str(v) for v in values])
    numbers = {name: number for number, name in enumerate(usual[0] if classes is None else classes)}
    for which, values in zip(("training", "test"), told, strict=True):
        if None in values:
            raise ValueError(
                f"data.label={label}: {values.count(None)} {which} examples have no class; leave them out"
            )
        if strange := sorted({*values} - {*numbers}):  # type: ignore[type-var]
            where = "data.classes" if classes is not None else "training examples"
            raise ValueError(
                f"data.label={label} has the class {strange[0]} in {which} examples and not in {where}"
            )
    return [*numbers], [np.array([numbers[str(v)] for v in values], np.int64) for values in told]


def _pictures(rows: Dataset, image: str, folder: str, said: str) -> list[Picture]:
    """The encoded images of a split."""
    import datasets

    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    pictures = []
    for number, value in enumerate(rows[image]):
        content = value
        if isinstance(value, dict):
            content = value.get("bytes") or value.get("path")
        if not isinstance(content, bytes | str):
            raise ValueError(
                f"data.image={image} holds no image in row {number} {said} but {type(content).__name__}:"
                " name a column of images"
            )
        if isinstance(content, str):
            content = os.path.join(os.path.expanduser(folder), content)
        pictures.append(Picture(content, f"row {number} {said}"))
    return pictures


def _frame(rows: Dataset, ignored: set[str]) -> DataFrame:
    """The columns of a split, with the names of classes."""
    import datasets

    for column, feature in rows.features.items():
        if not isinstance(feature, datasets.Value | datasets.ClassLabel) and column not in ignored:
            raise ValueError(
                f"data: the column {column} holds neither numbers nor texts ({type(feature).__name__}); leave it out by"
                f" data.ignore=[{column}]"
            )
    frame: DataFrame = rows.select_columns([c for c in rows.column_names if c not in ignored]).to_pandas()
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel) and column in frame:
            names = dict(enumerate(feature.names))
            frame[column] = frame[column].map(names)
    return frame
