"""What a new process imports: each command only what it uses, for importing is most of what a short one takes."""

import json
import subprocess
import sys

import pytest

PICTURES = {"matplotlib", "tensorboard"}
DATA = {"datasets", "flwr_datasets", "pandas", "pyarrow", "ray", "torchvision"}

COMMAND = """
import sys
from pisa_fl.{module} import main

sys.argv[0] = "command"
try:
    main()
except SystemExit:
    pass
print("\\n" + " ".join(sys.modules))
"""

RUN = """
import json, sys
from pisa_fl.cli.main import main
from pisa_fl.results.console import Display

Display.round = lambda self, metrics: print(json.dumps([metrics["round"], list(sys.modules)]))
main()
print(json.dumps(["end", list(sys.modules)]))
"""

CLIENT = """
import sys
from omegaconf import OmegaConf
from pisa_fl import compose
from pisa_fl.flower import app as flower_app
from pisa_fl.config import resolve

config = resolve(compose("engine=flower", "engine.state=" + sys.argv[1]))
flower_app.hosted(OmegaConf.to_yaml(config), 1, None, "e")
print(" ".join(sys.modules))
"""


def printed(program, *arguments, cwd):
    line = [sys.executable, "-c", program, *arguments]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("module", "argument"),
    [
        ("cli.main", "--cfg=job"),
        ("cli.main", "strategy=nonsense"),
        ("cli.main", "rounds=nonsense"),
        ("results.report", "--help"),
    ],
)
def test_commands_that_run_nothing(tmp_path, module, argument):
    loaded = printed(COMMAND.format(module=module), argument, cwd=tmp_path).splitlines()[-1].split()
    assert "omegaconf" in loaded
    assert not {"torch", "flwr", "numpy", "rich", *PICTURES, *DATA}.intersection(loaded)


def test_a_run(tmp_path):
    lines = printed(RUN, "rounds=1", "model=logistic", "engine.threads=1", cwd=tmp_path).splitlines()
    loaded = dict(json.loads(line) for line in lines if line.startswith("["))
    assert {"torch", "flwr"} <= set(loaded[0])
    assert not DATA.intersection(loaded["end"])
    # pictures are drawn only after the round
    assert not PICTURES.intersection(loaded[1])
    assert set(loaded["end"]) >= PICTURES


def test_a_client_of_a_deployment(tmp_path):
    """Flower starts a new process for every message."""
    loaded = printed(CLIENT, str(tmp_path), cwd=tmp_path).split()
    assert "torch" in loaded
    assert not {*PICTURES, *DATA}.intersection(loaded)
