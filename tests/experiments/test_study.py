"""A study runs what its file says, and reports each method at its best."""

import csv
import json
from itertools import product

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments import study
from experiments.study import STUDIES, Study
from pisa_fl import compose
from pisa_fl.results import settings
from pisa_fl.results.settings import identify
from pisa_fl.tasks import Classification


def runs(overrides):
    """Overrides of the single runs of a sweep."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(run) for batch in batches for run in batch]


@pytest.mark.parametrize("name", STUDIES)
def test_every_setting_and_method_composes(name):
    known = Study.read(name)
    assert known.question
    methods, settings = list(known.methods), list(known.settings)
    for setting, method in {*product(settings[:1], methods), *product(settings, methods[:1])}:
        sweep = runs(known.sweep(setting, method))
        assert len(sweep) % len(known.seeds) == 0
        compose(*sweep[-1])


TINY = """
question: Which is better?
common: [model=logistic, clients=5, rounds=2, engine.workers=0, progress=false, tracker=none]
seeds: [3]
settings:
  iid: [partition=iid]
  skewed: [partition=label_skew]
methods:
  pisa: [strategy=pisa]
  fedavg: [strategy=fedavg, strategy.local_epochs=1, "strategy.lr=1e-9,0.02"]
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("question: [", "study.yaml cannot be read"),
        (TINY.replace("seeds: [3]\n", ""), "must have the keys question, common, seeds, settings, methods"),
        (TINY.replace("seeds: [3]", "seeds: 0"), "seeds must be a list of whole numbers, got 0"),
        (TINY.replace("iid: [partition=iid]", "iid:"), "settings.iid must be a list of overrides, got None"),
        (TINY.replace("question: Which is better?", "question:"), "question must be a sentence, got None"),
    ],
)
def test_a_file_that_is_no_study_is_one_sentence(text, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "study.yaml").write_text(text)
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "STUDIES", ["tiny"])
    with pytest.raises(SystemExit) as ended:
        study.main(["tiny", "--dry"])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_group_is_tuned_like_any_key():
    class Tried:
        diverged = False

        def __init__(self, optimizer, worth):
            self.config = {"choices": {"strategy/optimizer": optimizer}, "strategy": {"optimizer": {"a": 1}}}
            self.metrics, self.measures = [{"test_accuracy": worth}], Classification().measures

    runs = [Tried("sgd", 0.3), Tried("adamw", 0.9), Tried("sgd", 0.4), Tried("adamw", 0.8)]
    assert study.best(runs, ["strategy/optimizer"]) == [runs[1], runs[3]]


def test_from_the_file_to_the_report(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "study.yaml").write_text(TINY)
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "STUDIES", ["tiny"])
    out = tmp_path / "o,u t=1"
    study.main(["tiny", "--out", str(out), "--settings", "skewed"])
    assert len(list(out.glob("skewed/fedavg/*/summary.json"))) == 2
    assert not (out / "iid").exists()
    assert "fedavg" in (out / "report.md").read_text()
    rows = list(csv.DictReader((out / "signed.csv").read_text().splitlines()[:-1]))
    assert [(row["setting"], row["method"], row["seed"]) for row in rows] == [
        ("skewed", "pisa", "3"),
        ("skewed", "fedavg", "3"),
    ]
    finals = [json.loads(p.read_text())["final_accuracy"] for p in out.glob("skewed/fedavg/*/summary.json")]
    assert float(rows[1]["final"]) == max(finals) > min(finals), "the better of the two"
    assert len({row["weights"] for row in rows}) == len({row["configuration"] for row in rows}) == 2
    with pytest.raises(SystemExit, match="2"):
        study.main(["tiny", "--out", str(out), "--methods", "nobody"])
    assert "nobody: choose from pisa, fedavg" in capsys.readouterr().err


def test_a_signed_configuration_does_not_change_with_keys_that_later_versions_add(monkeypatch):
    config = OmegaConf.to_container(compose("strategy=fedavg"), resolve=True)
    changed = OmegaConf.to_container(compose("strategy=fedavg", "engine.lost=0.1"), resolve=True)
    before = identify([config, changed])
    assert before[0] != before[1]
    monkeypatch.setitem(settings.UNLESS_SAID, "engine.more", 7)
    assert identify([config, changed]) == before
    changed["engine"]["more"] = 8
    assert identify([config, changed])[1] != before[1]
