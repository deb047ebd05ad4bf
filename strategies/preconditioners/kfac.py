"""K-FAC: the Fisher matrix of each layer as the Kronecker product of two small matrices.

K-FAC (Martens & Grosse 2015, arXiv 1503.05671; Grosse & Martens 2016, arXiv 1602.01407, for convolutions). A layer
multiplies rows a (what goes into it, with a 1 appended for the bias) by a matrix W (m x n); b are the gradients of an
example's loss with respect to what comes out of it. At T positions (a convolution's patches, a sequence's elements):

    A  = E[ (1/T) sum_t a_t a_t^T ]          C  = E[ sum_t b_t b_t^T ]          moving averages, decay beta
    C  = U diag(c) U^T,                      A  = Z diag(a) Z^T                 every `refresh` times
    F  = C x A + damping I                   the Fisher matrix of W, its inputs independent of its gradients
    nu = min(1, sqrt(kl_clip / (g^T F^-1 g)))                                   over all layers
    Q  = F / (gain nu)

so that, R being the residual of [W b],

    (sigma I + rho Q)^-1 R  =  U [ U^T R Z / (sigma + rho (c a^T + damping) / (gain nu)) ] Z^T

exactly. `fisher: sampled` is the Fisher matrix: its targets are drawn from the model's output, which takes a second
backward pass; `empirical` has those of the data. What goes into an embedding are unit vectors, and A is diagonal. Of
sides longer than `max_side` only the diagonal is taken. What belongs to no such layer follows the second moment, as
in SISA, with the same beta: norms, and convolutions in groups or transposed.

A and C are expectations over examples: the averages of the clients' are those of the whole federation, whatever the
skew. Clients send their upper triangles beside the gradient, in rounds that Q learns from: `strategy.align_every` is
the interval of the factors, `refresh` that of the decompositions, counted in factors. A client's are sums over its
batches, however few examples are differentiated at once.

The automatic penalty has sigma = q/lr and rho = m/((1-m) lr). q is the geometric mean of Q's eigenvalues over a layer;
their arithmetic mean would be that of the few largest. Where Q is small, sigma keeps a step from being long, as
damping does. Where Q is far above q, c = sigma/(sigma + rho Q) is small and the momentum of the dual, 1-c, too long:
friction f (docs/algorithm.md, departure 6) bounds it to 1-f, and a steady gradient g then moves the weights by about
lr g/Q, as a heavy ball would.

The rate of a natural gradient F^-1 g is of the size of one, while lr says how far a weight may go in a round: `gain` is
their ratio, so that the tensors of no such layer keep their lr.

From KAISA (Pauloski et al. 2021, arXiv 2107.01739) are beta and the bound, which is there that of a step
(0.001, the rate counted in) and here that of a step of rate one. Its placement of the work on many devices is for
another setting.

What is not there: damping that adapts to the ratio of actual to predicted decrease (sigma is added to it and follows
the schedule of lr); and inverses by Cholesky factors, for only a damping that is divided between A and C leaves an
inverse that is a Kronecker product, and sigma I is not so divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from strategies.base import checks
from strategies.base.beyond_gradients import Probe
from strategies.base.layers import Layer
from strategies.base.layout import Layout
from strategies.base.messages import Field, averaged
from strategies.preconditioners.base import PROBED, Preconditioner, State
from strategies.preconditioners.eigenbases import Eigenbases, Side, turned
from strategies.preconditioners.second_moment import SecondMoment

AT_ONCE = 2**24
"""Numbers that the rows of a layer's inputs, such as a convolution's patches, may take at once."""

Sides = Mapping[str, tuple[Side, Side]]
"""Layer -> the side of what comes out of it (C) and of what goes into it (A)."""


@checks.literals
class Kfac(Preconditioner):
    """Natural gradient steps of linear layers, convolutions and embeddings.

    Args:
        layout: Layout of the model's parameters.
        beta: Decay of the moving averages of A and C; KAISA: 0.95.
        damping: Added to the eigenvalues of C x A; KAISA: 0.003.
        kl_clip: Greatest g^T F^-1 g, or None for no bound.
        gain: Rate of a natural gradient, in units of `lr`.
        fisher: Whose targets the gradients b are of: `sampled` from the model's output, or `empirical`, the data's.
        max_side: Of longer sides only the diagonal is taken.
        refresh: Decompositions are made every so many times that factors come.
        eps: Added to the root of the second moment of what belongs to no such layer; SISA: 1e-8.

    Raises:
        ValueError: A value is outside its range.
    """

    def __init__(
        self,
        layout: Layout,
        beta: float,
        damping: float,
        kl_clip: float | None,
        gain: float,
        fisher: Literal["sampled", "empirical"],
        max_side: int,
        refresh: int,
        eps: float,
    ) -> None:
        checks.decay("beta", beta)
        checks.positive("damping", damping)
        if kl_clip is not None:
            checks.positive("kl_clip", kl_clip)
        checks.whole("max_side", max_side, 1)
        checks.whole("refresh", refresh, 1)
        checks.positive("gain", gain)
        self.layout, self.beta, self.damping, self.gain = layout, beta, damping, gain
        self.kl_clip, self.refresh = kl_clip, refresh
        self._others = SecondMoment(layout, beta, eps, 0.0, "gradient", "vector", "exact")
        self._layers = layout.layers
        embeddings = [name for name, layer in self._layers.items() if layer.kind == "embedding"]
        shapes = {name: layer.extended for name, layer in self._layers.items()}
        self._eigen = Eigenbases(shapes, max_side, keeping=embeddings)
        self._factors = Factors(self._layers, self._eigen.sides, drawn=fisher == "sampled")
        self.probe = self._factors if self._layers else None

    def state_fields(self) -> dict[str, Field]:
        """`moment` and `mass` 1-beta^t as SISA; c and a in `spectra`, C and A in `grams`, `bases`, `nu`, `age` t."""
        return self._others.state_fields() | {
            "spectra": Field(self._eigen.spectra, minimum=0.0),
            "bases": Field(self._eigen.bases),
            "nu": Field(1, minimum=0.0),
            "age": Field(1, minimum=0.0),
            "grams": Field(self._eigen.bases, types=("float64",)),
        }

    def solver_fields(self) -> dict[str, Field]:
        """All but the age, and C and A."""
        return {name: field for name, field in self.state_fields().items() if name not in ("age", "grams")}

    def statistic_fields(self) -> dict[str, Field]:
        """`observed`: the gradient, (d,); `probed`: what `Factors` makes of the layers."""
        probed = {PROBED: averaged(sum(self._factors.sizes().values()))} if self.probe else {}
        return self._others.statistic_fields() | probed

    def statistic(self, gradient: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """The gradient itself."""
        return self._others.statistic(gradient, residual)

    def accumulate(self, state: State, statistic: State) -> dict[str, Tensor]:
        """One step of the moving averages, every `refresh` of them the bases, and the bound."""
        held = self._others.accumulate(state, statistic)
        held["age"] = state["age"] + 1
        # the averages are kept divided by 1-beta^t, which a basis and its eigenvalues then need not know
        step, due = (1 - self.beta) / held["mass"], state["age"] % self.refresh == 0
        grams, spectra, bases = state["grams"].clone(), state["spectra"].clone(), state["bases"]
        for side, own in self._factors.unpacked(statistic[PROBED]) if self.probe else ():
            if side.span is None:
                spectra[:, side.spectrum].lerp_(own.clamp(min=0), step)
            else:
                side.of(grams).lerp_(own.to(grams.dtype), step.unsqueeze(-1).to(grams.dtype))
        if due.any():
            fresh, values = self._eigen.decomposed(grams)
            bases = torch.where(due, fresh.to(bases.dtype), bases)
            spectra = torch.where(due & self._eigen.turned.to(due.device), values.to(spectra.dtype), spectra)
        held |= {"grams": grams, "spectra": spectra, "bases": bases}
        return held | {"nu": self._bound(held, statistic["observed"])}

    def scale(self, state: State) -> Tensor | None:
        """Geometric mean of Q's eigenvalues over each layer; mean of the root over each other tensor, (d,)."""
        scale = self._others.scale(state)
        if scale is None:
            return None
        for name, layer in self._layers.items():
            typical = self._eigenvalues(state, name).log().mean().exp()
            for tensor in layer.tensors:
                scale[self.layout.spans[tensor]] = typical
        return scale

    def solve(self, state: State, residual: Tensor, sigma: Tensor, rho: float) -> Tensor:
        """Turned into the eigenbases, divided by sigma + rho times Q's eigenvalues, turned back.

        sigma is one number a layer.
        """
        step = self._others.solve(state, residual, sigma, rho)
        inverses = self.factored(state, sigma, rho, lambda: self._inverses(state, sigma, rho))
        for name, layer in self._layers.items():
            left, right = self._eigen.sides[name]
            inside = turned(self._matrix(layer, residual), left, right, state["bases"])
            outside = turned(inside * inverses[name], left, right, state["bases"], back=True)
            self._write(layer, step, outside)
        return step

    def _matrix(self, layer: Layer, flat: Tensor) -> Tensor:
        """[W b] of a layer in flat vectors (C, d), (C, m, n)."""
        weight = flat[:, self.layout.spans[layer.weight]]
        if layer.kind == "embedding":
            return weight.unflatten(-1, layer.shape[::-1]).mT
        matrix = weight.unflatten(-1, layer.shape)
        if layer.bias is None:
            return matrix
        return torch.cat([matrix, flat[:, self.layout.spans[layer.bias], None]], dim=-1)

    def _write(self, layer: Layer, flat: Tensor, matrix: Tensor) -> None:
        """Write [W b] of a layer into flat vectors."""
        if layer.bias is not None:
            flat[:, self.layout.spans[layer.bias]] = matrix[..., -1]
        weight = matrix[..., : layer.shape[1]]
        flat[:, self.layout.spans[layer.weight]] = (
            weight.mT if layer.kind == "embedding" else weight
        ).flatten(1)

    def _inverses(self, state: State, sigma: Tensor, rho: float) -> dict[str, Tensor]:
        """1 / (sigma + rho q) of each layer's eigenvalues, (C, m, n)."""
        sigma = sigma.expand(self.layout.size)
        firsts = {name: sigma[self.layout.spans[layer.weight]][0] for name, layer in self._layers.items()}
        return {name: 1 / (first + rho * self._eigenvalues(state, name)) for name, first in firsts.items()}

    def _eigenvalues(self, state: State, name: str) -> Tensor:
        """Q's of a layer, (C, m, n)."""
        return self._fisher(state, name) / (self.gain * state["nu"]).unsqueeze(-1)

    def _fisher(self, state: State, name: str) -> Tensor:
        """F's eigenvalues of a layer, (C, m, n)."""
        left, right = (state["spectra"][:, side.spectrum] for side in self._eigen.sides[name])
        return left.unsqueeze(-1) * right.unsqueeze(-2) + self.damping

    def _bound(self, held: State, gradient: Tensor) -> Tensor:
        """nu, (C, 1)."""
        if self.kl_clip is None:
            return torch.ones_like(held["mass"])
        length = torch.zeros_like(held["mass"])
        for name, layer in self._layers.items():
            inside = turned(self._matrix(layer, gradient), *self._eigen.sides[name], held["bases"])
            length[:, 0] += (inside.square() / self._fisher(held, name)).sum(dim=(-2, -1))
        return (self.kl_clip / length.clamp(min=torch.finfo(length.dtype).tiny)).sqrt().clamp(max=1.0)


class Factors(Probe):
    """A and C of layers, each as its upper triangle or, where a side keeps its basis, as its diagonal.

    Args:
        layers: Name -> layer.
        sides: Their sides.
        drawn: As the base's.
    """

    def __init__(self, layers: Mapping[str, Layer], sides: Sides, drawn: bool) -> None:
        self._layers, self._sides, self.drawn = layers, sides, drawn

    def sizes(self) -> dict[str, int]:
        """The sum of the weights, C and A of each layer."""
        return {name: 1 + _packed(left) + _packed(right) for name, (left, right) in self._sides.items()}

    def reduce(self, layer: str, inputs: Tensor, gradients: Tensor, weights: Tensor) -> Tensor:
        """Sums over the examples: of the weights, of sum_t b_t b_t^T, and of the mean a_t a_t^T."""
        own, (left, right) = self._layers[layer], self._sides[layer]
        positions = own.positions(gradients)
        at_once = max(1, AT_ONCE // (positions * right.size))
        parts = zip(*(whole.split(at_once) for whole in (inputs, gradients, weights)), strict=True)
        made = [
            torch.cat(
                [share.sum()[None], _outputs(own, b, share, left), _inputs(own, a, share / positions, right)]
            )
            for a, b, share in parts
        ]
        return torch.stack(made).sum(dim=0)

    def unpacked(self, probed: Tensor) -> Iterator[tuple[Side, Tensor]]:
        """C and A of every layer, (C, size, size) or, of a side that keeps its basis, (C, size), in their order."""
        parts = probed.split(
            [n for left, right in self._sides.values() for n in (1, _packed(left), _packed(right))], dim=-1
        )
        for place, (left, right) in enumerate(self._sides.values()):
            weight, c, a = parts[3 * place : 3 * place + 3]
            yield left, _square(c, left)
            # a layer that is called twice is one of twice the positions: its b b^T add up, its a a^T do not
            yield right, _square(a / weight.clamp(min=torch.finfo(a.dtype).tiny), right)


def _packed(side: Side) -> int:
    """Length of a side's matrix, as it is sent."""
    return side.size if side.span is None else side.size * (side.size + 1) // 2


def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of an upper triangle's elements."""
    rows, columns = torch.triu_indices(size, size, device=device)
    return rows, columns


def _square(packed: Tensor, side: Side) -> Tensor:
    """The matrices (C, size, size) of what was sent, or the diagonals (C, size) of a side that keeps its basis."""
    if side.span is None:
        return packed
    rows, columns = _triangle(side.size, packed.device)
    matrix = packed.new_empty(len(packed), side.size, side.size)
    matrix[:, rows, columns] = matrix[:, columns, rows] = packed
    return matrix


def _moment(rows: Tensor, side: Side) -> Tensor:
    """Sum of r r^T over rows (k, size), or its diagonal."""
    return rows.square().sum(dim=0) if side.span is None else rows.mT @ rows


def _pack(moment: Tensor, side: Side) -> Tensor:
    """A moment as it is sent."""
    return moment if side.span is None else moment[_triangle(side.size, moment.device)]


def _scaled(batch: Tensor, weights: Tensor) -> Tensor:
    """Examples (B, ...) times the roots of their weights, so that products of two are weighted."""
    return batch * weights.sqrt().reshape(-1, *(1,) * (batch.dim() - 1))


def _outputs(layer: Layer, gradients: Tensor, weights: Tensor, side: Side) -> Tensor:
    """Weighted sum of b b^T, packed."""
    return _pack(_moment(layer.gradients(_scaled(gradients, weights)).flatten(0, 1), side), side)


def _inputs(layer: Layer, inputs: Tensor, weights: Tensor, side: Side) -> Tensor:
    """Weighted sum of a a^T, packed."""
    if layer.kind == "embedding":
        numbers = layer.inputs(inputs)
        spread = weights.unsqueeze(1).expand(numbers.shape)
        return weights.new_zeros(side.size).scatter_add(0, numbers.flatten(), spread.flatten())
    rows = layer.inputs(_scaled(inputs.float(), weights))  # linear in the inputs, of which there are fewer
    ones = weights.sqrt().unsqueeze(1).expand(rows.shape[:2]).flatten()
    rows = rows.flatten(0, 1)
    moment = _moment(rows, side)
    if layer.bias is not None:  # without a copy of all rows that has ones beside them
        moment = F.pad(moment, (0, 1) * moment.dim())
        moment[..., -1] = (
            ones @ ones if side.span is None else torch.cat([ones @ rows, (ones @ ones).reshape(1)])
        )
    return _pack(moment, side)
