"""The report of finished runs, on run directories written by hand."""

import csv
import json
import sys

import pytest
from PIL import Image

from pisa_fl import report


def write_run(folder, name, seed, accuracies, **config):
    """A run directory whose run took one pass and 1 MB each way a round."""
    folder.mkdir(parents=True)
    strategy = {"lr": config.pop("lr", 0.1)}
    lines = [f"name: {name}", f"seed: {seed}", f"strategy: {json.dumps(strategy)}"]
    lines += [f"{key}: {json.dumps(value)}" for key, value in config.items()]
    (folder / "config.yaml").write_text("\n".join(lines))
    metrics = [
        {"round": i, "passes": i, "bytes_up": i * 10**6, "bytes_down": i * 10**6, "test_accuracy": a}
        for i, a in enumerate(accuracies)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    last = metrics[-1]
    reached = next(({"round": m["round"]} for m in metrics if m["test_accuracy"] >= 0.8), None)
    summary = {
        "final_accuracy": last["test_accuracy"],
        "best_accuracy": max(accuracies),
        "rounds": last["round"],
        "passes": last["passes"],
        "bytes_up": last["bytes_up"],
        "bytes_down": last["bytes_down"],
        "targets": {"0.8": reached},
    }
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def sweep(tmp_path):
    number = 0
    for alpha, gain in ((0.1, 0.0), (1.0, 0.1)):
        for name, start in (("sisa", 0.7), ("fedavg", 0.2)):
            for seed in range(3):
                final = start + gain + seed / 100
                accuracies = [0.1, final + 0.05, final]
                own = {
                    "rounds": 2,
                    "partition": {"alpha": alpha, "seed": seed},
                    "lr": 0.1 if name == "sisa" else 0.2,
                }
                write_run(tmp_path / str(number), name, seed, accuracies, **own)
                number += 1
    return tmp_path


def cells(folder):
    with (folder / "report.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_becomes_one_row_for_each_setting(sweep):
    report.report([sweep], sweep, "title")
    rows = cells(sweep)
    assert [(row["strategy"], row["partition.alpha"], row["seeds"]) for row in rows] == [
        ("sisa", "0.1", "3"),
        ("fedavg", "0.1", "3"),
        ("sisa", "1.0", "3"),
        ("fedavg", "1.0", "3"),
    ]
    assert rows[0]["final accuracy, %"] == "71.00 (70.00-72.00)"
    assert rows[0]["best accuracy, %"] == "76.00 (75.00-77.00)"
    assert (rows[0]["rounds"], rows[0]["passes"], rows[0]["MB"]) == ("2", "2", "4.0")
    assert rows[0]["rounds to 80 %"] == "-"
    assert rows[2]["rounds to 80 %"] == "1"
    assert "strategy.lr" not in rows[0], "strategies differ in their own numbers, which tells nothing"


def test_a_strategys_own_number_is_a_column_where_it_was_swept(tmp_path):
    for number, lr in enumerate((0.1, 0.2)):
        write_run(tmp_path / str(number), "sisa", 0, [0.1, 0.5 + number / 10], lr=lr)
    report.report([tmp_path], tmp_path, "")
    assert [(row["strategy.lr"], row["final accuracy, %"]) for row in cells(tmp_path)] == [
        ("0.1", "50.00"),
        ("0.2", "60.00"),
    ]


def test_the_pictures_are_drawn(sweep):
    report.report([sweep], sweep, "title")
    for name in ("comparison.png", "sweep.png"):
        with Image.open(sweep / name) as picture:
            assert len(picture.convert("L").getcolors()) > 10


def test_the_table_is_markdown(sweep):
    text = report.report([sweep], sweep, "")
    lines = text.splitlines()
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1
    assert (sweep / "report.md").read_text() == text


def test_a_run_that_did_not_finish_is_left_out(sweep):
    (sweep / "0" / "summary.json").unlink()
    report.report([sweep], sweep, "")
    assert cells(sweep)[0]["seeds"] == "2"


def test_nothing_to_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pisa-fl-report", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no finished run" in error
