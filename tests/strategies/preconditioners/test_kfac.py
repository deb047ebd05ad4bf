"""K-FAC against curvlinops' factors, the Fisher matrix of single examples, and dense linear algebra."""

from itertools import pairwise

import pytest
import torch
from curvlinops import KFACLinearOperator
from quadratics import ALPHA, LAYOUT, Quadratics, pisa_bench, solving
from torch import nn

from pisa_fl.clients.flat_model import FlatModel
from pisa_fl.clients.probing import probed_backward
from pisa_fl.tasks import Classification, NextCharacter, Regression
from strategies import Layout, Penalty
from strategies.preconditioners import Kfac
from strategies.preconditioners.base import PROBED
from strategies.preconditioners.kfac_damping import Damping

CPU = torch.device("cpu")
EXAMPLES = 7


class Symbols(nn.Module):
    """An embedding, of which each position has a layer's output."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)

    def forward(self, symbols):
        return self.out(torch.tanh(self.embedding(symbols)))


MODELS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)),
    "strided": lambda: nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 3 * 8, 3),
    ),
    "same": lambda: nn.Sequential(
        nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2), bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(72, 3),
    ),
    "groups": lambda: nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), groups=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Flatten(),
        nn.Linear(4 * 4 * 5, 3),
    ),
}


def kfac(layout, **options):
    settings = {
        "beta": 0.0,
        "damping": 0.02,
        "schedule": "constant",
        "final": 0.1,
        "horizon": 0,
        "kl_clip": None,
        "gain": 1.0,
        "eps": 1e-8,
        "fisher": "empirical",
        "form": "eigen",
        "max_side": 100,
        "refresh": 1,
    }
    return Kfac(layout, **settings | options)


def batch_of(name, examples=EXAMPLES):
    if name == "symbols":
        return {key: torch.randint(5, (examples, 4)) for key in ("inputs", "targets")}
    return {"inputs": torch.randn(examples, 2, 6, 6), "targets": torch.randint(3, (examples,))}


def probed(model, task, batch, preconditioner, shares=None):
    """Gradient (1, d) and what the probe makes of a batch, (1, size)."""
    flat, probe = FlatModel(model, task, CPU), preconditioner.probe
    count = len(batch["inputs"])
    shares = torch.full((count,), 1 / count) if shares is None else shares
    sums = {layer: torch.zeros(1, size) for layer, size in probe.sizes().items()}
    probed_backward(flat, batch, shares, None, {}, probe, sums)
    return flat.gradient.clone()[None], torch.cat(list(sums.values()), dim=-1)


def observed(preconditioner, gradient, made):
    """The state after a first round, in double precision."""
    state = {name: rows.double().expand(len(gradient), -1) for name, rows in preconditioner.nothing().items()}
    statistic = preconditioner.statistic(gradient.double(), gradient.double()) | {PROBED: made.double()}
    return preconditioner.accumulate(state, statistic)


def dense(preconditioner, state, layer):
    """Q of a layer on the rows of [W b], from its action on every direction."""
    layout = preconditioner.layout
    own = layout.layers[layer]
    names = [own.weight] + [own.bias] * (own.bias is not None)
    places = torch.cat([torch.arange(layout.size)[layout.spans[name]] for name in names])
    unit = torch.eye(layout.size, dtype=torch.float64)[places]
    state = {name: rows.expand(len(unit), -1) for name, rows in state.items()}
    inverse = preconditioner.solve(state, unit, torch.tensor(0.0, dtype=torch.float64), 1.0)[:, places]
    return torch.linalg.inv(inverse) - state["damping"][0, 0] * torch.eye(len(unit), dtype=torch.float64)


@pytest.mark.parametrize("name", ["linear", "strided"])
def test_factors_are_those_of_curvlinops(name):
    torch.manual_seed(0)
    model, batch = MODELS[name](), batch_of(name)
    ours = kfac(Layout.of_parameters(model))
    state = observed(ours, *probed(model, Classification(), batch, ours))
    theirs = KFACLinearOperator(
        *(model.double(), nn.CrossEntropyLoss(), list(model.parameters())),
        [(batch["inputs"].double(), batch["targets"])],
        fisher_type="empirical",
        separate_weight_and_bias=False,
    )
    expected = theirs @ torch.eye(theirs.shape[1], dtype=torch.float64)
    for layer in ours.layout.layers:
        names = [n for n in ours.layout.shapes if n.rpartition(".")[0] == layer]
        places = torch.cat([torch.arange(ours.layout.size)[ours.layout.spans[n]] for n in names])
        block = expected[places][:, places]
        assert (dense(ours, state, layer) - block).norm() < 1e-5 * block.norm()


def test_one_layer_and_its_exact_fisher():
    # all examples have the same gradient at the output but for its sign, so that inputs and gradients are independent
    torch.manual_seed(0)
    model, task = nn.Linear(4, 1), Regression()
    batch = {"inputs": torch.randn(EXAMPLES, 4)}
    batch["targets"] = (
        model(batch["inputs"]).detach().flatten() + torch.tensor([0.5, -0.5, 0.5] * 3)[:EXAMPLES]
    )
    ours = kfac(Layout.of_parameters(model))
    state = observed(ours, *probed(model, task, batch, ours))
    fisher = torch.zeros(5, 5, dtype=torch.float64)
    for inputs, target in zip(*batch.values(), strict=True):
        loss = (model(inputs[None]).flatten() - target).square().sum()
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
        ).double()
        fisher += torch.outer(gradient, gradient) / EXAMPLES
    torch.testing.assert_close(dense(ours, state, ""), fisher, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*MODELS, "symbols"])
def test_factors_are_moments_of_the_rows_that_a_layer_multiplies(name):
    # in plain loops, the rows from automatic differentiation
    torch.manual_seed(1)
    model = Symbols() if name == "symbols" else MODELS[name]()
    task = NextCharacter() if name == "symbols" else Classification()
    batch = batch_of(name)
    shares = torch.rand(EXAMPLES)
    ours = kfac(Layout.of_parameters(model))
    made = probed(model, task, batch, ours, shares)[1][0]
    start = 0
    for layer, own in ours.layout.layers.items():
        seen = []
        module = model.get_submodule(layer)
        handle = module.register_forward_hook(lambda m, i, o: seen.append((i[0].clone(), o)) or o.clone())  # noqa: B023
        losses = task.losses(task.output(model, batch), batch)
        handle.remove()
        [(inputs, output)] = seen
        outgoing = torch.autograd.grad(losses.sum(), output)[0]
        rows = outgoing.movedim(1, -1) if own.kind == "convolution" else outgoing
        rows = rows.reshape(EXAMPLES, -1, rows.shape[-1])
        upper_c, upper_a = [], []
        for group, of_group in enumerate(rows.split(own.shape[0], dim=-1)):
            c = torch.einsum("e,eti,etj->ij", shares, of_group, of_group)
            a = input_moment(module, own, inputs, shares, group * own.shape[0])
            m, n = len(c), len(a)
            upper_c.append(c[tuple(torch.triu_indices(m, m))])
            upper_a.append(a.diagonal() if own.kind == "embedding" else a[tuple(torch.triu_indices(n, n))])
        expected = torch.cat([shares.sum().reshape(1), *upper_c, *upper_a])
        torch.testing.assert_close(made[start : start + len(expected)], expected, rtol=1e-4, atol=1e-6)
        start += len(expected)
    assert start == len(made)


def input_moment(module, own, inputs, shares, row):
    """A of a layer, from the gradients of one output's positions with respect to its row of weights."""
    parameters = [getattr(module, name.rpartition(".")[2]) for name in own.tensors]
    total = 0.0
    for example, share in zip(inputs, shares, strict=True):
        output = module(example[None])
        first = output[:, row] if own.kind == "convolution" else output[..., row]
        rows = []
        for position in first.flatten():
            gradients = torch.autograd.grad(position, parameters, retain_graph=True)
            weight = gradients[0][:, row] if own.kind == "embedding" else gradients[0][row].flatten()
            rows.append(torch.cat([weight, *(g[row : row + 1] for g in gradients[1:])]))
        rows = torch.stack(rows)
        total = total + share * rows.T @ rows / len(rows)
    return total


@pytest.mark.parametrize("task", [Classification(), Regression()], ids=["classes", "numbers"])
def test_drawn_targets_are_those_of_the_models_distribution(task):
    # every example many times, with draws that are evenly spread: the expectation over targets
    torch.manual_seed(2)
    many, width = 4000, 3 if isinstance(task, Classification) else 1
    model = nn.Linear(2, width)
    inputs = torch.randn(1, 2).expand(many, 2)
    draws = (torch.arange(many) + 0.5) / many
    batch = {"inputs": inputs, "targets": torch.zeros(many, dtype=torch.int64), "draws": draws}
    ours = kfac(Layout.of_parameters(model), fisher="sampled")
    made = probed(model, task, batch, ours)[1][0]
    c = made[1 : 1 + width * (width + 1) // 2]
    if width == 1:
        expected = torch.tensor([[2.0]])  # of (y - f)^2 with y - f normal, of variance 1/2: E[4 (y - f)^2]
    else:
        p = model(inputs[0]).softmax(dim=-1).detach()
        expected = p.diag() - torch.outer(p, p)
    torch.testing.assert_close(c, expected[tuple(torch.triu_indices(width, width))], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("sigma", "rho"), [(0.3, 0.7), (0.0, 2.0), (0.5, 0.0)])
@pytest.mark.parametrize("max_side", [100, 3, 1])
@pytest.mark.parametrize("form", ["eigen", "cholesky"])
def test_solve_is_the_dense_inverse(form, max_side, sigma, rho):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.LayerNorm(100), nn.Linear(100, 4, bias=False)
    )
    layout = Layout.of_parameters(model)
    ours = kfac(layout, beta=0.5, max_side=max_side, damping=0.1, kl_clip=0.01, gain=4.0, form=form)
    clients, gradient = 2, torch.randn(2, layout.size)
    made = torch.cat([probed(model, Classification(), batch_of(""), ours)[1] for _ in range(clients)])
    state = observed(ours, gradient, made)
    right = torch.randn(clients, layout.size, dtype=torch.float64)
    values = sigma * torch.tensor([1.0, 1.0, 0.5, 0.5, 2.0], dtype=torch.float64)
    step = ours.solve(state, right, layout.expand(values), rho)
    for client in range(clients):
        factors = unpacked(made[client].double(), layout.layers, max_side)
        natural = 0.0  # g^T Q^-1 g without a bound
        systems = {}
        for (name, own), pairs in zip(layout.layers.items(), factors, strict=True):
            names = [own.weight] + [own.bias] * (own.bias is not None)
            g, r, s = (
                together(layout, names, vector)
                for vector in (gradient[client].double(), right[client], step[client])
            )
            natural += g @ torch.linalg.solve(damped(form, pairs, 1.0, 0.1), g)
            systems[name] = pairs, r, s, float(layout.expand(values)[layout.spans[own.weight]][0])
        nu = min(1.0, float((0.01 / natural).sqrt()))
        assert nu < 0.9
        for pairs, r, s, penalty in systems.values():
            share = rho / (4 * nu)
            system = damped(form, pairs, share, penalty + share * 0.1)
            torch.testing.assert_close(s, torch.linalg.solve(system, r), rtol=1e-5, atol=1e-6)
        norm = layout.spans["2.weight"]
        root = gradient[client, norm].double().abs() + 1e-8
        torch.testing.assert_close(step[client, norm], right[client, norm] / (values[2] + rho * root))


def damped(form, pairs, share, added):
    """share C x A + added I of a layer's groups, dense, as the form has it."""
    blocks = []
    for c, a in pairs:
        m, n = torch.eye(len(c), dtype=c.dtype), torch.eye(len(a), dtype=a.dtype)
        if form == "eigen":
            blocks.append(share * torch.kron(c, a) + added * torch.kron(m, n))
            continue
        p = ((a.trace() / len(a)) / (c.trace() / len(c))).sqrt()
        c, a = share**0.5 * c + added**0.5 / p * m, share**0.5 * a + added**0.5 * p * n
        blocks.append(torch.kron(c, a))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("form", ["eigen", "cholesky"])
def test_the_scale_is_the_geometric_mean_of_the_eigenvalues(form):
    torch.manual_seed(5)
    model = MODELS["groups"]()
    layout = Layout.of_parameters(model)
    ours = kfac(layout, damping=0.1, gain=4.0, form=form)
    gradient, made = probed(model, Classification(), batch_of(""), ours)
    scale = ours.scale(observed(ours, gradient, made))
    for own, pairs in zip(
        layout.layers.values(), unpacked(made[0].double(), layout.layers, 100), strict=True
    ):
        expected = torch.linalg.eigvalsh(damped(form, pairs, 1.0, 0.1)).log().mean().exp() / 4
        for name in own.tensors:
            torch.testing.assert_close(
                scale[layout.spans[name]], expected.expand(layout.spans[name].stop - layout.spans[name].start)
            )


def test_groups_and_their_exact_fisher():
    # as above: one position, and gradients at the output that only differ in sign
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(6, 1).requires_grad_(False))
    batch = {"inputs": torch.randn(EXAMPLES, 4, 2, 2)}
    batch["targets"] = model(batch["inputs"]).detach().flatten() + torch.tensor([0.5, -0.5] * 4)[:EXAMPLES]
    ours = kfac(Layout.of_parameters(model))
    state = observed(ours, *probed(model, Regression(), batch, ours))
    fisher = 0.0
    for inputs, target in zip(*batch.values(), strict=True):
        loss = (model(inputs[None]).flatten() - target).square().sum()
        weight, bias = torch.autograd.grad(loss, list(model[0].parameters()))
        groups = [
            torch.cat([weight.flatten(1), bias[:, None]], dim=1)[rows] for rows in (slice(3), slice(3, 6))
        ]
        fisher += (
            torch.block_diag(*(torch.outer(g.flatten(), g.flatten()) for g in groups)).double() / EXAMPLES
        )
    found = dense(ours, state, "0")  # weights, then biases
    order = torch.cat(
        [torch.cat([torch.arange(8 * row, 8 * row + 8), torch.tensor([48 + row])]) for row in range(6)]
    )
    torch.testing.assert_close(found[order][:, order], fisher, rtol=1e-5, atol=1e-5)


def together(layout, names, flat):
    """Rows of [W b] as one vector."""
    views = layout.views(flat)
    matrix = views[names[0]].flatten(1)
    return torch.cat([matrix, *(views[n].unsqueeze(1) for n in names[1:])], dim=1).flatten()


def unpacked(made, layers, max_side):
    """C and A of every layer's groups, dense, or only their diagonals where they are longer than `max_side`."""
    start = 0
    for own in layers.values():
        total, sides = made[start], []
        start += 1
        for size in (own.shape[0], own.shape[1] + (own.bias is not None)):
            above = torch.triu_indices(size, size)
            count = size if size > max_side else above.shape[1]
            matrices = []
            for part in made[start : start + own.groups * count].split(count):
                matrix = part.diag()
                if size <= max_side:
                    matrix = torch.zeros(size, size, dtype=made.dtype)
                    matrix[tuple(above)] = part
                    matrix = matrix + matrix.T - matrix.diag().diag()
                matrices.append(matrix)
            start += own.groups * count
            sides.append(matrices)
        yield [(c, a / total) for c, a in zip(*sides, strict=True)]


def test_damping_follows_how_well_decreases_were_predicted():
    problem, bench = Quadratics.draw(), pisa_bench("kfac, adaptive", sigma=None, rho=None, lr=1.0, lag=0)
    factors = []
    with solving(problem):
        for _ in range(12):
            before = bench.consensus.double()
            bench.round()
            shared = bench.strategy._shared
            c, a = (block.view(3, 3) for block in shared["grams"][0].split(9))
            damping = float(shared["damping"])
            if factors:
                step, (point, *quadratic, was) = before - factors[-1][0], factors[-1]
                expected = was * rule(problem, point, step, *quadratic, was)
                assert damping == pytest.approx(expected, rel=1e-6)
            factors.append((before, c, a, damping))
    changes = [after[-1] / now[-1] for now, after in pairwise(factors)]
    assert min(changes) == pytest.approx(0.95**5)
    assert (max(changes), 1.0 in changes) == (pytest.approx(0.95**-5), True)


def rule(problem, point, step, c, a, damping):
    """What Martens & Grosse multiply the damping by, in dense linear algebra."""
    loss = [
        ALPHA @ (torch.einsum("j,ijk,k->i", w, problem.a, w) / 2 - problem.b @ w)
        for w in (point, point + step)
    ]
    views = LAYOUT.views(step)
    rows = torch.cat([views["matrix"], views["vector"].unsqueeze(1)], dim=1).flatten()
    curved = (torch.kron(c, a) + damping * torch.eye(9, dtype=torch.float64)) @ rows
    change = ALPHA @ problem.gradients(point) @ step + rows @ curved / 2
    if change > 0 or (loss[1] - loss[0]) / change < 0.25:
        return 0.95**-5
    return 0.95**5 if (loss[1] - loss[0]) / change > 0.75 else 1.0


def test_damping_stays_within_reach():
    damping, one = Damping(0.5, "adaptive", 1.0, 0), torch.ones(2, 1)
    value = 0.5 * one
    for _ in range(500):
        value = damping.adapted(value, torch.tensor([[1.0], [-1.0]]), one)
    torch.testing.assert_close(value, torch.tensor([[0.5e-4], [0.5e4]]))


def test_damping_falls_as_lr_does():
    penalty = Penalty(2.0, 0.9, None, None, 1.0, 10, schedule="linear", horizon=5, final=0.2)
    ours = kfac(Layout({"scale": (4,)}), damping=2.0, schedule="linear", horizon=5, final=0.2)
    state = ours.nothing()
    for number in range(1, 8):
        state = ours.accumulate(state, ours.statistic(torch.ones(1, 4), torch.ones(1, 4)))
        assert float(state["damping"]) == pytest.approx(penalty.lr_at(number))


def test_what_is_no_layer_of_its_kind():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.transposed = nn.ConvTranspose1d(4, 4, 1)
            self.second.weight = self.first.weight
            self.frozen, self.own = nn.Linear(3, 3).requires_grad_(False), nn.Conv1d(2, 3, 2)
            self.own.bias.requires_grad_(False)
            self.attention = nn.MultiheadAttention(4, 2)  # which never calls the layer that it has

    layers = Layout.of_parameters(Tied()).layers
    assert {name: (own.weight, own.bias) for name, own in layers.items()} == {"own": ("own.weight", None)}


def test_a_model_without_such_layers_has_second_moments():
    layout = Layout({"scale": (4,)})
    ours = kfac(layout)
    assert ours.probe is None
    assert PROBED not in ours.statistic_fields()
    gradient = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    state = ours.accumulate(ours.nothing(), ours.statistic(gradient, gradient))
    step = ours.solve(state, gradient, torch.tensor(0.0), 1.0)
    torch.testing.assert_close(step, gradient.sign())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beta": 1.0}, "beta must be at least 0 and below 1, got 1.0"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"final": 0.0}, "final must be above 0"),
        ({"schedule": "step"}, "schedule must be constant, linear, cosine or adaptive, got step"),
        ({"kl_clip": 0.0}, "kl_clip must be positive"),
        ({"fisher": "exact"}, "fisher must be sampled or empirical, got exact"),
        ({"form": "qr"}, "form must be eigen or cholesky, got qr"),
        ({"max_side": 0}, "max_side must be a whole number"),
        ({"refresh": 0}, "refresh must be a whole number"),
    ],
)
def test_impossible_numbers_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        kfac(Layout({"w": (2, 2)}), **options)
