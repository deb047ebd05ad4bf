"""`ImageData`, what every loader of images returns: plain arrays, and how to turn them into model input."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from pisa_fl.data.data_set import DataSet, digest_of
from pisa_fl.tasks import Classification, Task
from pisa_fl.tasks.base import INPUTS, TARGETS

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""Maps normalised images (B, C, H, W) and a source of randomness to images of the same shape."""

Arrays = dict[str, np.ndarray]
"""The arrays of a data set by `ImageData` field, `classes` as an array of strings: what a cache holds."""

PIXELS = [np.dtype(kind) for kind in (np.uint8, np.float16, np.float32, np.float64)]
"""Types of pixels that PyTorch can read."""

PerChannel = float | Sequence[float]
"""One number for all channels, or one for each."""


@dataclass(frozen=True, eq=False)
class ImageData(DataSet):
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
    ) -> ImageData:
        """Build from `arrays` (see `Arrays`); a single `mean` or `std` counts for every channel."""
        channels = arrays["train_images"].shape[1]
        return cls(
            **{key: array for key, array in arrays.items() if key != "classes"},
            classes=tuple(arrays["classes"].tolist()),
            mean=_per_channel("data.mean", mean, channels),
            std=_per_channel("data.std", std, channels),
            augment=augment,
        )

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            _check_split(split, images, labels, self.classes)
        if (self.train_images.shape[1:], self.train_images.dtype) != (
            self.test_images.shape[1:],
            self.test_images.dtype,
        ):
            raise ValueError(
                f"data: training images are {self.train_images.dtype} {self.train_images.shape[1:]} (channels, height,"
                f" width) but test images are {self.test_images.dtype} {self.test_images.shape[1:]};"
                " make them the same"
            )
        if len({*self.classes}) < len(self.classes):
            raise ValueError(f"data.classes={list(self.classes)} has a name twice; give each class its own")
        for key, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != self.shape[0]:
                raise ValueError(
                    f"data.{key} has {len(numbers)} numbers but the images have {self.shape[0]} channels;"
                    " give one number for each channel"
                )
        if min(self.std) <= 0:
            raise ValueError(f"data.std={list(self.std)} must be positive; use 1 to leave a channel as it is")
        if not self.normalise(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)).isfinite().all():
            raise ValueError(
                f"data.mean={list(self.mean)} and data.std={list(self.std)} make pixels infinite;"
                " give those of pixel values 0..1"
            )
        if self.augment is not None:
            self._try(self.augment)

    def _try(self, augment: Augmentation) -> None:
        """Augment an image, to find out before a run whether that works.

        Raises:
            ValueError: if it does not.
        """
        before = self.normalise(self.train_images[:1])
        try:
            with torch.random.fork_rng(devices=[]):
                after = augment(before.clone(), torch.Generator().manual_seed(0))
            if not isinstance(after, Tensor) or after.shape != before.shape:
                raise ValueError(f"it makes {getattr(after, 'shape', after)!s} of {before.shape!s}")
        except Exception as error:  # whatever a user's function raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"data.augment cannot augment an image ({reason}); mend it or set it to null"
            ) from error

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that training and evaluation read, in hexadecimal: by it a data set is known again."""
        known = repr((self.classes, self.mean, self.std))
        return digest_of(known, self.train_images, self.train_labels, self.test_images, self.test_labels)

    @cached_property
    def train(self) -> dict[str, np.ndarray]:
        """Images and labels for training."""
        return {INPUTS: self.train_images, TARGETS: self.train_labels}

    @cached_property
    def test(self) -> dict[str, np.ndarray]:
        """Images and labels for testing."""
        return {INPUTS: self.test_images, TARGETS: self.test_labels}

    @property
    def groups(self) -> np.ndarray:
        """The training images' labels."""
        return self.train_labels

    @property
    def group_names(self) -> tuple[str, ...]:
        """The classes."""
        return self.classes

    @property
    def output_names(self) -> tuple[str, ...]:
        """The classes."""
        return self.classes

    @property
    def said(self) -> str:
        """What one input is, in words."""
        return f"images of (channels, height, width) {self.shape}"

    def usual_task(self) -> Task:
        """Classification."""
        return Classification()

    def trial(self, examples: int) -> dict[str, Tensor]:
        """Normalised images at random, all of the last class."""
        return {
            INPUTS: torch.randn(examples, *self.shape),
            TARGETS: torch.full((examples,), len(self.classes) - 1),
        }

    def ready(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With images normalised."""
        return {**batch, INPUTS: self.normalise(batch[INPUTS])}

    @property
    def augments(self) -> bool:
        """Whether there is an augmentation."""
        return self.augment is not None

    def augmented(self, batch: Mapping[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
        """With images augmented."""
        assert self.augment is not None
        return {**batch, INPUTS: self.augment(batch[INPUTS], draw)}

    def noisy(self, batch: Mapping[str, Tensor], std: float, draw: torch.Generator) -> dict[str, Tensor]:
        """With noise on pixels 0..1, drawn afresh each time an image is read, as NIID-Bench's feature skew does."""
        images = batch[INPUTS]
        scale = torch.tensor(self.std).view(-1, 1, 1)
        return {
            **batch,
            INPUTS: images + (torch.randn(images.shape, generator=draw) * std / scale).to(images.device),
        }

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


def check_memory(key: str, what: str, size: int) -> None:
    """Refuse, before it is tried, to hold `size` bytes that this machine's memory cannot.

    Raises:
        ValueError: if it cannot; the sentence names the configuration key `key`.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ValueError(
            f"{key}: {what} would take {size / 1e9:.3g} GB, more than the {memory / 1e9:.3g} GB of this machine's"
            " memory; use smaller data"
        )


def _per_channel(key: str, numbers: PerChannel, channels: int) -> tuple[float, ...]:
    listed = (
        [*numbers] if isinstance(numbers, Iterable) and not isinstance(numbers, str) else [numbers] * channels
    )
    for number in listed:
        if isinstance(number, bool) or not isinstance(number, Real) or not abs(number) <= sys.float_info.max:
            raise ValueError(f"{key}={numbers} must be a finite number, or a list with one for each channel")
    return tuple(float(number) for number in listed)


def _check_split(split: str, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    if images.ndim != 4 or 0 in images.shape[1:] or images.dtype not in PIXELS:
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
    # the extremes are finite only if all are, and finding them takes no memory
    if images.dtype != np.uint8 and not (np.isfinite(images.min()) and np.isfinite(images.max())):
        raise ValueError(f"data: {split}_images has values that are not finite; mend or remove such images")
