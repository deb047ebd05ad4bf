"""The sentence that a wrong value ends in: it names the key that was typed, wherever the value is used."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import pisa_fl
from pisa_fl.config import CONF, ConfigurationError, build, resolve
from strategies import Layout


def sentence(*overrides):
    with pytest.raises(ConfigurationError) as refused:
        pisa_fl.prepare(pisa_fl.compose("model=logistic", "engine.workers=0", *overrides))
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


WRONG = [
    # no number: by hint, through interpolations
    ("strategy=fedprox strategy.mu=abc", "strategy.mu must be a number, got abc"),
    ("strategy=fedprox strategy.mu=true", "strategy.mu must be a number, got True"),
    (
        "strategy=fedavg strategy.rounds=true",
        "strategy.rounds must be a whole number of at least 0, got True",
    ),
    ("rounds=true", "rounds must be a whole number of at least 0, got True"),
    ("strategy.lr=true", "strategy.lr must be a number, got True"),
    ("strategy.lr=nan", "strategy.lr must be a number, got nan"),
    ("partition.classes_per_client=true", "partition.classes_per_client must be a whole number, got True"),
    ("data.mean=true", "data.mean must be a number or a list with a number in each place, got True"),
    # no boolean, none of some words, no node
    (
        "partition=dirichlet partition.self_balancing=1",
        "partition.self_balancing must be true or false, got 1",
    ),
    ("strategy.wire=abc", "strategy.wire must be auto, primal or gradient, got abc"),
    ("strategy.lag=true", "strategy.lag must be 0 or 1, got True"),
    ("strategy.compression=zip", "strategy.compression must be none, bfloat16, int8 or topk, got zip"),
    (
        "strategy/preconditioner=spectral strategy.preconditioner.moment_of=a",
        "strategy.preconditioner.moment_of must be residual or gradient, got a",
    ),
    ("model=vgg9 model.norm=layer", "model.norm must be none, batch or group, got layer"),
    ("strategy.preconditioner=null", "strategy.preconditioner must be keys with a _target_, got null"),
    ("strategy.penalty=5", "strategy.penalty must be keys with a _target_, got 5"),
    # out of range: said by a class of ours of its arguments
    ("strategy.lr=-1", "strategy.lr must be positive, got -1"),
    (
        "strategy.preconditioner.beta=3",
        "strategy.preconditioner.beta must be at least 0 and below 1, got 3",
    ),
    (
        "strategy/preconditioner=spectral strategy.preconditioner.others.beta=3",
        "strategy.preconditioner.others.beta must be at least 0 and below 1, got 3",
    ),
    (
        "strategy=pisa_local strategy.sigma=null",
        "strategy.sigma must be a number of at most 1e+12, got None",
    ),
    ("strategy=fedadam strategy.lr=0 strategy.client.lr=1", "strategy.lr must be positive, got 0"),
    (
        "strategy=fedavgm strategy.server_momentum=1",
        "strategy.server_momentum must be at least 0 and below 1, got 1",
    ),
    (
        "strategy.align_every=0",
        "strategy.align_every=0 gives every client its own Q, for which there is no common automatic penalty:"
        " set strategy.sigma and strategy.rho by hand, or strategy.align_every=1",
    ),
    (
        "strategy.wire=gradient strategy.local_steps=2",
        "strategy.wire=gradient needs one local step and a common Q: set strategy.wire=primal, or"
        " strategy.local_steps=1",
    ),
    (
        "strategy.difference=0.5 strategy.align_every=2",
        "strategy.difference=0.5 needs the federation's gradient in every round: set strategy.align_every=1,"
        " strategy.lag=0, strategy.consensus=fresh and a preconditioner that learns from gradients, or"
        " strategy.difference=1",
    ),
    ("model.hidden=[0]", "model.hidden must hold whole numbers of at least 1, got [0]"),
    # said when the data are dealt
    ("clients=10001 partition=iid", "clients=10001 is more than the 10000 examples: lower clients"),
    (
        "clients=1001 partition=dirichlet",
        "clients=1001 with partition.min_examples=10 need more than the 10000 examples there are: lower clients"
        " or partition.min_examples",
    ),
    # said by others in their own words, or not at all
    (
        "model._target_=torch.nn.Dropout ~model.hidden +model.p=3",
        "model: dropout probability has to be between 0 and 1, but got 3",
    ),
    (
        "model._target_=torch.nn.Linear ~model.hidden +model.in_features=abc +model.out_features=3",
        "model.in_features must be a whole number, got abc",
    ),
    (
        "model._target_=torch.nn.Conv2d ~model.hidden +model.in_channels=3 +model.out_channels=4"
        " +model.kernel_size=1 +model.groups=2",
        "model.in_channels must be divisible by groups",
    ),
    (
        "+model.depth=3",
        "model._target_=pisa_fl.models.mlp.mlp: TypeError: mlp() got an unexpected keyword argument 'depth'",
    ),
    # typed where it is used
    (
        "strategy=fedprox strategy.server.proximal_mu=abc",
        "strategy.server.proximal_mu must be a number, got abc",
    ),
]


@pytest.mark.parametrize(("overrides", "said"), WRONG, ids=[overrides for overrides, _ in WRONG])
def test_a_wrong_value_is_blamed_on_the_key_that_was_typed(overrides, said):
    assert sentence(*overrides.split()) == said


@pytest.mark.parametrize("file", sorted((CONF / "strategy").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_number_of_a_strategy_is_blamed_itself(file):
    config = pisa_fl.compose(f"strategy={file.stem}")
    own = [key for key in OmegaConf.load(file) if key not in ("defaults", "rounds")]
    numbers = [key for key in own if type(config.strategy[key]) in (int, float)]
    for key in numbers:
        wrong = config.copy()
        wrong.strategy[key] = "abc"
        with pytest.raises(ConfigurationError, match=rf"^strategy\.{key} must be .*, got abc$"):
            build_strategy(resolve(wrong))


def build_strategy(config):
    for node in (config.strategy.server, config.strategy.client):
        layout = Layout.of_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        build(node, layout=layout, seed=0, device=torch.device("cpu"))


def refuses(width: int = 1, share: float = 0.5, sides: tuple[int, ...] = ()) -> None:
    if share > 1:
        raise ValueError(f"share must be at most 1, got {share}: lower `width` or set width={width}")
    raise RuntimeError("no")


OWN = {
    "size": "abc",
    "middle": "${size}",
    "half": 3,
    "good": {"width": 1},
    "group": {"half": "${..half}", "inner": {"width": "${...middle}", "sides": ["${size}", 2]}},
}
TARGET = {"_target_": f"{__name__}.refuses"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"width": "${middle}"}, "size must be a whole number, got abc"),
        ({"width": "${group.inner.width}"}, "size must be a whole number, got abc"),
        ({"width": "${oc.select:nothing,abc}"}, "node.width must be a whole number, got abc"),
        ({"width": "${oc.select:middle,1}"}, "size must be a whole number, got abc"),
        ({"width": "${middle}${half}"}, "node.width must be a whole number, got abc3"),
        (
            {"sides": ["${size}", 2]},
            "node.sides must be a list with a whole number in each place, got ['abc', 2]",
        ),
        ({"share": "${group.half}"}, "half must be at most 1, got 3: lower `width` or set width=1"),
        (
            {"share": "${group.half}", "width": "${good.width}"},
            "half must be at most 1, got 3: lower `width` or set good.width=1",
        ),
        ({}, f"node._target_={__name__}.refuses: RuntimeError: no"),
        ({"share": 0.1}, f"node._target_={__name__}.refuses: RuntimeError: no"),
    ],
)
@pytest.mark.parametrize("resolved", [False, True])
def test_interpolations_are_followed(values, said, resolved):
    config = OmegaConf.create({**OWN, "node": {**TARGET, **values}})
    with pytest.raises(ConfigurationError) as refused:
        build((resolve(resolve(config)).copy() if resolved else config).node)
    assert str(refused.value) == said


def test_a_subtree_that_is_referred_to_is_blamed_where_it_stands():
    node = {**TARGET, "_partial_": True, "width": "${..wide}", "share": 3}
    config = {"wide": 7, "part": node, "whole": {"_target_": f"{__name__}.calls", "made": "${part}"}}
    with pytest.raises(ConfigurationError, match=r"^part\.share must be .* or set wide=7$"):
        build(resolve(OmegaConf.create(config)).whole)


def calls(made):
    return made()


def test_what_is_below_a_node_is_built_as_hydra_builds_it():
    modules = [{"_target_": "torch.nn.Flatten"}, {"_target_": "torch.nn.Linear", "_args_": [4, 2]}]
    model = build(
        OmegaConf.create({"m": {"_target_": "torch.nn.Sequential", "_args_": modules}}).m, nn.Module
    )
    assert model(torch.zeros(3, 2, 2)).shape == (3, 2)
    plain = {"_target_": "builtins.dict", "at": {"a": [1, {"b": None}]}, "none": None}
    assert build(OmegaConf.create({"d": plain}).d) == {"at": {"a": [1, {"b": None}]}, "none": None}
    assert type(build(OmegaConf.create({"d": plain}).d)["at"]["a"]) is list
    inner = {"_target_": "pathlib.Path", "_args_": ["x"]}
    assert build(OmegaConf.create({"d": {"_target_": "builtins.dict", "p": inner}}).d) == {"p": Path("x")}
    kept = {"_target_": "builtins.dict", "_recursive_": False, "p": inner}
    assert build(OmegaConf.create({"d": kept}).d) == {"p": inner}
