"""Folders of images by class."""

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
    augment: Augmentation | None = None,
) -> ImageData:
    """Load images stored as `{train,test}/<class>/<name>.{jpg,png,...}`; classes are in alphabetical order.

    Args:
        path: the folder that holds `train` and `test`.
        cache: where decoded arrays are kept; None keeps none.
        mean: of pixel values 0..1, one for all channels or one for each.
        std: of pixel values 0..1, one for all channels or one for each.
        image_size: height and width to which every image is resized; None takes the first image's size.
        channels: 1 (grey) or 3 (colour).
        augment: applied to normalised training batches.

    Raises:
        FileNotFoundError: if `path` or its `train` or `test` is missing.
        ValueError: if a class folder is empty, classes differ, an image is damaged, or an option is
            impossible.
    """
    if channels not in MODES:
        raise ValueError(f"data.channels={channels} must be 1 (grey) or 3 (colour)")
    if image_size is not None and image_size < 1:
        raise ValueError(f"data.image_size={image_size} must be a number of pixels, or null")
    arrays = read_tree(Path(path).expanduser(), "data.path", cache, "imagefolder", image_size, channels)
    return ImageData.from_arrays(arrays, mean, std, augment)


def read_tree(
    root: Path, key: str, cache: str | None, name: str, image_size: int | None, channels: int
) -> Arrays:
    """Return the arrays of `{train,test}/<class>/*` below `root`; errors name the configuration key `key`."""
    folders = [root / "train", root / "test"]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{key}={root} has no folder '{folder.name}'; it must hold {{train,test}}/<class>/<images>"
            )
    files = (file for folder in folders for file in files_below(folder))
    source = [str(image_size), str(channels), *fingerprint(files)]
    return cached(cache, name, source, lambda: _decode(root, key, image_size, channels))


def _decode(root: Path, key: str, image_size: int | None, channels: int) -> Arrays:
    train, test = _list_images(root / "train", key), _list_images(root / "test", key)
    if train.classes != test.classes:
        lonely = sorted({*train.classes} ^ {*test.classes})
        raise ValueError(
            f"{key}={root} has class folders {lonely} in only one of 'train' and 'test'; add or remove them"
        )
    size = (image_size, image_size) if image_size else _picture(train.samples[0][0], key, channels).size

    def pixels(path: str) -> np.ndarray:
        picture = _picture(path, key, channels)
        return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))

    arrays = {"classes": np.array(train.classes)}
    with ThreadPoolExecutor() as threads:
        for split, listing in (("train", train), ("test", test)):
            images = list(threads.map(pixels, [path for path, _ in listing.samples]))
            arrays[f"{split}_images"] = channels_first(np.stack(images))
            arrays[f"{split}_labels"] = np.array(listing.targets, np.int64)
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
