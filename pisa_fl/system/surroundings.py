"""PyTorch as a federation needs it, whatever the program around it has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_surroundings() -> Iterator[None]:
    """Defaults of PyTorch; afterwards all is as it was.

    Type and device of new tensors, gradients switched off and mixed precision are the surrounding program's to set,
    and must not change a result.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
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
