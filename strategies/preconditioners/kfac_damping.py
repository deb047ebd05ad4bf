"""How K-FAC's damping changes: not at all, by a schedule, or with how well the decrease of the loss is predicted.

The last is the Levenberg-Marquardt rule of Martens & Grosse (2015, arXiv 1503.05671, section 6.5). When factors came
last, there were at the weights w the loss h(w), the gradient g and F, damping included; now w has moved by s, and

    actual = h(w) - h(w + s)              predicted = -(g^T s + s^T F s / 2)
    damping *= omega                      if actual > 3/4 predicted > 0
    damping /= omega                      if actual < 1/4 predicted or predicted < 0

The paper does so every fifth step of its mini-batches; here it is every time that factors come. `REACH` bounds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.schedule import share_left

OMEGA = (19 / 20) ** 5
"""What the damping is multiplied by at a time; the paper's, for five steps."""

REACH = 1e4
"""How many times its first value, or which part of it, the damping may become."""


@checks.literals
@dataclass(frozen=True)
class Damping:
    """A rule for it.

    Attributes:
        first: Its first value.
        schedule: `constant`, `linear` or `cosine`, as of lr, or `adaptive`.
        final: What a schedule leaves of it, as a share.
        horizon: Times that factors come until then.

    Raises:
        ValueError: A value is outside its range.
    """

    first: float
    schedule: Literal["constant", "linear", "cosine", "adaptive"]
    final: float
    horizon: int

    def __post_init__(self) -> None:
        checks.positive("damping", self.first)
        checks.share("final", self.final)
        checks.whole("horizon", self.horizon, 0)

    @property
    def adapts(self) -> bool:
        """Whether it follows the decreases."""
        return self.schedule == "adaptive"

    def scheduled(self, age: Tensor) -> Tensor:
        """Its values after so many times that factors came, (C, 1)."""
        schedule = "constant" if self.schedule == "adaptive" else self.schedule
        shares = [share_left(schedule, 1 + int(times), self.horizon, self.final) for times in age.flatten()]
        return self.first * age.new_tensor(shares).reshape(age.shape)

    def adapted(self, damping: Tensor, actual: Tensor, predicted: Tensor) -> Tensor:
        """The values that follow some, (C, 1); they stay where nothing has moved."""
        grows = (predicted < 0) | (actual < predicted / 4)
        shrinks = (predicted > 0) & (actual > 0.75 * predicted)
        factor = torch.where(grows, 1 / OMEGA, torch.where(shrinks, OMEGA, 1.0))
        damping = damping * torch.where(predicted == 0, 1.0, factor)
        return damping.clamp(self.first / REACH, self.first * REACH)
