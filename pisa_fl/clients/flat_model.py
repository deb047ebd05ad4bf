"""A model whose parameters and gradients are flat vectors, and what it computes with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from pisa_fl.data import ImageData
from pisa_fl.models.examination import Findings
from strategies.base.layout import Layout


class FlatModel:
    """A model whose parameters and gradients are views of two flat vectors of length d.

    Args:
        model: Any module; it is moved to `device` and its parameters re-bound.
        device: Where it computes.
        precision: `float32`, or `bfloat16`: mixed, by PyTorch's autocast, for the gradients.
        compiled: Have PyTorch compile the gradients of stacks.
        findings: What training has to know of it; None: every floating-point buffer is a running statistic, and a
            single example is enough.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: Literal["float32", "bfloat16"] = "float32",
        compiled: bool = False,
        findings: Findings | None = None,
    ) -> None:
        self._given = device, precision, compiled, findings
        self.module = model.to(device)
        self.layout = Layout.of_parameters(model)
        self.buffer_layout = Layout.of_buffers(model, findings.statistics if findings else None)
        self.takes_one = findings is None or findings.takes_one
        self.device = device
        # BatchNorm's batch counter and its like: they are restored for every client in turn
        self._integers = {n: b.clone() for n, b in model.named_buffers() if not b.is_floating_point()}
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = self.layout.flatten(parameters).to(device)
        self.gradient = torch.zeros_like(self.weights)
        values, gradients = self.layout.views(self.weights), self.layout.views(self.gradient)
        for name, parameter in parameters.items():
            parameter.data, parameter.grad = values[name], gradients[name]
        # oneDNN's convolutions, and PyTorch's pooling even more, are faster on images with channels last
        convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
        self._channels_last = convolves and device.type == "cpu"
        self._mixed, self._compiled = precision == "bfloat16", compiled

    def __reduce__(self) -> tuple[type[FlatModel], tuple[Any, ...]]:
        """In another process: a model of its own, from a copy whose parameters are no views."""
        return FlatModel, (copy.deepcopy(self.module), *self._given)

    @property
    def buffers(self) -> Tensor:
        """Running statistics as one vector (b,)."""
        return self.buffer_layout.flatten(dict(self.module.named_buffers())).to(self.device)

    def autocast(self) -> torch.autocast:
        """The context in which losses are computed."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed)

    @cached_property
    def gradients(self) -> dict[bool, Callable[..., tuple[Tensor, Tensor]]]:
        """Gradients and summed losses of a stack's batches: at one point for all (True), or each at its own (False).

        They take weights (d,) or (C, d), and images, labels and the examples' weights with a leading client axis.
        """
        of_one = grad(self._weighted_loss, has_aux=True)
        of_all = {
            shared: vmap(of_one, in_dims=(None if shared else 0, 0, 0, 0), randomness="different")
            for shared in (True, False)
        }
        return {shared: torch.compile(f) for shared, f in of_all.items()} if self._compiled else of_all

    def _weighted_loss(
        self, weights: Tensor, images: Tensor, labels: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        with self.autocast():
            logits = functional_call(self.module, self.layout.views(weights), (images,))
        loss = F.cross_entropy(logits.float(), labels, reduction="none")
        return (shares * loss).sum(), torch.where(shares > 0, loss, 0.0).sum()

    def example_bytes(self, images: Tensor) -> int:
        """Bytes that a pass over one example, (1, channels, height, width), keeps for the way back."""
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes if tensor.untyped_storage().data_ptr() != own else 0
            return tensor

        own, training = self.weights.untyped_storage().data_ptr(), self.module.training
        self.module.eval()  # running statistics stay as they are
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self.module(images)
        self.module.train(training)
        return kept

    @torch.no_grad()
    def load(self, weights: Tensor, buffers: Tensor | None = None) -> None:
        """Set the parameters (d,) and, if given, the running statistics (b,)."""
        self.weights.copy_(weights)
        self.load_buffers(buffers)

    @torch.no_grad()
    def load_buffers(self, buffers: Tensor | None) -> None:
        """Set the running statistics (b,), if there are any."""
        if buffers is not None and self.buffer_layout.size:
            own = dict(self.module.named_buffers())
            for name, value in {**self.buffer_layout.views(buffers), **self._integers}.items():
                own[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers by PyTorch's names, copied to the CPU."""
        return {k: v.detach().cpu().clone().contiguous() for k, v in self.module.state_dict().items()}

    def take(self, images: Tensor, rows: Tensor) -> Tensor:
        """Some images of a set (N, channels, height, width), in the order in memory that suits the model."""
        rows = rows.to(images.device)
        if not self._channels_last:
            return images.index_select(0, rows)
        return images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)

    def normalised(self, images: Tensor, data: ImageData) -> Tensor:
        """A whole set as model input, in that order: four times the memory of pixels, and none of the work later."""
        ready = torch.empty(images.shape, device=images.device)
        if self._channels_last:
            ready = ready.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        for start in range(0, len(images), 1000):
            part = slice(start, start + 1000)
            ready[part] = data.normalise(images[part])
        return ready

    def evaluate(
        self,
        images: Tensor,
        labels: Tensor,
        rows: Tensor,
        data: ImageData,
        chunk: int,
        raw: bool = True,
    ) -> tuple[float, float]:
        """Accuracy (0..1) and mean cross-entropy (nats) of the present weights on some rows of a set."""
        scores = (self.score(images, labels, part, data, raw) for part in rows.split(chunk))
        return mean_score(scores, len(rows))

    @torch.no_grad()
    def score(
        self, images: Tensor, labels: Tensor, rows: Tensor, data: ImageData, raw: bool = True
    ) -> tuple[int, float]:
        """Correct answers and the sum of the cross-entropies (nats), of some rows of a set read at once."""
        self.module.eval()
        y = labels[rows].to(self.device)
        x = self.take(images, rows).to(self.device)
        logits = self.module(data.normalise(x) if raw else x)
        loss = F.cross_entropy(logits, y, reduction="sum")
        return int((logits.argmax(dim=1) == y).sum()), float(loss)


def mean_score(scores: Iterable[tuple[int, float]], examples: int) -> tuple[float, float]:
    """Accuracy (0..1) and mean loss from what `FlatModel.score` gave of the parts of a set, in their order."""
    correct, loss = 0, 0.0
    for part_correct, part_loss in scores:
        correct += part_correct
        loss += part_loss
    return correct / examples, loss / examples
