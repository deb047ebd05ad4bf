"""Gradients compiled ahead of time for a CPU: in processes of their own, for PyTorch's compiler does not go with the
test runner's imports."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pisa_fl.clients.compiled import packaged
from pisa_fl.clients.flat_model import FlatModel
from pisa_fl.tasks import Classification

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler for PyTorch to use")

GRADIENTS = """
import copy, pickle, sys, torch
sys.path.insert(0, sys.argv[1])
from test_stack import *
from pisa_fl.clients.compiled import packaged

data = image_data()
flat = FlatModel(network(), Classification(), CPU)
rows = torch.arange(BATCH)
flat.package = packaged(flat, data.ready(flat.take(tensors(data.train, CPU), rows)))
calls = []
run = flat.package._run
flat.package._run = lambda *given: calls.append(1) or run(*given)
weights = flat.weights.repeat(1, 1) + 0.1
own = {4: clients(data)[4]}
# eleven examples in batches of four: the last has three, and is filled up; five are too many for it
by_package = LocalStack(flat, data, own, None, ROUND, SEED, BATCH, 1000)
eager = stack(own, data)
for batch, same in zip(by_package.batches(2), eager.batches(2), strict=True):
    found, wanted = by_package.gradient(weights, batch), eager.gradient(weights, same)
    torch.testing.assert_close(found, wanted)
assert len(calls) == 6, calls
plain = FlatModel(network(), Classification(), CPU)
whole = [LocalStack(m, data, own, None, ROUND, SEED, BATCH, 4) for m in (flat, plain)]
torch.testing.assert_close(*[s.full_gradient(weights, "mean") for s in whole])
assert len(calls) == 9 and [s.passes for s in whole] == [[1.0], [1.0]]
LocalStack(flat, data, own, None, ROUND, SEED, BATCH, 1000).full_gradient(weights, "mean")
assert len(calls) == 9  # eleven at once are too many
again = pickle.loads(pickle.dumps(flat)).package
batch = {name: field[0] for name, field in batch.data.items()}
given = weights[0], batch, torch.full((3,), 1 / 3)
for a, b in zip(again(*given), flat.package(*given), strict=True):
    assert torch.equal(a, b)
print("done")
"""


def alone(tmp_path, line, **variables):
    """Run something with a cache of its own."""
    surroundings = os.environ | {"PISA_FL_CACHE": str(tmp_path / "cache"), **variables}
    return subprocess.run(
        [str(part) for part in line],
        cwd=tmp_path,
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )


def test_compiled_gradients_are_autograds_to_rounding(tmp_path):
    done = alone(tmp_path, [sys.executable, "-c", GRADIENTS, Path(__file__).parent])
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


def federate(tmp_path, name, *overrides, **variables):
    """Run a federation by the command line; what it says, and its final weights."""
    run = tmp_path / name
    fixed = (
        "strategy=fedavg",
        "strategy.local_epochs=1",
        "rounds=2",
        "clients=10",
        "partition=iid",
        "batch_size=100",
        "tracker=none",
    )
    line = [sys.executable, "-m", "pisa_fl", f"hydra.run.dir={run}", "data.fraction=0.1", *fixed, *overrides]
    done = alone(tmp_path, line, **variables)
    assert done.returncode == 0, done.stderr
    return re.sub(r"\s+", " ", done.stdout + done.stderr), load_file(run / "model.safetensors")


def test_a_compiled_run_has_the_same_bits_whoever_computes_and_is_compiled_once(tmp_path):
    said, first = federate(tmp_path, "first", "engine.compiled=true", "engine.workers=2")
    again, second = federate(
        tmp_path, "second", "engine.compiled=true", "engine.workers=0", "engine.threads=1"
    )
    _, eager = federate(tmp_path, "eager")
    [package] = (tmp_path / "cache" / "gradients").glob("*.pt2")
    content = bytearray(package.read_bytes())
    content[len(content) // 2] ^= 255  # code that nobody must run
    package.write_bytes(content)
    mended, third = federate(tmp_path, "third", "engine.compiled=true")
    assert "is damaged" in mended
    assert all((first[name] == third[name]).all() for name in first)
    assert "compiling the gradients, once" in said
    assert "compiling" not in again
    assert "WARNING" not in again
    assert all((first[name] == second[name]).all() for name in first)
    assert any((first[name] != eager[name]).any() for name in first)
    assert all(first[name].allclose(eager[name], atol=1e-4) for name in first)


NORMED = ["model=vgg9", "model.norm=batch", "model.channels=[4,4]", "model.hidden=[8]"]


@pytest.mark.parametrize(
    ("overrides", "variables", "why"),
    [
        (
            ["model=vgg9", "model.norm=batch", "model.channels=[4,4]", "model.hidden=[8]"],
            {},
            "the model keeps running statistics",
        ),
        ([], {"CXX": "/nowhere/g++", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}, "/nowhere/g++"),
    ],
)
def test_where_it_cannot_be_compiled_it_says_why_and_goes_on(tmp_path, overrides, variables, why):
    said, without = federate(tmp_path, "a", "engine.compiled=true", *overrides, **variables)
    _, eager = federate(tmp_path, "b", *overrides)
    assert re.search(
        rf"going without, since the gradients cannot be compiled \([^)]*{re.escape(why)}", said
    ), said
    assert all((without[name] == eager[name]).all() for name in eager)


def test_a_model_that_draws_is_left_as_it_is(caplog):
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Dropout(0.5), nn.Linear(8, 5))
    batch = {"inputs": torch.randn(4, 2, 6, 6), "targets": torch.arange(4)}
    assert packaged(FlatModel(model.train(), Classification(), torch.device("cpu")), batch) is None
    assert (
        "going without, since the gradients cannot be compiled (the model draws random numbers)"
        in caplog.text
    )
