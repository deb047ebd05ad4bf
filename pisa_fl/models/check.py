"""Whether a model fits the data: found out before the first round, by two images."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pisa_fl.data import ImageData
from pisa_fl.randomness import global_generators

TRIED = 2
"""Images that are tried; batch normalisation needs more than one."""


def check_model(model: nn.Module, data: ImageData) -> None:
    """Check, on a copy, that a model maps the data set's images to logits, in training as in evaluation.

    Args:
        model: The model.
        data: The data set.

    Raises:
        ValueError: It does not; the sentence says what it gives.
    """
    images = data.normalise(data.train_images[:TRIED]).repeat(TRIED, 1, 1, 1)[:TRIED]
    tried = copy.deepcopy(model)
    device = next((p.device for p in tried.parameters()), torch.device("cpu"))
    for training in (False, True):
        tried.train(training)
        try:
            with torch.no_grad(), global_generators(0, device):
                logits = tried(images.to(device))
        except Exception as error:
            text = " ".join(str(error).split())
            raise ValueError(
                f"model: {type(model).__name__} cannot take images of (channels, height, width) {data.shape}:"
                f" {type(error).__name__}: {text}"
            ) from error
        if (words := _fault(logits, len(data.classes))) is not None:
            mode = "in training" if training else "in evaluation"
            raise ValueError(
                f"model: {type(model).__name__} must give logits, one float tensor of (images, classes),"
                f" and gives {words} {mode}"
            )


def _fault(logits: object, classes: int) -> str | None:
    """What a model gave for the tried images, if that is no logits."""
    if not isinstance(logits, Tensor):
        return f"a {type(logits).__name__}"
    if logits.dim() != 2 or len(logits) != TRIED or not logits.is_floating_point():
        return f"{logits.dtype} of shape {tuple(logits.shape)} for {TRIED} images"
    if logits.shape[1] < classes:
        return f"{logits.shape[1]} numbers an image for {classes} classes"
    return None if logits.isfinite().all() else "numbers that are not finite"
