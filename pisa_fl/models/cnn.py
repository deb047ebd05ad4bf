"""NIID-Bench's small convolutional network."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from pisa_fl.models.widths import check_widths

POOL = 2


class SimpleCNN(nn.Module):
    """LeNet-like network of NIID-Bench (Li et al. 2022, arXiv 2102.02079), with PyTorch's initialisation.

    Two unpadded convolutions, each with ReLU and a 2 x 2 max pool, then three linear layers. With the
    numbers of its yaml it has 44,426 parameters on 1 x 28 x 28 images and 62,006 on 3 x 32 x 32, 10 classes.

    Args:
        shape: (channels, height, width) of the images.
        classes: number of classes.
        channels: of the two convolutions.
        kernel: width of both kernels, in pixels.
        hidden: widths of the two hidden linear layers.

    Raises:
        ValueError: if a number is impossible, or the images are too small for two convolutions and pools.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        channels: Sequence[int],
        kernel: int,
        hidden: Sequence[int],
    ) -> None:
        super().__init__()
        check_widths("channels", channels, places=2)
        check_widths("kernel", [kernel])
        check_widths("hidden", hidden, places=2)
        depth, height, width = shape
        for _ in channels:
            height, width = (height - kernel + 1) // POOL, (width - kernel + 1) // POOL
        if min(height, width) < 1:
            raise ValueError(
                f"kernel={kernel} leaves nothing of {shape[1]} x {shape[2]} images after two pools;"
                " use larger images, a smaller kernel or model=mlp"
            )
        self.conv1 = nn.Conv2d(depth, channels[0], kernel)
        self.conv2 = nn.Conv2d(channels[0], channels[1], kernel)
        self.fc1 = nn.Linear(channels[1] * height * width, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, channels, height, width) to logits (B, classes)."""
        features = max_pool2d(relu(self.conv1(images)), POOL)
        features = max_pool2d(relu(self.conv2(features)), POOL)
        return self.fc3(relu(self.fc2(relu(self.fc1(features.flatten(1))))))
