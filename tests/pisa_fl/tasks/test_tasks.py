"""Tables and texts, the losses and metrics of tasks, clients' own examples: against pandas, torch and plain loops."""

import gzip
import json
import math
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import partitioners
from pisa_fl import ConfigurationError, compose, prepare, resume, run
from pisa_fl.clients.flat_model import FlatModel
from pisa_fl.clients.stack import ClientData, LocalStack
from pisa_fl.data.hold_out import hold_out
from pisa_fl.data.table import adult, csv
from pisa_fl.data.text import plays
from pisa_fl.models.gpt import GPT
from pisa_fl.models.lstm import LSTM
from pisa_fl.tasks import NextCharacter, Regression

SHARED = Path(os.environ.get("PISA_FL_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))

PLAY = (
    "FIRST:\n" + "to be or not to be " * 12 + "\n\nSECOND:\n" + "that is the question " * 12 + "\n\nno name\n"
)


def houses(count=400, seed=0):
    """Rooms, a district, a price that follows from both, and values that are missing."""
    draw = np.random.default_rng(seed)
    rooms, district = draw.integers(1, 8, count).astype(float), draw.choice(["north", "south", "east"], count)
    price = 20 * rooms + 30 * (district == "south") + draw.normal(0, 5, count)
    rooms[::17] = np.nan
    table = pd.DataFrame({"rooms": rooms, "district": district, "flat": 1, "price": price})
    return table.assign(dear=np.where(price > 100, "yes", "no"))


@pytest.fixture
def table(tmp_path):
    houses().to_csv(tmp_path / "train.csv", index=False)
    tested = houses(100, 1)
    tested.loc[0, "district"] = "west"  # which no training row has
    tested.loc[1, "rooms"] = 1e6
    tested.to_csv(tmp_path / "test.csv", index=False)
    return tmp_path


def test_a_table_is_scaled_and_filled_by_its_training_rows_alone(table):
    data = csv(str(table / "train.csv"), str(table / "test.csv"), "dear", "class", ignore=["price"])
    assert data.columns == ("rooms", "district=east", "district=north", "district=south", "flat")
    assert data.targets == ("no", "yes")
    train, tested = houses(), pd.read_csv(table / "test.csv")
    filled = train.rooms.fillna(train.rooms.median())
    expected = (tested.rooms.fillna(train.rooms.median()) - filled.mean()) / filled.std(ddof=0)
    np.testing.assert_allclose(data.test_rows[:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(data.train_rows[:, 0].mean(), 0, atol=1e-6)
    assert data.test_rows[0, 1:4].tolist() == [0, 0, 0]
    assert (data.train_rows[:, 4] == 0).all(), "a constant column says nothing"
    assert (data.train_targets == (train.dear == "yes")).all()
    assert data.groups is data.train_targets


def test_a_number_to_be_told_is_standardised_and_dealt_by_tenths(table):
    data = csv(str(table / "train.csv"), 0.25, "price", "number", ignore=["dear"])
    assert (len(data.train_rows), len(data.test_rows)) == (300, 100)
    assert data.train_targets.mean() == pytest.approx(0, abs=1e-6)
    assert np.bincount(data.groups).tolist() == [30] * 10
    tops = [data.train_targets[data.groups == g] for g in range(10)]
    assert all(low.max() <= high.min() for low, high in pairwise(tops))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"target": "colour"}, "data.target=colour is none of the columns"),
        ({"path": "none.csv"}, "is not a file"),
        ({"test": 1.0}, "data.test=1.0 must be where the test examples are, or a share"),
        ({"target": "dear", "target_is": "number"}, "use data.target_is=class"),
        ({"target": "flat"}, "has a single class"),
        ({"group_by": "street"}, "data.group_by=street is none of the columns"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(table, keys, sentence):
    given = {"path": "train.csv", "test": 0.2, "target": "dear", "target_is": "class"} | keys
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        csv(**given | {"path": str(table / given["path"])})


@pytest.mark.skipif(not (SHARED / "adult").is_dir(), reason=f"Adult is not in {SHARED} (PISA_FL_TEST_DATA)")
def test_adult_is_what_its_authors_say():
    data = adult(str(SHARED / "adult"))
    assert (len(data.train_rows), len(data.test_rows), data.targets) == (32561, 16281, ("<=50K", ">50K"))
    assert data.train_targets.mean() == pytest.approx(0.2408, abs=1e-4)  # adult.names
    by_country = adult(str(SHARED / "adult"), "native-country")
    assert "United-States" in by_country.group_names
    assert not any(column.startswith("native-country") for column in by_country.columns)


def test_plays_are_cut_by_speaker_and_nothing_tested_is_trained_on(tmp_path):
    (tmp_path / "play.txt.gz").write_bytes(gzip.compress(PLAY.encode()))
    data = plays(str(tmp_path / "play.txt.gz"), 10, 0.25, 20)
    assert data.speakers == ("FIRST", "SECOND")
    first, tested = (
        ["".join(data.alphabet[i] for i in row) for row in rows]
        for rows in (data.train_text[data.speaker == 0], data.test_text)
    )
    whole = "to be or not to be " * 12 + "\n"
    assert "".join(row[:-1] for row in first) == whole[: 10 * len(first)]
    assert all(row[-1] == after[0] for row, after in pairwise(first))
    kept = len(whole) - round(0.25 * len(whole))
    assert 10 * len(first) + 1 <= kept
    assert tested[0] == whole[kept : kept + 11]
    assert (data.train["targets"][:, :-1] == data.train["inputs"][:, 1:]).all()


def test_natural_groups_stay_whole():
    labels = np.repeat([3, 0, 2, 1], [40, 10, 30, 20])
    each = partitioners.deal(partitioners.NaturalPartitioner(4, 0), labels)
    assert [set(labels[rows]) for rows in each] == [{0}, {1}, {2}, {3}]
    shared = partitioners.deal(partitioners.NaturalPartitioner(2, 0), labels)
    assert sorted(len(rows) for rows in shared) == [50, 50]
    with pytest.raises(ValueError, match="clients=5 is more than the 4 groups"):
        partitioners.deal(partitioners.NaturalPartitioner(5, 0), labels)


def test_metrics_are_those_of_plain_formulas():
    draw = torch.Generator().manual_seed(0)
    targets, told = torch.randn(50, generator=draw), torch.randn(50, 1, generator=draw)
    batch, task = {"targets": targets}, Regression()
    totals = {name: float(value) for name, value in task.totals(told, batch).items()}
    found = task.measure(totals, 50, float(task.losses(told, batch).mean()))
    error = (told[:, 0] - targets).square().sum()
    assert found["r2"] == pytest.approx(
        float(1 - error / (targets - targets.mean()).square().sum()), rel=1e-5
    )
    assert found["rmse"] == pytest.approx(float((error / 50).sqrt()), rel=1e-5)
    logits, after = torch.randn(6, 7, 5, generator=draw), torch.randint(5, (6, 7), generator=draw)
    task = NextCharacter()
    plain = nn.functional.cross_entropy(logits.reshape(42, 5), after.reshape(42))
    torch.testing.assert_close(task.losses(logits, {"targets": after}).mean(), plain)
    totals = {name: float(value) for name, value in task.totals(logits, {"targets": after}).items()}
    found = task.measure(totals, 6, float(plain))
    assert found["accuracy"] == pytest.approx(float((logits.argmax(2) == after).float().mean()))
    assert found["perplexity"] == pytest.approx(math.exp(float(plain)))


@pytest.mark.parametrize("make", [lambda: LSTM((10,), 9, 4, 6, 2), lambda: GPT((10,), 9, 2, 2, 8)])
def test_models_of_sequences_look_back_only(make):
    torch.manual_seed(0)
    model = make()
    characters = torch.randint(9, (3, 10))
    changed = characters.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 9
    before, after = model(characters), model(changed)
    assert before.shape == (3, 10, 9)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_clients_of_a_stack_have_the_gradients_of_texts_that_each_has_alone(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    data = plays(str(tmp_path / "play.txt"), 10, 0.25, 20)
    torch.manual_seed(0)
    model = FlatModel(GPT((10,), len(data.alphabet), 1, 2, 8), data.usual_task(), torch.device("cpu"))
    fields = {name: torch.from_numpy(np.ascontiguousarray(field)) for name, field in data.train.items()}
    clients = {c: ClientData(fields, torch.from_numpy(np.flatnonzero(data.groups == c))) for c in (0, 1)}
    at = model.weights.clone()
    together, losses = LocalStack(model, data, clients, None, 1, 0, 4, 100).full_gradient(at, "mean")
    for row, client in enumerate(clients):
        own = {client: clients[client]}
        alone, loss = LocalStack(model, data, own, None, 1, 0, 4, 100).full_gradient(at, "mean")
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(losses[row], loss[0])


def test_held_out_examples_are_a_share_of_every_group():
    groups = np.repeat([0, 1, 2], [50, 30, 20])
    rows = np.random.default_rng(0).permutation(100)
    stay, taken = hold_out(rows, groups, 0.2, 7, 3)
    assert sorted([*stay, *taken]) == list(range(100))
    assert np.bincount(groups[taken]).tolist() == [10, 6, 4]
    assert (hold_out(rows, groups, 0.2, 7, 3)[1] == taken).all()
    assert set(hold_out(rows, groups, 0.2, 8, 3)[1]) != set(taken)
    assert len(hold_out(rows[:1], groups, 0.9, 7, 3)[0]) == 1


def test_clients_do_not_bring_tables_of_their_own(table):
    config = compose(
        "partition=own", "task=tabular_classification", f"data.path={table / 'train.csv'}", "data.target=dear"
    )
    with pytest.raises(ConfigurationError, match="partition=own does not go with these data"):
        prepare(config)


def test_a_table_learns_and_its_run_speaks_of_its_own_metrics(table, tmp_path):
    config = compose(
        *("task=tabular_regression", f"data.path={table / 'train.csv'}", "data.target=price"),
        *("data.ignore=[dear]", "clients=5", "partition=label_skew", "rounds=30", "model.hidden=[16]"),
        *("data.client_test=0.2", "evaluate_clients_every=15", "evaluate_every=4", "engine.workers=1"),
        *("progress=false", "seed=1", "strategy.lr=0.1"),
    )
    result = run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if "test_r2" in line] == [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert result.summary["final_r2"] == lines[-1]["test_r2"] == result.worth
    assert result.worth > 0.8
    assert result.summary["final_rmse"] < 0.5
    assert not any("accuracy" in key for key in result.summary)
    clients = [json.loads(line) for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    assert [line["round"] for line in clients] == [0, 15, 30]
    own = [one["rmse"] for one in clients[-1]["clients"].values()]
    assert result.summary["clients"]["rmse"]["mean"] == pytest.approx(np.mean(own))
    assert result.summary["clients"]["rmse"]["worst_10_percent"] == max(own)
    assert sum(one["examples"] for one in clients[-1]["clients"].values()) == 5 * round(0.2 * 64)
    # as after a kill between its last checkpoint and its end
    (tmp_path / "run" / "summary.json").unlink()
    assert resume(tmp_path / "run").summary["clients"] == result.summary["clients"]
