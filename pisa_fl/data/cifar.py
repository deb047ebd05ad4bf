"""CIFAR-10 (Krizhevsky 2009, "Learning multiple layers of features from tiny images")."""

from pathlib import Path

import numpy as np

from pisa_fl.data.cache import cached, fingerprint
from pisa_fl.data.folder import read_tree
from pisa_fl.data.hub import download
from pisa_fl.data.image_data import Arrays, Augmentation, ImageData, PerChannel, channels_first
from pisa_fl.system.files import expand

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = "cifar-10-batches-py"


def cifar10(
    root: str | None,
    cache: str | None,
    mean: PerChannel,
    std: PerChannel,
    augment: Augmentation | None = None,
) -> ImageData:
    """Load CIFAR-10: 50,000 training and 10,000 test images, (n, 3, 32, 32) uint8.

    Args:
        root: a folder with the published `cifar-10-batches-py`, or with images as
            `{train,test}/<class>/<name>.{jpg,png,...}`; None downloads from the Hugging Face hub.
        cache: where decoded arrays are kept; None keeps none.
        mean: of pixel values 0..1, one for all channels or one for each.
        std: of pixel values 0..1, one for all channels or one for each.
        augment: applied to normalised training batches.

    Raises:
        FileNotFoundError: if the folder holds neither form, or the hub cannot be reached.
        ValueError: if a file is damaged or the classes are not those of CIFAR-10.
    """
    return ImageData.from_arrays(_arrays(root, cache), mean, std, augment)


def _arrays(root: str | None, cache: str | None) -> Arrays:
    if root is None:
        hub = "uoft-cs/cifar10"
        return cached(cache, "cifar10", [hub], lambda: download(hub, "img", CLASSES))
    folder = expand(root, "data.root")
    if (folder / BATCHES).is_dir():
        source = fingerprint(sorted((folder / BATCHES).iterdir()))
        return cached(cache, "cifar10", source, lambda: _read_batches(folder))
    if (folder / "train").is_dir():
        arrays = read_tree(folder, "data.root", cache, "cifar10", image_size=32, channels=3)
        if tuple(arrays["classes"].tolist()) != CLASSES:
            raise ValueError(f"data.root={root} lacks CIFAR-10's ten class folders; use data=imagefolder")
        return arrays
    raise FileNotFoundError(
        f"data.root={root} holds neither {BATCHES} nor train/<class>/<images>;"
        " give a folder that does, or null to download"
    )


def _read_batches(folder: Path) -> Arrays:
    from torchvision.datasets import CIFAR10

    arrays = {"classes": np.array(CLASSES)}
    for split in ("train", "test"):
        try:
            # the files are pickles, which torchvision reads only after checking their published md5
            batches = CIFAR10(folder, train=split == "train", download=False)
        except RuntimeError as error:
            raise ValueError(
                f"data.root: a file of {folder / BATCHES} is missing or differs from the published one;"
                " fetch cifar-10-python.tar.gz again"
            ) from error
        arrays[f"{split}_images"] = channels_first(batches.data)
        arrays[f"{split}_labels"] = np.array(batches.targets, np.int64)
    return arrays
