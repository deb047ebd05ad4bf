"""Whole runs of the rivals against the papers' equations, as slow loops over tensors in double precision."""

import copy
import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from plain_loops import BATCH, SIZES, assert_moved_alike, half, make_problem, sgd
from torch.nn.functional import cross_entropy, unfold
from torch.nn.utils import parameters_to_vector

from pisa_fl.clients.host import ClientState
from pisa_fl.engines.local import LocalGrid

ROUNDS = 6
LOCAL = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01, "epochs": 2}
SAID = ["participation=0.5", "strategy.lr=0.02", "strategy.local_epochs=2", "strategy.weight_decay=0.01"]
LOST = 3
"""A round of which the reply of the client with the lowest number is lost."""
DECAY = 0.7
DECAYING = f"strategy.lr_decay={DECAY}"


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return make_problem(tmp_path_factory.mktemp("problem"))


def heard(number):
    """Who takes part in a round, and is heard."""
    drawn = half(number)
    return drawn[1:] if number == LOST else drawn


def steps(client):
    return LOCAL["epochs"] * -(-SIZES[client] // BATCH)


def falling(number):
    """Local steps of a round where lr falls."""
    return LOCAL | {"lr": LOCAL["lr"] * DECAY ** (number - 1)}


def coefficients(count, momentum, shrink):
    """How often each gradient counts: a_i, by the response of the loop to every gradient alone."""
    parts = []
    for at in range(count):
        moved = buffer = 0.0
        for step in range(count):
            buffer = momentum * buffer + (step == at) - shrink * moved
            moved += buffer
        parts.append(moved)
    return parts


def zeros(w):
    return {name: torch.zeros_like(t) for name, t in w.items()}


def mean(rows, uniform=False):
    """Weighted mean over clients, of dictionaries."""
    share = {i: 1.0 if uniform else float(SIZES[i]) for i in rows}
    return {
        name: sum(share[i] / sum(share.values()) * rows[i][name] for i in rows)
        for name in next(iter(rows.values()))
    }


def over_all(rows, uniform=False):
    """Mean over all clients, zero for those that are not there."""
    return {name: len(rows) / len(SIZES) * t for name, t in mean(rows, uniform).items()}


def stepping(problem, start, client, number, optimizers, radius=0.0):
    """Local steps of PyTorch's optimizers, given tensors with matrices as such, at the gradients of points nearby."""
    at = {
        name: torch.nn.Parameter(t.clone().flatten(1) if t.dim() > 1 else t.clone())
        for name, t in start.items()
    }
    made = optimizers(list(at.values()))
    for rows in problem.batches(client, number, LOCAL["epochs"]):
        here = {name: p.detach().view_as(start[name]) for name, p in at.items()}
        g = problem.gradient(here, rows)
        if radius:
            length = sum(t.square().sum() for t in g.values()).sqrt()
            g = problem.gradient({name: here[name] + radius * g[name] / length for name in here}, rows)
        for name, p in at.items():
            p.grad = g[name].view_as(p)
        for optimizer in made:
            optimizer.step()
    return {name: p.detach().view_as(start[name]) for name, p in at.items()}


def adamw(parameters, lr, beta_2):
    return torch.optim.AdamW(parameters, lr, (0.9, beta_2), weight_decay=LOCAL["weight_decay"])


def muon(parameters, lr):
    matrices = [p for p in parameters if p.dim() > 1]
    rule = {"weight_decay": LOCAL["weight_decay"], "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(matrices, lr, **rule), adamw([p for p in parameters if p.dim() == 1], lr, 0.95)]


def fedavg(problem, name, lr_decay):
    w = dict(problem.start)
    for number in range(1, ROUNDS + 1):
        lr = LOCAL["lr"] * lr_decay ** (number - 1)
        make = {
            "adamw": lambda parameters, lr=lr: [adamw(parameters, lr, 0.999)],
            "muon": lambda parameters, lr=lr: muon(parameters, lr),
        }.get(
            name, lambda parameters, lr=lr: [torch.optim.SGD(parameters, lr, 0.9, 0.0, LOCAL["weight_decay"])]
        )
        radius = 0.3 if name == "sam" else 0.0
        w = mean({i: stepping(problem, w, i, number, make, radius) for i in heard(number)})
    return w, {}


def scaffold(problem, momentum, server_lr=1.0, uniform=False, lr_decay=1.0):
    w, held = dict(problem.start), {}
    c = zeros(w)
    for number in range(1, ROUNDS + 1):
        lr = LOCAL["lr"] * lr_decay ** (number - 1)
        y, old = {}, dict(held)
        for i in heard(number):
            own = old.get(i, zeros(w))
            slope = {name: c[name] - own[name] for name in w}
            y[i] = sgd(problem, w, i, number, **LOCAL | {"momentum": momentum, "lr": lr}, slope=slope)
            length = lr * sum(coefficients(steps(i), momentum, 0.0))
            held[i] = {name: own[name] - c[name] + (w[name] - y[i][name]) / length for name in w}
        reached, c = mean(y, uniform), over_all(held, uniform)
        w = {name: w[name] + server_lr * (reached[name] - w[name]) for name in w}
    return w, held


def feddyn(problem, alpha):
    # the paper's own recursion of h, in its weights 1/N
    w, held = dict(problem.start), {}
    h = zeros(w)
    for number in range(1, ROUNDS + 1):
        answers = {}
        for i in heard(number):
            own = held.get(i, zeros(w))  # of the paper's grad L_i, the negative
            answers[i] = sgd(problem, w, i, number, **LOCAL, mu=alpha, slope=own)
            held[i] = {name: own[name] + alpha * (answers[i][name] - w[name]) for name in w}
        for name in w:
            h[name] = h[name] - alpha / len(SIZES) * sum(a[name] - w[name] for a in answers.values())
        w = {name: t - h[name] / alpha for name, t in mean(answers, uniform=True).items()}
    return w, held


def fedsmoo(problem, alpha, radius):
    w, held, shifts, lr = dict(problem.start), {}, {}, LOCAL["lr"]
    s, h = zeros(w), zeros(w)
    for number in range(1, ROUNDS + 1):
        answers = {}
        for i in heard(number):
            y, dual, m, b = dict(w), held.get(i, zeros(w)), dict(shifts.get(i, zeros(w))), zeros(w)
            for rows in problem.batches(i, number, LOCAL["epochs"]):
                g = problem.gradient(y, rows)
                pull = {name: g[name] - m[name] - s[name] for name in w}
                length = sum(t.square().sum() for t in pull.values()).sqrt()
                e = {name: radius * t / length for name, t in pull.items()}
                m = {name: m[name] + e[name] - s[name] for name in w}
                g = problem.gradient({name: y[name] + e[name] for name in w}, rows)
                for name in w:
                    g[name] = g[name] + LOCAL["weight_decay"] * y[name] + dual[name]
                    b[name] = LOCAL["momentum"] * b[name] + g[name] + alpha * (y[name] - w[name])
                y = {name: y[name] - lr * b[name] for name in w}
            answers[i], shifts[i] = y, m
            held[i] = {name: dual[name] + alpha * (y[name] - w[name]) for name in w}
        for name in w:
            h[name] = h[name] - alpha / len(SIZES) * sum(a[name] - w[name] for a in answers.values())
        w = {name: t - h[name] / alpha for name, t in mean(answers, uniform=True).items()}
        s = mean({i: shifts[i] for i in answers}, uniform=True)
        length = sum(t.square().sum() for t in s.values()).sqrt()
        s = {name: radius * t / length for name, t in s.items()}
    return w, held


def fedadmm(problem, rho, eta):
    w, held = dict(problem.start), {}
    last = {i: (dict(w), zeros(w)) for i in range(len(SIZES))}
    for number in range(1, ROUNDS + 1):
        moved = {}
        for i in heard(number):
            before, y = last[i]
            own = sgd(problem, w, i, number, **LOCAL, mu=rho, slope=y)
            held[i] = {name: y[name] + rho * (own[name] - w[name]) for name in w}
            moved[i] = {name: own[name] + held[i][name] / rho - before[name] - y[name] / rho for name in w}
            last[i] = own, held[i]
        step = len(moved) / len(SIZES) if eta is None else eta
        average = mean(moved, uniform=True)
        w = {name: w[name] + step * average[name] for name in w}
    return w, held


def fednova(problem, momentum, mu):
    w = dict(problem.start)
    for number in range(1, ROUNDS + 1):
        answers, a = {}, {}
        for i in heard(number):
            answers[i] = sgd(problem, w, i, number, **LOCAL | {"momentum": momentum}, mu=mu)
            a[i] = sum(coefficients(steps(i), momentum, LOCAL["lr"] * mu))
        d = {i: {name: (w[name] - t[name]) / (LOCAL["lr"] * a[i]) for name in w} for i, t in answers.items()}
        examples = sum(SIZES[i] for i in a)
        effective = sum(SIZES[i] / examples * a[i] for i in a)
        average = mean(d)
        w = {name: w[name] - LOCAL["lr"] * effective * average[name] for name in w}
    return w, {}


def remembering(problem, all_of_them):
    """MIFA with server_lr 0.5, or FedVARP."""
    w, last = dict(problem.start), {}
    for number in range(1, ROUNDS + 1):
        before = over_all(last, True) if last else zeros(w)
        news = {}
        for i in heard(number):
            own = sgd(problem, w, i, number, **LOCAL)
            moved = {name: own[name] - w[name] for name in w}
            news[i] = {name: moved[name] - last.get(i, zeros(w))[name] for name in w}
            last[i] = moved
        if all_of_them:
            step = {name: 0.5 * t for name, t in over_all(last, True).items()}
        else:
            step = {name: t + before[name] for name, t in mean(news, True).items()}
        w = {name: w[name] + step[name] for name in w}
    return w, last


def fedcm(problem, mix, lr_decay):
    w = dict(problem.start)
    v = zeros(w)
    for number in range(1, ROUNDS + 1):
        lr = LOCAL["lr"] * lr_decay ** (number - 1)
        answers, pace = {}, {}
        for i in heard(number):
            y = dict(w)
            for rows in problem.batches(i, number, LOCAL["epochs"]):
                g = problem.gradient(y, rows)
                for name in w:
                    own = g[name] + LOCAL["weight_decay"] * y[name]
                    y[name] = y[name] - lr * (mix * own + (1 - mix) * v[name])
            answers[i] = y
            pace[i] = {name: (w[name] - y[name]) / (lr * steps(i)) for name in w}
        w, v = mean(answers), mean(pace)
    return w, {}


def orthogonal(matrix):
    """Five steps of Newton and Schulz's iteration, with Muon's coefficients."""
    x = matrix / matrix.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
    return x


def fedpac(problem, mix, beta, beta_2, muon):
    w, lr = dict(problem.start), LOCAL["lr"]
    v, m, s, mass = zeros(w), zeros(w), zeros(w), torch.zeros(2, dtype=torch.float64)
    for number in range(1, ROUNDS + 1):
        ends, pace, firsts, seconds, masses = {}, {}, {}, {}, {}
        for i in heard(number):
            y, first, second, total = dict(w), dict(m), dict(s), mass.clone()
            for rows in problem.batches(i, number, LOCAL["epochs"]):
                g = problem.gradient(y, rows)
                betas = torch.tensor([beta, beta_2])
                total = betas * total + 1 - betas
                for name in w:
                    first[name] = beta * first[name] + (1 - beta) * g[name]
                    if muon and g[name].dim() > 1:
                        ahead = (beta * first[name] + (1 - beta) * g[name]).flatten(1)
                        d = (0.2 * max(ahead.shape) ** 0.5 * orthogonal(ahead)).view_as(g[name])
                    else:
                        second[name] = beta_2 * second[name] + (1 - beta_2) * g[name] ** 2
                        d = first[name] / total[0] / ((second[name] / total[1]).sqrt() + 1e-8)
                    d = d + LOCAL["weight_decay"] * y[name]
                    y[name] = y[name] - lr * (mix * d + (1 - mix) * v[name])
            ends[i], firsts[i], seconds[i], masses[i] = y, first, second, {"mass": total}
            pace[i] = {name: (w[name] - y[name]) / (lr * steps(i)) for name in w}
        w, v, m, s, mass = mean(ends), mean(pace), mean(firsts), mean(seconds), mean(masses)["mass"]
    return w, {}


def curvature(problem, weights, rows, damping, max_side):
    """P of every layer: the mean of a a^T over some rows and their positions, and damping."""
    model, whole = at(problem, weights), {}

    def look(module, inputs, output, name):
        (a,) = inputs
        if a.dim() == 4:
            a = unfold(a, module.kernel_size).mT.flatten(0, 1)
        a = torch.cat([a, torch.ones(len(a), 1)], dim=1)
        mean_of_products = a.T @ a / len(a)
        if len(mean_of_products) > max_side:
            mean_of_products = mean_of_products.diagonal().diag()
        whole[name] = mean_of_products + damping * torch.eye(a.shape[1])

    for name, module in model.named_children():
        module.register_forward_hook(partial(look, name=name))
    model(problem.images[rows])
    return whole


def extended(tensors):
    """[W b] of every layer."""
    names = dict.fromkeys(name.split(".")[0] for name in tensors)
    return {
        name: torch.cat([tensors[f"{name}.weight"].flatten(1), tensors[f"{name}.bias"][:, None]], dim=1)
        for name in names
    }


def taken_apart(matrices, like):
    """Tensors of the model of [W b]."""
    return {
        name: (matrices[name.split(".")[0]][..., slice(-1) if t.dim() > 1 else -1]).reshape(t.shape)
        for name, t in like.items()
    }


def fedpm(problem, damping, momentum, max_side):
    w = extended(problem.start)
    for number in range(1, ROUNDS + 1):
        ends, last = {}, {}
        for i in heard(number):
            y, b = dict(w), zeros(w)
            for rows in problem.batches(i, number, LOCAL["epochs"]):
                here = taken_apart(y, problem.start)
                g = extended(problem.gradient(here, rows))
                last[i] = curvature(problem, here, rows, damping, max_side)
                for name in w:
                    step = g[name] @ torch.linalg.inv(last[i][name]) + LOCAL["weight_decay"] * y[name]
                    b[name] = momentum * b[name] + step
                    y[name] = y[name] - LOCAL["lr"] * b[name]
            ends[i] = y
        counted = mean({i: {name: t @ last[i][name] for name, t in y.items()} for i, y in ends.items()})
        whole = mean(last)
        w = {name: counted[name] @ torch.linalg.inv(whole[name]) for name in w}
    return taken_apart(w, problem.start), {}


def counted(problem, client):
    """How many examples of each class a client has."""
    return torch.bincount(problem.labels[problem.partition[client]], minlength=10).double()


def softmax_of(changed):
    """Mean over a batch of -log of the share of the right class, of logits that are changed first."""

    def loss(logits, labels):
        powers = changed(logits).exp()
        return -(powers[torch.arange(len(labels)), labels] / powers.sum(dim=1)).log().mean()

    return loss


def of_labels(problem, changed):
    """FedAvg of a loss that knows each client's counts."""
    w = dict(problem.start)
    for number in range(1, ROUNDS + 1):
        answers = {}
        for i in heard(number):
            loss = softmax_of(partial(changed, counts=counted(problem, i)))
            answers[i] = sgd(
                problem, w, i, number, **falling(number), gradient=partial(problem.gradient, loss=loss)
            )
        w = mean(answers)
    return w, {}


def fedlc(problem, tau):
    return of_labels(
        problem, lambda logits, counts: logits - tau / torch.where(counts > 0, counts, 1e-8) ** 0.25
    )


def fedrs(problem, alpha):
    return of_labels(problem, lambda logits, counts: logits * torch.where(counts > 0, 1.0, alpha))


def seen_through(model, images):
    """What goes into the last layer."""
    kept = []
    handle = model.fc3.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    model(images)
    handle.remove()
    return kept[0]


def at(problem, weights):
    """A model of its own, which is not differentiated."""
    model = copy.deepcopy(problem.model)
    model.load_state_dict(weights)
    return model.requires_grad_(False)


def contrasting(problem, w, before, mu, temperature):
    """The gradient of a client's loss with the contrast."""
    server, previous = at(problem, w), at(problem, before)

    def gradient(weights, rows):
        def loss(logits, labels):
            z, z_w, z_p = (
                seen_through(model, problem.images[rows]) for model in (problem.model, server, previous)
            )
            near, far = (
                ((z * other).sum(1) / z.norm(dim=1) / other.norm(dim=1) / temperature).exp()
                for other in (z_w, z_p)
            )
            return cross_entropy(logits, labels) - mu * (near / (near + far)).log().mean()

        return problem.gradient(weights, rows, loss)

    return gradient


def moon(problem, mu, temperature, forgets=()):
    w, before = dict(problem.start), {}
    for number in range(1, ROUNDS + 1):
        answers = {}
        for i in heard(number):
            if number in forgets:
                before.pop(i, None)
            gradient = contrasting(problem, w, before.get(i, w), mu, temperature)
            answers[i] = before[i] = sgd(problem, w, i, number, **falling(number), gradient=gradient)
        w = mean(answers)
    return w, before


def of_modules(w, modules):
    """Tensors of some modules."""
    return {name: t for name, t in w.items() if name.split(".")[0] in modules}


def fedper(problem, modules, head_epochs=0, forgets=()):
    """FedPer, or FedRep where the head has epochs of its own; only what is shared is given back, and the rest."""
    w, own = dict(problem.start), {}
    personal = of_modules(w, modules)
    for number in range(1, ROUNDS + 1):
        answers = {}
        for i in heard(number):
            if number in forgets:
                own.pop(i, None)
            begin, fixed = w | own.get(i, {}), ()
            if head_epochs:
                alone = {"epochs": head_epochs, "fixed": set(w) - set(personal)}
                begin, fixed = sgd(problem, begin, i, number, **falling(number) | alone), set(personal)
            answers[i] = sgd(problem, begin, i, number, **falling(number), fixed=fixed)
            own[i] = of_modules(answers[i], modules)
        w = mean(answers) | personal
    return {name: t for name, t in w.items() if name not in personal}, own


def ditto(problem, pull, epochs, forgets=()):
    w, own = dict(problem.start), {}
    for number in range(1, ROUNDS + 1):
        answers = {}
        for i in heard(number):
            if number in forgets:
                own.pop(i, None)
            answers[i] = sgd(problem, w, i, number, **falling(number))
            beside = falling(number) | {"epochs": epochs, "mu": pull, "centre": w}
            own[i] = sgd(problem, own.get(i, w), i, number, **beside)
        w = mean(answers)
    return w, own


UNIFORM = "strategy.alpha=uniform"
VARIANTS = {
    "fedavg": (["strategy=fedavg", DECAYING], fedavg, ("sgd", 0.7)),
    "fedsam": (
        ["strategy=fedsam", "strategy.optimizer.radius=0.3"],
        *(fedavg, ("sam", 1.0)),
    ),
    "fedavg with adamw": (["strategy=fedavg", "strategy/optimizer=adamw", DECAYING], fedavg, ("adamw", 0.7)),
    "fedavg with muon": (["strategy=fedavg", "strategy/optimizer=muon", DECAYING], fedavg, ("muon", 0.7)),
    "scaffold": (["strategy=scaffold", "strategy.momentum=0.9"], scaffold, (0.9,)),
    "scaffold of the paper": (
        ["strategy=scaffold", "strategy.momentum=0.0", UNIFORM, "strategy.server_lr=0.8"],
        *(scaffold, (0.0, 0.8, True)),
    ),
    "scaffold with a falling lr": (
        ["strategy=scaffold", "strategy.momentum=0.5", DECAYING],
        *(scaffold, (0.5, 1.0, False, 0.7)),
    ),
    "feddyn": (["strategy=feddyn", "strategy.penalty=0.3", "strategy.momentum=0.9", UNIFORM], feddyn, (0.3,)),
    "fedsmoo": (
        ["strategy=fedsmoo", "strategy.penalty=0.3", "strategy.radius=0.3", "strategy.momentum=0.9", UNIFORM],
        *(fedsmoo, (0.3, 0.3)),
    ),
    "fedadmm": (
        ["strategy=fedadmm", "strategy.rho=0.3", "strategy.eta=0.7", "strategy.momentum=0.9", UNIFORM],
        *(fedadmm, (0.3, 0.7)),
    ),
    "fedadmm that tracks": (
        ["strategy=fedadmm", "strategy.rho=0.3", "strategy.eta=null", "strategy.momentum=0.9", UNIFORM],
        *(fedadmm, (0.3, None)),
    ),
    "fednova": (["strategy=fednova", "strategy.momentum=0.9"], fednova, (0.9, 0.0)),
    "fednova proximal": (
        ["strategy=fednova", "strategy.momentum=0.5", "strategy.mu=2.0"],
        *(fednova, (0.5, 2.0)),
    ),
    "fedvarp": (["strategy=fedvarp", UNIFORM], remembering, (False,)),
    "mifa": (["strategy=mifa", UNIFORM], remembering, (True,)),
    "fedcm": (["strategy=fedcm", "strategy.mix=0.2", DECAYING], fedcm, (0.2, 0.7)),
    "fedpac": (["strategy=fedpac", "strategy.mix=0.3"], fedpac, (0.3, 0.9, 0.999, False)),
    "fedmuon": (["strategy=fedmuon", "strategy.mix=0.3"], fedpac, (0.3, 0.95, 0.95, True)),
    "fedpm": (["strategy=fedpm", "strategy.damping=0.3"], fedpm, (0.3, 0.0, 1024)),
    "fedpm with a diagonal and momentum": (
        ["strategy=fedpm", "strategy.damping=0.1", "strategy.momentum=0.9", "strategy.max_side=50"],
        *(fedpm, (0.1, 0.9, 50)),
    ),
    "fedlc": (["strategy=fedlc", DECAYING, "strategy.tau=0.7"], fedlc, (0.7,)),
    "fedrs": (["strategy=fedrs", DECAYING, "strategy.restriction=0.3"], fedrs, (0.3,)),
    "moon": (["strategy=moon", DECAYING, "strategy.mu=3", "strategy.temperature=0.4"], moon, (3.0, 0.4)),
    "fedper": (["strategy=fedper", DECAYING, "strategy.personal_layers=2"], fedper, (("fc2", "fc3"),)),
    "fedrep": (["strategy=fedrep", DECAYING, "strategy.head_epochs=1"], fedper, (("fc3",), 1)),
    "ditto": (
        ["strategy=ditto", DECAYING, "strategy.lambda=0.7", "strategy.personal_epochs=1"],
        ditto,
        (0.7, 1),
    ),
}


WORK = {"fedsam": 2, "fedsmoo": 2, "moon": Fraction(5, 3), "fedrep": Fraction(3, 2), "ditto": Fraction(3, 2)}
"""Passes for each of FedAvg's, where there are more; a forward pass alone is a third of one."""
UNSENT = {"fedper": 10 * 7 + 110, "fedrep": 110}
"""Numbers of a client that it does not send: of fc2 and fc3, or of fc3."""


def sent(variant, tensors):
    """Sizes of the arrays that go down and up."""
    size = sum(t.numel() for t in tensors)
    vectors = sum(t.numel() for t in tensors if t.dim() == 1)
    if "scaffold" in variant or variant == "fedsmoo":  # control variates; multipliers
        return [size] * 2, [size] * 2
    if variant == "fedcm":  # the velocity
        return [size] * 2, [size]
    if "fedpm" in variant:  # triangles of layers of so many inputs, or of one a diagonal
        sides = [t.flatten(1).shape[1] + 1 for t in tensors if t.dim() > 1]
        return [size], [size, sum(n if "diagonal" in variant and n > 50 else n * (n + 1) // 2 for n in sides)]
    memory = {"fedpac": [size, size, 2], "fedmuon": [size - vectors, vectors, vectors, 2]}.get(variant)
    return ([size] * 2 + memory, [size, *memory]) if memory else ([size], [size - UNSENT.get(variant, 0)])


def kept(federation, client):
    """What a client remembers as the server accepted it, or what the server keeps of it."""
    if tables := getattr(federation.strategy, "tables", {}):
        return next(iter(tables.values()))[client]
    state = federation.grid.host.states[client]
    pending = state.pending_round == federation.gateway.accepted[client]
    [row] = (state.pending if pending else state.accepted).values()
    return row


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rival_follows_the_plain_loop(problem, variant, monkeypatch):
    send_and_receive, exchanges = LocalGrid.send_and_receive, []

    def lose_one(grid, messages, **kwargs):
        replies = sorted(send_and_receive(grid, messages, **kwargs), key=lambda r: r.metadata.src_node_id)
        exchanges.append(len(replies))
        return replies[1:] if len(exchanges) == LOST else replies

    monkeypatch.setattr(LocalGrid, "send_and_receive", lose_one)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # in which PyTorch's Muon computes
    said, loop, numbers = VARIANTS[variant]
    federation, metrics = problem.run(ROUNDS, *said, *SAID)
    expected, held = loop(problem, *numbers)
    assert_moved_alike(federation, expected, problem.start)
    for client, row in held.items():
        flat = torch.cat([t.flatten() for t in row.values()])
        assert (kept(federation, client).double() - flat).norm() <= 3e-4 * flat.norm()
    down, up = sent(variant, list(problem.start.values()))
    assert exchanges == [2] * ROUNDS
    assert metrics[-1]["bytes_down"] == 2 * ROUNDS * sum(4 * size + 128 for size in down)
    assert metrics[-1]["bytes_up"] == (2 * ROUNDS - 1) * sum(4 * size + 128 for size in up)
    share = WORK.get(variant, 1)
    seen = sum(
        math.ceil(share * LOCAL["epochs"] * SIZES[i])
        for number in range(1, ROUNDS + 1)
        for i in heard(number)
    )
    assert metrics[-1]["passes"] == pytest.approx(seen / sum(SIZES), rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_clients_that_advance_together_are_as_when_alone(problem, variant):
    said, *_ = VARIANTS[variant]
    alone, together = (problem.run(2, *said, *SAID[1:], f"engine.stack={size}") for size in (1, len(SIZES)))
    start = torch.cat([t.flatten() for t in problem.start.values()])
    ends = [parameters_to_vector(f.model.module.parameters()).double() for f, _ in (alone, together)]
    assert (ends[0] - ends[1]).norm() <= 1e-4 * (ends[0] - start).norm()
    assert alone[1][-1]["passes"] == together[1][-1]["passes"]
    for client, state in alone[0].grid.host.states.items():
        for name, row in state.pending.items():
            other = together[0].grid.host.states[client].pending[name]
            assert (other - row).norm() <= 1e-4 * row.norm()


WITHOUT = {
    "fedlc": "strategy.tau=0",
    "fedrs": "strategy.restriction=1",
    "moon": "strategy.mu=0",
    "fedper": "strategy.personal_layers=0",
    "ditto": "strategy.lambda=0",
}


@pytest.fixture(scope="module")
def plain(problem):
    return problem.run(2, "strategy=fedavg", *SAID)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_rival_without_what_it_adds_is_fedavg_to_the_bit(problem, plain, name):
    averaged, lines = plain
    same, again = problem.run(2, f"strategy={name}", WITHOUT[name], *SAID)
    assert torch.equal(same.model.weights, averaged.model.weights)
    other, _ = problem.run(2, f"strategy={name}", *SAID)
    # Ditto's server never knows what its clients have of their own
    assert torch.equal(other.model.weights, averaged.model.weights) == (name == "ditto")
    own = ("round", "train_loss", "bytes_up", "bytes_down")
    assert [[line[key] for key in own] for line in lines] == [[line[key] for key in own] for line in again]


def test_with_a_large_damping_fedpm_is_fedavg(problem):
    heavy = 1e5
    said = [
        "participation=0.5",
        "strategy.local_epochs=2",
        "strategy.weight_decay=0",
        "strategy.momentum=0.9",
    ]
    averaged, _ = problem.run(2, "strategy=fedavg", "strategy.lr=0.02", *said)
    numbers = [f"strategy.damping={heavy}", f"strategy.lr={0.02 * heavy}"]
    mixed, _ = problem.run(2, "strategy=fedpm", *numbers, *said)
    expected = {name: p.detach().double() for name, p in averaged.model.module.named_parameters()}
    assert_moved_alike(mixed, expected, problem.start, share=3e-4)  # of which half is A over the damping


FORGET = 5
"""A round before which those who take part lose what they remember."""
OF_ONES_OWN = ["moon", "fedper", "fedrep", "ditto"]
"""Rivals whose clients remember what the server does not know."""


@pytest.mark.parametrize("variant", OF_ONES_OWN)
def test_a_client_that_lost_what_nobody_else_knows_begins_anew_and_says_so(
    problem, variant, monkeypatch, caplog
):
    send_and_receive, exchanges = LocalGrid.send_and_receive, []

    def forget(grid, messages, **kwargs):
        asked = list(messages)
        if asked[0].metadata.message_type == "train":
            exchanges.append(asked)
            if len(exchanges) == FORGET:
                grid.host.states |= {m.metadata.dst_node_id: ClientState() for m in asked}
        replies = sorted(send_and_receive(grid, asked, **kwargs), key=lambda r: r.metadata.src_node_id)
        return replies[1:] if len(exchanges) == LOST else replies

    monkeypatch.setattr(LocalGrid, "send_and_receive", forget)
    said, loop, numbers = VARIANTS[variant]
    federation, metrics = problem.run(ROUNDS, *said, *SAID)
    expected, _ = loop(problem, *numbers, forgets={FORGET})
    assert_moved_alike(federation, expected, problem.start)
    assert metrics[-1]["clients_ok"] == 2
    anew = [line for line in caplog.messages if "has lost what it remembered, and begins anew" in line]
    known = {i for number in range(1, FORGET) for i in heard(number)}
    assert len(anew) == len(known & set(heard(FORGET))) > 0
