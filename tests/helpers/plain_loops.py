"""The algorithms once more, as slow loops over clients and tensors in double precision.

Nothing of `strategies` or `pisa_fl` is used but a model's layers and the stored images: autograd, dictionaries
and the papers' formulas. Symbols as in `strategies.pisa`.
"""

import json
import math
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import save_file
from torch import tanh
from torch.nn.functional import avg_pool2d, cross_entropy

from pisa_fl import compose, prepare
from pisa_fl.data.mnist import mnist_mini
from pisa_fl.models.cnn import SimpleCNN

MEAN, STD = 0.1307, 0.3081
SIZES = (100, 64, 37, 19)
"""Examples of each client: more than a mini-batch and not a multiple of it, exactly one, and less than one."""
BATCH = 32
SEED = 5


def few_digits(mean, std, augment=None):
    """The first 220 training and 50 test images of mnist_mini."""
    whole = mnist_mini(None, mean, std, augment)
    return type(whole)(
        *(whole.train_images[: sum(SIZES)], whole.train_labels[: sum(SIZES)]),
        *(whole.test_images[:50], whole.test_labels[:50]),
        *(whole.classes, whole.mean, whole.std, augment),
    )


class SmoothCNN(SimpleCNN):
    """Two convolutions, a wide, a tall and a square linear layer, with tanh and average pools.

    Where an activation or a maximum is about to change, the gradient of ReLU and max pool jumps: two trajectories that
    differ by rounding alone end up on different sides of it, and then are different trajectories. Here the gradient
    changes as little as the weights do, so that a deviation is somebody's fault, on whatever processor.
    """

    def __init__(self):
        super().__init__((1, 28, 28), 10, channels=[2, 3], kernel=5, hidden=[6, 10])

    def forward(self, images):
        features = avg_pool2d(tanh(self.conv1(images)), 2)
        features = avg_pool2d(tanh(self.conv2(features)), 2)
        return self.fc3(tanh(self.fc2(tanh(self.fc1(features.flatten(1))))))


@dataclass
class Problem:
    """Images of the clients, the model and where it starts."""

    folder: object
    model: torch.nn.Module
    start: dict
    images: torch.Tensor
    labels: torch.Tensor
    partition: list

    def gradient(self, weights, rows, loss=cross_entropy):
        """Gradient of the mean loss of logits and labels over some rows, one tensor a name."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        loss = loss(self.model(self.images[rows]), self.labels[rows])
        return dict(zip(weights, torch.autograd.grad(loss, list(self.model.parameters())), strict=True))

    def sum_of_batches(self, weights, rows):
        """Sum over mini-batches, in order, of the gradients of their mean losses."""
        parts = [self.gradient(weights, rows[at : at + BATCH]) for at in range(0, len(rows), BATCH)]
        return {name: sum(part[name] for part in parts) for name in weights}

    def batches(self, client, round_number, epochs):
        """A client's mini-batches in a round, by the documented rule."""
        draw = np.random.default_rng([SEED, crc32(b"batches"), round_number, client])
        rows = np.array(self.partition[client])
        for _ in range(epochs):
            order = rows[draw.permutation(len(rows))]
            yield from (torch.from_numpy(order[at : at + BATCH]) for at in range(0, len(rows), BATCH))

    def run(self, rounds, *overrides):
        """The framework's own run of this problem: its federation after the rounds, and their metrics."""
        federation = prepare(
            compose(
                *("data=few", "model=smooth"),
                *(
                    "partition=from_file",
                    f"partition.path={self.folder}/partition.json",
                    f"clients={len(SIZES)}",
                ),
                *(f"init={self.folder}/initial.safetensors", f"batch_size={BATCH}", f"seed={SEED}"),
                *("device=cpu", "engine.threads=1", *overrides),
                config_dir=self.folder,
            )
        )
        metrics = list(federation.rounds(rounds))
        federation.load_weights()
        return federation, metrics


def make_problem(folder):
    """Write a problem's files into a folder: configuration, partition and initial weights."""
    torch.manual_seed(3)
    model = SmoothCNN()
    save_file(model.state_dict(), folder / "initial.safetensors")
    (folder / "data").mkdir()
    (folder / "model").mkdir()
    (folder / "model" / "smooth.yaml").write_text("_target_: plain_loops.SmoothCNN\n")
    (folder / "data" / "few.yaml").write_text(
        f"_target_: plain_loops.few_digits\nmean: [{MEAN}]\nstd: [{STD}]\naugment: null\n"
    )
    data = few_digits([MEAN], [STD])
    # sorted by label, so that clients differ; the order within a client is kept
    order = np.argsort(data.train_labels, kind="stable").tolist()
    ends = np.cumsum(SIZES).tolist()
    partition = [order[end - size : end] for size, end in zip(SIZES, ends, strict=True)]
    (folder / "partition.json").write_text(json.dumps({str(i): rows for i, rows in enumerate(partition)}))
    return Problem(
        folder,
        model.double(),
        {name: p.detach().double().clone() for name, p in model.named_parameters()},
        (torch.from_numpy(data.train_images.copy()).double() / 255 - MEAN) / STD,
        torch.from_numpy(data.train_labels.copy()),
        partition,
    )


def everyone(round_number):
    """All clients."""
    return list(range(len(SIZES)))


def half(round_number):
    """Half of the clients, by the documented rule."""
    draw = np.random.default_rng([SEED, crc32(b"participation"), round_number])
    return sorted(draw.choice(list(range(len(SIZES))), len(SIZES) // 2, replace=False).tolist())


def assert_moved_alike(federation, expected, start, share=1e-4):
    """Every tensor moved to where the plain loop took it, to a share of the way and single-precision rounding."""
    weights = dict(federation.model.module.named_parameters())
    for name, target in expected.items():
        moved = (target - start[name]).norm()
        error = (weights[name].detach().double() - target).norm()
        assert moved > 0, name
        assert error <= share * moved + 5e-7 * target.norm(), f"{name}: off by {error / moved:.1e} of the way"


def admm(
    problem, rounds, rule, *, lambda_=0.0, uniform=False, steps=1, gradient="mean", drawn=everyone, every=1
):
    """PISA's rounds; `rule` knows sigma and the preconditioner, and what clients share is measured `every` so often.

    Returns the final consensus and the duals.
    """
    w = dict(problem.start)
    local, dual, largest = {}, {}, {}
    for number in range(1, rounds + 1):
        sigma = rule.sigma(number)
        for i in drawn(number):
            batches = problem.batches(i, number, steps)

            def differentiate(at, i=i, batches=batches):
                if gradient == "mean":
                    return problem.gradient(at, problem.partition[i])
                if gradient == "sum":
                    return problem.sum_of_batches(at, problem.partition[i])
                return problem.gradient(at, next(batches))

            pi = dual.get(i, {name: torch.zeros_like(t) for name, t in w.items()})
            g = differentiate(w)
            rule.observe(i, g, {name: g[name] + pi[name] for name in w}, first=True)
            local[i], dual[i] = w, pi
            if sigma is None:
                continue
            for k in range(steps):
                if k:
                    g = differentiate(local[i])
                    rule.observe(i, g, {name: g[name] + pi[name] for name in w}, first=False)
                local[i] = {
                    name: local[i][name]
                    - rule.step(
                        i, name, g[name], pi[name] + sigma[name] * (local[i][name] - w[name]), sigma[name]
                    )
                    for name in w
                }
            dual[i] = {name: pi[name] + sigma[name] * (local[i][name] - w[name]) for name in w}
        share = {i: 1.0 if uniform else float(SIZES[i]) for i in local}
        alpha = {i: s / sum(share.values()) for i, s in share.items()}
        if (number - 1) % every == 0:
            rule.finish({i: alpha[i] for i in drawn(number)})
        sigma = rule.sigma(number + 1)
        if sigma is not None:
            if rule.by_hand is None:
                largest = {name: max(largest.get(name, 0.0), float(rule.scale(name))) for name in w}
            w = {
                name: sum(alpha[i] * (sigma[name] * local[i][name] + dual[i][name]) for i in local)
                / (sigma[name] + min(lambda_, largest.get(name, lambda_)))
                for name in w
            }
    return w, dual


class Rule:
    """Q = I; sigma and rho by hand, or automatic from lr and momentum."""

    def __init__(
        self, names, sigma=None, rho=None, lr=None, momentum=None, gamma=1.0, every=10, participation=1.0
    ):
        self.names, self.by_hand, self.lr = names, sigma, lr
        self.gamma, self.every, self.participation = gamma, every, participation
        self.rho = rho if rho is not None else participation * momentum / ((1 - momentum) * lr)

    def sigma(self, number):
        """Penalty of a round by tensor; it was divided by gamma after rounds every, 2 every, ... from zero."""
        grown = sum(1 for past in range(number - 1) if past > 0 and past % self.every == 0)
        if self.by_hand is not None:
            return dict.fromkeys(self.names, self.by_hand / self.gamma**grown)
        scales = {name: self.scale(name) for name in self.names}
        if None in scales.values():
            return None
        return {name: self.participation * scales[name] / self.lr / self.gamma**grown for name in self.names}

    def scale(self, name):
        return 1.0

    def observe(self, client, g, residual, first):
        pass

    def step(self, client, name, g, rest, sigma):
        return (g + rest) / (sigma + self.rho)

    def finish(self, shares):
        pass


class Averages:
    """Moving averages of something observed: one of each client's own, or one of the round's average."""

    def __init__(self, beta, shared, transform=lambda t: t, before=lambda t: t, plain=False):
        self.beta, self.shared, self.plain = beta, shared, plain
        self.before, self.transform = before, transform
        self.value, self.steps, self.seen = {}, {}, {}

    def observe(self, client, observed, first):
        if first:
            self.seen[client] = {name: self.before(t) for name, t in observed.items()}
        if not self.shared:
            self.advance(client, {name: self.before(t) for name, t in observed.items()})

    def advance(self, key, observed):
        weight = 1.0 if self.plain else 1 - self.beta
        old = self.value.get(key, {})
        self.value[key] = {
            name: self.beta * old.get(name, 0.0) + weight * self.transform(t) for name, t in observed.items()
        }
        self.steps[key] = self.steps.get(key, 0) + 1

    def finish(self, shares):
        if self.shared:
            total = sum(shares.values())
            names = self.seen[next(iter(shares))]
            self.advance(
                "all",
                {name: sum(a / total * self.seen[i][name] for i, a in shares.items()) for name in names},
            )

    def of(self, client, name, correct=True):
        """The bias-corrected average that a client steps with; its own first observation if there is none."""
        key = "all" if self.shared else client
        if key not in self.value:
            return self.transform(self.seen[client][name])
        return self.value[key][name] / (1 - self.beta ** self.steps[key] if correct else 1.0)


class MomentRule(Rule):
    """SISA: Q = diag(sqrt(v^) + eps)."""

    def __init__(
        self,
        names,
        *,
        beta,
        shared,
        of="residual",
        squares=False,
        first_step=False,
        eps=1e-8,
        floor=0.0,
        **penalty,
    ):
        super().__init__(names, **penalty)
        self.uses_gradient, self.eps, self.first_step, self.beta = of == "gradient", eps, first_step, beta
        square = {"before": torch.square} if squares else {"transform": torch.square}
        self.moments, self.floor = Averages(beta, shared, **square), floor

    def observe(self, client, g, residual, first):
        self.moments.observe(client, g if self.uses_gradient else residual, first)

    def root(self, client, name):
        if self.first_step:
            return (self.moments.of(client, name, correct=False) / (1 - self.beta)).sqrt() + self.eps
        return self.moments.of(client, name).sqrt() + self.eps

    def scale(self, name):
        return float(self.root("all", name).mean()) if self.moments.value else None

    def with_floor(self, root):
        return root + self.floor * root.mean()

    def step(self, client, name, g, rest, sigma):
        return (g + rest) / (sigma + self.rho * self.with_floor(self.root(client, name)))

    def finish(self, shares):
        self.moments.finish(shares)


class NewtonSchulzRule(MomentRule):
    """NSISA as its authors' code has it; vectors follow SISA."""

    def __init__(self, names, *, mu=0.95, **others):
        super().__init__(names, **others)
        self.mu, self.momentum = mu, Averages(mu, shared=False, plain=True)

    def observe(self, client, g, residual, first):
        super().observe(client, g, residual, first)
        self.momentum.observe(client, g, first)

    def step(self, client, name, g, rest, sigma):
        if g.dim() < 2:
            return super().step(client, name, g, rest, sigma)
        x = (g + self.mu * self.momentum.of(client, name, correct=False)).flatten(1)
        rows, columns = x.shape
        x = x / x.norm()
        for _ in range(5):
            # the quintic, on whichever side: it is odd in the singular values
            x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
        u = (x * math.sqrt(max(1.0, rows / columns))).view_as(g) + rest
        return u / (sigma + self.rho * (u.abs() + self.eps))


class SpectralRule(MomentRule):
    """NSISA in its spectral form, by dense inverses; vectors follow SISA."""

    def __init__(self, names, *, beta, shared, **others):
        super().__init__(names, beta=beta, shared=shared, **others)
        self.grams = Averages(beta, shared, transform=self.gram)

    @staticmethod
    def gram(residual):
        if residual.dim() < 2:
            return residual
        r = residual.flatten(1)
        return r @ r.T / r.shape[1] if r.shape[0] <= r.shape[1] else r.T @ r / r.shape[0]

    def observe(self, client, g, residual, first):
        super().observe(client, g, residual, first)
        self.grams.observe(client, g if self.uses_gradient else residual, first)

    def root_of_gram(self, client, name):
        values, vectors = torch.linalg.eigh(self.grams.of(client, name))
        return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T

    def scale(self, name):
        if not self.grams.value or self.grams.value["all"][name].dim() < 2:
            return super().scale(name)
        q = self.root_of_gram("all", name)
        return float(q.trace() / len(q))

    def step(self, client, name, g, rest, sigma):
        if g.dim() < 2:
            return super().step(client, name, g, rest, sigma)
        r = (g + rest).flatten(1)
        q = self.root_of_gram(client, name)
        inverse = torch.linalg.inv(sigma * torch.eye(len(q), dtype=q.dtype) + self.rho * q)
        return (inverse @ r if r.shape[0] <= r.shape[1] else r @ inverse).view_as(g)

    def finish(self, shares):
        super().finish(shares)
        self.grams.finish(shares)


def sgd(
    problem,
    start,
    client,
    number,
    *,
    lr,
    momentum,
    weight_decay,
    epochs,
    mu=0.0,
    centre=None,
    slope=None,
    gradient=None,
    fixed=(),
):
    """Local SGD from the server's weights: what one client sends back.

    The proximal term is around `centre`, or the start; `slope` is a linear term of its loss; `gradient` is that of
    another loss, at weights and of rows; tensors whose names are in `fixed` stay as they are.
    """
    w = dict(start)
    gradient = gradient or problem.gradient
    buffer = {name: torch.zeros_like(t) for name, t in w.items()}
    for rows in problem.batches(client, number, epochs):
        g = gradient(w, rows)
        for name in w:
            pull = g[name] + weight_decay * w[name] + mu * (w[name] - (centre or start)[name])
            buffer[name] = momentum * buffer[name] + pull + (slope[name] if slope else 0)
        w = {name: w[name] - (name not in fixed) * lr * buffer[name] for name in w}
    return w


def fedavg(problem, rounds, drawn=everyone, **local):
    """FedAvg's rounds: the average of the clients' weights, by their examples."""
    w = problem.start
    for number in range(1, rounds + 1):
        answers = {i: sgd(problem, w, i, number, **local) for i in drawn(number)}
        total = sum(SIZES[i] for i in answers)
        w = {name: sum(SIZES[i] / total * answer[name] for i, answer in answers.items()) for name in w}
    return w


def carried(v, u, new_u, z, new_z):
    """The second moment in new bases, as if its coordinates were uncorrelated."""
    return torch.einsum("ik,ij,jl->kl", (u.T @ new_u) ** 2, v, (z.T @ new_z) ** 2)


def blended(v, u, left, z, right, factored):
    """The second moment with a share of what it would be if rows and columns were independent."""
    a, b = ((basis.T @ gram @ basis).diagonal().clamp(min=0) for basis, gram in ((u, left), (z, right)))
    return (1 - factored) * v + factored * torch.outer(a, b) / a.sum()


def allowed(start, moved, w, bound):
    """What of its step each tensor may take, as a share: halved widths of a limit on the shares of matrices."""

    def share(name, size):
        if w[name].dim() < 2:
            return float(size[name].norm()) / max(float(start[name].norm()), 0.1 * size[name].numel() ** 0.5)
        return float(torch.linalg.matrix_norm(size[name], 2)) / max(
            float(torch.linalg.matrix_norm(start[name], 2)), 0.3
        )

    shares = {name: share(name, moved) for name in w}
    matrices = [shares[name] for name in w if w[name].dim() > 1]
    low, high = 0.0, max(matrices)
    if sum(matrices) > bound:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(min(x, middle) for x in matrices) < bound else (low, middle)
    return {name: min(1.0, (high if w[name].dim() > 1 else bound) / shares[name]) for name in w}


def kronecker_pisa(problem, rounds, numbers, q, *, drawn=everyone, horizon):
    """`strategy=pisa`: the second moment in Kronecker eigenbases, of a table of gradients; fresh primals, all duals."""
    w, beta = dict(problem.start), q["beta"]
    flat = {name: (lambda t: t.flatten(1) if t.dim() > 1 else t[None]) for name in w}
    dual, table = {}, {}
    left, right, u, z, v, largest, mass = {}, {}, {}, {}, {}, {}, 0.0
    for number in range(1, rounds + 1):
        done = min(1.0, (number - 1) / (horizon - 1))
        final = numbers["final"]
        lr = numbers["lr"] * min(1.0, number / max(1, numbers["warmup"]))
        lr *= final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
        for i in drawn(number):
            g = problem.gradient(w, problem.partition[i])
            table[i] = {name: flat[name](g[name]) for name in w}
            dual.setdefault(i, {name: torch.zeros_like(table[i][name]) for name in w})
        known = sum(SIZES[i] for i in table)
        present = sum(SIZES[i] for i in drawn(number))
        mass = beta * mass + 1 - beta
        after, moved = {}, {}
        for name, before in w.items():
            g = sum(SIZES[i] / known * table[i][name] for i in table)
            m, n = g.shape
            one = before.dim() < 2
            left[name] = beta * left.get(name, 0.0) + (1 - beta) * g @ g.T
            right[name] = beta * right.get(name, 0.0) + (1 - beta) * g.T @ g
            new_u = torch.linalg.eigh(left[name])[1] if m > 1 and not one else torch.eye(m, dtype=g.dtype)
            new_z = torch.linalg.eigh(right[name])[1] if n > 1 and not one else torch.eye(n, dtype=g.dtype)
            if name in v:
                v[name] = carried(v[name], u[name], new_u, z[name], new_z)
            u[name], z[name] = new_u, new_z
            v[name] = beta * v.get(name, 0.0) + (1 - beta) * (new_u.T @ g @ new_z) ** 2
            share = 0.0 if one else q["factored"]
            moment = blended(v[name], new_u, left[name], new_z, right[name], share)
            root = (moment / mass).sqrt() + q["eps"]
            sigma, rho = root.mean() / lr, numbers["momentum"] / ((1 - numbers["momentum"]) * lr)
            start, total = flat[name](before), torch.zeros_like(g)
            for i in drawn(number):
                residual = g + numbers["difference"] * (table[i][name] - g) + dual[i][name]
                step = new_u @ ((new_u.T @ residual @ new_z) / (sigma + rho * root)) @ new_z.T
                total = total + SIZES[i] / present * (start - step)
                dual[i][name] = dual[i][name] - sigma * step
            slowed = numbers["friction"] * sum(SIZES[i] / known * dual[i][name] for i in dual)
            for i in dual:
                dual[i][name] = dual[i][name] - slowed
            duals = sum(SIZES[i] / known * dual[i][name] for i in dual)
            largest[name] = max(largest.get(name, 0.0), float(root.mean()))
            moved[name] = (sigma * total + duals) / (
                sigma + min(numbers["lambda"], numbers["difference"] * largest[name])
            ) - start
        longest = allowed(
            {name: flat[name](before) for name, before in w.items()}, moved, w, numbers["bound"]
        )
        for name, before in w.items():
            after[name] = before + (longest[name] * moved[name]).view_as(before)
        w = after
    return w, {i: {name: row.view_as(w[name]) for name, row in rows.items()} for i, rows in dual.items()}
