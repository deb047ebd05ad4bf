"""Augmentation of training batches, named by `data.augment._target_`."""

import torch
from torch import Tensor
from torch.nn.functional import pad


class CropFlip:
    """Random crop of the zero-padded image, then a random horizontal flip: the field's habit on CIFAR.

    Every image has its own draws, all of them from the generator given at the call. Images come
    normalised, so the padding has the mean colour (as in He et al. 2016, section 4.2).

    Args:
        padding: pixels added on each side before a crop of the original size, at most that; 0 crops nothing.
        flip: mirror each image with probability 1/2.

    Raises:
        ValueError: if `padding` is negative, or `flip` neither true nor false.
    """

    def __init__(self, padding: int, flip: bool) -> None:
        if type(padding) is not int or padding < 0:
            raise ValueError(f"data.augment.padding={padding} must be 0 or more pixels")
        if not isinstance(flip, bool):
            raise ValueError(f"data.augment.flip={flip} must be true or false")
        self.padding, self.flip = padding, flip

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images (B, C, H, W); the result has their shape, device and type."""
        count, _, height, width = images.shape
        if self.padding > min(height, width):
            raise ValueError(f"padding={self.padding} is more than an image of {height} x {width} has")

        def draw(choices: int) -> Tensor:
            # drawn where the generator lives, so that the numbers do not depend on the images' device
            drawn = torch.randint(choices, (count, 1), generator=generator, device=generator.device)
            return drawn.to(images.device)

        rows = draw(2 * self.padding + 1) + torch.arange(height, device=images.device)
        columns = draw(2 * self.padding + 1) + torch.arange(width, device=images.device)
        if self.flip:
            columns = torch.where(draw(2) == 1, columns.flip(1), columns)
        padded = pad(images, (self.padding,) * 4)
        which = torch.arange(count, device=images.device)[:, None, None]
        # indices around a slice put their dimensions first: (B, H, W, C)
        return padded[which, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
