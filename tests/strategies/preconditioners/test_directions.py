"""Directions: what their papers say of them, other libraries' optimisers, and what all of them have in common."""

import math
from functools import partial

import pytest
import torch
from quadratics import ALPHA, Quadratics, pisa_bench, solving
from torch import nn

from strategies import Layout
from strategies.base.polar import polar
from strategies.preconditioners import Auon, DctLowRank, Fismo, Frugal, Muon, PolarGrad, Swan
from strategies.preconditioners.dct_low_rank import cosines
from strategies.preconditioners.swan import normalised

SHAPES = {"wide": (3, 5), "filter": (6, 2, 2, 1), "vector": (4,), "number": (1,)}
LAYOUT = Layout(SHAPES)
C, STEPS, BETA = 2, 5, 0.9
MOMENTS = {"beta": BETA, "eps": 1e-8}
EXACT = {"method": "eigh", "steps": 5}
MAKE = {
    "muon": partial(Muon, mu=0.8, nesterov=True, method="newton_schulz", steps=5, **MOMENTS),
    "polar_grad": partial(PolarGrad, mu=0.8, **EXACT, **MOMENTS),
    "swan": partial(Swan, **EXACT, **MOMENTS),
    "auon": partial(Auon, mu=0.8, nesterov=True, hybrid=False, **MOMENTS),
    "fismo": partial(Fismo, momentum=0.8, gamma=0.7, damping=0.1, max_side=5, **EXACT, **MOMENTS),
    "frugal": partial(Frugal, density=0.3, refresh=2, sign=1.0, **MOMENTS),
    "dct_low_rank": partial(DctLowRank, rank=2, feedback=True, **MOMENTS),
}
ZERO = torch.tensor(0.0, dtype=torch.float64)


def lr_of(name):
    """With which all take steps of the same length."""
    return 0.1 / MAKE[name].func.rate


@pytest.fixture
def gradients():
    torch.manual_seed(0)
    return [torch.randn(C, LAYOUT.size, dtype=torch.float64) for _ in range(STEPS)]


def observed(preconditioner, gradients):
    state = {
        name: torch.zeros(len(gradients[0]), field.size, dtype=torch.float64)
        for name, field in preconditioner.state_fields().items()
    }
    for gradient in gradients:
        state = preconditioner.accumulate(state, preconditioner.statistic(gradient, None))
    return state


def directions(preconditioner, gradients):
    """D/q of each matrix after the last gradient, (C, m, n), and q, (C, d)."""
    state = observed(preconditioner, gradients)
    q = preconditioner.diagonal(state)
    return dict(LAYOUT.each_matrix(preconditioner.direction(state, gradients[-1]) / q)), q


def matrices(flat):
    return dict(LAYOUT.each_matrix(flat))


# what they have in common


@pytest.mark.parametrize("name", MAKE)
def test_the_size_is_the_root_second_moment_and_the_rest_follows_it(name, gradients):
    preconditioner = MAKE[name](LAYOUT)
    state = observed(preconditioner, gradients)
    weights = [(1 - BETA) * BETA**k / (1 - BETA**STEPS) for k in reversed(range(STEPS))]
    square = sum(w * g.square() for w, g in zip(weights, gradients, strict=True))
    for matrix in matrices(square).values():
        matrix.copy_(matrix.mean(dim=(-2, -1), keepdim=True).expand_as(matrix))
    torch.testing.assert_close(preconditioner.diagonal(state), square.sqrt() + 1e-8)
    step = preconditioner.solve(state, preconditioner.direction(state, gradients[0]), ZERO, 1.0)
    # a client whose gradient is another one than the federation's, the last observed
    weighed = gradients[-1] + (1.0 if name == "polar_grad" else 0.3) * (gradients[0] - gradients[-1])
    for tensor in ("vector", "number"):
        span = LAYOUT.spans[tensor]
        torch.testing.assert_close(step[:, span], (weighed / (square.sqrt() + 1e-8))[:, span])


@pytest.mark.parametrize("name", MAKE)
def test_clients_at_once_are_each_alone_and_only_the_memory_is_read(name, gradients):
    preconditioner = MAKE[name](LAYOUT)
    both = observed(preconditioner, gradients)
    sigma, memory = torch.tensor(0.3, dtype=torch.float64), None
    for client in range(C):
        rows = [gradient[client : client + 1] for gradient in gradients]
        alone = observed(preconditioner, rows)
        for key, value in alone.items():
            torch.testing.assert_close(both[key][client : client + 1], value, msg=key)
        step = preconditioner.solve(alone, preconditioner.direction(alone, rows[0]), sigma, 0.7)
        together = preconditioner.solve(both, preconditioner.direction(both, gradients[0]), sigma, 0.7)
        torch.testing.assert_close(together[client : client + 1], step)
    memory = {key: both[key] for key in preconditioner.memory_fields()}
    for key, value in preconditioner.accumulate(both, {"observed": gradients[1]}).items():
        assert torch.equal(preconditioner.accumulate(memory, {"observed": gradients[1]})[key], value), key
    assert set(preconditioner.state_fields()) == set(both) > set(memory)


@pytest.mark.parametrize("name", MAKE)
def test_nothing_observed_and_next_to_nothing_to_observe(name):
    preconditioner = MAKE[name](LAYOUT)
    assert preconditioner.scale(preconditioner.nothing()) is None
    for share in (0.0, 1e-30, 1e-20):
        gradient = share * torch.randn(1, LAYOUT.size, generator=torch.Generator().manual_seed(0))
        state = preconditioner.nothing()
        for _ in range(3):
            state = preconditioner.accumulate(state, {"observed": gradient})
        assert all(vector.isfinite().all() for vector in state.values())
        step = preconditioner.direction(state, gradient) / preconditioner.diagonal(state)
        assert step.abs().max() <= (5 if share else 0)


def skewed(problem, by):
    """The problem with other gradients of each client and the same average."""
    b = problem.b + by * torch.randn(problem.b.shape, generator=torch.Generator().manual_seed(9)).double()
    return Quadratics(problem.a, b - ALPHA @ b + ALPHA @ problem.b)


@pytest.mark.parametrize("name", MAKE)
def test_the_path_is_the_same_whatever_the_skew(name):
    """Aligned; where every client has its own direction, it is not."""
    problem, reached = Quadratics.draw(seed=5), {}
    alike = Quadratics(problem.a[:1].expand_as(problem.a), (ALPHA @ problem.b).expand_as(problem.b))
    for align_every in (1, 0):
        options = (
            {"sigma": 6.0, "rho": 1.0}
            if not align_every
            else {"sigma": None, "rho": None, "lag": 0, "lr": 0.02}
        )
        for case in (alike, skewed(alike, 0.3)):
            bench = pisa_bench(MAKE[name], align_every, **options)
            with solving(case):
                for _ in range(12):
                    bench.round()
            reached.setdefault(align_every, []).append(bench.consensus)
    apart = {key: float((one - other).norm() / one.norm()) for key, (one, other) in reached.items()}
    assert apart[1] < 1e-3 < apart[0]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("name", MAKE)
def test_both_wires_take_the_same_path_and_only_the_memory_stays(name, lag):
    options = {"lag": lag, "stack": 1, "consensus": "fresh", "sigma": None, "rho": None, "lr": lr_of(name)}
    benches = [pisa_bench(MAKE[name], wire=wire, **options) for wire in ("primal", "gradient")]
    with solving(Quadratics.draw(seed=3)):
        for number in range(6):
            for bench in benches:
                bench.round(lost={1, 3} if number == 2 else ())
    assert torch.equal(benches[0].consensus, benches[1].consensus)
    assert benches[0].consensus.norm() > 0.1
    kept = {
        key.removeprefix("shared.") for key in benches[1].strategy.state_dict() if key.startswith("shared.")
    }
    preconditioner = benches[1].strategy.preconditioner
    assert kept == set(preconditioner.state_fields() if lag else preconditioner.memory_fields())


@pytest.mark.parametrize("name", MAKE)
def test_a_checkpoint_goes_on_with_the_same_bits(name):
    options = {"wire": "gradient", "lag": 0, "consensus": "fresh", "sigma": None, "rho": None}
    one, other = (pisa_bench(MAKE[name], **options) for _ in range(2))
    with solving(Quadratics.draw(seed=3)):
        for _ in range(3):
            one.round()
        other.strategy.load_state_dict(
            {key: value.clone() for key, value in one.strategy.state_dict().items()}
        )
        other.arrays, other.number = one.arrays, one.number
        for _ in range(3):
            for bench in (one, other):
                bench.round(drawn={0, 2})
    assert torch.equal(one.consensus, other.consensus)


@pytest.mark.parametrize("name", [name for name in MAKE if name != "swan"])
def test_the_optimum_of_different_clients_is_found_as_steps_become_shorter(name):
    problem = Quadratics.draw()
    bench = pisa_bench(MAKE[name], sigma=None, rho=None, lag=0, gamma=0.8, grow_every=4, lr=lr_of(name))
    with solving(problem):
        for _ in range(100):
            bench.round()
    optimum = problem.optimum()
    assert (bench.consensus.double() - optimum).norm() <= 2e-3 * optimum.norm()


@pytest.mark.parametrize("name", MAKE)
def test_a_client_with_a_direction_of_its_own_keeps_its_memory(name):
    bench = pisa_bench(MAKE[name], align_every=0)
    fields = bench.strategy.preconditioner.memory_fields()
    problem = Quadratics.draw()
    with solving(problem):
        for _ in range(3):
            bench.round()
    assert set(bench.half.state_sizes()) == {"dual", *fields}
    # the mass of three observations, not of one
    assert float(bench.host.states[0].pending["mass"][0]) == pytest.approx(1 - BETA**3)


# each


def test_muon_is_that_of_torch(gradients):
    make = partial(
        *(torch.optim.Muon,),
        **{"lr": 1.0, "momentum": 0.8, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"},
    )
    ours, _ = directions(MAKE["muon"](LAYOUT), gradients)
    for name, (m, n) in LAYOUT.matrices.items():
        parameter = nn.Parameter(torch.zeros(m, n, dtype=torch.float64))
        optimiser = make([parameter])
        for gradient in gradients:
            before = parameter.detach().clone()
            parameter.grad = matrices(gradient)[name][0].clone()
            optimiser.step()
        theirs = (before - parameter.detach()) / 0.2
        # theirs computes in bfloat16, of which an ulp is 2^-8, and five steps magnify it
        assert (ours[name][0] - theirs).norm() <= 0.05 * theirs.norm()


def test_muons_direction_is_orthogonal_and_does_not_depend_on_the_scale(gradients):
    muon = Muon(LAYOUT, mu=0.8, nesterov=True, **EXACT, **MOMENTS)
    once, _ = directions(muon, gradients)
    again, _ = directions(muon, [1000 * gradient for gradient in gradients])
    for name, matrix in once.items():
        m, n = LAYOUT.matrices[name]
        small = matrix @ matrix.mT if m <= n else matrix.mT @ matrix
        one = torch.eye(min(m, n), dtype=torch.float64).expand_as(small)
        torch.testing.assert_close(small, max(m, n) * one, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(matrix, again[name], rtol=1e-6, atol=1e-6)


def test_polar_grad_keeps_the_gradients_scale(gradients):
    def direction(scale):
        preconditioner, rows = MAKE["polar_grad"](LAYOUT), [scale * gradient for gradient in gradients]
        return matrices(preconditioner.direction(observed(preconditioner, rows), rows[-1]))

    once, again = direction(1.0), direction(-7.0)
    momentum = ZERO
    for gradient in gradients:
        momentum = 0.8 * momentum + 0.2 * gradient
    for name, matrix in matrices(momentum).items():
        torch.testing.assert_close(-7 * once[name], again[name])
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(once[name], s.sum(dim=-1)[:, None, None] * u @ vh)


def test_swan_normalises_rows_and_whitens(gradients):
    ours, _ = directions(MAKE["swan"](LAYOUT), gradients)
    last = gradients[-1].clone()
    for matrix in matrices(last).values():
        matrix.mul_(3).add_(torch.arange(matrix.shape[-2], dtype=torch.float64).unsqueeze(-1))
    shifted, _ = directions(MAKE["swan"](LAYOUT), [*gradients[:-1], last])
    for name, matrix in matrices(gradients[-1]).items():
        normal = normalised(matrix)
        torch.testing.assert_close(normal.mean(-1), torch.zeros_like(normal[..., 0]))
        torch.testing.assert_close(normal.std(-1, correction=0), torch.ones_like(normal[..., 0]))
        u, s, vh = torch.linalg.svd(normal, full_matrices=False)
        white = u @ torch.diag_embed((s > 1e-6).double()) @ vh
        white *= (matrix[0].numel() ** 0.5 / white.norm(dim=(1, 2)))[:, None, None]
        torch.testing.assert_close(ours[name], white)
        torch.testing.assert_close(ours[name], shifted[name])  # whatever the rows' means and the scale
    constant, _ = directions(MAKE["swan"](LAYOUT), [torch.full_like(last, 1.1)])
    assert not any(matrix.any() for matrix in constant.values())


@pytest.mark.parametrize("hybrid", [False, True])
def test_auon_is_normalised_momentum_over_a_number_that_is_nearly_one(gradients, hybrid):
    ours, _ = directions(Auon(LAYOUT, mu=0.8, nesterov=True, hybrid=hybrid, **MOMENTS), gradients)
    momentum = ZERO
    for gradient in gradients:
        momentum = 0.8 * momentum + 0.2 * gradient
    for name, matrix in matrices(0.8 * momentum + 0.2 * gradients[-1]).items():
        for client in range(C):
            g = polar(matrix, "newton_schulz", 1)[client] if hybrid else matrix[client]
            x = g / g.norm()
            rms = math.sqrt(sum(math.cosh(float(e)) ** 2 for e in x.flatten()) / x.numel())
            assert 1 < rms < 1 + 1 / x.numel()
            torch.testing.assert_close(ours[name][client], x * x.numel() ** 0.5 / rms)


@pytest.mark.parametrize("max_side", [8, 5, 1])
def test_fismo_is_its_equations(gradients, max_side):
    options = {"momentum": 0.8, "gamma": 0.7, "damping": 0.1, "max_side": max_side}
    preconditioner = Fismo(LAYOUT, **options, **EXACT, **MOMENTS)
    ours, _ = directions(preconditioner, gradients)

    def power(matrix, exponent):
        values, vectors = torch.linalg.eig(matrix)
        return (vectors @ torch.diag(values**exponent) @ torch.linalg.inv(vectors)).real

    for name, (m, n) in LAYOUT.matrices.items():
        p, r = torch.eye(m, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
        momentum = torch.zeros(m, n, dtype=torch.float64)
        for t in range(1, STEPS + 1):
            q = preconditioner.diagonal(observed(preconditioner, gradients[:t]))
            g = matrices(gradients[t - 1] / q)[name][0]
            if m <= max_side:
                p = 0.7 * p + 0.3 * (g @ torch.linalg.inv(r) @ g.T / n + 0.1 * torch.eye(m))
                p = p * m / p.trace()
            if n <= max_side:
                r = 0.7 * r + 0.3 * (g.T @ torch.linalg.inv(p) @ g / m + 0.1 * torch.eye(n))
                r = r * n / r.trace()
            momentum = 0.8 * momentum + 0.2 * power(p, -0.5) @ g @ power(r, -0.5)
        u, _, vh = torch.linalg.svd(momentum, full_matrices=False)
        expected = max(m, n) ** 0.5 * power(p, -0.5) @ u @ vh @ power(r, -0.5)
        torch.testing.assert_close(ours[name][0], expected, rtol=1e-6, atol=1e-6)


def test_frugal_has_adam_on_the_columns_whose_turn_it_is_and_signs_elsewhere(gradients):
    """Two columns of five or of four, for two rounds each: 0 1, 2 3, and 4 0 or 0 1."""
    turns = {
        "wide": [[0, 1], [0, 1], [2, 3], [2, 3], [4, 0]],
        "filter": [[0, 1], [0, 1], [2, 3], [2, 3], [0, 1]],
    }
    preconditioner = Frugal(LAYOUT, density=0.3, refresh=2, sign=0.5, **MOMENTS)
    adams = {}
    for t in range(STEPS):
        ours, _ = directions(preconditioner, gradients[: t + 1])
        for name, matrix in matrices(gradients[t]).items():
            columns = turns[name][t]
            if t % 2 == 0:
                parameter = nn.Parameter(torch.zeros(C, matrix.shape[1], 2, dtype=torch.float64))
                adams[name] = torch.optim.Adam([parameter], lr=1.0, betas=(0.0, BETA), eps=1e-8), parameter
            adam, parameter = adams[name]
            before, parameter.grad = parameter.detach().clone(), matrix[..., columns]
            adam.step()
            torch.testing.assert_close(ours[name][..., columns], before - parameter.detach())
            others = [c for c in range(matrix.shape[-1]) if c not in columns]
            torch.testing.assert_close(ours[name][..., others], 0.5 * matrix[..., others].sign())


def test_memory_is_what_the_papers_promise():
    layout = Layout({"matrix": (64, 100), "filter": (16, 4, 2, 2)})
    d, bookkeeping = layout.size, 2 + 1 + 1  # a size each, their mass, an age

    def memory(name, **options):
        return sum(field.size for field in MAKE[name](layout, **options).memory_fields().values())

    assert memory("swan") == memory("muon", mu=0.0) == 3
    assert memory("muon") == memory("polar_grad") == memory("auon") == d + 3
    assert memory("fismo", max_side=100) == d + 64**2 + 100**2 + 2 * 16**2 + 3
    assert memory("frugal", density=0.25) == d / 4 + bookkeeping
    # of each matrix, two columns as long as its longer side, their places and masses
    assert memory("dct_low_rank", feedback=False) == 2 * (100 + 16) + 2 * (2 + 2) + 3
    assert memory("dct_low_rank") == memory("dct_low_rank", feedback=False) + d


@pytest.mark.parametrize("n", [1, 2, 7])
def test_cosines_are_an_orthonormal_basis_of_waves(n):
    basis = cosines(n)
    torch.testing.assert_close(basis.T @ basis, torch.eye(n, dtype=torch.float64))
    for k, wave in enumerate(basis.T):
        signs = wave[wave.abs() > 1e-12].sign()
        assert (signs[1:] != signs[:-1]).sum() == k  # of half a period more each


def test_at_full_rank_it_is_adam_among_cosines(gradients):
    preconditioner = DctLowRank(LAYOUT, rank=9, feedback=False, **MOMENTS)
    ours, _ = directions(preconditioner, gradients)
    for name, (m, n) in LAYOUT.matrices.items():
        tall, waves = m >= n, cosines(min(m, n))
        parameter = nn.Parameter(torch.zeros(C, max(m, n), min(m, n), dtype=torch.float64))
        adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.0, BETA), eps=1e-8)
        for gradient in gradients:
            matrix, before = matrices(gradient)[name], parameter.detach().clone()
            parameter.grad = (matrix if tall else matrix.mT) @ waves
            adam.step()
        expected = (before - parameter.detach()) @ waves.T
        torch.testing.assert_close(ours[name], expected if tall else expected.mT)


@pytest.mark.parametrize("feedback", [False, True])
def test_low_rank_steps_are_along_the_waves_that_matter_most_and_nothing_is_lost(gradients, feedback):
    preconditioner = DctLowRank(LAYOUT, rank=2, feedback=feedback, **MOMENTS)
    for name, (m, n) in LAYOUT.matrices.items():
        waves = cosines(min(m, n))
        error, moments, stepped = 0.0, {}, 0.0
        for t in range(1, STEPS + 1):
            ours, _ = directions(preconditioner, gradients[:t])
            [matrix, step] = (
                x[0] if m >= n else x[0].T for x in (matrices(gradients[t - 1])[name], ours[name])
            )
            seen = (matrix + error) @ waves
            chosen = sorted(range(len(waves)), key=lambda k: -float(seen[:, k].norm()))[:2]
            moments = {k: moments.get(k, (0.0, 0.0)) for k in chosen}
            for k, (moment, mass) in moments.items():
                moments[k] = BETA * moment + (1 - BETA) * seen[:, k] ** 2, BETA * mass + 1 - BETA
                moment, mass = moments[k]
                torch.testing.assert_close(step @ waves[:, k], seen[:, k] / ((moment / mass).sqrt() + 1e-8))
            others = [k for k in range(len(waves)) if k not in chosen]
            torch.testing.assert_close(step @ waves[:, others], 0 * seen[:, others])
            taken = seen[:, chosen] @ waves[:, chosen].T
            stepped = stepped + taken
            if feedback:
                error = matrix + error - taken
                kept = matrices(observed(preconditioner, gradients[:t])["error"])[name][0]
                torch.testing.assert_close(kept if m >= n else kept.T, error)
        if feedback:  # all gradients have been stepped along, but for what is still owed
            total = sum(matrices(gradient)[name][0] for gradient in gradients)
            torch.testing.assert_close(stepped + error, total if m >= n else total.T)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("muon", "mu", 1.0),
        ("muon", "method", "svd"),
        ("muon", "beta", -0.1),
        ("polar_grad", "steps", 0),
        ("swan", "eps", -1.0),
        ("auon", "mu", -1),
        ("fismo", "momentum", 1.0),
        ("fismo", "gamma", 1.0),
        ("fismo", "damping", 0.0),
        ("fismo", "max_side", 0),
        ("frugal", "density", 0.0),
        ("frugal", "refresh", 0),
        ("frugal", "sign", -1.0),
        ("dct_low_rank", "rank", 0),
    ],
)
def test_impossible_numbers(name, key, value):
    with pytest.raises(ValueError, match=rf"^{key} must"):
        MAKE[name](LAYOUT, **{key: value})
