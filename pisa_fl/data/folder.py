"""Folders of images by class."""

import logging
import os
import stat
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from pisa_fl.data.cache import cached, fingerprint
from pisa_fl.data.image_data import Arrays, Augmentation, ImageData, PerChannel
from pisa_fl.data.pictures import MODES, NO_PICTURES, Picture, check_size, decode
from pisa_fl.system.files import expand

log = logging.getLogger(__name__)

SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
"""Beside those that start with a dot: what operating systems put between a user's folders."""


def imagefolder(
    path: str,
    cache: str | None,
    mean: PerChannel,
    std: PerChannel,
    image_size: int | None = None,
    channels: int = 3,
    classes: Sequence[str] | None = None,
    augment: Augmentation | None = None,
) -> ImageData:
    """Load images stored as `{train,test}/<class>/<name>.{jpg,png,...}`.

    Every ending that Pillow can open counts, also in folders below `<class>`; of a picture with several frames the
    first. What starts with a dot and what operating systems leave behind is passed over.

    Args:
        path: the folder that holds `train` and `test`; with `classes`, `test` may be missing.
        cache: where decoded arrays are kept; None keeps none.
        mean: of pixel values 0..1, one for all channels or one for each.
        std: of pixel values 0..1, one for all channels or one for each.
        image_size: height and width to which every image is resized; None takes the first image's size.
        channels: 1 (grey) or 3 (colour).
        classes: the names of all classes in the order of their labels, of which this folder may lack some (a
            client of a real federation need not have all); None takes the folders, in alphabetical order.
        augment: applied to normalised training batches.

    Raises:
        FileNotFoundError: if `path` or its `train` or `test` is missing.
        ValueError: if a class folder is empty, classes differ or are unknown, an image is damaged, or an option is
            impossible.
    """
    if type(channels) is not int or channels not in MODES:
        raise ValueError(f"data.channels={channels} must be 1 (grey) or 3 (colour)")
    check_size(image_size)
    if isinstance(classes, str):
        raise ValueError(f"data.classes={classes} must be a list of names, or null")
    named = None if classes is None else [str(name) for name in classes]  # YAML takes the name 7 for a number
    arrays = read_tree(
        expand(path, "data.path"), "data.path", cache, "imagefolder", image_size, channels, named
    )
    return ImageData.from_arrays(arrays, mean, std, augment)


def read_tree(
    root: Path,
    key: str,
    cache: str | None,
    name: str,
    image_size: int | None,
    channels: int,
    classes: Sequence[str] | None = None,
) -> Arrays:
    """Return the arrays of `{train,test}/<class>/**` below `root`; errors name the configuration key `key`."""
    splits = [split for split in ("train", "test") if (root / split).is_dir()]
    for split in ("train", "test") if classes is None else ("train",):
        if split not in splits:
            raise FileNotFoundError(
                f"{key}={root} has no folder '{split}'; it must hold {{train,test}}/<class>/<images>"
            )
    others: set[str] = set()
    listings = {split: _list_images(root / split, key, others) for split in splits}
    if classes is None:
        classes = [*listings["train"]]
        if lonely := sorted({*classes} ^ {*listings["test"]}):
            raise ValueError(
                f"{key}={root} has class folders {lonely} in only one of 'train' and 'test'; add or remove them"
            )
    for listing in listings.values():
        if strange := sorted({*listing} - {*classes}):
            raise ValueError(
                f"{key}={root} has class folders {strange} that data.classes lacks; add or remove them"
            )
    if others:
        log.warning(
            "%s=%s: files that end in %s are no pictures and are left out",
            key,
            root,
            ", ".join(sorted(others)),
        )
    files = [path for listing in listings.values() for paths in listing.values() for path in paths]
    source = [PIL.__version__, str(image_size), str(channels), *classes, *fingerprint(files)]
    return cached(cache, name, source, lambda: _decode(listings, key, image_size, channels, classes))


def _list_images(folder: Path, key: str, others: set[str]) -> dict[str, list[str]]:
    """Class -> its images' paths, both in alphabetical order; `others` takes the endings of what is no image."""
    split = str(folder)
    classes = [path for path, status in _visible(split) if stat.S_ISDIR(status.st_mode)]
    if not classes:
        raise ValueError(f"{key}: {folder} holds no class folders; give each class a folder")
    listing = {os.path.basename(path): _images_below(path, split, key, others) for path in classes}
    if empty := [name for name, paths in listing.items() if not paths]:
        raise ValueError(f"{key}: the class folders {empty} of {folder} hold no images; fill or remove them")
    return listing


def _images_below(folder: str, split: str, key: str, others: set[str]) -> list[str]:
    """Paths of the images of a class folder, in alphabetical order of folders, then of names."""
    # every folder is entered once, so that links back to one that holds them end
    found, entered, waiting = [], {_identity(os.stat(split)), _identity(os.stat(folder))}, [folder]
    while waiting:
        for path, status in _visible(waiting.pop()):
            if stat.S_ISDIR(status.st_mode):
                if _identity(status) not in entered:
                    entered.add(_identity(status))
                    waiting.append(path)
            elif (ending := os.path.splitext(path)[1].lower()) not in _endings():
                others.add(ending or "nothing")
            elif stat.S_ISREG(status.st_mode):
                found.append(path)
            else:
                raise ValueError(f"{key}: {path} is not a file with content; replace or remove it")
    return sorted(found, key=os.path.split)


def _visible(folder: str) -> list[tuple[str, os.stat_result]]:
    """What lies in a folder and is not hidden, in alphabetical order."""
    names = sorted(name for name in os.listdir(folder) if name[0] != "." and name not in SYSTEM_FOLDERS)
    return [(path, os.stat(path)) for path in (os.path.join(folder, name) for name in names)]


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@cache
def _endings() -> frozenset[str]:
    """Endings, in small letters, of files that are taken for pictures."""
    return frozenset(end for end, name in Image.registered_extensions().items() if name not in NO_PICTURES)


def _decode(
    listings: Mapping[str, Mapping[str, list[str]]],
    key: str,
    image_size: int | None,
    channels: int,
    classes: Sequence[str],
) -> Arrays:
    """Decode the listed images of each split, the training images' first.

    Raises:
        ValueError: if one cannot be read, or all together are more than memory holds.
    """
    labels = {name: label for label, name in enumerate(classes)}
    splits = [
        [Picture(path, path) for paths in each.values() for path in paths] for each in listings.values()
    ]
    arrays = {"classes": np.array(classes)}
    for (split, listing), images in zip(
        listings.items(), decode(splits, key, image_size, channels), strict=True
    ):
        each = [labels[name] for name, paths in listing.items() for _ in paths]
        arrays |= {f"{split}_images": images, f"{split}_labels": np.array(each, np.int64)}
    if "test" not in listings:
        arrays["test_images"], arrays["test_labels"] = arrays["train_images"][:0], arrays["train_labels"][:0]
    return arrays
