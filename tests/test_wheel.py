"""The wheel holds all that a run needs, and runs where there is no checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("hatchling", reason="hatchling builds the wheel")
pytest.importorskip("pip", reason="pip installs the wheel")


def run(*line, cwd, **environment):
    ended = subprocess.run(
        [sys.executable, *line], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    run(*pip, str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with nothing but the wheel's contents."""
    folder = tmp_path_factory.mktemp("site")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    run(*pip, str(wheel), cwd=folder)
    return folder


def test_the_wheel_holds_configuration_and_data_but_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("conf", "pisa_fl", "strategies", "partitioners"):
        inside = "pisa_fl/conf" if folder == "conf" else folder
        suffix = "*.yaml" if folder == "conf" else "*.py"
        expected = {f"{inside}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob(suffix)}
        assert expected
        assert expected <= names
    assert {"pisa_fl/data/mnist_mini.npz", "pisa_fl/data/MNIST_MINI.md"} <= names
    assert {f"{package}/py.typed" for package in ("pisa_fl", "strategies", "partitioners")} <= names
    assert {f"pisa_fl/results/report/template/page.{kind}" for kind in ("html", "css", "js")} <= names
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"pisa_fl", "strategies", "partitioners"}
    assert any(name.endswith("LICENSE") for name in names)


def test_the_installed_wheel_runs_by_itself(installed, tmp_path):
    alone = {"PYTHONPATH": str(installed), "HYDRA_FULL_ERROR": "1"}
    where = "import pisa_fl.config, strategies, partitioners as p; "
    where += "print(pisa_fl.__file__, pisa_fl.config.CONF, strategies.__file__, p.__file__, sep='\\n')"
    for path in run("-c", where, cwd=tmp_path, **alone).splitlines():
        assert Path(path).is_relative_to(installed)
    arguments = ["rounds=1", "model=logistic", "engine.threads=1", "hydra.run.dir=run"]
    run("-m", "pisa_fl", *arguments, cwd=tmp_path, **alone)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds"] == 1
    assert summary["git_commit"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_commands_are_installed(installed):
    (entries,) = installed.glob("pisa_fl-*.dist-info/entry_points.txt")
    assert "pisa-fl = pisa_fl.cli.main:main" in entries.read_text()
