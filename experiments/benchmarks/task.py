"""The work that all sides of a comparison do: the same images, the same model, the same sizes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pisa_fl.data import ImageData
from pisa_fl.models.cnn import SimpleCNN

SHAPE, CLASSES = (3, 32, 32), 10
"""CIFAR-10's."""

LR = 0.01
"""Learning rate of the local SGD, without momentum or weight decay, on every side."""


def noise(examples: int) -> ImageData:
    """Random uint8 images and labels; the ten test images are only there because a server wants some."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (examples + 10, *SHAPE), np.uint8)
    labels = draw.integers(0, CLASSES, examples + 10)
    names = tuple(map(str, range(CLASSES)))
    half = (0.5,) * SHAPE[0]
    return ImageData(
        images[:examples], labels[:examples], images[examples:], labels[examples:], names, half, half
    )


class Model(SimpleCNN):
    """`model=simple_cnn`, 62,006 parameters, that counts the images which pass through in this process."""

    seen = 0

    def __init__(self) -> None:
        super().__init__(SHAPE, CLASSES, channels=[6, 16], kernel=5, hidden=[120, 84])

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        Model.seen += len(images)
        return super().forward(images)


@dataclass(frozen=True)
class Task:
    """A federation's sizes.

    Attributes:
        clients: Number of clients.
        images: Images of each client.
        batch: Images of a mini-batch.
        drawn: Clients that take part in a round; None: all.
    """

    clients: int
    images: int
    batch: int
    drawn: int | None = None

    @property
    def stack(self) -> int:
        """Clients of a round."""
        return self.drawn or self.clients

    @property
    def examples(self) -> int:
        """Images of all clients."""
        return self.clients * self.images

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images, normalised, and their labels; client i holds the i-th stretch of `self.images`."""
        data = noise(self.examples)
        return data.normalise(data.train_images), torch.from_numpy(data.train_labels)

    def shares(self) -> list[tuple[Tensor, Tensor]]:
        """Images and labels of every client."""
        images, labels = self.tensors()
        return list(zip(images.split(self.images), labels.split(self.images), strict=True))

    @staticmethod
    def model() -> nn.Module:
        """The model, with the same initial weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Model()

    def dumps(self) -> str:
        """The task as text, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Task:
        """The task that `dumps` wrote."""
        return cls(**json.loads(text))
