"""Probes at work: what a layer gets and the gradients of what it gives, reduced as they are computed.

A client alone is probed by hooks in its ordinary backward pass. Clients advanced together are differentiated by
`vmap(grad(...))`, which hooks on gradients do not see: zeros are added to what the layers give, and the gradients with
respect to the zeros are those of the layers' outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import grad, vmap

from pisa_fl.clients.flat_model import Fields, FlatModel
from pisa_fl.clients.layers import watched
from strategies.base.beyond_gradients import Probe, Term

Calls = Mapping[str, list[Tensor]]
"""Layers -> a tensor for each call of theirs in a forward pass."""

Sums = dict[str, Tensor]
"""Layers -> the vectors that a probe made, (C, size)."""


@contextmanager
def probing(model: FlatModel, probe: Probe, sums: Sums, shares: Tensor) -> Iterator[None]:
    """Add what a probe makes of one client's batch in the forward and backward pass that is run meanwhile."""

    def on_call(layer: str, inputs: Tensor, output: Tensor) -> None:
        inputs = inputs.detach()

        def on_gradient(gradients: Tensor) -> None:
            sums[layer] += probe.reduce(layer, inputs, _own(layer, gradients, shares), shares)

        output.register_hook(on_gradient)

    with watched(model.module, probe.sizes(), on_call):
        yield


def probed_gradients(
    model: FlatModel, weights: Tensor, batches: Fields, shares: Tensor, term: Term | None, probe: Probe
) -> tuple[Tensor, Tensor, Sums]:
    """Gradients (C, d) and summed losses (C,) of a stack's batches, and what a probe makes of each client's."""
    layers = probe.sizes()

    def weighted(
        weights: Tensor, zeros: Calls, batch: Fields, shares: Tensor, given: Fields
    ) -> tuple[Tensor, tuple[Tensor, Calls]]:
        calls: dict[str, list[Tensor]] = {layer: [] for layer in layers}

        def on_call(layer: str, inputs: Tensor, output: Tensor) -> Tensor:
            calls[layer].append(inputs)
            return output + zeros[layer][len(calls[layer]) - 1]

        with watched(model.module, layers, on_call):
            objective, losses = model.weighted_loss(term, weights, batch, shares, given)
        return objective, (losses, calls)

    def of_one(
        weights: Tensor, zeros: Calls, batch: Fields, shares: Tensor, given: Fields
    ) -> tuple[Tensor, Tensor, Sums]:
        differentiated = grad(weighted, argnums=(0, 1), has_aux=True)
        (gradient, outgoing), (loss, calls) = differentiated(weights, zeros, batch, shares, given)
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
