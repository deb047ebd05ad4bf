"""A model, a data set and an algorithm of one's own; the yaml files beside this one name them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn

from pisa_fl import ImageData
from strategies import ClientHalf, Instruction, Layout, Stack, Update
from strategies.base.messages import WEIGHTS


class TwoLayer(nn.Sequential):
    """One hidden layer."""

    def __init__(self, shape: tuple[int, int, int], classes: int, hidden: int) -> None:
        pixels = int(np.prod(shape))
        super().__init__(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def stripes(examples: int, seed: int) -> ImageData:
    """Noisy 16 x 16 images with a bright row in one of ten places."""
    rng = np.random.default_rng(seed)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 10
        images = rng.integers(0, 128, (count, 1, 16, 16), dtype=np.uint8)
        images[np.arange(count), 0, 3 + labels] += 100
        return images, labels

    train, test = split(examples), split(200)
    names = tuple(f"row {row}" for row in range(3, 13))
    return ImageData(*train, *test, classes=names, mean=(0.25,), std=(0.2,))


class ClippedStep(ClientHalf):
    """One full-gradient step a round, its length bounded; the server takes the median."""

    def __init__(self, layout: Layout, lr: float, bound: float) -> None:
        self.layout, self.lr, self.bound = layout, lr, bound

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """w_i = w - lr g_i min(1, bound/|g_i|)."""
        weights = instruction.arrays[WEIGHTS]
        gradient, loss = stack.full_gradient(weights, "mean")
        norm = gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return Update({WEIGHTS: weights - self.lr * gradient * (self.bound / norm).clamp(max=1.0)}, loss)
