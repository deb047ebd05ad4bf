"""The report of finished runs, on real configurations and on metrics written by hand."""

import copy
import csv
import json
import math
import shutil
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pictures import blank
from PIL import Image

from pisa_fl import compose
from pisa_fl.metric import Measures, Metric
from pisa_fl.results import figures, report, run_directory
from pisa_fl.results.figures import qualities
from pisa_fl.results.finished import natural
from pisa_fl.results.report import page as html
from pisa_fl.results.report import sweep as sweep_picture
from pisa_fl.results.runs import load_runs

TARGET = 0.8


@lru_cache
def _composed(*overrides):
    return OmegaConf.to_container(compose("model=logistic", "rounds=2", *overrides))


def chosen(*overrides, seed=0):
    """The configuration of a run by the command line."""
    config = copy.deepcopy(_composed(*overrides))
    config["seed"] = config["partition"]["seed"] = seed
    return config


def write_run(folder, config, accuracies, mb=1, losses=None):
    """A finished run's directory, of one pass and so many MB each way a round."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    losses = losses or [1.0] * len(accuracies)
    metrics = [
        {
            "round": i,
            "passes": i,
            "bytes_up": i * mb * 10**6,
            "bytes_down": i * mb * 10**6,
            "test_accuracy": accuracy,
            "test_loss": loss,
            "train_loss": loss,
            "seconds": i,
        }
        for i, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "summary.json").write_text(
        json.dumps(run_directory.summarise(metrics, [TARGET], config["seed"], Measures.read(None)))
    )
    return folder


def cells(folder):
    with (folder / "report.csv").open() as file:
        return list(csv.DictReader(file))


def columns(rows, *names):
    return [tuple(row[name] for name in names) for row in rows]


def notes_of(text):
    return [line[2:] for line in text.partition("\n## Notes\n")[2].splitlines() if line]


def cells_and_notes(folder):
    text = report.report([folder], folder, "")
    return cells(folder), notes_of(text)


@pytest.fixture
def no_pictures(monkeypatch):
    """Reports of which only the table is looked at."""
    monkeypatch.setattr(figures, "draw_comparison", blank)
    monkeypatch.setattr(sweep_picture, "draw_sweep", blank)
    monkeypatch.setattr(html, "page", lambda runs, title: "")


@pytest.fixture
def sweep(tmp_path):
    """Two methods, two alphas, three seeds; the directories are 0 to 11 in this order."""
    number = 0
    for alpha, gain in ((0.1, 0.0), (1.0, 0.1)):
        for strategy, start in (("sisa", 0.7), ("fedavg", 0.2)):
            for seed in range(3):
                config = chosen(
                    f"strategy={strategy}", "partition=dirichlet", f"partition.alpha={alpha}", seed=seed
                )
                final = start + gain + seed / 100
                write_run(tmp_path / str(number), config, [0.1, final + 0.05, final], mb=1 + seed)
                number += 1
    return tmp_path


def test_a_sweep_becomes_one_row_for_each_setting(sweep):
    text = report.report([sweep], sweep, "title")
    rows = cells(sweep)
    assert columns(rows, "strategy", "alpha", "seeds") == [
        ("sisa", "0.1", "3"),
        ("fedavg", "0.1", "3"),
        ("sisa", "1.0", "3"),
        ("fedavg", "1.0", "3"),
    ]
    final = ("final accuracy, %", "final accuracy, %, min", "final accuracy, %, max")
    assert [float(value) for value in columns(rows, *final)[0]] == [71.0, 70.0, 72.0]
    assert [float(row["best accuracy, %"]) for row in rows[:2]] == [76.0, 26.0]
    assert [float(rows[0][name]) for name in ("rounds", "passes", "MB")] == [2, 2, 8], (
        "medians, not the first's"
    )
    assert columns(rows, "rounds to 80 %", "rounds to 80 %, reached")[::2] == [("inf", "0"), ("1.0", "3")]
    table = text.partition("\n\n")[0].splitlines()
    assert len(table) == 2 + 4
    assert notes_of(text) == [], "none where nothing is missing"
    assert len({line.count("|") for line in table}) == 1
    assert "| **71.00 (70.00-72.00)** | **76.00 (75.00-77.00)** | 2 | 2 | 8.0 (4.0-12.0) | - |" in table[2]
    assert "| 21.00 (20.00-22.00) | 26.00 (25.00-27.00) |" in table[3]
    assert (sweep / "report.md").read_text() == text
    for name in ("comparison.png", "sweep.png"):
        with Image.open(sweep / name) as picture:
            assert len(picture.convert("L").getcolors()) > 10


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("runs", "names", "values"),
    [
        (  # what differs within one choice
            [["strategy.preconditioner.beta=0"], ["strategy.preconditioner.beta=0.99"]],
            ["strategy", "beta"],
            [("pisa", "0"), ("pisa", "0.99")],
        ),
        (  # what was chosen stands for all below it
            [["strategy=pisa"], ["strategy=pisa", "strategy/preconditioner=second_moment"]],
            ["strategy", "preconditioner"],
            [("pisa", "kronecker"), ("pisa", "second_moment")],
        ),
        (  # whatever they are called
            [["name=mine"], ["strategy=nsisa", "name=mine"], ["strategy=fedavg", "name=mine"]],
            ["strategy"],
            [("pisa",), ("nsisa",), ("fedavg",)],
        ),
        (  # null beside a number
            [["strategy.rho=1"], ["strategy.rho=1", "strategy.sigma=9"]],
            ["strategy", "sigma"],
            [("pisa", "null"), ("pisa", "9")],
        ),
        (
            [["partition=iid"], ["partition=dirichlet"], ["partition=dirichlet", "partition.alpha=1"]],
            ["strategy", "partition", "alpha"],
            [("pisa", "iid", ""), ("pisa", "dirichlet", "0.5"), ("pisa", "dirichlet", "1")],
        ),
        (  # two keys of one name
            [
                ["partition=dirichlet", "strategy.alpha=uniform"],
                ["partition=dirichlet", "partition.alpha=1"],
            ],
            ["strategy", "strategy.alpha", "partition.alpha"],
            [("pisa", "uniform", "0.5"), ("pisa", "examples", "1")],
        ),
        (  # lists, truths and text that looks like a number
            [
                ["model.hidden=[5]"],
                ["model.hidden=[5,5]"],
                ["+model.x=true"],
                ["+model.x=1"],
                ["+model.x='1'"],
            ],
            ["strategy", "hidden", "x"],
            [("pisa", *v) for v in (("[5]", ""), ("[5, 5]", ""), ("[]", "true"), ("[]", "1"), ("[]", '"1"'))],
        ),
        (  # what follows from another key is no column of its own
            [["clients=5"], ["clients=6"], ["batch_size=5"], ["participation=0.5"]],
            ["strategy", "clients", "participation", "batch_size"],
            [
                ("pisa", "5", "1.0", "64"),
                ("pisa", "6", "1.0", "64"),
                ("pisa", "10", "1.0", "5"),
                ("pisa", "10", "0.5", "64"),
            ],
        ),
        (
            [["engine.precision=bfloat16"], ["engine=flower"], ["init=w"]],
            ["strategy", "precision", "init"],
            [("pisa", "bfloat16", "null"), ("pisa", "float32", "null"), ("pisa", "float32", "w")],
        ),
    ],
)
def test_any_difference_but_the_seed_makes_a_row(tmp_path, runs, names, values):
    for number, overrides in enumerate(runs):
        for seed in (0, 1):
            config = chosen(*overrides, seed=seed)
            write_run(tmp_path / f"{number}-{seed}", config, [0.1, 0.5, 0.5 + number / 50 + seed / 100])
    rows, notes = cells_and_notes(tmp_path)
    assert columns(rows, *names) == values
    assert list(rows[0])[: list(rows[0]).index("seeds")] == names
    assert {row["seeds"] for row in rows} == {"2"}
    assert not [note for note in notes if "again" in note]


@pytest.mark.usefixtures("no_pictures")
def test_what_cannot_matter_to_the_numbers_makes_no_row(tmp_path):
    others = [
        ["name=other", "progress=false", "targets=[0.5]", "checkpoint.every=1", "data.cache=null"],
        ["state=disk", "engine.workers=0", "engine.threads=2"],
        ["engine=ray", "engine.actors=2"],
        ["engine=flower", f"engine.directory={tmp_path}", "engine.experiment=e", f"resume={tmp_path}"],
    ]
    for number, overrides in enumerate([[], *others]):
        config = chosen(*overrides, seed=number)
        if number == 4:  # of an earlier version, which did not tell what was chosen
            del config["choices"]
        write_run(tmp_path / str(number), config, [0.1, 0.2, number / 10])
    rows, notes = cells_and_notes(tmp_path)
    assert columns(rows, "strategy", "seeds") == [("pisa", "5")]
    assert float(rows[0]["final accuracy, %"]) == 20
    assert notes == []


@pytest.mark.usefixtures("no_pictures")
def test_runs_that_do_not_tell_what_was_chosen(tmp_path):
    runs = (["partition=iid"], ["partition=shards"], ["strategy=nsisa", "partition=iid"], ["strategy=fedavg"])
    for number, overrides in enumerate(runs):
        config = chosen(*overrides)
        del config["choices"]
        write_run(tmp_path / str(number), config, [0.1, 0.2, number / 10])
    write_run(tmp_path / "4", {"name": "by hand", "seed": 0, "strategy": {"lr": 1}}, [0.1, 0.2, 0.3])
    rows, _ = cells_and_notes(tmp_path)
    assert columns(rows, "strategy", "preconditioner", "partition") == [
        ("Pisa", "Kronecker", "IidPartitioner"),
        ("Pisa", "Kronecker", "ShardsPartitioner"),
        ("Pisa", "Spectral", "IidPartitioner"),
        ("FedAvg", "", "LabelSkewPartitioner"),
        ("by hand", "", ""),
    ]


@pytest.mark.usefixtures("no_pictures")
def test_what_follows_from_the_version_is_told_by_it(tmp_path):
    """Keys that a version lacks and classes that lay elsewhere; not what was chosen within a version."""
    for number, (commit, overrides) in enumerate(
        [("a" * 40, []), ("a" * 40, ["strategy.lr=1"]), ("b" * 40, []), ("b" * 40, ["+strategy.more=1"])]
    ):
        config = chosen("strategy=fedavg", *overrides)
        if commit < "b":
            config["strategy"]["client"]["_target_"] = "strategies.elsewhere.LocalSgd"
            for key in ("evaluate_every", "stop_at_chance", "task"):
                del config[key]
            config["choices"].pop("task")
        run = write_run(tmp_path / str(number), config, [0.1, 0.2, number / 10])
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"git_commit": commit}))
    rows, notes = cells_and_notes(tmp_path)
    assert columns(rows, "strategy", "lr", "version", "more") == [
        ("fedavg", "0.01", "aaaaaaa", ""),
        ("fedavg", "1", "aaaaaaa", ""),
        ("fedavg", "0.01", "bbbbbbb", ""),
        ("fedavg", "0.01", "bbbbbbb", "1"),
    ]
    assert list(rows[0])[:5] == ["strategy", "lr", "more", "version", "seeds"]
    assert notes == []
    assert [row.line for row in load_runs(tmp_path).rows] == [
        "fedavg (lr 0.01, version aaaaaaa)",
        "fedavg (lr 1, version aaaaaaa)",
        "fedavg (lr 0.01, version bbbbbbb)",
        "fedavg (lr 0.01, more 1, version bbbbbbb)",
    ]


@pytest.mark.usefixtures("no_pictures")
def test_the_same_seed_twice_is_not_two_seeds(sweep):
    shutil.copytree(sweep / "0", sweep / "20")
    shutil.copytree(sweep / "1", sweep / "21")
    lines = (sweep / "21" / "metrics.jsonl").read_text()
    (sweep / "21" / "metrics.jsonl").write_text(lines.replace("0.76", "0.77"))
    text = report.report([sweep, sweep / "3"], sweep, "")
    assert columns(cells(sweep), "seeds") == [("3",)] * 4
    assert notes_of(text) == [
        f"{sweep / '3'} was given twice and is counted once",
        f"{sweep / '20'} is {sweep / '0'} again, and is not counted",
        f"{sweep / '21'} has the seed and the configuration of {sweep / '1'}, but OTHER NUMBERS;"
        " only the latter is counted",
    ]


@pytest.mark.usefixtures("no_pictures")
def test_runs_that_ended_in_an_error_are_in_the_verdict(sweep):
    (sweep / "1" / "summary.json").unlink()
    entries = [
        {"directory": str(number), "failed": "it diverged" if number == 1 else None} for number in range(3)
    ]
    (sweep / "sweep.json").write_text(json.dumps({"entries": entries}))
    text = report.report([sweep], sweep, "")
    why = f"{sweep / '1'} is left out: it ended in an error: it diverged"
    assert f"- None of the runs that are counted diverged, or ended at chance.\n- Not counted: {why}." in text
    assert why in notes_of(text)


def test_what_is_no_number_is_as_bad_as_can_be():
    lines = [{"q": 0.5}, {"q": None}, {"q": -7.0}]
    for metric, values in (
        (Metric("q", "higher"), [0.5, -math.inf, -7.0]),
        (Metric("q", "higher", "%"), [0.5, 0.0, -7.0]),
        (Metric("q", "lower"), [0.5, math.inf, -7.0]),
    ):
        lines_of_it = [{metric.key: line["q"]} for line in lines]
        assert qualities(lines_of_it, metric).tolist() == values
    assert Metric("q", "higher").shown(-math.inf) == "not finite"


def test_folders_are_in_the_order_of_their_numbers_whatever_else_they_are_called():
    paths = [Path("s", name) for name in ("10", "9", "²", "a")]
    assert sorted(paths, key=natural) == [Path("s", name) for name in ("a", "²", "9", "10")]


@pytest.mark.usefixtures("no_pictures")
def test_runs_that_are_missing_are_named(sweep):
    (sweep / "0" / "summary.json").unlink()
    for number in ("9", "10", "11"):
        shutil.rmtree(sweep / number)
    config = chosen("strategy=fedavg", "partition=dirichlet", "partition.alpha=0.1", "rounds=1")
    write_run(sweep / "12", config, [0.1, 0.2])
    text = report.report([sweep], sweep, "")
    assert notes_of(text) == [
        f"{sweep / '0'} is left out: it is not finished",
        "no run of sisa (alpha 0.1) with seed 0, which others have",
        "no run of fedavg (rounds 1) with seed 1, 2, which others have",
        "no run of fedavg with alpha 1.0, which others have",
    ]
    assert "Unequal rounds: sisa 2, fedavg (rounds 2) 2, fedavg (rounds 1) 1." in text
    assert float(cells(sweep)[0]["final accuracy, %"]) == 71.5, "the median of two is their mean"


DAMAGED = [
    ("config.yaml", "a: [", "config.yaml is damaged"),
    ("config.yaml", "- 1", "config.yaml is damaged"),
    ("config.yaml", "name: x", "config.yaml is damaged"),
    ("config.yaml", None, "it has no config.yaml"),
    ("metrics.jsonl", "", "metrics.jsonl is damaged"),
    ("metrics.jsonl", '{"round": 0, "passes"\n', "metrics.jsonl is damaged"),
    ("metrics.jsonl", '{"round": 0, "test_accuracy": 0.1}\n', "metrics.jsonl is damaged"),
    ("metrics.jsonl", "[1]\n", "metrics.jsonl is damaged"),
    ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl is damaged"),
    ("metrics.jsonl", lambda whole: whole * 2, "metrics.jsonl is damaged"),
    ("metrics.jsonl", lambda whole: whole[:-9], "its summary.json is not of the run in metrics.jsonl"),
    ("metrics.jsonl", None, "it has no metrics.jsonl"),
    ("summary.json", "", "summary.json is damaged"),
    ("summary.json", "[" * 100_000, "summary.json is damaged"),
    ("summary.json", '{"rounds": 2}', "summary.json is damaged"),
    ("summary.json", None, "it is not finished"),
]


@pytest.mark.usefixtures("no_pictures")
def test_damaged_runs_are_named_and_left_out(tmp_path):
    for number in range(len(DAMAGED) + 1):
        write_run(tmp_path / str(number), chosen(seed=number), [0.1, 0.2, 0.3])
    for number, (name, content, _) in enumerate(DAMAGED):
        path = tmp_path / str(number) / name
        whole = path.read_text()
        path.unlink()
        if content is not None:
            content = content(whole) if callable(content) else content
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    rows, notes = cells_and_notes(tmp_path)
    assert columns(rows, "seeds") == [("1",)]
    assert notes == [f"{tmp_path / str(i)} is left out: {why}" for i, (_, _, why) in enumerate(DAMAGED)]


@pytest.mark.usefixtures("no_pictures")
def test_targets_that_some_runs_reached(tmp_path):
    ends = {"sisa": (0.9, 0.9, 0.3), "fedavg": (0.9, 0.3, 0.3), "nsisa": (0.9, 0.9, 0.9)}
    for strategy, finals in ends.items():
        for seed, final in enumerate(finals):
            config = chosen(f"strategy={strategy}", "rounds=3", seed=seed)
            early = final if seed else 0.1
            write_run(tmp_path / f"{strategy}{seed}", config, [0.1, early, 0.2, final])
    rows, _ = cells_and_notes(tmp_path)
    text = (tmp_path / "report.md").read_text().splitlines()
    assert {row["strategy"]: row["rounds to 80 %, reached"] for row in rows} == {
        "fedavg": "1",
        "nsisa": "3",
        "sisa": "2",
    }
    assert [line.split(" | ")[-1] for line in text[2:5]] == ["- (1 of 3) |", "1 |", "3 (2 of 3) |"]


def test_a_diverged_run_is_counted_and_told(tmp_path):
    for seed, (last, loss) in enumerate(((0.1, None), (0.5, 1.0), (None, None))):
        config = chosen(seed=seed)
        path = write_run(tmp_path / str(seed), config, [0.1, 0.4, last or 0.1], losses=[2.0, 1.0, loss])
        if last is None:
            for name in ("metrics.jsonl", "summary.json"):
                text = (path / name).read_text()
                head, _, tail = (
                    text.rpartition('_accuracy": 0.1')
                    if name == "metrics.jsonl"
                    else (text.partition('_accuracy": 0.1'))
                )
                (path / name).write_text(f'{head}_accuracy": null{tail}')
    rows, notes = cells_and_notes(tmp_path)
    assert columns(rows, "seeds", "final accuracy, %", "final accuracy, %, min") == [("3", "10.0", "0.0")]
    assert notes == [
        f"{tmp_path / '0'} (pisa, seed 0) diverged, and is counted",
        f"{tmp_path / '2'} (pisa, seed 2) diverged, and is counted",
    ]
    assert (tmp_path / "comparison.png").is_file()


@pytest.mark.parametrize(
    "swept",
    [
        {"strategy.sigma": ["null", "1", "1000"], "strategy.rho": ["1"]},  # null among numbers
        {"strategy.align_every": ["0", "1"], "strategy.alpha": ["uniform", "examples"]},  # two at once
        {"+model.text": ["'$a_b'", "'_c^'", "'[red]|\\U0001f600\\x1b\\udce9'"]},
    ],
)
def test_whatever_was_swept_is_drawn(tmp_path, swept):
    keys = list(swept)
    runs = [[f"{keys[0]}={first}"] for first in swept[keys[0]]]
    runs = [[*one, f"{key}={value}"] for one in runs for key in keys[1:] for value in swept[key]] or runs
    for number, overrides in enumerate([*runs, ["strategy=fedavg"]]):
        config = chosen("rounds=1", *overrides)
        write_run(tmp_path / str(number), config, [0.1, number / 10])
    text = report.report([tmp_path], tmp_path, "a title with $x_$")
    assert len(cells(tmp_path)) == len(runs) + 1
    assert not [note for note in notes_of(text) if "missing" in note]
    for name in ("comparison.png", "sweep.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("L").getcolors()) > 10
    (tmp_path / "0" / "summary.json").unlink()
    for number in range(1, len(runs)):
        shutil.rmtree(tmp_path / str(number))
    report.report([tmp_path], tmp_path, "")
    assert not (tmp_path / "sweep.png").exists(), "that of before is of other runs"


def test_every_federation_has_axes_of_its_own_and_a_method_one_colour(tmp_path, monkeypatch):
    problems = (
        *([f"partition={p}", f"partition.alpha={a}"] for p, a in [("dirichlet", 0.1), ("dirichlet", 0.5)]),
        ["partition=iid"],
    )
    finals = {}
    for number, problem in enumerate(problems):
        for strategy in ("fedavg", "pisa") if number == 1 else ("pisa",):
            for seed in range(3):
                final = 0.5 + number / 10 + (strategy == "pisa") / 5 + seed**2 / 100
                finals.setdefault((number, strategy), []).append(100 * final)
                folder = tmp_path / f"{number}{strategy}{seed}"
                write_run(folder, chosen(f"strategy={strategy}", *problem, seed=seed), [0.1, 0.3, final])
    drawn = {}
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.update({path.name: figure}))
    report.report([tmp_path], tmp_path, "a title")
    comparison, sweep = drawn["comparison.png"], drawn["sweep.png"]
    assert len(comparison.axes) == 3 * 3
    where = {(0, "pisa"): (0, 0), (1, "fedavg"): (3, 0), (1, "pisa"): (3, 1), (2, "pisa"): (6, 0)}
    lines = {which: comparison.axes[ax].lines[line] for which, (ax, line) in where.items()}
    for which, line in lines.items():
        assert line.get_ydata()[-1] == pytest.approx(sorted(finals[which])[1])
    assert lines[0, "pisa"].get_color() == lines[1, "pisa"].get_color() != lines[1, "fedavg"].get_color()
    (ax,) = sweep.axes
    points = {(round(x), round(y, 6)) for line in ax.lines for x, y in zip(*line.get_data(), strict=True)}
    medians = {(which[0], round(sorted(values)[1], 6)) for which, values in finals.items()}
    assert points == medians
    assert [text.get_text() for text in comparison.legends[0].texts] == ["pisa, n=3", "fedavg, n=3"]


@pytest.mark.parametrize("content", [None, "not finished", "no folder"])
def test_nothing_to_report(tmp_path, monkeypatch, capsys, content):
    folder = tmp_path / "runs"
    if content != "no folder":
        folder.mkdir()
    if content == "not finished":
        (folder / "config.yaml").write_text("seed: 0")
    monkeypatch.setattr(sys, "argv", ["pisa-fl-report", str(folder), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("not a folder" if content == "no folder" else "no finished run") in error
    assert (content or "") in error or content == "no folder"
    assert not (tmp_path / "out").exists()
