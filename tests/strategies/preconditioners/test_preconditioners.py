"""Preconditioners against torch.optim, dense linear algebra and the singular value decomposition."""

from functools import partial

import pytest
import torch
from quadratics import ALPHA, LAYOUT, PRECONDITIONERS, Quadratics, pisa_bench, second_moment, solving

from strategies import Layout
from strategies.preconditioners import Identity, NewtonSchulz, SecondMoment, Spectral

SHAPES = {"wide": (2, 5), "tall": (4, 3), "filter": (3, 2, 2, 1), "square": (3, 3), "vector": (4,)}
SMALL = Layout(SHAPES)
C = 2


def draws(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(C, SMALL.size, generator=generator, dtype=torch.float64) for _ in range(count)]


def start(preconditioner):
    return {
        name: torch.zeros(C, f.size, dtype=torch.float64) for name, f in preconditioner.state_fields().items()
    }


def observe(preconditioner, residuals):
    state = start(preconditioner)
    for residual in residuals:
        state = preconditioner.accumulate(state, preconditioner.statistic(residual, residual))
    return state


def dense_root(name, residuals, beta):
    """Q on a tensor's row-major elements: the root of the corrected average of R R'/n, on the smaller side."""
    shape = SHAPES[name]
    gram, mass = 0.0, 0.0
    for residual in residuals:
        if len(shape) == 1:
            term = residual.square().diag()
        else:
            r = residual.reshape(shape[0], -1)
            rows, columns = r.shape
            small = r @ r.T / columns if rows <= columns else r.T @ r / rows
            one = torch.eye(max(rows, columns), dtype=torch.float64)
            term = torch.kron(small, one) if rows <= columns else torch.kron(one, small)
        gram, mass = beta * gram + (1 - beta) * term, beta * mass + (1 - beta)
    values, vectors = torch.linalg.eigh(gram / mass)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


def dense_diagonal(name, residuals, beta):
    diagonals = torch.stack([residual.square() for residual in residuals])
    weights = torch.tensor([beta**k for k in reversed(range(len(residuals)))], dtype=torch.float64)
    return (weights / weights.sum() @ diagonals).sqrt().diag()


@pytest.mark.parametrize("one_sigma", [True, False])
@pytest.mark.parametrize(
    ("preconditioner", "dense"),
    [
        (Identity(SMALL), lambda name, residuals, beta: torch.eye(len(residuals[0]), dtype=torch.float64)),
        (second_moment(beta=0.8)(SMALL), dense_diagonal),
        (second_moment("square", beta=0.8)(SMALL), dense_diagonal),
        (Spectral(SMALL, 0.8, "residual", second_moment(beta=0.8)), dense_root),
    ],
    ids=["identity", "second moment", "squares", "spectral"],
)
def test_solve_is_the_dense_inverse(preconditioner, dense, one_sigma):
    *residuals, right = draws(4)
    rho, values = 0.7, dict(zip(SHAPES, (0.3, 0.5, 1.1, 2.0, 0.9), strict=True))
    if one_sigma:
        values, sigma = dict.fromkeys(SHAPES, 0.4), torch.tensor(0.4, dtype=torch.float64)
    else:
        sigma = SMALL.expand(torch.tensor(list(values.values()), dtype=torch.float64))
    step = preconditioner.solve(observe(preconditioner, residuals), right, sigma, rho)
    for client in range(C):
        for name, span in SMALL.spans.items():
            q = dense(name, [r[client, span] for r in residuals], 0.8)
            system = values[name] * torch.eye(len(q), dtype=torch.float64) + rho * q
            expected = torch.linalg.solve(system, right[client, span])
            # eps = 1e-8 is added to the root
            torch.testing.assert_close(step[client, span], expected, rtol=1e-6, atol=1e-7)


def test_second_moment_is_adams():
    beta, eps, parameter = 0.9, 1e-8, torch.zeros(C, SMALL.size, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.0, beta), eps=eps)
    ours = second_moment(beta=beta)(SMALL)
    state = start(ours)
    for t, residual in enumerate(draws(5), start=1):
        parameter.grad = residual.clone()
        before = parameter.detach().clone()
        adam.step()
        state = ours.accumulate(state, ours.statistic(residual * 0, residual))
        torch.testing.assert_close(state["moment"], adam.state[parameter]["exp_avg_sq"])
        assert torch.allclose(state["mass"], torch.tensor(1 - beta**t, dtype=torch.float64))
        # without momentum, at sigma = 0 and rho = 1, the step is Adam's
        step = ours.solve(state, residual, torch.tensor(0.0), 1.0)
        torch.testing.assert_close(step, before - parameter.detach(), rtol=1e-6, atol=1e-9)


def test_moment_of_the_gradient():
    gradient, residual = draws(2)
    ours = SecondMoment(SMALL, 0.9, 0.0, 0.0, "gradient", "vector", "exact")
    state = ours.accumulate(start(ours), ours.statistic(gradient, residual))
    torch.testing.assert_close(ours.diagonal(state), gradient.abs())


def test_the_floor_is_a_share_of_each_tensors_mean():
    [gradient] = draws(1)
    ours = SecondMoment(SMALL, 0.9, 0.0, 0.5, "gradient", "vector", "exact")
    state = ours.accumulate(start(ours), ours.statistic(gradient, gradient))
    for span in SMALL.spans.values():
        root = gradient[:, span].abs()
        torch.testing.assert_close(ours.diagonal(state)[:, span], root + 0.5 * root.mean(dim=1, keepdim=True))
        mean = root[0].mean().expand_as(root[0])
        torch.testing.assert_close(ours.scale({k: v[:1] for k, v in state.items()})[span], mean)


def test_first_step_correction_never_advances():
    ours = SecondMoment(SMALL, 0.999, 0.0, 0.0, "residual", "vector", "first_step")
    residuals = draws(3)
    moment = sum(0.001 * 0.999 ** (2 - k) * r.square() for k, r in enumerate(residuals))
    torch.testing.assert_close(ours.diagonal(observe(ours, residuals)), (moment / 0.001).sqrt())


def test_spectral_step_is_the_polar_factor():
    [residual] = draws(1)
    spectral = Spectral(SMALL, 0.0, "residual", second_moment())
    step = spectral.solve(
        observe(spectral, [residual]), residual, torch.tensor(0.0, dtype=torch.float64), 1.0
    )
    for name, (rows, columns) in SMALL.matrices.items():
        for client in range(C):
            r, s = (flat[client, SMALL.spans[name]].view(rows, columns) for flat in (residual, step))
            u, _, vh = torch.linalg.svd(r, full_matrices=False)
            # of the longer side's n, so that an element has the size of one
            torch.testing.assert_close(s, max(rows, columns) ** 0.5 * u @ vh, rtol=1e-8, atol=1e-8)


def test_spectral_scale_is_the_mean_eigenvalue():
    residuals = [r[:1] for r in draws(3)]
    spectral = Spectral(SMALL, 0.8, "residual", second_moment(beta=0.8))
    state = {name: v[:1] for name, v in observe(spectral, residuals).items()}
    scale = spectral.scale(state)
    for name, span in SMALL.spans.items():
        q = dense_root(name, [r[0, span] for r in residuals], 0.8)
        mean = q.trace() / len(q)
        torch.testing.assert_close(scale[span], mean.expand(q.shape[0]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("average", ["vector", "square"])
def test_alignment_averages_over_clients_before_the_moving_average(average):
    problem = Quadratics.draw()
    bench = pisa_bench("squares" if average == "square" else "second moment", sigma=None, rho=None)
    with solving(problem):
        bench.round()
    residuals = -problem.b  # the gradients at zero, with duals of zero
    mean = ALPHA @ residuals.square() if average == "square" else (ALPHA @ residuals).square()
    shared = bench.strategy._shared
    torch.testing.assert_close(shared["moment"][0].double(), 0.1 * mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared["mass"], torch.tensor([[0.1]]))


def test_alignment_averages_over_those_who_answered():
    problem = Quadratics.draw()
    bench = pisa_bench("squares", sigma=None, rho=None)
    with solving(problem):
        bench.round(drawn={1, 3})
    share = ALPHA[[1, 3]] / ALPHA[[1, 3]].sum()
    expected = 0.1 * share @ problem.b[[1, 3]].square()
    torch.testing.assert_close(bench.strategy._shared["moment"][0].double(), expected, rtol=1e-5, atol=1e-6)


def test_spectral_alignment_averages_residuals():
    problem = Quadratics.draw()
    bench = pisa_bench("spectral", sigma=None, rho=None)
    with solving(problem):
        bench.round()
    mean = (ALPHA @ -problem.b)[LAYOUT.spans["matrix"]].view(3, 2)
    gram = bench.strategy._shared["gram"][0, :4].view(2, 2).double()
    torch.testing.assert_close(gram, 0.1 * mean.T @ mean / 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_clients_of_a_stack_do_not_mix(name):
    preconditioner = PRECONDITIONERS[name](SMALL)
    first, second, right = draws(3)
    sigma = torch.tensor(0.4, dtype=torch.float64)

    def step(rows):
        state = {key: value[rows] for key, value in start(preconditioner).items()}
        for r in (first, second):
            state = preconditioner.accumulate(state, preconditioner.statistic(r[rows], r[rows]))
        direction = preconditioner.direction(state, right[rows])
        return preconditioner.solve(state, direction, sigma, 0.7)

    both = step(slice(None))
    for client in range(C):
        torch.testing.assert_close(both[client : client + 1], step(slice(client, client + 1)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (second_moment(beta=1.0), "beta must be at least 0 and below 1, got 1.0"),
        (partial(SecondMoment, beta=0.9, eps=-1.0, floor=0.0, moment_of="residual", average="square",
                 bias_correction="exact"), "eps must not be negative"),
        (second_moment("median"), "average must be vector or square, got median"),
        (partial(Spectral, beta=-0.1, moment_of="gradient", others=second_moment()),
         "beta must be at least 0"),
        (partial(NewtonSchulz, mu=1.0, steps=5, eps=0.0, others=second_moment()), "mu must be"),
        (partial(NewtonSchulz, mu=0.9, steps=0, eps=0.0, others=second_moment()), "steps must"),
    ],
)  # fmt: skip
def test_impossible_numbers_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(SMALL)


def test_own_moments_have_no_automatic_penalty():
    with pytest.raises(ValueError, match=r"align_every=0 gives every client its own Q"):
        pisa_bench("second moment", align_every=0, sigma=None, rho=None)
