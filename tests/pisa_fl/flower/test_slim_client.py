"""A client's host needs the dependency group `client` and no more: a client that can import nothing else."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from omegaconf import OmegaConf

from pisa_fl import compose
from pisa_fl.config import resolve

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())

BROUGHT = {"pyarrow", "seaborn", "markdown", "werkzeug"}
"""What those bring that a client has no use for."""

CLIENT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed")

sys.meta_path.insert(0, Blocker())

from flwr.app import ConfigRecord, Context, Message, RecordDict
from omegaconf import OmegaConf
from pisa_fl.engines.base import identify
from pisa_fl.flower import credentials, keeper, policy, supernode
from pisa_fl.flower.app import client
from strategies.base.messages import ConfigRecord, record
import torch

identify()
config = {config!r}
context = Context(7, 99, {{"partition-id": 0}}, RecordDict(), {{"hydra": config}})

def ask(kind, content):
    reply = client(Message(RecordDict(content), 99, kind), context)
    assert not reply.has_error(), reply.error.reason
    return reply.content

said = ask("query", {{"config": ConfigRecord({{"version": "?"}})}})
weights = {{"arrays": record({{"weights": torch.zeros(7850)}})}}
numbers = {{"server-round": 1, "accepted-round": 0}}
ask("train", weights | {{"config": ConfigRecord(numbers)}})
ask("evaluate", weights)
"""


def names(requirements):
    return {re.match(r"[\w-]+", text)[0].lower() for text in requirements if not text.startswith("pisa-fl")}


def test_a_client_imports_nothing_but_its_dependency_group(tmp_path):
    everything, client = PROJECT["project"]["dependencies"], PROJECT["dependency-groups"]["client"]
    assert set(client) <= set(everything), "the same versions"
    extras = PROJECT["project"]["optional-dependencies"]
    other = names(everything) - names(client)
    for name in ("ray", "mlflow", "wandb", "tune"):
        other |= names(extras[name])
    imported = {"vl-convert-python": "vl_convert"}
    blocked = {imported.get(name, name.replace("-", "_")) for name in other} | BROUGHT
    assert {"matplotlib", "tensorboard", "altair", "jinja2", "optuna", "ray", "datasets"} <= blocked
    small = ["strategy=fedavg", "strategy.local_epochs=1", "model=logistic", "clients=200", "partition=iid"]
    config = OmegaConf.to_yaml(resolve(compose("engine=flower", "device=cpu", *small)))
    own = {"PISA_FL_STATE": str(tmp_path / "state"), "PISA_FL_CACHE": str(tmp_path / "cache")}
    script = CLIENT.format(blocked=blocked, config=config)
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | own
    )
    assert ended.returncode == 0, ended.stderr
    assert list((tmp_path / "state").glob("*/client-0.safetensors"))
