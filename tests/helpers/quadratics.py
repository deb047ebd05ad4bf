"""Clients with F_i(w) = w'A_i w / 2 - b_i'w, through the framework's own server halves, gateway and clients."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import ConfigRecord, Message
from torch import nn

from pisa_fl.clients.executor import Executor
from pisa_fl.clients.flat_model import FlatModel
from pisa_fl.clients.host import ClientHost, ClientState
from pisa_fl.clients.stack import ClientData
from pisa_fl.data import ImageData
from pisa_fl.engines.local import LocalGrid
from pisa_fl.server.flowers_own import server_half
from pisa_fl.server.gateway import Gateway
from pisa_fl.tasks import Classification
from strategies import Batch, Layout, Penalty, Pisa, PisaClient
from strategies.base.layers import Layer
from strategies.base.messages import WEIGHTS, record, vectors
from strategies.preconditioners import (
    Identity,
    Kfac,
    Kronecker,
    Mfac,
    Muon,
    NewtonSchulz,
    SecondMoment,
    Spectral,
)

SHAPES = {"matrix": (3, 2), "filter": (2, 1, 2, 2), "vector": (3,)}
LAYOUT = Layout(SHAPES, {"layer": Layer("linear", "matrix", "vector", (3, 2))})
EXAMPLES = (5, 9, 2, 7)
ALPHA = torch.tensor(EXAMPLES, dtype=torch.float64) / sum(EXAMPLES)


class Tensors(nn.Module):
    """Nothing but parameters of the layout."""

    def __init__(self):
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


@dataclass
class Quadratics:
    """The clients' problems: A (N, d, d), eigenvalues 0.5 to 4, and b (N, d), in double precision."""

    a: torch.Tensor
    b: torch.Tensor

    @classmethod
    def draw(cls, seed=0, alike=False):
        generator = torch.Generator().manual_seed(seed)
        count, d = len(EXAMPLES), LAYOUT.size
        q, _ = torch.linalg.qr(torch.randn(count, d, d, generator=generator, dtype=torch.float64))
        values = 0.5 + 3.5 * torch.rand(count, d, generator=generator, dtype=torch.float64)
        a = q @ torch.diag_embed(values) @ q.mT
        b = torch.randn(count, d, generator=generator, dtype=torch.float64) * 2
        return cls(a[:1].expand_as(a), b[:1].expand_as(b)) if alike else cls(a, b)

    def optimum(self, lambda_=0.0, alpha=ALPHA):
        a = torch.einsum("i,ijk->jk", alpha, self.a) + lambda_ * torch.eye(LAYOUT.size, dtype=torch.float64)
        return torch.linalg.solve(a, alpha @ self.b)

    def gradients(self, w):
        """Of every client, at one point, (N, d)."""
        return self.a @ w - self.b


class QuadraticStack:
    """Clients of a stack; a batch tells nothing, for the gradient is exact. A probe sees a layer that there is not."""

    layout = LAYOUT
    buffers = torch.empty(0)
    probe = None

    def __init__(self, problem, clients, steps_per_epoch=1):
        self.clients = list(clients)
        self.differentiated = [1] * len(self.clients)
        self.passes = [1.0] * len(self.clients)
        self._a, self._b = problem.a[self.clients].float(), problem.b[self.clients].float()
        self._steps = steps_per_epoch

    def full_gradient(self, weights, gradient):
        w = weights.expand(len(self.clients), -1)
        slope = torch.einsum("cij,cj->ci", self._a, w)
        if self.probe is not None:
            self._show(w, slope - self._b)
        return slope - self._b, (w * (slope / 2 - self._b)).sum(dim=1)

    def gradient(self, weights, batch):
        return self.full_gradient(weights, "mean")

    @contextmanager
    def probed(self, probe):
        sums = {layer: torch.zeros(len(self.clients), size) for layer, size in probe.sizes().items()}
        self.probe = probe, sums
        yield sums
        self.probe = None

    def _show(self, weights, gradients):
        probe, sums = self.probe
        for layer, of_all in sums.items():
            for row, seen, back in zip(of_all, weights, gradients, strict=True):
                row += probe.reduce(layer, seen[:8].view(4, 2), back[:12].view(4, 3), torch.full((4,), 0.25))

    def batches(self, epochs):
        ones = torch.ones(len(self.clients))
        for _ in range(epochs * self._steps):
            yield Batch({}, ones, [1] * len(self.clients))


@dataclass
class Bench:
    """A federation of quadratics. Faults of a round are given to `round` as sets of clients."""

    strategy: object
    half: object
    participation: float = 1.0
    stack: int = len(EXAMPLES)
    number: int = 0
    losing: set = field(default_factory=set)

    def __post_init__(self):
        nothing = np.zeros((1, 1, 1, 1), np.uint8)
        labels = np.zeros(1, np.int64)
        data = ImageData(nothing, labels, nothing, labels, ("0",), (0.0,), (1.0,))
        model = FlatModel(Tensors(), Classification(), torch.device("cpu"))
        rows = {
            i: ClientData({"inputs": torch.zeros(1)}, torch.zeros(n, dtype=torch.int64))
            for i, n in enumerate(EXAMPLES)
        }
        self.host = ClientHost(Executor(model, self.half, data, rows, 0, 1, 1), self.stack)
        bench = self

        class Line(LocalGrid):
            """Loses the replies it is told to lose."""

            def send_and_receive(self, messages, *, timeout=None):
                replies = super().send_and_receive(messages, timeout=timeout)
                return [r for r in replies if r.metadata.src_node_id not in bench.losing]

        server = server_half(self.strategy)
        self.gateway = Gateway(Line(self.host), self.half, torch.empty(0), 0, self.participation, server)
        self.arrays = record({WEIGHTS: torch.zeros(LAYOUT.size)})

    @property
    def consensus(self):
        return vectors(self.arrays)[WEIGHTS]

    def round(self, drawn=None, lost=(), forgetful=()):
        """One round: of whom, whose reply is lost, and who loses its state beforehand."""
        self.number += 1
        self.losing = set(lost)
        for client in forgetful:
            self.host.states[client] = ClientState()
        self.gateway.begin(self.number)
        messages = self.strategy.configure_train(self.number, self.arrays, ConfigRecord(), self.gateway)
        asked: list[Message] = [m for m in messages if drawn is None or m.metadata.dst_node_id in drawn]
        replies = self.gateway.send_and_receive(asked)
        arrays, _ = self.strategy.aggregate_train(self.number, replies)
        self.gateway.commit()
        self.arrays = self.arrays if arrays is None else arrays
        return replies


@contextmanager
def solving(problem, failing=frozenset(), steps_per_epoch=1):
    """While it lasts, hosted clients solve a quadratic problem, and some of them raise."""

    def stack(model, data, examples, *_):
        if broken := sorted(failing & set(examples)):
            raise RuntimeError(f"client {broken[0]} is broken")
        return QuadraticStack(problem, examples, steps_per_epoch)

    with patch("pisa_fl.clients.executor.LocalStack", stack):
        yield


def second_moment(average="vector", beta=0.9):
    return partial(
        *(SecondMoment,),
        **{"beta": beta, "eps": 1e-8, "floor": 0.0, "moment_of": "residual"},
        **{"average": average, "bias_correction": "exact"},
    )


def kfac(form, schedule):
    return partial(
        *(Kfac,),
        **{"beta": 0.9, "damping": 0.1, "schedule": schedule, "final": 1.0, "horizon": 0, "kl_clip": 1.0},
        **{"gain": 1.0, "fisher": "empirical", "form": form, "max_side": 8, "refresh": 1, "eps": 1e-8},
    )


PRECONDITIONERS = {
    "identity": partial(Identity),
    "second moment": second_moment(),
    "squares": second_moment("square"),
    "spectral": partial(Spectral, beta=0.9, moment_of="residual", others=second_moment()),
    "kronecker": partial(Kronecker, beta=0.9, eps=1e-8, max_side=8, refresh=1, factored=0.5),
    "kfac": kfac("eigen", "constant"),
    "kfac, adaptive": kfac("cholesky", "adaptive"),
    "mfac": partial(Mfac, gradients=4, damping=0.1),
    "newton_schulz": partial(NewtonSchulz, mu=0.95, steps=5, eps=1e-8, others=second_moment()),
    "muon": partial(Muon, mu=0.8, nesterov=True, method="newton_schulz", steps=5, beta=0.9, eps=1e-8),
}


def pisa_bench(
    preconditioner,
    align_every=1,
    lambda_=0.0,
    local_steps=1,
    alpha="examples",
    forget_after=None,
    *,
    wire="primal",
    lag=1,
    bound=None,
    friction=0.0,
    trim=0.0,
    difference=1.0,
    **options,
):
    """A bench of PISA with a preconditioner, by name or made from a layout; other options are of its penalty."""
    consensus = options.get("consensus", "all")
    both = {"wire": wire, "lag": lag, "friction": friction, "difference": difference}
    sending = {key: options.pop(key) for key in ("compression", "keep") if key in options}
    bench = {key: options.pop(key) for key in ("participation", "stack") if key in options}
    settings = {"lr": 0.1, "momentum": 0.9, "sigma": 6.0, "rho": 1.0, "gamma": 1.0, "grow_every": 10}
    penalty = Penalty(**settings | options)
    make = PRECONDITIONERS.get(preconditioner, preconditioner)
    return Bench(
        Pisa(
            *(LAYOUT, make, penalty, lambda_, align_every, alpha),
            **both,
            local_steps=local_steps,
            consensus=consensus,
            bound=bound,
            trim=trim,
            forget_after=forget_after,
        ),
        PisaClient(LAYOUT, make, penalty, align_every, local_steps, "mean", **both, **sending),
        **bench,
    )


def duals_of(ledger):
    """Duals of all its clients, by client number, (N, d)."""
    return torch.stack([ledger.dual(client) for client in sorted(ledger.clients)])
