"""M-FAC against the dense inverse."""

import pytest
import torch

from strategies import Layout
from strategies.preconditioners import Mfac

LAYOUT = Layout({"matrix": (3, 4), "vector": (5,)})
C, D = 2, LAYOUT.size


def draws(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(C, D, generator=generator, dtype=torch.float64) for _ in range(count)]


def observe(preconditioner, gradients):
    fields = preconditioner.state_fields()
    state = {name: torch.zeros(C, field.size, dtype=torch.float64) for name, field in fields.items()}
    for gradient in gradients:
        state = preconditioner.accumulate(state, preconditioner.statistic(gradient, gradient * 0))
    return state


def dense(gradients, damping):
    """q of each tensor and Q, block by block, of one client's gradients."""
    sizes, blocks = [], []
    for span in LAYOUT.spans.values():
        fisher = sum(torch.outer(g[span], g[span]) for g in gradients) / len(gradients)
        trace = fisher.trace()
        sizes.append((trace / len(fisher)).sqrt())
        blocks.append(
            sizes[-1] / trace * (damping * trace * torch.eye(len(fisher), dtype=torch.float64) + fisher)
        )
    return LAYOUT.expand(torch.stack(sizes)), torch.block_diag(*blocks)


@pytest.mark.parametrize(("sigma", "rho"), [(0.3, 0.7), (0.0, 2.0), (0.5, 0.0)])
@pytest.mark.parametrize("seen", [1, 3, 4, 9])
def test_solve_is_the_dense_inverse(seen, sigma, rho):
    *gradients, right = draws(seen + 1)
    mfac = Mfac(LAYOUT, 4, 0.1)
    state = observe(mfac, gradients)
    sigmas = LAYOUT.expand(torch.tensor([sigma, 3 * sigma], dtype=torch.float64))
    step = mfac.solve(state, right, sigmas, rho)
    for client in range(C):
        q, matrix = dense([g[client] for g in gradients[-4:]], 0.1)
        expected = torch.linalg.solve(sigmas.diag() + rho * matrix, right[client])
        torch.testing.assert_close(step[client], expected, rtol=1e-9, atol=1e-9)
        scale = mfac.scale({name: rows[client : client + 1] for name, rows in state.items()})
        torch.testing.assert_close(scale, q)


def test_in_single_precision():
    *gradients, right = [draw.float() for draw in draws(10)]
    gradients = [1e-3 * (gradients[0] + 0.01 * g) for g in gradients]  # nearly the same direction
    mfac = Mfac(LAYOUT, 8, 0.1)
    state = {name: rows.float() for name, rows in observe(mfac, gradients).items()}
    step = mfac.solve(state, right, torch.tensor(1e-4), 0.7)
    for client in range(C):
        _, matrix = dense([g[client].double() for g in gradients[-8:]], 0.1)
        system = 1e-4 * torch.eye(D, dtype=torch.float64) + 0.7 * matrix
        expected = torch.linalg.solve(system, right[client].double())
        assert (step[client] - expected).norm() < 1e-5 * expected.norm()


def test_a_steady_gradient_has_the_momentum_that_was_asked_for():
    # sigma and rho of the automatic penalty for lr = 1: along it c = sigma/(sigma + rho Q) is 1 - m but for the damping
    [gradient] = draws(1)
    mfac, momentum = Mfac(LAYOUT, 4, 1e-9), 0.9
    state = observe(mfac, 3 * [gradient])
    sigma = LAYOUT.expand(LAYOUT.mean(gradient.square()).sqrt())
    for client in range(C):
        one = {name: rows[client : client + 1] for name, rows in state.items()}
        torch.testing.assert_close(mfac.scale(one), sigma[client])
        step = mfac.solve(one, gradient[client : client + 1], mfac.scale(one), momentum / (1 - momentum))
        torch.testing.assert_close(step[0] * sigma[client], 0.1 * gradient[client], rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [((0, 0.1), "gradients must be a whole number of 1"), ((4, 0.0), "damping must be positive, got 0.0")],
)
def test_impossible_numbers_are_refused(numbers, sentence):
    with pytest.raises(ValueError, match=sentence):
        Mfac(LAYOUT, *numbers)
