"""Folders of images by class."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pisa_fl.data.cache import cached, files_below, fingerprint
from pisa_fl.data.image_data import Arrays, Augmentation, ImageData, PerChannel, channels_first

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

MODES = {1: "L", 3: "RGB"}


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
    if channels not in MODES:
        raise ValueError(f"data.channels={channels} must be 1 (grey) or 3 (colour)")
    if image_size is not None and image_size < 1:
        raise ValueError(f"data.image_size={image_size} must be a number of pixels, or null")
    named = None if classes is None else [str(name) for name in classes]  # YAML takes the name 7 for a number
    arrays = read_tree(
        Path(path).expanduser(), "data.path", cache, "imagefolder", image_size, channels, named
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
    """Return the arrays of `{train,test}/<class>/*` below `root`; errors name the configuration key `key`."""
    folders = [root / "train", root / "test"]
    for folder in folders:
        if not folder.is_dir() and (classes is None or folder.name == "train"):
            raise FileNotFoundError(
                f"{key}={root} has no folder '{folder.name}'; it must hold {{train,test}}/<class>/<images>"
            )
    files = (file for folder in folders for file in files_below(folder))
    source = [str(image_size), str(channels), *(classes or ()), *fingerprint(files)]
    return cached(cache, name, source, lambda: _decode(root, key, image_size, channels, classes))


def _decode(
    root: Path, key: str, image_size: int | None, channels: int, classes: Sequence[str] | None
) -> Arrays:
    listings = {
        split: _list_images(root / split, key) for split in ("train", "test") if (root / split).is_dir()
    }
    if classes is None:
        classes = listings["train"].classes
        if lonely := sorted({*classes} ^ {*listings["test"].classes}):
            raise ValueError(
                f"{key}={root} has class folders {lonely} in only one of 'train' and 'test'; add or remove them"
            )
    labels = {name: label for label, name in enumerate(classes)}
    for listing in listings.values():
        if strange := sorted({*listing.classes} - {*labels}):
            raise ValueError(
                f"{key}={root} has class folders {strange} that data.classes lacks; add or remove them"
            )
    first = listings["train"].samples[0][0]
    size = (image_size, image_size) if image_size else _picture(first, key, channels).size

    def pixels(path: str) -> np.ndarray:
        picture = _picture(path, key, channels)
        return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))

    arrays = {"classes": np.array(classes)}
    with ThreadPoolExecutor() as threads:
        for split, listing in listings.items():
            images = list(threads.map(pixels, [path for path, _ in listing.samples]))
            arrays[f"{split}_images"] = channels_first(np.stack(images))
            named = [labels[listing.classes[target]] for target in listing.targets]
            arrays[f"{split}_labels"] = np.array(named, np.int64)
    if "test" not in listings:
        arrays["test_images"], arrays["test_labels"] = arrays["train_images"][:0], arrays["train_labels"][:0]
    return arrays


def _list_images(folder: Path, key: str) -> "ImageFolder":
    # imported here since it takes a second, which a cached data set need not pay
    from torchvision.datasets import ImageFolder

    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise ValueError(f"{key}: {folder} holds no class folders; give each class a folder")
    listing = ImageFolder(folder, allow_empty=True)
    counts = np.bincount(listing.targets, minlength=len(listing.classes))
    if empty := [name for name, count in zip(listing.classes, counts, strict=True) if not count]:
        raise ValueError(f"{key}: the class folders {empty} of {folder} hold no images; fill or remove them")
    return listing


def _picture(path: str, key: str, channels: int) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert(MODES[channels])
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{key}: {path} is not a readable image ({error}); replace or remove it") from error
