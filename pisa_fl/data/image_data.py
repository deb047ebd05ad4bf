"""`ImageData`, what every data set loader returns: plain arrays, and how to turn them into model input."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""Maps normalised images (B, C, H, W) and a source of randomness to images of the same shape."""

Arrays = dict[str, np.ndarray]
"""The arrays of a data set by `ImageData` field, `classes` as an array of strings: what a cache holds."""

PerChannel = float | Sequence[float]
"""One number for all channels, or one for each."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image data set in memory, or memory-mapped from disk.

    Arrays may be read-only: index or copy before handing them to `torch.from_numpy`.

    Attributes:
        train_images: (n, channels, height, width), uint8 pixels 0..255, or floats that are taken as they are.
        train_labels: (n,) int64, positions in `classes`.
        test_images: (m, channels, height, width), as `train_images`; m may be 0 at a client.
        test_labels: (m,) int64.
        classes: the names of the classes, in the order of their labels.
        mean: per channel, of pixel values 0..1 (of the values themselves where images are floats).
        std: per channel, as `mean`.
        augment: applied to normalised training batches, or None.

    Raises:
        ValueError: if the parts do not fit together.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augmentation | None = None

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], mean: PerChannel, std: PerChannel, augment: Augmentation | None
    ) -> "ImageData":
        """Build from `arrays` (see `Arrays`); a single `mean` or `std` counts for every channel."""
        channels = arrays["train_images"].shape[1]
        return cls(
            **{key: array for key, array in arrays.items() if key != "classes"},
            classes=tuple(arrays["classes"].tolist()),
            mean=_per_channel(mean, channels),
            std=_per_channel(std, channels),
            augment=augment,
        )

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            _check_split(split, images, labels, self.classes)
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"data: training images are {self.train_images.shape[1:]} (channels, height, width)"
                f" but test images are {self.test_images.shape[1:]}; make them the same"
            )
        for key, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != self.shape[0]:
                raise ValueError(
                    f"data.{key} has {len(numbers)} numbers but the images have {self.shape[0]} channels;"
                    " give one number for each channel"
                )
        if min(self.std) <= 0:
            raise ValueError(f"data.std={list(self.std)} must be positive; use 1 to leave a channel as it is")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that training and evaluation read, in hexadecimal: by it a data set is known again."""
        known = hashlib.sha256(repr((self.classes, self.mean, self.std)).encode())
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            known.update(f"{array.dtype}{array.shape}".encode())
            known.update(np.ascontiguousarray(array).data)
        return known.hexdigest()

    def normalise(self, images: np.ndarray | Tensor) -> Tensor:
        """Turn a batch of stored images (B, C, H, W) into float32 model input, on the device they are on."""
        # torch.tensor copies: arrays may be read-only maps of a file, which torch must not alias
        batch = images if isinstance(images, Tensor) else torch.tensor(images)
        mean, std = (numbers.to(batch.device) for numbers in self._moments)
        pixels = batch.float() if batch.is_floating_point() else batch.float().div_(255)
        return (pixels - mean).div_(std)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """Turn (n, height, width) or (n, height, width, channels) into (n, channels, height, width)."""
    return np.ascontiguousarray(pixels[:, None] if pixels.ndim == 3 else np.moveaxis(pixels, -1, 1))


def _per_channel(numbers: PerChannel, channels: int) -> tuple[float, ...]:
    if isinstance(numbers, (int, float)):
        return (float(numbers),) * channels
    return tuple(float(number) for number in numbers)


def _check_split(split: str, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    if images.ndim != 4 or not (images.dtype == np.uint8 or np.issubdtype(images.dtype, np.floating)):
        raise ValueError(
            f"data: {split}_images is {images.dtype} of shape {images.shape};"
            " give uint8 or float (n, channels, height, width)"
        )
    if labels.dtype != np.int64 or labels.shape != images.shape[:1] or (split == "train" and not len(labels)):
        raise ValueError(
            f"data: {split}_labels is {labels.dtype} of shape {labels.shape} for {len(images)} images;"
            " give one int64 label for each image, and at least one image"
        )
    if not len(labels):
        return
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"data: {split}_labels run from {labels.min()} to {labels.max()}"
            f" but there are {len(classes)} classes; number the classes from 0"
        )
