"""Every file of conf/: it composes, it builds, its numbers are explained, the promised names are there."""

import re
from pathlib import Path

import pytest
import yaml
from flwr.serverapp.strategy import Strategy
from omegaconf import DictConfig, OmegaConf

import pisa_fl
from pisa_fl.config import CONF, ConfigurationError, build, resolve
from strategies import ClientHalf

PROMISED = {
    "strategy": {
        *("sisa", "pisa", "nsisa", "sisa_official", "fedavg", "fedprox"),
        *("fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedmedian", "fedtrimmedavg", "krum", "multikrum"),
        *("scaffold", "feddyn", "fedadmm", "fednova", "fedcm", "fedvarp", "mifa", "fedlc", "fedrs", "moon"),
        *("fedper", "fedrep", "ditto", "fedsam", "fedsmoo", "fedpac", "fedmuon", "fedpm"),
    },
    "partition": {
        "label_skew",
        "dirichlet",
        "iid",
        "shards",
        "quantity",
        "feature_noise",
        "from_file",
        "own",
    },
    "data": {
        "mnist_mini",
        "mnist",
        "mnist_unscaled",
        "fashion_mnist",
        "cifar10",
        "imagefolder",
        "csv",
        "adult",
        "shakespeare",
    },
    "model": {"simple_cnn", "mlp", "logistic", "vgg9", "resnet18", "lstm", "gpt"},
    "engine": {"local", "ray", "flower"},
    "task": {"image_classification", "tabular_classification", "tabular_regression", "next_character"},
}
FILES = sorted(CONF.rglob("*.yaml"))
OPTIONS = [(str(f.parent.relative_to(CONF)), f.stem) for f in FILES if f.parent != CONF]
BUILT = ("strategy", "strategy/preconditioner")
"""Groups of which a test builds every option."""
STRATEGIES = [name for group, name in OPTIONS if group == "strategy"]
PRECONDITIONERS = [name for group, name in OPTIONS if group == "strategy/preconditioner"]
EXPLAINED_BY_THEIR_NAME = {"defaults", "_target_", "_partial_", "_recursive_", "_convert_", "name"}


MANDATORY = {
    "data/imagefolder": ["data.path=somewhere"],
    "data/csv": ["data.path=somewhere", "data.target=one"],
    "data/huggingface_table": ["data.path=somewhere", "data.target=one"],
    "data/adult": ["data.root=somewhere"],
    "data/shakespeare": ["data.path=somewhere"],
    "partition/from_file": ["partition.path=somewhere"],
    **{f"strategy/optimizer/{name}": ["strategy=fedavg"] for name in ("sgd", "sam", "adamw", "muon")},
    "task/tabular_classification": ["data.path=somewhere", "data.target=one"],
    "task/tabular_regression": ["data.path=somewhere", "data.target=one"],
    "task/next_character": ["data.path=somewhere"],
}
"""Values for the keys that have no default, and a strategy for what the default one has not."""


def whole_one(*overrides):
    """A composed configuration, of which nothing is missing and nothing leads nowhere."""
    config = pisa_fl.compose(*overrides)
    resolved = resolve(config)
    assert "${" not in OmegaConf.to_yaml(resolved)
    assert not OmegaConf.missing_keys(resolved)
    return config


@pytest.mark.parametrize(("group", "name"), [option for option in OPTIONS if option[0] not in BUILT])
def test_every_option_composes(group, name):
    whole_one(f"{group}={name}", *MANDATORY.get(f"{group}/{name}", []))


@pytest.mark.parametrize("group", PROMISED)
def test_the_promised_names_are_there(group):
    assert {file.stem for file in (CONF / group).glob("*.yaml")} >= PROMISED[group]


def test_the_promised_defaults():
    config = pisa_fl.compose()
    root = {key: config[key] for key in ("seed", "clients", "participation", "batch_size", "device")}
    assert root == {"seed": 0, "clients": 10, "participation": 1.0, "batch_size": 64, "device": "auto"}
    assert config.init is None
    assert config.resume is None
    assert config.rounds > 0
    assert config.checkpoint.every > 0
    assert config.name == "pisa"
    assert config.partition.classes_per_client == 2
    chosen = {"strategy": "pisa", "partition": "label_skew", "data": "mnist_mini", "model": "simple_cnn"}
    assert config == pisa_fl.compose(*(f"{group}={name}" for group, name in chosen.items()))
    assert config.engine._target_.endswith(".local_engine")


def test_pisa_has_the_same_numbers_wherever_its_duals_are():
    openly, summed = (pisa_fl.compose(f"strategy={name}").strategy for name in ("pisa", "pisa_summed"))
    numbers = set(summed) - {"penalty", "server", "client"}
    assert numbers > {"lr", "momentum", "bound", "friction", "lambda", "preconditioner"}
    assert {key: summed[key] for key in numbers} == {key: openly[key] for key in numbers}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_builds(name):
    sums = ["secure=secagg"] if name == "pisa_summed" else []
    federation = pisa_fl.prepare(whole_one(f"strategy={name}", "model=mlp", "model.hidden=[2]", *sums))
    assert isinstance(federation.strategy, Strategy)
    assert isinstance(federation.grid.host._half, ClientHalf)
    assert federation.model.layout.size == 2 * 784 + 2 + 10 * 2 + 10
    assert [len(federation.partition), federation.round] == [10, 0]


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_every_preconditioner_builds(name):
    by_hand = ["strategy.align_every=0", "strategy.sigma=80", "strategy.rho=100"]
    config = whole_one(f"strategy/preconditioner={name}", "model=logistic", *by_hand)
    kind = type(pisa_fl.prepare(config).strategy.preconditioner).__name__
    assert kind.lower() == name.replace("_", "")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_every_value_is_explained_on_its_line(file):
    assert unexplained(file.read_text()) == []


def unexplained(text):
    """Lines `key: value` without a comment, but for those that only point elsewhere or say what is built."""
    node, lines = yaml.compose(text), text.splitlines()
    bare = []
    # Hydra's own keys are explained by Hydra
    queue = [(k, v) for k, v in node.value if k.value not in ("hydra", "defaults")]
    for key, value in queue:
        if isinstance(value, yaml.MappingNode):
            queue += value.value
            continue
        line = lines[key.start_mark.line]
        interpolation = isinstance(value, yaml.ScalarNode) and value.value.startswith("${..")
        exempt = key.value in EXPLAINED_BY_THEIR_NAME or interpolation or value.value == "${participation}"
        if not exempt and not re.search(r"\s# ?\S", line):
            bare.append(line)
    return bare


def test_the_check_of_explanations_sees_a_bare_value():
    text = "_target_: a.b\nlr: 0.1 # step\nbeta: 0.9\ninner:\n  eps: 1.0\n  lr: ${..lr}\n"
    assert unexplained(text) == ["beta: 0.9", "  eps: 1.0"]


def test_python_composes_what_the_command_line_prints(command):
    overrides = ["strategy=fedprox", "strategy.mu=0.5", "partition=dirichlet", "seed=3", "targets=[0.5]"]
    printed = command("--cfg", "job", "--resolve", *overrides)
    assert printed.status == 0
    assert OmegaConf.create(printed.out) == pisa_fl.compose(*overrides)


def test_cfg_job_prints_every_root_key_and_runs_nothing(command, tmp_path):
    printed = command("--cfg", "job", "rounds=7")
    config = yaml.safe_load(printed.out)
    assert config["rounds"] == 7
    assert config.keys() >= {"seed", "clients", "init", "resume", "checkpoint", "name", *PROMISED}
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_groups(command, tmp_path):
    shown = command("--help")
    assert (shown.status, shown.err) == (0, "")
    for group, names in PROMISED.items():
        (line,) = re.findall(rf"^{group}: (.*)$", shown.out, re.MULTILINE)
        assert set(line.split(", ")) >= names
    assert list(tmp_path.iterdir()) == []


def test_compose_names_a_mandatory_value():
    with pytest.raises(
        ConfigurationError, match=r"^data\.path has no default: give it as data\.path=\.\.\.$"
    ):
        pisa_fl.compose("data=imagefolder")


def test_compose_refuses_an_unknown_key():
    with pytest.raises(ConfigurationError, match=r"^nonsense is no key"):
        pisa_fl.compose("nonsense=1")


def test_compose_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConfigurationError, match=r"config_dir=.*none is not a folder"):
        pisa_fl.compose(config_dir=tmp_path / "none")


def test_compose_leaves_no_trace_in_the_next(tmp_path):
    pisa_fl.compose("strategy=fedavg", "seed=5")
    assert pisa_fl.compose().seed == 0
    assert pisa_fl.compose().name == "pisa"


# --- build


def whole(count: int, ratio: float | None = None) -> tuple[int, float | None]:
    return count, ratio


def takes_layout(layout: object, width: int) -> tuple[object, int]:
    return layout, width


def node(**values) -> DictConfig:
    return OmegaConf.create({"model": {"_target_": f"{__name__}.whole", **values}}).model


def test_build_hands_over_only_what_is_asked_for():
    config = OmegaConf.create({"_target_": f"{__name__}.takes_layout", "width": 3})
    assert build(config, layout="it", seed=1) == ("it", 3)
    assert build(node(count=2), layout="it") == (2, None)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"count": "abc"}, "model.count must be a whole number, got abc"),
        ({"count": 1.5}, "model.count must be a whole number, got 1.5"),
        ({"count": None}, "model.count must be a whole number, got null"),
        ({"count": 1, "ratio": "x"}, "model.ratio must be a number or null, got x"),
        ({"count": 1, "ratio": [1.0]}, r"model.ratio must be a number or null, got \[1.0\]"),
        ({}, "missing 1 required positional argument: 'count'"),
        ({"count": 1, "other": 2}, "unexpected keyword argument 'other'"),
    ],
)
def test_build_says_what_does_not_fit(values, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        build(node(**values))


@pytest.mark.parametrize(("value", "ratio"), [(1, 1), (0.5, 0.5), (None, None)])
def test_build_takes_a_whole_number_for_a_number_and_null_where_allowed(value, ratio):
    assert build(node(count=4, ratio=value)) == (4, ratio)


def test_build_names_a_class_that_is_not_there():
    with pytest.raises(
        ConfigurationError, match=r"^model\._target_=nowhere\.Net: .*No module named 'nowhere'"
    ):
        build(OmegaConf.create({"model": {"_target_": "nowhere.Net"}}).model)


def test_build_needs_a_target():
    with pytest.raises(ConfigurationError, match="names no _target_: lr: 1"):
        build(OmegaConf.create({"lr": 1}))


def test_conf_is_the_checkouts():
    assert Path(__file__).parents[3] / "conf" == CONF
