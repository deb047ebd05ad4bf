"""The validation split: a share of the training examples that nobody trains on, and the test set is not read."""

import json
from dataclasses import replace

import numpy as np
import pytest

import pisa_fl
from pisa_fl import ConfigurationError, ImageData
from pisa_fl.data.validation import Validation
from pisa_fl.results.report import report

QUICK = ("model=logistic", "partition=iid", "clients=3", "rounds=1", "engine.workers=0", "engine.threads=1")


def numbered(count=200, tests=40):
    """Pictures each of which holds its own number, the test set's beyond those of the training set's."""
    draw = np.random.default_rng(0)
    numbers = np.arange(count + tests, dtype="<u4").view(np.uint8).reshape(-1, 1, 2, 2)
    labels = np.concatenate(
        [draw.permutation(np.repeat([0, 1, 2], [100, 60, 40])), draw.integers(0, 3, tests)]
    )
    arrays = numbers[:count], labels[:count], numbers[count:], labels[count:]
    return ImageData(*arrays, ("a", "b", "c"), (0.4,), (0.2,))


def found(fields):
    return fields["inputs"].reshape(-1, 4).copy().view("<u4").ravel().tolist()


def test_the_split_is_a_share_of_every_class_and_of_nothing_else():
    whole = numbered()
    split = Validation(whole, 0.1, 3)
    assert sorted(found(split.train) + found(split.test)) == list(range(200))
    assert np.bincount(split.test["targets"]).tolist() == [10, 6, 4]
    assert split.test["targets"].tolist() == whole.train["targets"][found(split.test)].tolist()
    assert split.groups.tolist() == whole.groups[found(split.train)].tolist()


def test_the_split_follows_from_the_seed_and_not_from_the_test_set():
    whole = numbered()
    first = found(Validation(whole, 0.1, 3).test)
    assert found(Validation(replace(whole, test_images=whole.test_images[::-1].copy()), 0.1, 3).test) == first
    others = [found(Validation(whole, 0.1, seed).test) for seed in (4, 5)]
    assert len({tuple(sorted(one)) for one in [first, *others]}) == 3


@pytest.mark.parametrize(
    ("share", "words"), [("1", "below 1"), ("0.00001", "data.validation=1e-05 of 10000")]
)
def test_a_share_that_is_impossible(share, words):
    with pytest.raises(ConfigurationError, match=words):
        pisa_fl.run(pisa_fl.compose(*QUICK, f"data.validation={share}"))


def test_a_run_deals_the_rest_and_measures_on_the_split(tmp_path):
    """Its test accuracy is of the split, by its own final weights; and its files and the report say so."""
    config = pisa_fl.compose(*QUICK, "data.validation=0.1", "progress=false")
    result = pisa_fl.run(config, tmp_path / "0")
    data, whole = pisa_fl.prepare(config).data, pisa_fl.prepare(pisa_fl.compose(*QUICK)).data
    dealt = json.loads((tmp_path / "0" / "partition.json").read_text()).values()
    assert sorted(row for rows in dealt for row in rows) == list(range(9000)) == list(range(len(data.groups)))
    assert np.bincount(data.test["targets"]).tolist() == [100] * 10
    outputs = result.model(whole.normalise(data.test["inputs"]))
    right = (outputs.argmax(1).numpy() == data.test["targets"]).mean()
    assert result.worth == pytest.approx(right)
    assert result.summary["validation"] == 0.1
    pisa_fl.run(pisa_fl.compose(*QUICK, "progress=false"), tmp_path / "1")
    text = report([tmp_path], tmp_path / "report", "")
    assert "1 of 2 runs are measured on a share of the training examples (data.validation)" in text
    assert "| validation |" in text
    changed = tmp_path / "0" / "config.yaml"
    changed.write_text(changed.read_text().replace("validation: 0.1", "validation: 0.2"))
    with pytest.raises(ConfigurationError, match="resume: the data are not those of the run"):
        pisa_fl.resume(tmp_path / "0")


def test_clients_who_bring_their_data_have_no_split_of_it():
    config = pisa_fl.compose("partition=own", "data.validation=0.1", "model=logistic")
    with pytest.raises(ConfigurationError, match=r"data\.validation=0\.1 does not go with partition=own"):
        pisa_fl.prepare(config)
