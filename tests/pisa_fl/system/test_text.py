"""Whatever users call their classes and runs, it ends no run: pictures, terminals and files show it as it is."""

import io
import sys

import numpy as np
import pytest
from omegaconf import OmegaConf
from pictures import pictures
from PIL import Image

import partitioners
import pisa_fl
from pisa_fl.metric import Measures
from pisa_fl.results import figures
from pisa_fl.results import pictures as drawn_while_running
from pisa_fl.trackers import tensorboard

STRANGE = [
    "$5_bill_$10",
    r"$\frac{$",
    "[red]a[/]",
    "[/]",
    ":smile:",
    "_left_out",
    "a\nb\x1b[31m",
    "caf\udce9",
    "שלום",
    "x" * 900,
]
QUICK = ("model=logistic", "rounds=1", "clients=5", "engine.threads=1", "progress=false")


def is_picture(path):
    with Image.open(path) as picture:
        return len(picture.convert("L").getcolors()) > 10


MEASURES = Measures.read(None)


def test_pictures_show_any_text(tmp_path):
    labels = np.arange(len(STRANGE))
    with pictures(drawn=True):
        partitioners.draw([labels[:3], labels[3:]], labels, STRANGE, tmp_path / "partition.png")
    line = {
        "passes": 0,
        "bytes_up": 0,
        "bytes_down": 0,
        "test_accuracy": 0.1,
        "test_loss": None,
        "train_loss": 1,
    }
    metrics = [line | {"round": i} for i in range(3)]
    lines = {name: [metrics] for name in STRANGE}
    figures.draw_comparison(
        dict.fromkeys(STRANGE, lines), STRANGE[0], tmp_path / "comparison.png", MEASURES.quality
    )
    finals = {name: [0.1] for name in STRANGE}
    figures.draw_federations(
        dict.fromkeys(STRANGE, finals), STRANGE[0], tmp_path / "federations.png", MEASURES.quality
    )
    figures.draw_sweep(
        {STRANGE[0]: [(name, [0.1]) for name in STRANGE]},
        {},
        STRANGE[1],
        tmp_path / "sweep.png",
        MEASURES.quality,
    )
    for name in STRANGE:
        figures.draw_curves(metrics, name, tmp_path / "curves.png", MEASURES)
    assert all(
        is_picture(tmp_path / f"{name}.png")
        for name in ("partition", "comparison", "federations", "sweep", "curves")
    )
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_run_of_any_name_in_any_terminal(tmp_path, monkeypatch, encoding):
    name = "lr_$_a_$ [red]é[bold] :smile: \x1b[31m caf\udce9"
    config = pisa_fl.compose(*QUICK)
    config.name = name
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as there, pictures(drawn=True):
        there.setattr(sys, "stdout", shown)
        pisa_fl.run(config, tmp_path / "caf\udce9 [red]é :smile:")
    shown.flush()
    (line,) = [text for text in shown.buffer.getvalue().decode().splitlines() if "run directory" in text]
    assert line.endswith(
        "caf\\udce9 [red]é :smile:" if encoding == "utf-8" else "caf\\udce9 [red]\\xe9 :smile:"
    )
    directory = tmp_path / "caf\udce9 [red]é :smile:"
    assert OmegaConf.load(directory / "config.yaml").name == name
    assert is_picture(directory / "curves.png")


def test_a_picture_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(drawn_while_running, "draw_curves", fail)
    monkeypatch.setattr(partitioners, "draw", fail)
    monkeypatch.setattr(tensorboard, "write", fail)
    pisa_fl.run(pisa_fl.compose(*QUICK, "rounds=2"), tmp_path)
    assert {"model.safetensors", "summary.json"} <= {path.name for path in tmp_path.iterdir()}
    assert [message.partition(" is left out from here on: ")[0] for message in caplog.messages] == [
        "partition.png",
        "TensorBoard",
        "curves.png",
    ], "each once"


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "../x", "x" * 201, "null"])
def test_a_name_that_is_no_folders_is_refused(command, tmp_path, name):
    ended = command(*QUICK, f"name={name}", "hydra.run.dir=run")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "name must be a plain folder name" in ended.err
    assert list(tmp_path.iterdir()) == []
