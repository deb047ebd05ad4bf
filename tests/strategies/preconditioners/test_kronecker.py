"""The second moment in Kronecker eigenbases against dense linear algebra, and what follows from its definition."""

import pytest
import torch
from plain_loops import blended, carried
from quadratics import second_moment

from strategies import Layout
from strategies.preconditioners import Kronecker

SHAPES = {
    "wide": (2, 5),
    "tall": (4, 3),
    "filter": (3, 2, 2, 1),
    "square": (3, 3),
    "row": (1, 4),
    "vector": (4,),
}
SMALL = Layout(SHAPES)
C = 2
BETA = 0.8


def draws(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(C, SMALL.size, generator=generator, dtype=torch.float64) for _ in range(count)]


def observe(preconditioner, gradients, clients=C):
    state = {
        name: torch.zeros(clients, field.size, dtype=torch.float64)
        for name, field in preconditioner.state_fields().items()
    }
    for gradient in gradients:
        state = preconditioner.accumulate(state, preconditioner.statistic(gradient, gradient * 0))
    return state


def dense(gradients, max_side, refresh, factored):
    """Q of one matrix on its row-major elements, from its gradients (m, n) in their order."""
    m, n = gradients[0].shape
    eye = {size: torch.eye(size, dtype=torch.float64) for size in (m, n)}
    left, right, moment, mass = 0.0, 0.0, torch.zeros(m, n, dtype=torch.float64), 0.0
    u, z = eye[m], eye[n]
    for age, g in enumerate(gradients):
        left, right = BETA * left + (1 - BETA) * g @ g.T, BETA * right + (1 - BETA) * g.T @ g
        if age % refresh == 0:
            new_u = torch.linalg.eigh(left)[1] if m <= max_side else eye[m]
            new_z = torch.linalg.eigh(right)[1] if n <= max_side else eye[n]
            if age:
                moment = carried(moment, u, new_u, z, new_z)
            u, z = new_u, new_z
        moment = BETA * moment + (1 - BETA) * (u.T @ g @ z) ** 2
        mass = BETA * mass + 1 - BETA
    moment = blended(moment, u, left, z, right, factored)
    basis = torch.kron(u.contiguous(), z.contiguous())
    return basis @ ((moment / mass).sqrt().flatten() + 1e-8).diag() @ basis.T


@pytest.mark.parametrize("factored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("max_side", "refresh"), [(100, 1), (100, 2), (3, 1), (100, 3), (1, 1)])
def test_solve_is_the_dense_inverse(max_side, refresh, factored):
    *gradients, right = draws(5)
    rho, values = 0.7, dict(zip(SHAPES, (0.3, 0.5, 1.1, 2.0, 0.9, 0.0), strict=True))
    ours = Kronecker(SMALL, BETA, 1e-8, max_side, refresh, factored)
    sigma = SMALL.expand(torch.tensor(list(values.values()), dtype=torch.float64))
    state = observe(ours, gradients)
    step, scale = ours.solve(state, right, sigma, rho), ours.scale({k: v[:1] for k, v in state.items()})
    for client in range(C):
        for name, span in SMALL.spans.items():
            if refresh > 1 and name not in ("square", "vector"):
                continue  # until the next refresh, the basis of what a first gradient leaves out is anybody's
            shape = SMALL.matrices.get(name, (1, 4))
            matrices = [g[client, span].view(shape) for g in gradients]
            known = name in SMALL.matrices
            q = dense(matrices, max_side if known else 0, refresh, factored if known else 0.0)
            system = values[name] * torch.eye(len(q), dtype=torch.float64) + rho * q
            expected = torch.linalg.solve(system, right[client, span])
            torch.testing.assert_close(step[client, span], expected, rtol=1e-6, atol=1e-9)
            if client == 0:
                mean = q.trace() / len(q)
                torch.testing.assert_close(scale[span], mean.expand(len(q)), rtol=1e-9, atol=0)


def test_with_the_basis_that_tensors_have_it_is_sisas():
    *gradients, right = draws(4)
    ours, sisa = Kronecker(SMALL, BETA, 1e-8, 1, 1, 0.0), second_moment(beta=BETA)(SMALL)
    theirs = {n: torch.zeros(C, f.size, dtype=torch.float64) for n, f in sisa.state_fields().items()}
    for gradient in gradients:
        theirs = sisa.accumulate(theirs, sisa.statistic(gradient, gradient))
    sigma = torch.tensor(0.4, dtype=torch.float64)
    torch.testing.assert_close(
        ours.solve(observe(ours, gradients), right, sigma, 0.7), sisa.solve(theirs, right, sigma, 0.7)
    )


def test_the_first_step_is_the_polar_factor():
    # in its own singular bases a gradient is diagonal, and divided by its size it is one
    [gradient] = draws(1)
    ours = Kronecker(SMALL, 0.0, 1e-10, 100, 1, 0.0)
    step = ours.solve(observe(ours, [gradient]), gradient, torch.tensor(0.0, dtype=torch.float64), 1.0)
    for name, (rows, columns) in SMALL.matrices.items():
        for client in range(C):
            g, s = (flat[client, SMALL.spans[name]].view(rows, columns) for flat in (gradient, step))
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            torch.testing.assert_close(s, u @ vh, rtol=0, atol=1e-4)


def test_turning_the_rows_and_columns_of_all_gradients_turns_the_step():
    generator = torch.Generator().manual_seed(7)
    layout = Layout({"w": (4, 3)})

    def rotation(size):
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]

    left, right = rotation(4), rotation(3)
    gradients = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(6)]
    steps = []
    for turned in ([*gradients], [left @ g @ right for g in gradients]):
        ours = Kronecker(layout, BETA, 1e-8, 100, 1, 0.5)
        *seen, last = [g.reshape(1, -1) for g in turned]
        state = observe(ours, seen, clients=1)
        steps.append(ours.solve(state, last, torch.tensor(0.2, dtype=torch.float64), 0.7).view(4, 3))
    torch.testing.assert_close(left @ steps[0] @ right, steps[1], rtol=1e-6, atol=1e-9)


def test_many_clients_at_once_are_each_alone():
    gradients = draws(5)
    ours = Kronecker(SMALL, BETA, 1e-8, 100, 2, 0.5)
    together, sigma = observe(ours, gradients), torch.tensor(0.3, dtype=torch.float64)
    for client in range(C):
        alone = observe(ours, [g[client : client + 1] for g in gradients], clients=1)
        expected = ours.solve(alone, gradients[0][client : client + 1], sigma, 0.7)[0]
        torch.testing.assert_close(ours.solve(together, gradients[0], sigma, 0.7)[client], expected)


def test_each_client_refreshes_its_own_bases_when_they_are_due():
    # the second client begins a round after the first: the refresh of neither is the other's
    gradients = draws(4)
    ours = Kronecker(SMALL, BETA, 1e-8, 100, 2, 0.5)
    state, late = observe(ours, [gradients[0]]), observe(ours, [])
    for name, rows in state.items():
        rows[1] = late[name][1]
    for gradient in gradients[1:]:
        state = ours.accumulate(state, {"observed": gradient})
    for client, seen in ((0, gradients), (1, gradients[1:])):
        alone = observe(ours, [g[client : client + 1] for g in seen], clients=1)
        for name, rows in alone.items():
            torch.testing.assert_close(state[name][client], rows[0])


def test_small_singular_values_are_told_from_rounding():
    # down to 1e-4 of the largest, whose square is below what single precision resolves of the largest's square
    generator = torch.Generator().manual_seed(3)
    u, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    z, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    values = torch.tensor([1.0, 0.3, 1e-1, 1e-2, 1e-3, 1e-4], dtype=torch.float64)
    gradient = ((u * values) @ z.T).float().reshape(1, -1)
    ours = Kronecker(Layout({"w": (6, 6)}), 0.9, 1e-12, 100, 1, 0.0)
    state = ours.nothing()
    for _ in range(3):
        state = ours.accumulate(state, {"observed": gradient})
    roots = (state["moment"] / state["mass"]).sqrt().view(6, 6).diagonal().double()
    torch.testing.assert_close(roots.flip(0), values, rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta", 1.0), ("eps", -1.0), ("max_side", 0), ("refresh", 0), ("refresh", 1.5), ("factored", 1.1)],
)
def test_impossible_numbers(key, value):
    options = {"beta": 0.9, "eps": 1e-8, "max_side": 8, "refresh": 1, "factored": 0.5, key: value}
    with pytest.raises(ValueError, match=rf"^{key} must"):
        Kronecker(SMALL, **options)
