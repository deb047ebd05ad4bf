"""AdaBelief, Adafactor, SGD-SaI and Shampoo against other libraries' optimisers and dense linear algebra."""

from functools import partial

import pytest
import pytorch_optimizer
import torch
from quadratics import Quadratics, pisa_bench, solving
from torch import nn

from strategies import Layout
from strategies.preconditioners import AdaBelief, Adafactor, SgdSai, Shampoo

SHAPES = {"wide": (2, 5), "filter": (4, 3, 2, 1), "vector": (4,), "number": (1,)}
LAYOUT = Layout(SHAPES)
C, STEPS = 2, 4
MAKE = {
    "adabelief": partial(AdaBelief, beta1=0.8, beta2=0.9, eps=1e-10),
    "adafactor": partial(Adafactor, decay=0.8, eps=0.0),
    "sgd_sai": partial(SgdSai, eps=1e-8),
    "shampoo": partial(Shampoo, beta=0.9, eps=1e-8, max_side=8, refresh=1),
}
ZERO = torch.tensor(0.0, dtype=torch.float64)


@pytest.fixture
def gradients():
    torch.manual_seed(0)
    return [torch.randn(C, LAYOUT.size, dtype=torch.float64) for _ in range(STEPS)]


def observed(preconditioner, gradients):
    count = len(gradients[0])
    fields = preconditioner.state_fields()
    state = {name: torch.zeros(count, field.size, dtype=torch.float64) for name, field in fields.items()}
    for gradient in gradients:
        state = preconditioner.accumulate(state, preconditioner.statistic(gradient, None))
    return state


def optimised(make, gradients):
    """Parameters before and after the last step of an optimiser, and the optimiser, for the first client."""
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES.values()]
    optimiser = make(parameters)
    for gradient in gradients:
        before = torch.cat([p.detach().flatten() for p in parameters])
        for parameter, part in zip(parameters, LAYOUT.views(gradient[0]).values(), strict=True):
            parameter.grad = part.clone()
        optimiser.step()
    return before, torch.cat([p.detach().flatten() for p in parameters]), parameters, optimiser


def test_adabelief_is_that_of_pytorch_optimizer(gradients):
    make = partial(pytorch_optimizer.AdaBelief, lr=0.1, betas=(0.8, 0.9), eps=1e-10, weight_decay=0.0)
    before, after, *_ = optimised(make, gradients)
    preconditioner, mean = MAKE["adabelief"](LAYOUT), ZERO
    for gradient in gradients:
        mean = 0.8 * mean + 0.2 * gradient
    mean = mean / (1 - 0.8**STEPS)
    step = preconditioner.solve(observed(preconditioner, gradients), mean, ZERO, 1.0)
    torch.testing.assert_close(0.1 * step[0], before - after, rtol=1e-6, atol=1e-10)


def test_adafactor_has_the_moments_of_torch(gradients):
    *_, parameters, optimiser = optimised(partial(torch.optim.Adafactor, lr=0.1), gradients)
    preconditioner = MAKE["adafactor"](LAYOUT)
    step = preconditioner.solve(observed(preconditioner, gradients), torch.ones_like(gradients[0]), ZERO, 1.0)
    for (name, shape), parameter in zip(SHAPES.items(), parameters, strict=True):
        if len(shape) == 4:
            continue  # torch does not read convolutions as matrices
        state, own = optimiser.state[parameter], step[0, LAYOUT.spans[name]].view(shape)
        moment = (
            state["row_var"] @ state["col_var"] / state["row_var"].mean()
            if len(shape) == 2
            else state["variance"]
        )
        torch.testing.assert_close(1 / own, moment.sqrt())


def test_adafactor_has_the_means_of_the_whole_moment(gradients):
    """A convolution's rows are its outputs."""
    preconditioner = MAKE["adafactor"](LAYOUT)
    state = observed(preconditioner, gradients)
    whole = ZERO
    for age, gradient in enumerate(gradients, start=1):
        whole = torch.lerp(whole.expand_as(gradient), gradient.square(), torch.tensor(age**-0.8).double())
    own = preconditioner.solve(state, torch.ones_like(whole), ZERO, 1.0) ** -2
    for matrices in zip(*(LAYOUT.each_matrix(moment) for moment in (own, whole)), strict=True):
        (_, mine), (_, theirs) = matrices
        for dim in (-1, -2):
            torch.testing.assert_close(mine.mean(dim), theirs.mean(dim))


def test_sgd_sai_keeps_the_ratio_of_the_first_gradient(gradients):
    make = partial(pytorch_optimizer.SGDSaI, lr=0.1, momentum=0.0, weight_decay=0.0)
    before, after, *_ = optimised(make, gradients)
    preconditioner = MAKE["sgd_sai"](LAYOUT)
    step = preconditioner.solve(observed(preconditioner, gradients), gradients[-1], ZERO, 1.0)
    for name in ("wide", "filter"):
        span = LAYOUT.spans[name]
        torch.testing.assert_close(0.1 * step[0, span], (before - after)[span])
    assert step[0, LAYOUT.spans["number"]] == pytest.approx(gradients[-1][0, LAYOUT.spans["number"]])


def test_sgd_sai_waits_for_a_gradient(gradients):
    first = gradients[0].clone()
    first[:, LAYOUT.spans["vector"]] = 0
    preconditioner = MAKE["sgd_sai"](LAYOUT)
    waited = preconditioner.scale(observed(preconditioner, [first]))[LAYOUT.spans["vector"]]
    assert waited.tolist() == [0.5] * 4
    both, second = (observed(preconditioner, some) for some in ([first, gradients[1]], gradients[1:2]))
    place = list(SHAPES).index("vector")
    assert torch.equal(both["ratio"][:, place], second["ratio"][:, place])
    assert not torch.equal(both["ratio"], second["ratio"])


@pytest.mark.parametrize("max_side", [8, 5, 1])
def test_shampoo_is_the_dense_inverse(gradients, max_side):
    preconditioner = Shampoo(LAYOUT, beta=0.9, eps=1e-8, max_side=max_side, refresh=1)
    right, sigma, rho = gradients[0], torch.tensor(0.3, dtype=torch.float64), 0.7
    step = preconditioner.solve(observed(preconditioner, gradients), right, sigma, rho)
    weights = [0.1 * 0.9**k / (1 - 0.9**STEPS) for k in reversed(range(STEPS))]
    for name in ("wide", "filter"):
        span, (m, n) = LAYOUT.spans[name], LAYOUT.matrices[name]
        observations = [gradient[0, span].view(m, n) for gradient in gradients]
        left = sum(w * g @ g.T / n for w, g in zip(weights, observations, strict=True))
        other = sum(w * g.T @ g / m for w, g in zip(weights, observations, strict=True))
        roots = []
        for gram in (left, other):
            gram = gram if 1 < len(gram) <= max_side else gram.diag().diag()
            values, vectors = torch.linalg.eigh(gram)
            roots.append(vectors @ values.clamp(min=0).pow(0.25).diag() @ vectors.T)
        q = torch.kron(*roots) + 1e-8 * torch.eye(m * n, dtype=torch.float64)
        expected = torch.linalg.solve(sigma * torch.eye(m * n, dtype=torch.float64) + rho * q, right[0, span])
        torch.testing.assert_close(step[0, span], expected, rtol=1e-5, atol=1e-7)
    vector = sum(w * g[0, LAYOUT.spans["vector"]] ** 2 for w, g in zip(weights, gradients, strict=True))
    torch.testing.assert_close(
        step[0, LAYOUT.spans["vector"]],
        right[0, LAYOUT.spans["vector"]] / (sigma + rho * (vector.sqrt() + 1e-8)),
    )


@pytest.mark.parametrize("name", MAKE)
def test_clients_at_once_are_each_alone_and_scale_is_the_mean_of_q(name, gradients):
    preconditioner = MAKE[name](LAYOUT)
    state = observed(preconditioner, gradients)
    sigma = LAYOUT.expand(torch.tensor([0.3, 0.5, 1.1, 2.0], dtype=torch.float64))
    both = preconditioner.solve(state, gradients[0], sigma, 0.7)
    for client in range(C):
        rows = slice(client, client + 1)
        alone = observed(preconditioner, [gradient[rows] for gradient in gradients])
        torch.testing.assert_close(preconditioner.solve(alone, gradients[0][rows], sigma, 0.7), both[rows])
    assert preconditioner.scale(preconditioner.nothing()) is None
    first = {key: value[:1] for key, value in state.items()}
    units = torch.eye(LAYOUT.size, dtype=torch.float64)
    dense = torch.cat([preconditioner.solve(first, unit.view(1, -1), ZERO, 1.0) for unit in units])
    q = torch.linalg.inv(dense)
    means = torch.stack([part.mean() for part in q.diag().split(LAYOUT.sizes)])
    scale = preconditioner.scale(first)[[span.start for span in LAYOUT.spans.values()]]
    torch.testing.assert_close(scale, means, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("align_every", [0, 1])
@pytest.mark.parametrize("name", MAKE)
def test_the_optimum_is_found(name, align_every):
    problem = Quadratics.draw()
    bench = pisa_bench(MAKE[name], align_every, participation=0.5)
    with solving(problem):
        for _ in range(150):
            bench.round()
    optimum = problem.optimum()
    assert (bench.consensus.double() - optimum).norm() <= 1e-5 * optimum.norm()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("name", MAKE)
def test_both_wires_take_the_same_path(name, lag):
    options = {"lag": lag, "stack": 1, "consensus": "fresh", "sigma": None, "rho": None}
    benches = [pisa_bench(MAKE[name], wire=wire, **options) for wire in ("primal", "gradient")]
    with solving(Quadratics.draw(seed=3)):
        for number in range(6):
            for bench in benches:
                bench.round(lost={1, 3} if number == 2 else ())
    assert torch.equal(benches[0].consensus, benches[1].consensus)
    assert benches[0].consensus.norm() > 0.1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(AdaBelief, beta1=1.0, beta2=0.9, eps=0.0), "beta1 must be at least 0 and below 1"),
        (partial(AdaBelief, beta1=0.9, beta2=-1, eps=0.0), "beta2 must be at least 0 and below 1"),
        (partial(Adafactor, decay=0.0, eps=0.0), "decay must be positive"),
        (partial(SgdSai, eps=-1.0), "eps must not be negative"),
        (partial(Shampoo, beta=0.9, eps=0.0, max_side=0, refresh=1), "max_side must be a whole number"),
    ],
)
def test_impossible_numbers(make, words):
    with pytest.raises(ValueError, match=words):
        make(LAYOUT)
