"""What a model must be so that it can be trained, found out by trying it on a batch drawn at random."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pisa_fl.config import ConfigurationError
from pisa_fl.config.explain import first_line
from pisa_fl.data.data_set import DataSet
from pisa_fl.randomness import global_generators
from pisa_fl.tasks import Task
from strategies.base.layout import Layout

EXAMPLES = 4
"""Examples that a model is tried on: enough for statistics over a batch."""


@dataclass(frozen=True)
class Findings:
    """What training has to know of a model.

    Attributes:
        statistics: Names of its running statistics: the floating-point buffers that a training pass changes. Others,
            such as masks and tables of positions, are constants of the model.
        takes_one: Whether a training pass can be made of a single example, which BatchNorm over (B, C) cannot.
        mixes: Whether what a training pass makes of an example depends on the others of its batch, as by BatchNorm.
    """

    statistics: tuple[str, ...]
    takes_one: bool
    mixes: bool


def examine(model: nn.Module, task: Task, data: DataSet) -> Findings:
    """Try a copy of a model on random examples; nothing of the caller's changes.

    Args:
        model: The model.
        task: What it is to learn.
        data: What it is to learn from.

    Raises:
        ConfigurationError: It cannot be trained: a pass fails, its output is none for the task, or does not follow
            from its parameters.
    """
    try:
        Layout.of_parameters(model)
        own = copy.deepcopy(model).cpu()
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigurationError(f"model: {first_line(error)}") from error
    with global_generators(0):
        batch = data.trial(EXAMPLES)
        before = {name: buffer.clone() for name, buffer in own.named_buffers()}
        parameters = [p for p in own.parameters() if p.requires_grad]
        try:
            evaluated = task.output(own.eval(), batch)
            own.train()
            first, second = (_moved(own, parameters, task, batch) for _ in range(2))
        except Exception as error:  # whatever a model of the user's raises
            raise ConfigurationError(
                f"model: {type(model).__name__} cannot take {data.said}:"
                f" {type(error).__name__}: {first_line(error)}"
            ) from error
        for output, mode in ((evaluated, "in evaluation"), (second, "in training")):
            if (words := task.objection(output, batch)) is not None:
                raise ConfigurationError(f"model: {type(model).__name__} {words} {mode}")
        # of logits as they are: a loss may be flat where they are extreme
        values = [o if isinstance(o, Tensor) else task.losses(o, batch) for o in (first, second)]
        _check_output_follows(values[0], values[1], parameters)
        after = dict(own.named_buffers())
        statistics = tuple(
            name
            for name, buffer in before.items()
            if buffer.is_floating_point() and not _same(buffer, after[name])
        )
        mixes = _mixes(own, task, batch)
        try:
            task.output(own, {name: field[:1] for name, field in batch.items()})
            takes_one = True
        except Exception:  # it was trained on several
            takes_one = False
    return Findings(statistics, takes_one, mixes)


def _moved(
    model: nn.Module, parameters: Sequence[nn.Parameter], task: Task, batch: Mapping[str, Tensor]
) -> Any:
    """Output of a training pass after the parameters were given other values, as training does it.

    Zero-initialised layers are no longer zero then, and what lies behind them shows.
    """
    for parameter in parameters:
        parameter.data = parameter.data + torch.randn(parameter.shape) * 0.1
    with global_generators(0):  # dropout and its like draw the same every time
        return task.output(model, batch)


def _check_output_follows(first: Tensor, second: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Refuse a model whose output is not a differentiable function of the parameters that training sets.

    Raises:
        ConfigurationError: It is not.
    """
    if not second.requires_grad:
        raise ConfigurationError(
            "model: its output has no gradient, so it would never learn:"
            " its forward must not detach it or run under torch.no_grad"
        )
    gradients = [torch.zeros_like(parameter.data) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient  # as training does: the gradients are to be added there
    second.square().sum().backward()
    if _same(first.detach(), second.detach()) or not any(gradient.any() for gradient in gradients):
        raise ConfigurationError(
            "model: its output does not follow from its parameters, so it would never learn: give an ordinary"
            " nn.Module (a scripted or traced one keeps tensors of its own) that does not replace its parameters"
        )


def _mixes(model: nn.Module, task: Task, batch: Mapping[str, Tensor]) -> bool:
    """Whether the first example's output changes with the others of its batch, in training."""
    alike = {name: field[:1].expand_as(field) for name, field in batch.items()}

    def first(given: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad(), global_generators(0):
            output = task.output(model, given)
        return (output if isinstance(output, Tensor) else task.losses(output, given))[0]

    return not torch.allclose(first(batch), first(alike), rtol=1e-3, atol=1e-5, equal_nan=True)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN being one."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
