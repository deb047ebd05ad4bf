"""PyTorch as a federation needs it, whatever the program around it has set."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_surroundings() -> Iterator[None]:
    """Defaults of PyTorch, and no reports of Flower's own; afterwards all is as it was.

    Type and device of new tensors, gradients switched off and mixed precision are the surrounding program's to set,
    and must not change a result.
    """
    flower, dtype = logging.getLogger("flwr"), torch.get_default_dtype()
    level = flower.level
    with ExitStack() as stack:
        # Flower's strategies report every round on their own; the run directory and the display do that here
        flower.setLevel(logging.ERROR)
        stack.callback(flower.setLevel, level)
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        if (
            torch.get_default_device().type != "cpu"
        ):  # to enter it for nothing would slow down every operation
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
