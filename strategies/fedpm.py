"""FedPM: second-order steps on the clients, and a mean of their weights in which each counts by its curvature.

Ishii et al. 2025, arXiv 2511.09100 (AAAI 2026). A step by the federation's curvature, the mean P of the clients' P_i,
is a mean of the clients' own steps, if that mean is taken with P^-1 P_i:

    w - lr P^-1 sum_i alpha_i g_i  =  sum_i alpha_i P^-1 P_i (w - lr P_i^-1 g_i)

So, in a round, for every client i that takes part, W = [W b] being a layer's matrix and g its gradient likewise:

    w_i = w, then for every mini-batch of `local_epochs` passes              (client)
        P_i  = mean over the mini-batch of a a^T, at w_i, + damping I
        W_i -= lr g P_i^-1
    W     = (sum_i alpha_i W_i P_i) (sum_i alpha_i P_i)^-1                   (server; P_i of the last step)

Symbols: w the server's weights, w_i the client's, a what goes into the layer, with a 1 appended for the bias: FOOF's
approximation of the Fisher matrix (Benzing 2022, arXiv 2201.12250). P_i acts on W from the right, for a is what W is
multiplied by. With one step a round the server makes FOOF's step for the whole federation, whatever the skew; a
layer with squared error is then solved in one round (lr 1/2 for |Wa - y|^2). With equal P_i it is FedAvg of FOOF, and
with a large damping, lr growing with it, plain FedAvg. Clients keep nothing. The way up has the weights and, instead of
P_i, the triangle R_i of P_i = R_i^T R_i: as many numbers, and whatever arrives stands for no negative curvature.

What could be read are the abstract and others' notes of the equations and tables (papernotes.org, themoonlight.io),
neither the whole text nor the authors' code. By the notes P_i is made anew at every step, that of the last step is
sent, and alpha is uniform; networks were trained by ten clients, all of them in every round, in 5 local epochs, with
GroupNorm for BatchNorm. Not settled there, and chosen here:

* damping 0.03 and lr 0.1, by the runs below; the project's batch size; no momentum or weight decay, for the equations
  have none. If set, momentum is of the steps g P_i^-1, and weight decay is not divided by P_i.
* Whether P_i is of the mini-batch or a moving average, as FOOF's: of the mini-batch, by the equations' index of the
  step. An average within the round (0.9) was no better (two classes, simple_cnn, 6 rounds: 88.2 % for 89.1 %).
* The mean over a convolution's positions, or their sum: the mean, as of K-FAC's A. The sum, with the same damping and
  lr, was somewhat better where it was tried (two classes, simple_cnn, 5 rounds: 90.6 % for 88.6 %).
* What belongs to no linear layer or convolution (norms, embeddings, recurrent layers): steps of plain SGD with the same
  lr, and a plain mean. A convolution in groups has a P_i for each.
* Who is averaged where not everybody takes part: those present.
* Sides longer than `max_side`: the diagonal of P_i alone, as in `strategies.preconditioners.kfac`. The notes have
  no such bound; n inputs take n^2/2 numbers on the way up, and n^3/3 operations in every step of every client.

On stability. Seen once each, seed 0, on `mnist_mini`, ten clients of one class, an epoch a round, accuracy after 12
rounds: simple_cnn 73.5 % (best 74.6), mlp 83.8 % (best 84.0), with no fall of more than about a percent; FedAvg's SGD
(lr 0.01, momentum 0.9) 11.8 % and 58.6 %, up and down. Both hardly rise any more by then. It is the mixing that does
it: after 5 rounds simple_cnn has 69.8 %, and 18.1 % with a plain mean of the same steps. Damping 0.01 is about alike;
0.3 and 1 are slow to begin (of two classes); lr 0.3 is no quicker, and falls back from 66 to 59 % in two rounds;
5 epochs a round reach less in as many rounds (64.8 % for 68.8 % after 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.averaging import Answers, Averaging, mean
from strategies.base.client import Batch, Instruction, Stack, Update
from strategies.base.layout import Layout
from strategies.base.messages import WEIGHTS, Field, RoundError, squared
from strategies.local_sgd import Local, LocalSgd
from strategies.preconditioners.eigenbases import Eigenbases, Side
from strategies.preconditioners.kfac_factors import Factors

ROOTS = "roots"
"""R_i of all layers, in a reply."""


class Roots:
    """R of every layer, P = R^T R: upper triangles (C, *axes, n, n), or diagonals (C, *axes, n), double precision.

    Args:
        layout: Layout of the model's parameters.
        max_side: Of longer sides P is diagonal.

    Attributes:
        layers: The layers that have one, by name.
        probe: Makes the means of a a^T that P is made of.
        size: Length of all of them as they are sent.

    Raises:
        ValueError: There is no such layer, or `max_side` is below 1.
    """

    def __init__(self, layout: Layout, max_side: int) -> None:
        checks.whole("max_side", max_side, 1)
        self.layers = {name: layer for name, layer in layout.layers.items() if layer.kind != "embedding"}
        if not self.layers:
            raise ValueError("FedPM needs a model with a linear layer or a convolution")
        shapes = {name: (*layer.axes, *layer.extended) for name, layer in self.layers.items()}
        self._sides = {name: right for name, (_, right) in Eigenbases(shapes, max_side).sides.items()}
        self.probe = Factors(self.layers, {name: (None, side) for name, side in self._sides.items()}, False)
        self.size = sum(side.packed for side in self._sides.values())

    def made(self, probed: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Those of P = A + damping I, by name, A being what the probe made."""
        moments = self.probe.unpacked(torch.cat([probed[name] for name in self.layers], dim=-1))
        return {
            name: _root(moment.double(), side, damping)
            for name, (side, moment) in zip(self.layers, moments, strict=True)
        }

    def packed(self, roots: Mapping[str, Tensor]) -> Tensor:
        """All of them as they are sent, (C, size)."""
        return torch.cat([side.pack(roots[name]) for name, side in self._sides.items()], dim=-1)

    def unpacked(self, packed: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What was sent, (C, size)."""
        parts = packed.double().split([side.packed for side in self._sides.values()], dim=-1)
        for (name, side), part in zip(self._sides.items(), parts, strict=True):
            yield name, side.unpack(part) if side.span is None else side.unpack(part).triu()

    def of(self, name: str, whole: Tensor) -> Tensor:
        """That of P.

        Raises:
            LinAlgError: It has no inverse.
        """
        return whole.sqrt() if self._sides[name].span is None else torch.linalg.cholesky(whole, upper=True)

    def whole(self, name: str, root: Tensor) -> Tensor:
        """P."""
        return root.square() if self._sides[name].span is None else root.mT @ root


def _root(moment: Tensor, side: Side, damping: float) -> Tensor:
    """R of A + damping I; damping is at least what A was rounded by, which is of single precision."""
    if side.span is None:
        return (moment + damping).sqrt()
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    rounded = torch.finfo(torch.float32).eps * diagonal.sum(dim=-1, keepdim=True)
    diagonal.add_(rounded.clamp(min=damping))
    # of what is not finite, R is not finite, and the reply is refused
    return torch.linalg.cholesky_ex(moment, upper=True)[0]


def _times(matrix: Tensor, whole: Tensor) -> Tensor:
    """M P, of matrices (C, *axes, m, n)."""
    return matrix @ whole if whole.dim() == matrix.dim() else matrix * whole.unsqueeze(-2)


def _divided(matrix: Tensor, root: Tensor) -> Tensor:
    """M P^-1, of matrices (C, *axes, m, n)."""
    if root.dim() == matrix.dim():
        return torch.cholesky_solve(matrix.mT, root, upper=True).mT
    return matrix / root.square().unsqueeze(-2)


@checks.literals
class FedPm(Averaging):
    """Server half: the mean of the weights, in which each layer counts by its P_i.

    Args:
        layout: Layout of the model's parameters.
        alpha: Weights of the clients: `examples` (n_i/n) or `uniform` (the paper).
        max_side: The clients'.

    Raises:
        ValueError: A value is outside its range, or the model has no linear layer or convolution.
    """

    def __init__(self, layout: Layout, alpha: Literal["examples", "uniform"], max_side: int) -> None:
        super().__init__(layout, alpha)
        self._roots = Roots(layout, max_side)

    def step(self, answers: Answers, weights: Mapping[int, float]) -> Tensor:
        """The preconditioned mixing, written as a step from the weights that were sent; see the module's equations.

        Raises:
            RoundError: What clients sent makes a P without an inverse.
        """
        following = mean({node: said[WEIGHTS] for node, said in answers.arrays.items()}, weights)[None]
        whole: dict[str, Tensor] = {}
        moved: dict[str, Tensor] = {}
        for node, said in answers.arrays.items():
            step = (said[WEIGHTS].double() - self.consensus)[None]
            for name, root in self._roots.unpacked(said[ROOTS][None]):
                own = weights[node] * self._roots.whole(name, root)
                counted = _times(self.layout.extended(self._roots.layers[name], step), own)
                whole[name] = whole[name] + own if name in whole else own
                moved[name] = moved[name] + counted if name in moved else counted
        for name, layer in self._roots.layers.items():
            try:
                root = self._roots.of(name, whole[name])
            except torch.linalg.LinAlgError as error:
                raise RoundError(f"P of '{name}' of the server") from error
            matrix = self.layout.extended(layer, self.consensus[None]) + _divided(moved[name], root)
            self.layout.write(layer, following, matrix.to(following.dtype))
        return following[0]


class FedPmClient(LocalSgd):
    """Client half: steps by the curvature of each mini-batch.

    Args:
        layout: Layout of the model's parameters.
        damping: Added to the mean of a a^T.
        max_side: Of longer sides only the diagonal of P_i is taken; the server's.
        local: As `LocalSgd`'s; momentum is of the steps g P_i^-1, and the optimizer must be SGD or SAM.

    Raises:
        ValueError: A number is outside its range, or the model has no linear layer or convolution.
    """

    def __init__(self, layout: Layout, damping: float, max_side: int, **local: Unpack[Local]) -> None:
        super().__init__(layout, **local)
        self.require_sgd("FedPM's steps are by P_i")
        checks.positive("damping", damping)
        self.damping, self._roots = damping, Roots(layout, max_side)

    def reply_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """The weights and R_i."""
        return super().reply_fields(config) | {ROOTS: squared(self._roots.size)}

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """The local epochs; see the module's equations."""
        last: dict[str, Tensor] = {}

        def preconditioned(weights: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            with stack.probed(self._roots.probe) as probed:
                gradient, loss = stack.gradient(weights, batch)
            idle = [row for row, count in enumerate(batch.examples) if not count]
            for name, root in self._roots.made(probed, self.damping).items():
                if idle:  # whose last step was before
                    root[idle] = last[name][idle]
                layer, last[name] = self._roots.layers[name], root
                matrix = _divided(self.layout.extended(layer, gradient).double(), root)
                self.layout.write(layer, gradient, matrix.to(gradient.dtype))
            return gradient, loss

        start = instruction.arrays[WEIGHTS]
        done = self.descend(stack, start, self.lr_now(instruction), 0.0, differentiate=preconditioned)
        return Update({WEIGHTS: done.weights, ROOTS: self._roots.packed(last)}, done.loss)
