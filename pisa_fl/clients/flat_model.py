"""A model whose parameters and gradients are flat vectors, and what it computes with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

from pisa_fl.clients.compiled import Package
from pisa_fl.clients.layers import watched
from pisa_fl.data.data_set import DataSet
from pisa_fl.models.examination import Findings
from pisa_fl.tasks import Task
from pisa_fl.tasks.base import LOSS
from strategies.base.beyond_gradients import Forward, Term
from strategies.base.layout import Layout

Fields = Mapping[str, Tensor]
"""Named tensors of a batch."""

GRADIENT_BYTES = 2**28
"""Bytes that gradients of single examples may take at once."""


class FlatModel:
    """A model whose parameters and gradients are views of two flat vectors of length d.

    Args:
        model: Any module; it is moved to `device` and its parameters re-bound.
        task: What it learns.
        device: Where it computes.
        precision: `float32`, or `bfloat16`: mixed, by PyTorch's autocast, for the gradients.
        compiled: Have PyTorch compile the gradients of stacks of several.
        findings: What training has to know of it; None: every floating-point buffer is a running statistic, and a
            single example is enough.

    Attributes:
        mixes: Whether what it makes of an example depends on those that are read with it.
        package: Gradients of a client alone, compiled; None: as PyTorch has them.
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
        self.package: Package | None = None
        self.module, self.task = model.to(device), task
        self.layout = Layout.of_parameters(model)
        self.buffer_layout = Layout.of_buffers(model, findings.statistics if findings else None)
        self.takes_one = findings is None or findings.takes_one
        self.mixes = self.buffer_layout.size > 0 or (findings is not None and findings.mixes)
        self.device = device
        # BatchNorm's batch counter and its like: they are restored for every client in turn
        self._integers = {n: b.clone() for n, b in model.named_buffers() if not b.is_floating_point()}
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = self.layout.flatten(parameters).to(device)
        self.gradient = torch.zeros_like(self.weights)
        values, gradients = self.layout.views(self.weights), self.layout.views(self.gradient)
        for name, parameter in parameters.items():
            parameter.data, parameter.grad = values[name], gradients[name]
        # oneDNN's convolutions, and PyTorch's pooling even more, are faster on inputs with channels last: by 10 to 21 %
        # in simple_cnn and vgg9 on 3 x 32 x 32, slower by 1 to 5 % in resnet18, and as exact. A measurement in every
        # run would choose no better, and bits would hang on it.
        convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
        self._channels_last = convolves and device.type == "cpu"
        self._mixed, self._compiled = precision == "bfloat16", compiled
        self._shell = _Shell(self.module)

    def __reduce__(self) -> tuple[type[FlatModel], tuple[Any, ...], dict[str, Any]]:
        """In another process: a model of its own, from a copy whose parameters are no views."""
        return FlatModel, (copy.deepcopy(self.module), *self._given), {"package": self.package}

    @property
    def buffers(self) -> Tensor:
        """Running statistics as one vector (b,)."""
        return self.buffer_layout.flatten(dict(self.module.named_buffers())).to(self.device)

    def autocast(self) -> torch.autocast:
        """The context in which losses are computed."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed)

    def gradients(self, shared: bool, term: Term | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
        """Gradients (C, d) and summed losses (C,) of a stack's batches.

        They take weights, (d,) for all where they are `shared`, else (C, d), and with a leading client axis a batch,
        its examples' weights, and what the term is given.
        """
        return self._plain_gradients[shared] if term is None else self._vectorised(shared, term)

    @cached_property
    def _plain_gradients(self) -> dict[bool, Callable[..., tuple[Tensor, Tensor]]]:
        made = {shared: self._vectorised(shared) for shared in (True, False)}
        return {shared: torch.compile(f) for shared, f in made.items()} if self._compiled else made

    def of_one(self, term: Term | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
        """Gradient (d,) and summed loss of one client's batch, of what `gradients` takes without a client axis."""
        return grad(partial(self.weighted_loss, term), has_aux=True)

    def _vectorised(self, shared: bool, term: Term | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
        return vmap(self.of_one(term), in_dims=(None if shared else 0, 0, 0, 0), randomness="different")

    def weighted_loss(
        self, term: Term | None, weights: Tensor, batch: Fields, shares: Tensor, given: Fields
    ) -> tuple[Tensor, Tensor]:
        """What training lowers, weighted and summed over a batch's examples, and the plain sum of their losses."""
        objective, losses = self.at(weights, self.objective, batch, term, given)
        return (shares * objective).sum(), torch.where(shares > 0, losses, 0.0).sum()

    def at(self, weights: Tensor, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of the model gives at other weights (d,) than the present ones."""
        own = {f"model.{name}": value for name, value in self.layout.views(weights).items()}
        return functional_call(self._shell, own, (function, *arguments))

    def objective(self, batch: Fields, term: Term | None, given: Fields) -> tuple[Tensor, Tensor]:
        """What training lowers, and the losses in it, of a batch's examples at the present weights, (B,) each."""
        objective, losses, _ = self.objectives(batch, term, given, False)
        return objective, losses

    def objectives(
        self, batch: Fields, term: Term | None, given: Fields, drawn: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`objective` and, if asked for, the losses with targets that are drawn from the output, (B,)."""
        forward = self.forward(batch, term.layers if term else ())
        losses = self.task.losses(forward.output, batch)
        objective = losses if term is None else losses + term.of(forward, given)
        if not drawn:
            return objective, losses, None
        return objective, losses, self.task.losses(forward.output, self.task.drawn(forward.output, batch))

    def forward(self, batch: Fields, layers: Iterable[str] = ()) -> Forward:
        """Output of a batch at the present weights, and what went into some layers when they were last called."""
        inputs: dict[str, Tensor] = {}

        def on_call(layer: str, given: Tensor, output: Tensor) -> None:
            inputs[layer] = given

        with watched(self.module, layers, on_call), self.autocast():
            return Forward(self.task.output(self.module, batch), inputs)

    @torch.no_grad()
    def outputs(self, weights: Tensor, batches: Fields, layers: Sequence[str]) -> Forward:
        """`forward` of a stack's batches, (C, B, ...), at (d,) or (C, d), as an evaluation has it."""

        def of_one(weights: Tensor, batch: Fields) -> tuple[Any, Mapping[str, Tensor]]:
            forward = self.at(weights, self.forward, batch, layers)
            return forward.output, forward.inputs

        of_all = vmap(of_one, in_dims=(None if weights.dim() == 1 else 0, 0))
        with self.evaluating():
            if any(len(field) > 1 for field in batches.values()):
                return Forward(*of_all(weights, batches))
            # alone, without what vectorising demands of a model
            alone = of_one(weights.reshape(-1), {name: field[0] for name, field in batches.items()})
            return Forward(*tree_map(lambda tensor: tensor.unsqueeze(0), alone))

    def example_norms(self, weights: Tensor, batches: Fields, shares: Tensor) -> Tensor:
        """Norms of the gradients of examples' own losses, (C, B), at (d,) or (C, d).

        Raises:
            ValueError: The model keeps running statistics.
        """

        def norm(weights: Tensor, example: Fields) -> Tensor:
            return torch.linalg.vector_norm(grad(self._loss_alone)(weights, example))

        of_one = vmap(norm, in_dims=(None, 0), randomness="different", chunk_size=self._at_once(shares))
        of_all = vmap(of_one, in_dims=(None if weights.dim() == 1 else 0, 0), randomness="different")
        return torch.where(shares > 0, of_all(weights, batches), 0.0)

    def sums_of_gradients(
        self, weights: Tensor, batches: Fields, shares: Tensor, each: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Sums over batches' examples of what is made of the gradient of each one's own loss, (C, d).

        Args:
            weights: (d,) or (C, d).
            batches: (C, B, ...).
            shares: (C, B); zero for padding, which is left out.
            each: From gradients of single examples (..., d) to the terms of the sums, (..., d).

        Raises:
            ValueError: The model keeps running statistics.
        """
        of_one = vmap(grad(self._loss_alone), in_dims=(None, 0), randomness="different")
        of_all = vmap(of_one, in_dims=(None if weights.dim() == 1 else 0, 0), randomness="different")
        total = torch.zeros(len(shares), self.layout.size, device=self.device)
        size = self._at_once(shares)
        for start in range(0, shares.shape[1], size):
            part = {name: field[:, start : start + size] for name, field in batches.items()}
            there = (shares[:, start : start + size] > 0).unsqueeze(-1)
            total += torch.where(there, each(of_all(weights, part)), 0.0).sum(dim=1)
        return total

    def _loss_alone(self, weights: Tensor, example: Fields) -> Tensor:
        """Loss of one example.

        Raises:
            ValueError: The model keeps running statistics.
        """
        if self.buffer_layout.size:
            raise ValueError("an example alone has no gradient in a model with running statistics")
        alone = {name: field.unsqueeze(0) for name, field in example.items()}
        objective, _ = self.at(weights, self.objective, alone, None, {})
        return objective[0]

    def _at_once(self, shares: Tensor) -> int:
        """Examples of each client whose gradients are held at once."""
        return max(1, GRADIENT_BYTES // (4 * self.layout.size * len(shares)))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Meanwhile, the model is as an evaluation has it."""
        training = self.module.training
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training)

    def example_bytes(self, example: Mapping[str, Tensor]) -> int:
        """Bytes that a pass over one example, a batch of one, keeps for the way back."""
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes if tensor.untyped_storage().data_ptr() != own else 0
            return tensor

        own = self.weights.untyped_storage().data_ptr()
        saving = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with self.evaluating(), saving:  # running statistics stay as they are
            self.task.output(self.module, example)
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


class _Shell(nn.Module):
    """A module around the model that runs functions of it, so that its weights can be given from outside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def measured(task: Task, parts: Iterable[Mapping[str, float]], examples: int) -> dict[str, float]:
    """Mean `loss` and metrics from what `FlatModel.totals` gave of the parts of a set, in their order."""
    totals: dict[str, float] = {}
    for part in parts:
        totals = {name: totals.get(name, 0.0) + value for name, value in part.items()}
    loss = totals[LOSS] / examples
    return {LOSS: loss, **task.measure(totals, examples, loss)}
