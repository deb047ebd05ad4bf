"""Flower's robust server halves, by `strategy=`: the papers' rules, and Flower's own classes on the same replies."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from plain_loops import SIZES, make_problem

from pisa_fl.engines.local import LocalGrid
from strategies.base.messages import WEIGHTS, metrics_of, vectors

ROUNDS = 2
LOCAL = ["strategy.local_epochs=1", "strategy.lr=0.05"]
LIAR = 1
"""A client that answers with its weights multiplied by a thousand."""


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return make_problem(tmp_path_factory.mktemp("problem"))


def median(rows, sizes):
    return np.median(rows, axis=0)


def trimmed(rows, sizes):
    """Without the least and the greatest of four."""
    return np.sort(rows, axis=0)[1:-1].mean(axis=0)


def by_krum(rows):
    """From the best to the worst: the distance to the 4 - 1 - 2 nearest others."""
    apart = np.square(rows[:, None] - rows[None]).sum(axis=2)
    return np.argsort(np.sort(apart, axis=1)[:, 1])


def krum(rows, sizes):
    return rows[by_krum(rows)[0]]


def multikrum(rows, sizes):
    best = by_krum(rows)[:3]
    return sizes[best] @ rows[best] / sizes[best].sum()


NOBODY = {"fraction_evaluate": 0.0}
RULES = {
    "fedmedian": ([], flower.FedMedian(**NOBODY), median),
    "fedtrimmedavg": (["strategy.beta=0.25"], flower.FedTrimmedAvg(beta=0.25, **NOBODY), trimmed),
    "krum": (["strategy.malicious=1"], flower.Krum(num_malicious_nodes=1, **NOBODY), krum),
    "multikrum": (
        ["strategy.malicious=1", "strategy.selected=3"],
        *(flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3, **NOBODY), multikrum),
    ),
}


def reply(weights, said, client):
    content = RecordDict({"arrays": ArrayRecord({WEIGHTS: Array(weights)}), "metrics": MetricRecord(said)})
    return Message(content, reply_to=Message(RecordDict(), client, "train"))


@pytest.mark.parametrize("name", RULES)
def test_a_liar_among_the_clients_and_the_papers_rule(problem, name, monkeypatch):
    send_and_receive, heard = LocalGrid.send_and_receive, []

    def lie(grid, messages, **kwargs):
        replies = sorted(send_and_receive(grid, messages, **kwargs), key=lambda r: r.metadata.src_node_id)
        arrays = replies[LIAR].content["arrays"]
        arrays[WEIGHTS] = Array(1000 * arrays[WEIGHTS].numpy())
        heard.append([(r.content["arrays"][WEIGHTS].numpy(), dict(metrics_of(r.content))) for r in replies])
        return replies

    monkeypatch.setattr(LocalGrid, "send_and_receive", lie)
    said, own, rule = RULES[name]
    federation, metrics = problem.run(ROUNDS, f"strategy={name}", *said, *LOCAL)
    assert [len(replies) for replies in heard] == [len(SIZES)] * ROUNDS
    found = vectors(federation.arrays)[WEIGHTS]
    directly, _ = own.aggregate_train(
        ROUNDS, [reply(weights, said, client) for client, (weights, said) in enumerate(heard[-1])]
    )
    assert torch.equal(found, vectors(directly)[WEIGHTS])
    rows = np.array([weights for weights, _ in heard[-1]], dtype=np.float64)
    expected = rule(rows, np.array(SIZES, dtype=np.float64))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert np.abs(rows[LIAR]).max() > 100 > np.abs(expected).max()
    assert metrics[-1]["clients_ok"] == len(SIZES)
