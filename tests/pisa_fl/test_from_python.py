"""Called from a program: edits after `compose`, Hydra applications, threads, pools, and what PyTorch was set to."""

import asyncio
import concurrent.futures
import multiprocessing
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

import pisa_fl
from pisa_fl.config import CONF, ConfigurationError, own_folders, resolve

SMALL = ("clients=5", "model=logistic", "progress=false", "engine.threads=1")

DROPS = """
from torch import nn

def net(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, classes))
"""


def losses(*overrides, **more):
    result = pisa_fl.run(pisa_fl.compose(*SMALL, "rounds=1", *overrides, **more))
    return [line["test_loss"] for line in result.metrics]


def of_seed(seed):
    return losses(f"seed={seed}")


# --- edits


def test_what_follows_from_a_key_follows_an_edit():
    config = pisa_fl.compose("model=logistic", "strategy=pisa", "engine.workers=0")
    config.clients, config.seed, config.participation, config.strategy.rounds = 10, 3, 0.5, 7
    edited = resolve(pickle.loads(pickle.dumps(config)))
    said = ["clients=10", "seed=3", "participation=0.5", "strategy.rounds=7"]
    assert edited == resolve(pisa_fl.compose("model=logistic", "strategy=pisa", "engine.workers=0", *said))
    assert [edited.partition.num_partitions, edited.partition.seed, edited.rounds] == [10, 3, 7]
    assert edited.strategy.penalty.participation == 0.5
    federation = pisa_fl.prepare(config)
    assert len(federation.partition) == 10
    federation.grid.close()
    assert "${clients}" in OmegaConf.to_yaml(config)  # what is handed in is left as it was


def test_an_unknown_key_cannot_be_set():
    config = pisa_fl.compose()
    with pytest.raises(ConfigAttributeError, match="cliants"):
        config.cliants = 3


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("partition.num_partitions=7", r"^partition\.num_partitions=7 and clients=10 disagree"),
        ("strategy.penalty.participation=0.5", r"participation=0\.5 and participation=1\.0 disagree"),
    ],
)
def test_values_that_disagree_are_refused(override, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        pisa_fl.prepare(pisa_fl.compose(override))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("cliens=3", "did you mean clients"),
        ("lr=3", r"did you mean strategy\.lr"),
        ("strategy=sisaa", r"did you mean sisa\?"),
        ("partition.clases_per_client=3", r"did you mean partition\.classes_per_client"),
        ("data=5", "data=5: a group is chosen by its name"),
        ("experiment=papr", "experiment=papr does not exist: did you mean paper"),
        ("seed=${seed}", "Recursive interpolation"),
    ],
)
def test_compose_says_what_was_meant(override, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        pisa_fl.compose(override)


# --- programs around a run


def test_an_application_of_hydras_keeps_its_state():
    with initialize_config_dir(str(CONF), version_base="1.2"):
        outer = hydra_compose("config", ["strategy=fedprox"], return_hydra_config=True)
        HydraConfig.instance().set_config(outer)
        before = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
        assert pisa_fl.compose("strategy=pisa").name == "pisa"
        with pytest.raises(ConfigurationError):
            pisa_fl.compose("nonsense=1")
        assert before == (GlobalHydra.instance().hydra, HydraConfig.instance().cfg)
        assert HydraConfig.get().runtime.choices.strategy == "fedprox"
        assert hydra_compose("config", ["seed=4"]).seed == 4
    HydraConfig.instance().cfg = None


def test_runs_in_threads_give_what_they_give_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "model").mkdir()
    (tmp_path / "own_dropping.py").write_text(DROPS)
    (tmp_path / "model" / "drops.yaml").write_text("_target_: own_dropping.net\n")

    def run(seed):
        chosen = ["model=drops", f"seed={seed}", "engine.workers=0", "strategy=fedavg"]
        return losses(*chosen, "strategy.local_epochs=1", config_dir=tmp_path)

    alone = [run(seed) for seed in range(3)]
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        assert list(threads.map(run, range(3))) == alone
    assert len({tuple(part) for part in alone}) == 3


def test_in_an_event_loop_and_in_another_thread(two_workers):
    """As in notebooks and servers; signals are the main thread's."""

    async def main():
        before = signal.getsignal(signal.SIGINT)
        here = losses()
        assert signal.getsignal(signal.SIGINT) is before
        return here, await asyncio.to_thread(losses)

    alone = losses()
    assert asyncio.run(main()) == (alone, alone)


def test_runs_in_the_processes_of_a_pool(two_workers):
    """Forked after PyTorch and the ledger had threads, which the processes do not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(1000, 1000).exp().sum()
        alone = [losses("strategy=pisa", f"seed={seed}") for seed in (0, 1)]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            answers = [pool.apply_async(losses, ("strategy=pisa", f"seed={seed}")) for seed in (0, 1)]
            assert [answer.get(timeout=120) for answer in answers] == alone
    finally:
        torch.set_num_threads(before)


def test_what_pytorch_was_set_to_neither_matters_nor_changes():
    plain = losses("engine.workers=0")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    torch.set_default_dtype(torch.float64)
    generator = torch.get_rng_state()
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert losses("engine.workers=0") == losses("engine.workers=2") == plain
            assert torch.get_default_device().type == "meta"
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), generator)


# --- modules of our names


def python(folder, code):
    (folder / "program.py").write_text(code)
    return subprocess.run([sys.executable, "program.py"], cwd=folder, capture_output=True, text=True)


def test_a_module_of_the_users_with_the_name_of_ours(tmp_path):
    (tmp_path / "strategies.py").write_text("class Mine: pass\n")
    (tmp_path / "partitioners").mkdir()
    (tmp_path / "partitioners" / "__init__.py").write_text("")
    ended = python(tmp_path, "import pisa_fl\nfrom strategies import Pisa\nfrom partitioners import deal\n")
    assert ended.returncode == 0
    for name in ("strategies.py", "partitioners/__init__.py"):
        assert f"{tmp_path}/{name} is hidden by pisa-fl's package" in ended.stderr
    ended = python(tmp_path, "import strategies\nimport pisa_fl\n")
    assert ended.stderr.splitlines()[-1] == (
        f"ImportError: {tmp_path}/strategies.py hides pisa-fl's package `strategies`: rename it"
    )


def test_modules_beside_the_users_configuration_are_searched_last(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("pisa_fl.config.own_code.imported_folders", [])
    for name in ("strategies", "random"):
        (tmp_path / f"{name}.py").write_text("def net(): pass\n")
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / f"{name}.yaml").write_text(f"_target_: {name}.net\n")
        with pytest.raises(
            ConfigurationError, match=f"{name}.py is hidden by the module `{name}`, .*: rename it"
        ):
            pisa_fl.prepare(pisa_fl.compose(f"model={name}", config_dir=tmp_path))
    assert len(losses(config_dir=tmp_path)) == 2
    assert own_folders(pisa_fl.compose("model=mlp", config_dir=tmp_path)) == []
