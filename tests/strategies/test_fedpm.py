"""FedPM: what its mixing reaches at once where a mean does not, and what it does with what is no layer."""

import numpy as np
import pytest
import torch
from flwr.app import MetricRecord
from torch import nn

from pisa_fl import compose, prepare
from strategies import FedPm, Layout
from strategies.base.averaging import Answers
from strategies.base.messages import RoundError

CLIENTS, EXAMPLES, INPUTS = 4, (40, 25, 60, 15), 3


def table(folder):
    """A table whose clients have other inputs, and other slopes; what was written, target last."""
    draw = np.random.default_rng(0)
    lines, rows = ["a,b,c,target,who"], []
    for client, count in enumerate(EXAMPLES):
        inputs = draw.normal(draw.normal(0, 2, INPUTS), draw.uniform(0.3, 3, INPUTS), (count, INPUTS))
        target = inputs @ draw.normal(0, 2, INPUTS) + draw.normal(0, 0.1, count)
        rows.append(np.column_stack([inputs, target]))
        lines += [",".join([*map(repr, map(float, row)), f"client{client}"]) for row in rows[-1]]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return rows


def least_squares(rows):
    """[w b] of a client's, or of all clients', rows."""
    inputs = np.column_stack([rows[:, :-1], np.ones(len(rows))])
    return np.linalg.lstsq(inputs, rows[:, -1], rcond=None)[0]


def test_one_round_of_one_step_reaches_the_least_squares_of_all_clients(tmp_path):
    rows = table(tmp_path)
    path = tmp_path / "train.csv"
    config = compose(
        *("task=tabular_regression", "data=csv", f"data.path={path}", f"data.test={path}"),
        *("data.target=target", "data.group_by=who", "partition=natural", f"clients={CLIENTS}"),
        *("model=logistic", "strategy=fedpm", "strategy.lr=0.5", "strategy.damping=1e-7"),
        *("strategy.local_epochs=1", "batch_size=1000", "rounds=1", "device=cpu", "engine.threads=1"),
    )
    federation = prepare(config)
    list(federation.rounds(1))
    federation.load_weights()
    reached = torch.cat([p.detach().flatten() for p in federation.model.module.parameters()]).double().numpy()
    whole = np.concatenate(rows)
    scaled = [(part - whole.mean(axis=0)) / whole.std(axis=0) for part in rows]
    expected = least_squares(np.concatenate(scaled))
    assert np.linalg.norm(reached - expected) <= 1e-4 * np.linalg.norm(expected)
    # each client's own step leads to its own least squares, whose mean is far from there
    averaged = np.average([least_squares(part) for part in scaled], axis=0, weights=EXAMPLES)
    assert np.linalg.norm(averaged - expected) > 0.5 * np.linalg.norm(expected)


class Parts(nn.Module):
    """An embedding and a norm beside a convolution in groups without a bias, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.convolution, self.linear = nn.Conv1d(4, 6, 3, groups=2, bias=False), nn.Linear(6, 3)


def test_layers_are_mixed_by_their_curvature_and_the_rest_is_averaged():
    layout, draw = Layout.of_parameters(Parts()), torch.Generator().manual_seed(1)
    server = FedPm(layout, "uniform", 100)
    server.consensus = torch.randn(layout.size, generator=draw)
    groups, side, last = 2, 6, 7
    lengths = [groups * side * (side + 1) // 2, last * (last + 1) // 2]
    said = {
        node: {
            "weights": torch.randn(layout.size, generator=draw),
            "roots": torch.randn(sum(lengths), generator=draw),
        }
        for node in (3, 8)
    }
    answers = Answers(said, dict.fromkeys(said, 1), dict.fromkeys(said, MetricRecord()))
    views = layout.views(server.step(answers, dict.fromkeys(said, 1.0)).double())
    own = {node: layout.views(one["weights"].double()) for node, one in said.items()}
    for name in ("embedding.weight", "norm.weight", "norm.bias"):
        torch.testing.assert_close(views[name], (own[3][name] + own[8][name]) / 2, rtol=0, atol=1e-6)

    def whole(packed, size):
        root = torch.zeros(size, size, dtype=torch.float64)
        root[tuple(torch.triu_indices(size, size))] = packed.double()
        return root.T @ root

    def solved(matrices, wholes):
        return sum(m @ p for m, p in zip(matrices, wholes, strict=True)) @ torch.linalg.inv(sum(wholes))

    parts = {node: one["roots"].split(lengths) for node, one in said.items()}
    for group in range(groups):
        filters = [own[node]["convolution.weight"].reshape(groups, 3, 6)[group] for node in said]
        wholes = [whole(parts[node][0].reshape(groups, -1)[group], side) for node in said]
        mixed = views["convolution.weight"].reshape(groups, 3, 6)[group]
        torch.testing.assert_close(mixed, solved(filters, wholes), rtol=1e-4, atol=1e-4)
    linear = [torch.cat([v["linear.weight"], v["linear.bias"][:, None]], dim=1) for v in own.values()]
    expected = solved(linear, [whole(parts[node][1], last) for node in said])
    mixed = torch.cat([views["linear.weight"], views["linear.bias"][:, None]], dim=1)
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)


def test_what_has_no_inverse_is_refused():
    layout = Layout.of_parameters(nn.Linear(3, 2))
    server = FedPm(layout, "uniform", 100)
    server.consensus = torch.zeros(layout.size)
    answers = Answers({0: {"weights": torch.ones(layout.size), "roots": torch.zeros(10)}}, {0: 1}, {})
    with pytest.raises(RoundError, match="P of ''"):
        server.step(answers, {0: 1.0})
    with pytest.raises(ValueError, match="a linear layer or a convolution"):
        FedPm(Layout.of_parameters(nn.LayerNorm(3)), "uniform", 100)
