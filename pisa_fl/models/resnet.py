"""ResNet-18 for small and large images."""

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from pisa_fl.models.norm import Norm, norm_layer


def resnet18(
    shape: tuple[int, int, int], classes: int, norm: Norm, group_channels: int, small_below: int
) -> ResNet:
    """Return torchvision's ResNet-18 (He et al. 2016, arXiv 1512.03385) for images of this shape.

    Small images get the stem usual on CIFAR, a 3 x 3 convolution of stride 1 without a pool; others
    keep the 7 x 7 convolution of stride 2 and the pool.

    Args:
        shape: (channels, height, width) of the images.
        classes: number of classes.
        norm: `group` or `batch`; see `norm_layer` for why `group` is the default.
        group_channels: channels in a group, for `norm: group`.
        small_below: images whose shorter side has fewer pixels than this are small.

    Raises:
        ValueError: if `norm` or `group_channels` is impossible.
    """
    depth, height, width = shape
    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=classes, norm_layer=norm_layer(norm, group_channels))
    if min(height, width) < small_below:
        model.conv1 = nn.Conv2d(depth, 64, 3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    else:
        model.conv1 = nn.Conv2d(depth, 64, 7, stride=2, padding=3, bias=False)
    # as torchvision initialises its own convolutions
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model
