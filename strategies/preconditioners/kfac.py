"""K-FAC: the Fisher matrix of each layer as the Kronecker product of two small matrices.

K-FAC (Martens & Grosse 2015, arXiv 1503.05671; Grosse & Martens 2016, arXiv 1602.01407, for convolutions). A layer
multiplies rows a (what goes into it, with a 1 appended for the bias) by a matrix W (m x n); b are the gradients of an
example's loss with respect to what comes out of it. At T positions (a convolution's patches, a sequence's elements):

    A  = E[ (1/T) sum_t a_t a_t^T ]          C  = E[ sum_t b_t b_t^T ]          moving averages, decay beta
    C  = U diag(c) U^T,                      A  = Z diag(a) Z^T                 `form: eigen`, every `refresh` times
    F  = C x A + damping I                   the Fisher matrix of W, its inputs independent of its gradients
    nu = min(1, sqrt(kl_clip / (g^T F^-1 g)))                                   over all layers
    Q  = F / (gain nu)

so that, R being the residual of [W b],

    (sigma I + rho Q)^-1 R  =  U [ U^T R Z / (sigma + rho (c a^T + damping) / (gain nu)) ] Z^T

exactly. `form: cholesky` needs no eigenvectors. It divides a damping between C and A, which leaves a Kronecker product
(Martens & Grosse, section 6.3), and sigma I is a damping like any other: with s = rho/(gain nu) and e = sigma +
s damping, sigma I + rho Q = s C x A + e I becomes

    (sqrt(s) C + sqrt(e)/p I) x (sqrt(s) A + p sqrt(e) I)                   p^2 = (tr A / n) / (tr C / m)

which is inverted exactly, sigma I where rho = 0. That is sigma I + rho Q' with a Q' that is larger than Q, by
sqrt(s e) (p C x I + (1/p) I x A) / rho, and depends on sigma: steps are shorter, above all along those directions in
which one of C and A is large and the other small. In nu and q, F is this form's, at s = 1 and e = damping.

`fisher: sampled` is the Fisher matrix: its targets are drawn from the model's output, which takes a second
backward pass; `empirical` has those of the data. What goes into an embedding are unit vectors, and A is diagonal. Of
sides longer than `max_side` only the diagonal is taken. A convolution in groups is as many convolutions side by side,
each with its own A and C: as between layers, what is off the blocks is left out. (Where one pair of factors is shared,
as in curvlinops, A is of the inputs' average over groups, in which they may cancel.) What belongs to no such layer
follows the second moment, as in SISA, with the same beta: norms, and transposed convolutions.

A and C are expectations over examples: the averages of the clients' are those of the whole federation, whatever the
skew. Clients send their upper triangles beside the gradient, in rounds that Q learns from: `strategy.align_every` is
the interval of the factors, `refresh` that of what is solved with, counted in factors. A client's are sums over its
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

`schedule` lets the damping fall as lr does, or adapt (`strategies.preconditioners.kfac_damping`). To adapt, clients
send their loss beside the factors, and the server keeps the gradient and what the consensus has moved by since. The
paper's step minimises what it is predicted by, while this one has momentum and sigma; lambda is in neither decrease.
With everybody there h is the federation's loss. Where only some answer, it is the average of what all have said last
(consensus `fresh`, whose gradient g is as old), or of other clients than before (`all`): then the ratio tells less of
the step than of who was drawn. A Q of a client's own knows of no step of the consensus, and its damping stays.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field, averaged
from strategies.preconditioners.base import LOSS, PROBED, Preconditioner, State
from strategies.preconditioners.eigenbases import Eigenbases, Side
from strategies.preconditioners.kfac_damping import Damping
from strategies.preconditioners.kfac_factors import Factors
from strategies.preconditioners.kfac_inverses import CholeskyForm, EigenForm, Inverse
from strategies.preconditioners.second_moment import SecondMoment


@checks.literals
class Kfac(Preconditioner):
    """Natural gradient steps of linear layers, convolutions and embeddings.

    Args:
        layout: Layout of the model's parameters.
        beta: Decay of the moving averages of A and C; KAISA: 0.95.
        damping: Added to the eigenvalues of C x A, its first value; KAISA: 0.003.
        schedule: How the damping changes, as of `strategies.preconditioners.kfac_damping`.
        final: What a schedule leaves of it, as a share.
        horizon: Times that factors come until then.
        kl_clip: Greatest g^T F^-1 g, or None for no bound.
        gain: Rate of a natural gradient, in units of `lr`.
        fisher: Whose targets the gradients b are of: `sampled` from the model's output, or `empirical`, the data's.
        form: How F is damped and inverted: `eigen`, or `cholesky`.
        max_side: Of longer sides only the diagonal is taken.
        refresh: What is solved with is made of A and C every so many times that factors come.
        eps: Added to the root of the second moment of what belongs to no such layer; SISA: 1e-8.

    Raises:
        ValueError: A value is outside its range.
    """

    gradient_field = "observed"
    trust = 4.0  # kl_clip bounds its steps already; with 1, simple_cnn took twice the rounds to 95 %

    def __init__(
        self,
        layout: Layout,
        beta: float,
        damping: float,
        schedule: Literal["constant", "linear", "cosine", "adaptive"],
        final: float,
        horizon: int,
        kl_clip: float | None,
        gain: float,
        fisher: Literal["sampled", "empirical"],
        form: Literal["eigen", "cholesky"],
        max_side: int,
        refresh: int,
        eps: float,
    ) -> None:
        checks.decay("beta", beta)
        if kl_clip is not None:
            checks.positive("kl_clip", kl_clip)
        checks.whole("max_side", max_side, 1)
        checks.whole("refresh", refresh, 1)
        checks.positive("gain", gain)
        self.layout, self.beta, self.gain = layout, beta, gain
        self._damping = Damping(damping, schedule, final, horizon)
        self.kl_clip, self.refresh = kl_clip, refresh
        self._others = SecondMoment(layout, beta, eps, 0.0, "gradient", "vector", "exact")
        self._layers = layout.layers
        embeddings = [name for name, layer in self._layers.items() if layer.kind == "embedding"]
        shapes = {name: (*layer.axes, *layer.extended) for name, layer in self._layers.items()}
        self._eigen = Eigenbases(shapes, max_side, keeping=embeddings)
        self._form = EigenForm(self._eigen) if form == "eigen" else CholeskyForm(self._eigen)
        self._factors = Factors(self._layers, self._eigen.sides, drawn=fisher == "sampled")
        self.probe = self._factors if self._layers else None
        self._adapts = self._damping.adapts and bool(self._layers)

    def state_fields(self) -> dict[str, Field]:
        """`moment` and `mass` 1-beta^t as SISA; C and A in `grams`, `sides` and `spectra` of them.

        Beside them `damping`, `nu` and `age` t; and, if the damping adapts, what a decrease is predicted from:
        `gradient`, `step` since then, and the loss `before`.
        """
        before = {"gradient": self.layout.size, "step": self.layout.size, "before": 1} if self._adapts else {}
        return self._others.state_fields() | {
            "spectra": Field(self._eigen.spectra, minimum=0.0),
            "sides": Field(self._eigen.bases),
            "damping": Field(1, minimum=0.0),
            "nu": Field(1, minimum=0.0),
            "age": Field(1, minimum=0.0),
            "grams": Field(self._eigen.bases, types=("float64",)),
            **{name: Field(size) for name, size in before.items()},
        }

    def solver_fields(self) -> dict[str, Field]:
        """Without what the averages and the damping are made of."""
        fields = self.state_fields()
        names = *self._others.state_fields(), "spectra", "sides", "damping", "nu"
        return {name: fields[name] for name in names}

    def statistic_fields(self) -> dict[str, Field]:
        """`observed`: the gradient, (d,); `probed`: what `Factors` makes of the layers; `loss`, if damping adapts."""
        probed = {PROBED: averaged(sum(self._factors.sizes().values()))} if self.probe else {}
        return self._others.statistic_fields() | probed | ({LOSS: averaged(1)} if self._adapts else {})

    def statistic(self, gradient: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """The gradient itself."""
        return self._others.statistic(gradient, residual)

    def accumulate(self, state: State, statistic: State) -> dict[str, Tensor]:
        """One step of the moving averages, every `refresh` of them what is solved with; the damping and the bound."""
        held = self._others.accumulate(state, statistic)
        held["age"] = state["age"] + 1
        # the averages are kept divided by 1-beta^t, which a basis and its eigenvalues then need not know
        step, due = (1 - self.beta) / held["mass"], state["age"] % self.refresh == 0
        grams, spectra, sides = state["grams"].clone(), state["spectra"].clone(), state["sides"]
        for side, own in self._factors.unpacked(statistic[PROBED]) if self.probe else ():
            if side.span is None:
                spectra[:, side.spectrum].lerp_(own.flatten(1).clamp(min=0), step)
            else:
                grams[:, side.span].lerp_(own.flatten(1).to(grams.dtype), step.to(grams.dtype))
        if due.any():
            fresh, values = self._form.prepared(grams)
            sides = torch.where(due, fresh.to(sides.dtype), sides)
            spectra = torch.where(due & self._eigen.turned.to(due.device), values.to(spectra.dtype), spectra)
        held |= {"grams": grams, "spectra": spectra, "sides": sides}
        held["damping"] = self._damping.scheduled(state["age"])
        if self._adapts:
            followed = self._damping.adapted(
                state["damping"], state["before"] - statistic[LOSS], self._predicted(state)
            )
            held["damping"] = torch.where(state["age"] > 0, followed, held["damping"])
            gradient = statistic["observed"]
            held |= {"gradient": gradient, "step": torch.zeros_like(gradient), "before": statistic[LOSS]}
        return held | {"nu": self._bound(held, statistic["observed"])}

    def moved(self, state: State, step: Tensor) -> State:
        """With the step added to those since the last gradient, if the damping adapts."""
        return {**state, "step": state["step"] + step} if self._adapts else state

    def scale(self, state: State) -> Tensor | None:
        """Geometric mean of Q's eigenvalues over each layer; mean of the root over each other tensor, (d,)."""
        scale = self._others.scale(state)
        if scale is None:
            return None
        for name, layer in self._layers.items():
            typical = self._fisher(state, name).typical() / (self.gain * state["nu"])
            for tensor in layer.tensors:
                scale[self.layout.spans[tensor]] = typical[0]
        return scale

    def solve(self, state: State, residual: Tensor, sigma: Tensor, rho: float) -> Tensor:
        """By the inverse of each layer's sigma I + rho Q; sigma is one number a layer."""
        step = self._others.solve(state, residual, sigma, rho)
        inverses = self.factored(state, sigma, rho, lambda: self._inverses(state, sigma, rho))
        for name, layer in self._layers.items():
            self.layout.write(layer, step, inverses[name](self.layout.extended(layer, residual)))
        return step

    def _inverses(self, state: State, sigma: Tensor, rho: float) -> dict[str, Inverse]:
        """The inverse of each layer's sigma I + rho Q."""
        sigma = sigma.expand(self.layout.size)
        share = rho / (self.gain * state["nu"])
        return {
            name: self._form.inverse(
                *(state, name, share),
                sigma[self.layout.spans[layer.weight]][0] + share * state["damping"],
            )
            for name, layer in self._layers.items()
        }

    def _fisher(self, state: State, name: str) -> Inverse:
        """The inverse of a layer's F."""
        return self._form.inverse(state, name, torch.ones_like(state["damping"]), state["damping"])

    def _predicted(self, state: State) -> Tensor:
        """Decrease of the loss along the step, (C, 1); the curvature is F's, and none of what belongs to no layer."""
        decrease = -(state["gradient"] * state["step"]).sum(dim=-1, keepdim=True)
        for name, layer in self._layers.items():
            step = self.layout.extended(layer, state["step"])
            left, right = self._eigen.sides[name]
            curved = _product(state, right, _product(state, left, step).mT).mT
            curved = curved + state["damping"].reshape(-1, *(1,) * (step.dim() - 1)) * step
            decrease -= (step * curved).flatten(1).sum(dim=-1, keepdim=True) / 2
        return decrease

    def _bound(self, held: State, gradient: Tensor) -> Tensor:
        """nu, (C, 1)."""
        if self.kl_clip is None:
            return torch.ones_like(held["mass"])
        length = torch.zeros_like(held["mass"])
        for name, layer in self._layers.items():
            matrix = self.layout.extended(layer, gradient)
            length[:, 0] += (matrix * self._fisher(held, name)(matrix)).flatten(1).sum(dim=-1)
        return (self.kl_clip / length.clamp(min=torch.finfo(length.dtype).tiny)).sqrt().clamp(max=1.0)


def _product(state: State, side: Side, matrix: Tensor) -> Tensor:
    """C or A times a matrix."""
    if side.span is None:
        return side.values(state["spectra"]).unsqueeze(-1) * matrix
    return side.of(state["grams"]).to(matrix.dtype) @ matrix
