"""Training examples that nobody has: of deals that leave some out, and of a fraction of the data."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg

import pisa_fl
from pisa_fl import ConfigurationError, Federation
from pisa_fl.data.validation import Fraction
from strategies import Layout

QUICK = ("model=logistic", "engine.workers=0", "engine.threads=1", "progress=false", "tracker=none")
FEDAVG = ("strategy=fedavg", "strategy.local_epochs=1", "clients=2", "partition=from_file", "rounds=2")


def test_a_deal_that_leaves_examples_out_is_one_of_data_that_lack_them(tmp_path, caplog):
    """As many bits: of batches, weights of the average and passes."""
    dealt = [np.arange(90, 30, -1), np.arange(1000, 1300, 2)]
    path = tmp_path / "partition.json"
    path.write_text(json.dumps({client: rows.tolist() for client, rows in enumerate(dealt)}))
    config = pisa_fl.compose(*QUICK, *FEDAVG, f"partition.path={path}")
    result = pisa_fl.run(config, tmp_path / "run")
    assert "partition deals 210 of 10000 training examples: the others are used by nobody" in caplog.text

    there = pisa_fl.prepare(config)
    there.grid.close()
    used = np.sort(np.concatenate(dealt))
    data = replace(
        there.data, train_images=there.data.train_images[used], train_labels=there.data.train_labels[used]
    )
    alone = Federation(
        data,
        [np.searchsorted(used, rows) for rows in dealt],
        there.model.module,
        FedAvg(fraction_evaluate=0.0, weighted_by_key="num-examples"),
        pisa_fl.config.build(config.strategy.client, layout=Layout.of_parameters(there.model.module), seed=0),
        batch_size=config.batch_size,
    )
    torch.set_num_threads(1)  # as the run has it, whatever tests before left
    lines = list(alone.rounds(2))
    alone.load_weights()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(alone.model.module.state_dict()[name], tensor)
    assert [line["passes"] for line in lines] == [line["passes"] for line in result.metrics] == [0, 1, 2]
    assert result.metrics[-1]["test_accuracy"] == lines[-1]["test_accuracy"] > 0.2


def test_a_fraction_of_the_data_is_there():
    config = pisa_fl.compose(*QUICK, "data.fraction=0.02", "rounds=1", "partition=iid")
    few = pisa_fl.prepare(config)
    whole = pisa_fl.prepare(pisa_fl.compose(*QUICK))
    few.grid.close(), whole.grid.close()
    assert np.bincount(few.data.groups).tolist() == [20] * 10
    assert sorted(np.concatenate(few.partition)) == list(range(200))
    assert np.array_equal(few.data.test["inputs"], whole.data.test["inputs"])
    own = {one.tobytes() for one in few.data.train["inputs"]}
    assert len(own) == 200
    assert own < {one.tobytes() for one in whole.data.train["inputs"]}
    other = Fraction(whole.data, 0.02, seed=1)
    assert own != {one.tobytes() for one in other.train["inputs"]}
    assert len({few.data.digest, whole.data.digest, other.digest}) == 3
    with pytest.raises(
        ConfigurationError, match=r"data.fraction=1e-06 of 10000 training examples is none: raise"
    ):
        pisa_fl.prepare(pisa_fl.compose(*QUICK, "data.fraction=1e-6"))
