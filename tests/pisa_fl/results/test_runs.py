"""Finished runs as objects: frames, plots, the trained module, and the notebook that shows them."""

from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

import partitioners
import pisa_fl

SMALL = ("model=logistic", "clients=5", "engine.workers=0", "progress=false", "tracker=none", "rounds=2")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    config = pisa_fl.compose(*SMALL, "checkpoint.every=1", "data.client_test=0.2", "evaluate_clients_every=2")
    return pisa_fl.run(config, folder)


def test_frames_and_plots_of_a_result_and_of_runs(ran):
    assert list(ran.frame["round"]) == [0, 1, 2]
    assert ran.frame["test_accuracy"].iloc[-1] == ran.summary["final_accuracy"]
    assert "final_accuracy" in ran._repr_html_()
    assert ran.plot().to_dict()["encoding"]["y"]["field"] == "test_accuracy"

    runs = pisa_fl.load_runs(ran.directory)
    assert len(runs) == 1
    assert runs.table().loc[0, "final accuracy, %"] == pytest.approx(100 * ran.summary["final_accuracy"])
    assert runs.table()._repr_html_().count("<tr") == runs._repr_html_().count("<tr") == 2
    assert runs.frame().loc[0, "directory"] == str(ran.directory)
    own = runs.curves().query("cost == 'MB'")
    assert list(own["x"]) == pytest.approx(
        [(b + c) / 1e6 for b, c in ran.frame[["bytes_up", "bytes_down"]].to_numpy()]
    )
    clients = runs.clients()
    assert clients["value"].mean() == pytest.approx(100 * ran.summary["clients"]["accuracy"]["mean"])
    assert runs.plot("MB").to_dict()["vconcat"]
    with pytest.raises(ValueError, match="cost must be one of rounds, passes, MB, got seconds"):
        runs.plot("seconds")


def test_what_every_client_has_is_written_down(ran):
    held = pd.read_csv(ran.directory / "partition.csv")
    federation = pisa_fl.prepare(pisa_fl.compose(*SMALL, "data.client_test=0.2"))
    groups = federation.data.groups
    counted = {
        (client, int(group)): int((groups[rows] == group).sum())
        for client, rows in enumerate(federation.partition)
        for group in set(groups[rows])
    }
    federation.grid.close()
    assert {(c, g): n for c, g, n in held.itertuples(index=False)} == counted


def test_the_trained_module_of_a_run_directory(ran):
    model = pisa_fl.load_model(ran.directory)
    assert not model.training
    for name, tensor in ran.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    earlier = pisa_fl.load_model(ran.directory, round_number=1)
    assert not torch.equal(earlier.state_dict()[name], tensor)
    with pytest.raises(
        pisa_fl.ConfigurationError, match="no model of round 7; there are checkpoints of rounds: 1, 2"
    ):
        pisa_fl.load_model(ran.directory, round_number=7)
    with pytest.raises(pisa_fl.ConfigurationError, match=r"^load_model: .* is not a run directory"):
        pisa_fl.load_model(ran.directory.parent)


def test_a_run_directory_builds_nothing_that_is_not_allowed(ran, tmp_path):
    config = OmegaConf.load(ran.directory / "config.yaml")
    config.model = {"_target_": "subprocess.run", "args": ["touch", str(tmp_path / "built")]}
    OmegaConf.save(config, tmp_path / "config.yaml")
    (tmp_path / "model.safetensors").write_bytes((ran.directory / "model.safetensors").read_bytes())
    with pytest.raises(
        pisa_fl.ConfigurationError, match=r"load_model: .*_target_=subprocess.run must not be built"
    ):
        pisa_fl.load_model(tmp_path)
    assert not (tmp_path / "built").exists()


def test_public_names_are_listed_and_typed():
    for package in (pisa_fl, partitioners):
        assert {name for name in dir(package) if not name.startswith("__")} == set(package.__all__)
    assert pisa_fl.__version__ == metadata.version("pisa-fl")
    for name in pisa_fl.__all__:
        assert getattr(pisa_fl, name) is not None
    for package in ("pisa_fl", "strategies", "partitioners"):
        assert (Path(__import__(package).__file__).parent / "py.typed").is_file()


def test_the_notebook_runs():
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient", reason="nbclient runs notebooks")
    pytest.importorskip("ipykernel", reason="ipykernel runs notebooks")
    path = Path(__file__).parents[3] / "docs" / "runs.ipynb"
    notebook = client.NotebookClient(nbformat.read(path, 4), timeout=120).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("vega-lite" in output.get("data", {}).get("text/html", "") for output in outputs)
    assert "Who ends best" in "".join(output.get("text", "") for output in outputs)
    assert outputs[-1]["data"]["text/plain"] == "7850"
