"""The weights of the best round are kept, whatever happens to the run."""

import json
import shutil

import pytest
from safetensors import safe_open

import pisa_fl
from pisa_fl import ConfigurationError

SWINGING = (
    *("model=logistic", "engine.workers=0", "progress=false", "tracker=none", "rounds=7"),
    *("strategy=fedavg", "strategy.lr=0.5", "strategy.local_epochs=1", "participation=0.2"),
    *("checkpoint.best=true", "checkpoint.every=1", "checkpoint.keep=9"),
)
BEST = "best.safetensors"


def accuracy(model, data):
    guessed = model(data.normalise(data.test_images)).argmax(1)
    return float((guessed.numpy() == data.test_labels).mean())


def test_the_weights_of_the_best_round_are_kept(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = pisa_fl.run(pisa_fl.compose(*SWINGING), whole)
    summary = json.loads((whole / "summary.json").read_text())
    best, last = summary["best_round"], 7
    assert 1 < best < last
    assert summary["best_weights"] == {"file": BEST, "chosen_by": "test accuracy"}
    with safe_open(whole / BEST, "pt") as file:
        assert file.metadata() == {"round": str(best)}
    federation = pisa_fl.prepare(pisa_fl.compose(*SWINGING))
    federation.grid.close()
    model = pisa_fl.load_model(whole, best=True)
    assert accuracy(model, federation.data) == pytest.approx(summary["best_accuracy"], abs=1e-9)
    assert accuracy(result.model, federation.data) < summary["best_accuracy"] - 0.001
    with pytest.raises(ConfigurationError, match="give round_number or best, not both"):
        pisa_fl.load_model(whole, 1, best=True)

    # as a kill leaves it: lines and best weights of rounds after the last checkpoint
    for later_than, damage in ((best, BEST), (best - 2, "")):
        shutil.copytree(whole, cut)
        for name in ("summary.json", "model.safetensors", damage):
            (cut / name).unlink() if name else None
        for folder in (cut / "checkpoint").glob("round-*"):
            if int(folder.name[6:]) > later_than:
                shutil.rmtree(folder)
        pisa_fl.resume(str(cut))
        assert (cut / BEST).read_bytes() == (whole / BEST).read_bytes()
        shutil.rmtree(cut)


def test_a_share_for_validation_chooses(tmp_path):
    result = pisa_fl.run(pisa_fl.compose(*SWINGING, "data.validation=0.1", "rounds=1"), tmp_path)
    assert result.summary["best_weights"]["chosen_by"] == "validation accuracy"
    (tmp_path / BEST).unlink()
    with pytest.raises(ConfigurationError, match=r"has no best.safetensors: checkpoint.best=true keeps it"):
        pisa_fl.load_model(tmp_path, best=True)
