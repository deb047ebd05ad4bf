"""A model whose parameters and gradients are flat vectors, and what it computes with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from pisa_fl.data.data_set import DataSet
from pisa_fl.models.examination import Findings
from pisa_fl.tasks import Task
from pisa_fl.tasks.base import LOSS
from strategies.base.layout import Layout


class FlatModel:
    """A model whose parameters and gradients are views of two flat vectors of length d.

    Args:
        model: Any module; it is moved to `device` and its parameters re-bound.
        task: What it learns.
        device: Where it computes.
        precision: `float32`, or `bfloat16`: mixed, by PyTorch's autocast, for the gradients.
        compiled: Have PyTorch compile the gradients of stacks.
        findings: What training has to know of it; None: every floating-point buffer is a running statistic, and a
            single example is enough.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        device: torch.device,
        precision: Literal["float32", "bfloat16"] = "float32",
        compiled: bool = False,
        findings: Findings | None = None,
    ) -> None:
        self._given = task, device, precision, compiled, findings
        self.module, self.task = model.to(device), task
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
        self._losses = _Losses(self)

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

        They take weights (d,) or (C, d), and a batch and its examples' weights with a leading client axis.
        """
        of_one = grad(self._weighted_loss, has_aux=True)
        of_all = {
            shared: vmap(of_one, in_dims=(None if shared else 0, 0, 0), randomness="different")
            for shared in (True, False)
        }
        return {shared: torch.compile(f) for shared, f in of_all.items()} if self._compiled else of_all

    def _weighted_loss(
        self, weights: Tensor, batch: Mapping[str, Tensor], shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        own = {f"model.{name}": value for name, value in self.layout.views(weights).items()}
        loss = functional_call(self._losses, own, (batch,))
        return (shares * loss).sum(), torch.where(shares > 0, loss, 0.0).sum()

    def losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Losses of a batch's examples at the present weights, (B,), as training has them."""
        with self.autocast():
            output = self.task.output(self.module, batch)
        return self.task.losses(output, batch)

    def example_bytes(self, example: Mapping[str, Tensor]) -> int:
        """Bytes that a pass over one example, a batch of one, keeps for the way back."""
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes if tensor.untyped_storage().data_ptr() != own else 0
            return tensor

        own, training = self.weights.untyped_storage().data_ptr(), self.module.training
        self.module.eval()  # running statistics stay as they are
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self.task.output(self.module, example)
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

    def take(self, fields: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Some rows of a set, in the order in memory that suits the model."""
        return {name: self._rows(field, rows.to(field.device)) for name, field in fields.items()}

    def _rows(self, field: Tensor, rows: Tensor) -> Tensor:
        if not self._channels_last or field.dim() != 4:
            return field.index_select(0, rows)
        return field.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)

    def ready(self, fields: Mapping[str, Tensor], data: DataSet) -> dict[str, Tensor]:
        """A whole set as the task takes it, in that order: more memory than what is stored, and no work later."""
        made: dict[str, Tensor] = {}
        length = len(next(iter(fields.values())))
        for start in range(0, length, 1000):
            part = {name: field[start : start + 1000] for name, field in fields.items()}
            for name, field in data.ready(part).items():
                if start == 0:
                    made[name] = self._empty(field, length)
                made[name][start : start + 1000] = field
        return made

    def _empty(self, like: Tensor, length: int) -> Tensor:
        empty = torch.empty(length, *like.shape[1:], dtype=like.dtype, device=like.device)
        if self._channels_last and like.dim() == 4:
            empty = empty.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return empty

    def evaluate(
        self, fields: Mapping[str, Tensor], rows: Tensor, data: DataSet, chunk: int, raw: bool = True
    ) -> dict[str, float]:
        """Mean `loss` and the task's metrics of the present weights on some rows of a set."""
        totals = (self.totals(fields, part, data, raw) for part in rows.split(chunk))
        return measured(self.task, totals, len(rows))

    @torch.no_grad()
    def totals(
        self, fields: Mapping[str, Tensor], rows: Tensor, data: DataSet, raw: bool = True
    ) -> dict[str, float]:
        """Sums of the losses and of what the task's metrics follow from, of some rows of a set read at once."""
        self.module.eval()
        batch = {name: field.to(self.device) for name, field in self.take(fields, rows).items()}
        batch = data.ready(batch) if raw else batch
        output = self.task.output(self.module, batch)
        sums = {LOSS: self.task.losses(output, batch).sum(), **self.task.totals(output, batch)}
        return {name: float(total) for name, total in sums.items()}


class _Losses(nn.Module):
    """The losses as a module, whose weights can be given from outside."""

    def __init__(self, flat: FlatModel) -> None:
        super().__init__()
        self.model, self._of = flat.module, flat.losses

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._of(batch)


def measured(task: Task, parts: Iterable[Mapping[str, float]], examples: int) -> dict[str, float]:
    """Mean `loss` and metrics from what `FlatModel.totals` gave of the parts of a set, in their order."""
    totals: dict[str, float] = {}
    for part in parts:
        totals = {name: totals.get(name, 0.0) + value for name, value in part.items()}
    loss = totals[LOSS] / examples
    return {LOSS: loss, **task.measure(totals, examples, loss)}
