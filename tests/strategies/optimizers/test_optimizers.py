"""Optimizers of local steps against PyTorch's own, in double precision, and SAM against its equations."""

from functools import partial

import pytest
import torch
from quadratics import EXAMPLES, LAYOUT, Quadratics, QuadraticStack

from strategies import Instruction, LocalSgd
from strategies.base.messages import WEIGHTS
from strategies.optimizers import AdamW, Muon, Sam, Sgd

LR, DECAY, CLIENTS, STEPS = 0.05, 0.1, 3, 6


def exact_muon(layout, momentum, weight_decay, nesterov=True):
    return Muon(layout, momentum, weight_decay, nesterov, "newton_schulz", 5, beta_2=0.95, eps=1e-8)


def theirs(parameters, name, momentum):
    """PyTorch's optimizers of one client's tensors: Muon's takes matrices alone."""
    if name == "sgd":
        return [torch.optim.SGD(parameters.values(), LR, momentum, weight_decay=DECAY)]
    if name == "adamw":
        return [torch.optim.AdamW(parameters.values(), LR, (momentum, 0.99), 1e-6, DECAY)]
    matrices = [p for p in parameters.values() if p.dim() == 2]
    rest = [p for p in parameters.values() if p.dim() == 1]
    muon = {"momentum": momentum, "nesterov": name == "muon", "adjust_lr_fn": "match_rms_adamw"}
    return [
        torch.optim.Muon(matrices, LR, DECAY, **muon),
        torch.optim.AdamW(rest, LR, (momentum, 0.95), 1e-8, DECAY),
    ]


OURS = {
    "sgd": lambda momentum: Sgd(LAYOUT, momentum, DECAY),
    "adamw": lambda momentum: AdamW(LAYOUT, momentum, DECAY, beta_2=0.99, eps=1e-6),
    "muon": lambda momentum: exact_muon(LAYOUT, momentum, DECAY),
    "muon without look-ahead": lambda momentum: exact_muon(LAYOUT, momentum, DECAY, nesterov=False),
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", OURS)
def test_steps_are_pytorchs(name, momentum, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # in which PyTorch's Muon computes
    draw = torch.Generator().manual_seed(2)
    weights, *pulls = torch.randn(1 + STEPS, CLIENTS, LAYOUT.size, generator=draw, dtype=torch.float64)

    def differentiate(at, pull):
        return 2 * at + pull, at.sum(1)  # clients differ, and gradients depend on where they are taken

    expected = []
    for client in range(CLIENTS):
        parts = weights[client].clone().split(LAYOUT.sizes)
        shapes = [(shape[0], -1) if len(shape) > 1 else shape for shape in LAYOUT.shapes.values()]
        parameters = {
            name: torch.nn.Parameter(part.view(shape))
            for name, part, shape in zip(LAYOUT.shapes, parts, shapes, strict=True)
        }
        optimizers = theirs(parameters, name, momentum)
        for pull in pulls:
            flat = torch.cat([p.detach().flatten() for p in parameters.values()])
            gradient, _ = differentiate(flat[None], pull[client][None])
            for p, part in zip(parameters.values(), gradient[0].split(LAYOUT.sizes), strict=True):
                p.grad = part.view(p.shape).clone()
            for optimizer in optimizers:
                optimizer.step()
        expected.append(torch.cat([p.detach().flatten() for p in parameters.values()]))
    optimizer, at = OURS[name](momentum), weights.clone()
    memory = optimizer.begin(at)
    assert {name: row.shape for name, row in memory.items()} == {
        name: (CLIENTS, field.size) for name, field in optimizer.memory_fields().items()
    }
    for pull in pulls:
        gradient, loss = optimizer.gradient(memory, lambda where, pull=pull: differentiate(where, pull), at)
        assert torch.equal(loss, at.sum(1))
        at.sub_(optimizer.direction(memory, gradient, at), alpha=LR)
    torch.testing.assert_close(at, torch.stack(expected), rtol=1e-9, atol=1e-10)


def test_sam_takes_the_gradient_of_the_worst_point_nearby():
    # of F = h |w|^2 / 2 that is h (1 + radius / |w|) w, and where the gradient is zero there is no such point
    h, radius = torch.tensor([[2.0], [5.0], [3.0]]).double(), 0.3
    weights = torch.randn(3, LAYOUT.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[2] = 0.0
    asked = []

    def differentiate(at):
        asked.append(at)
        return h * at, (h * at.square()).sum(1) / 2

    gradient, loss = Sam(LAYOUT, 0.0, DECAY, radius).gradient({}, differentiate, weights)
    lengths = weights.norm(dim=1, keepdim=True)
    nearby = h * weights * (1 + radius / lengths.clamp(min=1e-30))
    torch.testing.assert_close(gradient, nearby + DECAY * weights, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss, differentiate(weights)[1])
    assert torch.equal(asked[0], weights)
    torch.testing.assert_close((asked[1] - weights).norm(dim=1), torch.tensor([radius, radius, 0.0]).double())


FIXED = torch.arange(LAYOUT.size) % 3 == 1
FACTORIES = {
    "sgd": Sgd,
    "sam": partial(Sam, radius=0.3),
    "adamw": partial(AdamW, beta_2=0.99, eps=1e-6),
    "muon": exact_muon,
}


def descend_in_part(name):
    """Where clients with quadratic losses begin, and where their free weights take them."""
    problem, start = Quadratics.draw(), torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(4))
    half = LocalSgd(LAYOUT, LR, 0.9, DECAY, STEPS, optimizer=FACTORIES[name])
    stack = QuadraticStack(problem, range(len(EXAMPLES)))
    return problem, start, half.descend(stack, start, LR, 0.0, fixed=FIXED).weights


@pytest.mark.parametrize("name", FACTORIES)
def test_what_is_fixed_stays_whatever_the_optimizer(name):
    _, start, ends = descend_in_part(name)
    assert torch.equal(ends[:, FIXED], start[FIXED].expand(len(EXAMPLES), -1))
    assert (ends - start)[:, ~FIXED].all()


def test_sams_points_nearby_are_among_the_free_weights_alone():
    problem, start, ends = descend_in_part("sam")
    free, constant = start.double()[~FIXED], start.double()[FIXED]
    for a, b, end in zip(problem.a, problem.b, ends, strict=True):
        # the client's loss as a function of its free weights
        a, b = a[~FIXED][:, ~FIXED], b[~FIXED] - a[~FIXED][:, FIXED] @ constant
        w, buffer = free.clone(), torch.zeros_like(free)
        for _ in range(STEPS):
            h = a @ w - b
            buffer = 0.9 * buffer + a @ (w + 0.3 * h / h.norm()) - b + DECAY * w
            w = w - LR * buffer
        torch.testing.assert_close(end[~FIXED].double(), w, rtol=1e-5, atol=1e-5)


def test_lr_falls_by_its_decay_from_round_to_round():
    half = LocalSgd(LAYOUT, 0.1, 0.0, 0.0, 1, lr_decay=0.5)
    rates = [half.lr_now(Instruction({WEIGHTS: torch.zeros(1)}, {"server-round": r})) for r in (1, 2, 4)]
    assert rates == [0.1, 0.05, 0.0125]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sam(LAYOUT, 0.9, 0.0, -0.1), "radius must not be negative"),
        (lambda: AdamW(LAYOUT, 0.9, 0.0, 1.0, 1e-8), "beta_2 must be at least 0 and below 1"),
        (lambda: AdamW(LAYOUT, 0.9, 0.0, 0.9, 0.0), "eps must be positive"),
        (lambda: Muon(LAYOUT, 0.9, 0.0, True, "svd", 5, 0.9, 1e-8), "method must be newton_schulz"),
        (lambda: Muon(LAYOUT, 0.9, 0.0, True, "eigh", 0, 0.9, 1e-8), "steps must be a whole number of 1"),
        (lambda: LocalSgd(LAYOUT, 0.1, 0.9, 0.0, 1, lr_decay=1.1), "lr_decay must be above 0 and at most 1"),
    ],
)
def test_impossible_numbers_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
