"""NIID-Bench's VGG-9."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from pisa_fl.models.mlp import mlp
from pisa_fl.models.norm import Norm, norm_layer
from pisa_fl.models.widths import check_widths

POOL = 2


def vgg9(
    shape: tuple[int, int, int],
    classes: int,
    channels: Sequence[int],
    hidden: Sequence[int],
    norm: Norm,
    group_channels: int,
) -> nn.Sequential:
    """Return the VGG-9 of NIID-Bench (Li et al. 2022, arXiv 2102.02079; from FedMA, arXiv 2002.06440).

    Padded 3 x 3 convolutions with ReLU, a 2 x 2 max pool after every second one, then linear layers. Its
    slight dropout (5 and 10 %) is left out: its draws would come from global state and not from the seed.

    Args:
        shape: (channels, height, width) of the images.
        classes: number of classes.
        channels: of the convolutions.
        hidden: widths of the hidden linear layers.
        norm: after each convolution: `none` (the original), `batch` or `group`.
        group_channels: channels in a group, for `norm: group`.

    Raises:
        ValueError: if the images are too small, or a width, `norm` or `group_channels` is impossible.
    """
    check_widths("channels", channels)
    if not channels:
        raise ValueError("channels=[] is empty: give a number for each convolution, or use model=mlp")
    depth, height, width = shape
    normalise = norm_layer(norm, group_channels)
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise([depth, *channels])):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), normalise(outputs), nn.ReLU()]
        if index % 2:
            layers.append(nn.MaxPool2d(POOL))
            height, width = height // POOL, width // POOL
    if min(height, width) < 1:
        raise ValueError(
            f"channels: {len(channels) // 2} pools leave nothing of {shape[1]} x {shape[2]} images;"
            " use larger images or model=mlp"
        )
    return nn.Sequential(*layers, *mlp((channels[-1], height, width), classes, hidden))
