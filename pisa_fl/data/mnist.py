"""MNIST, the subset of it that ships with this package, and Fashion-MNIST."""

from pathlib import Path

import numpy as np

from pisa_fl.data.cache import cached, fingerprint
from pisa_fl.data.hub import download
from pisa_fl.data.idx import find_idx, read_idx
from pisa_fl.data.image_data import Arrays, Augmentation, ImageData, PerChannel
from pisa_fl.system.files import expand

DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def mnist_mini(
    cache: str | None, mean: PerChannel, std: PerChannel, augment: Augmentation | None = None
) -> ImageData:
    """Load the first 1,000 training and 200 test images of every class of MNIST.

    They ship with this package: (10000, 1, 28, 28) and (2000, 1, 28, 28) uint8, in MNIST's own order.
    `MNIST_MINI.md` beside this file has provenance and licence.

    Args:
        cache: where decoded arrays are kept; None keeps none.
        mean: of pixel values 0..1.
        std: of pixel values 0..1.
        augment: applied to normalised training batches.
    """
    file = Path(__file__).with_name("mnist_mini.npz")

    def decode() -> Arrays:
        with np.load(file, allow_pickle=False) as stored:
            return {**stored, "classes": np.array(DIGITS)}

    arrays = cached(cache, "mnist_mini", fingerprint([file]), decode)
    return ImageData.from_arrays(arrays, mean, std, augment)


def mnist(
    root: str | None,
    cache: str | None,
    mean: PerChannel,
    std: PerChannel,
    augment: Augmentation | None = None,
) -> ImageData:
    """Load MNIST (LeCun, Cortes and Burges): 60,000 training and 10,000 test images, (n, 1, 28, 28) uint8.

    Args:
        root: a folder with the four idx files, gzipped or not; None downloads from the Hugging Face hub.
        cache: where decoded arrays are kept; None keeps none.
        mean: of pixel values 0..1.
        std: of pixel values 0..1.
        augment: applied to normalised training batches.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing, or the hub cannot be reached.
        ValueError: if a file is damaged, or the files do not belong together.
    """
    arrays = _idx_or_hub("mnist", "ylecun/mnist", DIGITS, root, cache)
    return ImageData.from_arrays(arrays, mean, std, augment)


def fashion_mnist(
    root: str | None,
    cache: str | None,
    mean: PerChannel,
    std: PerChannel,
    augment: Augmentation | None = None,
) -> ImageData:
    """Load Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747); all else is as in `mnist`."""
    arrays = _idx_or_hub("fashion_mnist", "zalando-datasets/fashion_mnist", CLOTHES, root, cache)
    return ImageData.from_arrays(arrays, mean, std, augment)


def _idx_or_hub(name: str, hub: str, classes: tuple[str, ...], root: str | None, cache: str | None) -> Arrays:
    if root is None:
        return cached(cache, name, [hub], lambda: download(hub, "image", classes))
    folder = expand(root, "data.root")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.root={root} is not a folder; give one that holds the idx files, or null to download"
        )
    files = {
        f"{split}_{kind}": find_idx(folder, f"{prefix}-{kind}-idx{dimensions}-ubyte")
        for split, prefix in (("train", "train"), ("test", "t10k"))
        for kind, dimensions in (("images", 3), ("labels", 1))
    }
    return cached(cache, name, fingerprint(files.values()), lambda: _read_idx_files(files, classes))


def _read_idx_files(files: dict[str, Path], classes: tuple[str, ...]) -> Arrays:
    arrays = {"classes": np.array(classes)}
    for split in ("train", "test"):
        images, labels = read_idx(files[f"{split}_images"], 3), read_idx(files[f"{split}_labels"], 1)
        if len(images) != len(labels):
            raise ValueError(
                f"data.root: {files[f'{split}_images']} has {len(images)} images but"
                f" {files[f'{split}_labels']} has {len(labels)} labels; fetch both again from one place"
            )
        arrays |= {f"{split}_images": images[:, None], f"{split}_labels": labels.astype(np.int64)}
    return arrays
