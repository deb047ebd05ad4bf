"""Probes at work: what a layer gets and the gradients of what it gives, reduced as they are computed.

A client alone is probed by hooks in its ordinary backward pass. Clients advanced together are differentiated by
`vmap` of a gradient, which hooks do not see: zeros are added to what the layers give, and the gradients with respect
to the zeros are those of the layers' outputs.

A probe may ask for the gradients of the losses with drawn targets: that is a second backward pass of one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils.hooks import RemovableHandle

from pisa_fl.clients.flat_model import Fields, FlatModel
from pisa_fl.clients.layers import watched
from strategies.base.beyond_gradients import Probe, Term

Calls = Mapping[str, list[Tensor]]
"""Layers -> a tensor for each call of theirs in a forward pass."""

Sums = dict[str, Tensor]
"""Layers -> the vectors that a probe made, (C, size)."""


def probed_backward(
    model: FlatModel,
    batch: Fields,
    shares: Tensor,
    term: Term | None,
    given: Fields,
    probe: Probe,
    sums: Sums,
) -> Tensor:
    """Forward and backward pass of one client's batch, what a probe makes of it added to its sums; the losses, (B,)."""
    hooks: list[RemovableHandle] = []

    def on_call(layer: str, inputs: Tensor, output: Tensor) -> None:
        inputs = inputs.detach()

        def on_gradient(gradients: Tensor) -> None:
            sums[layer] += probe.reduce(layer, inputs, _own(layer, gradients, shares), shares)

        hooks.append(output.register_hook(on_gradient))

    with watched(model.module, probe.sizes(), on_call):
        objective, losses, drawn = model.objectives(batch, term, given, probe.drawn)
    if drawn is not None:
        kept = model.gradient.clone()
        (shares * drawn).sum().backward(retain_graph=True)
        model.gradient.copy_(kept)
        for hook in hooks:
            hook.remove()
    (shares * objective).sum().backward()
    return losses.detach()


def probed_gradients(
    model: FlatModel, weights: Tensor, batches: Fields, shares: Tensor, term: Term | None, probe: Probe
) -> tuple[Tensor, Tensor, Sums]:
    """Gradients (C, d) and summed losses (C,) of a stack's batches, and what a probe makes of each client's."""
    layers = probe.sizes()

    def weighted(
        batch: Fields, shares: Tensor, given: Fields, weights: Tensor, zeros: Calls
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Calls]]:
        calls: dict[str, list[Tensor]] = {layer: [] for layer in layers}

        def on_call(layer: str, inputs: Tensor, output: Tensor) -> Tensor:
            calls[layer].append(inputs)
            return output + zeros[layer][len(calls[layer]) - 1]

        with watched(model.module, layers, on_call):
            objective, losses, drawn = model.at(weights, model.objectives, batch, term, given, probe.drawn)
        seen = objective if drawn is None else drawn
        total = torch.where(shares > 0, losses, 0.0).sum()
        return ((shares * objective).sum(), (shares * seen).sum()), (total, calls)

    def of_one(
        weights: Tensor, zeros: Calls, batch: Fields, shares: Tensor, given: Fields
    ) -> tuple[Tensor, Tensor, Sums]:
        of_both: Any = vjp(partial(weighted, batch, shares, given), weights, zeros, has_aux=True)
        both, back, (loss, calls) = of_both
        one, none = torch.ones_like(both[0]), torch.zeros_like(both[0])
        if probe.drawn:
            (gradient, _), (_, outgoing) = back((one, none)), back((none, one))
        else:
            gradient, outgoing = back((one, none))
        sums: Sums = {}
        for layer in layers:
            for inputs, gradients in zip(calls[layer], outgoing[layer], strict=True):
                made = probe.reduce(layer, inputs, _own(layer, gradients, shares), shares)
                sums[layer] = sums[layer] + made if layer in sums else made
        return gradient, loss, sums

    of_all = vmap(of_one, in_dims=(None if weights.dim() == 1 else 0, None, 0, 0, 0), randomness="different")
    zeros = _zeros(model, {name: field[0] for name, field in batches.items()}, probe)
    made: tuple[Tensor, Tensor, Sums] = of_all(weights, zeros, batches, shares, term.given if term else {})
    return made


@torch.no_grad()
def _zeros(model: FlatModel, batch: Fields, probe: Probe) -> Calls:
    """Zeros like what the layers give for one client's batch."""
    zeros: dict[str, list[Tensor]] = {layer: [] for layer in probe.sizes()}

    def on_call(layer: str, inputs: Tensor, output: Tensor) -> None:
        zeros[layer].append(torch.zeros_like(output))

    with model.evaluating(), watched(model.module, probe.sizes(), on_call):
        model.forward(batch)
    return zeros


def _own(layer: str, gradients: Tensor, shares: Tensor) -> Tensor:
    """Gradients of examples' own losses, from those of the weighted ones.

    Raises:
        ValueError: The layer's output has not a row for each example.
    """
    if len(gradients) != len(shares):
        raise ValueError(f"layer '{layer}' gives {len(gradients)} rows for {len(shares)} examples")
    own = shares.reshape(-1, *(1,) * (gradients.dim() - 1))
    return torch.where(own > 0, gradients.float() / own, 0.0)
