"""Normalisation layers, by name."""

from collections.abc import Callable
from typing import Literal

from torch import nn

from strategies.base import checks

Norm = Literal["none", "batch", "group"]


@checks.literals
def norm_layer(norm: Norm, group_channels: int) -> Callable[[int], nn.Module]:
    """Return what builds the normalisation of a number of channels.

    Batch normalisation is troublesome where clients hold different classes, since each normalises by
    statistics of its own batches, and group normalisation is not (Hsieh et al. 2020, arXiv 1910.00189).
    Running statistics of batch normalisation are averaged by the server.

    Args:
        norm: `none`, `batch` or `group`.
        group_channels: channels in a group; a divisor of every layer's channels (Wu and He 2018, arXiv
            1803.08494, find 16 the best fixed size).

    Raises:
        ValueError: if `norm` is unknown or, when the layer is built, the channels do not split into groups.
    """

    def group(channels: int) -> nn.Module:
        if group_channels < 1 or channels % group_channels:
            raise ValueError(f"group_channels={group_channels} must divide a layer's {channels} channels")
        return nn.GroupNorm(channels // group_channels, channels)

    kinds: dict[str, Callable[[int], nn.Module]] = {
        "none": lambda channels: nn.Identity(),
        "batch": nn.BatchNorm2d,
        "group": group,
    }
    return kinds[norm]
