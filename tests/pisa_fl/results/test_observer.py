"""What watches a run: what is there while it goes on, and that nobody but the run directory can end it."""

import json

import pytest
from pictures import pictures
from PIL import Image
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pisa_fl

QUICK = ("model=logistic", "clients=5", "rounds=3", "engine.threads=1", "progress=false")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Copies of a run directory after every round."""
    folder = tmp_path_factory.mktemp("watched")
    more = [
        "redraw=0",
        "checkpoint.every=2",
        "tracker=[tensorboard,csv]",
        "+tracker.last._target_=watchers.Copier",
    ]
    with pictures(drawn=True):
        pisa_fl.run(pisa_fl.compose(*QUICK, *more), folder / "run")
    return folder


def test_curves_events_and_table_are_there_up_to_the_present_round(watched):
    for number in (1, 2, 3):
        copy = watched / f"after-{number}"
        events = EventAccumulator(str(copy)).Reload().Scalars("test_loss")
        rows = (copy / "metrics.csv").read_text().splitlines()
        lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
        assert [event.step for event in events] == list(range(number + 1))
        assert [row.split(",")[:2] for row in rows] == [
            ["round", "test_accuracy"],
            *([str(line["round"]), str(line["test_accuracy"])] for line in lines),
        ]
        with Image.open(copy / "curves.png") as image:
            image.verify()
        assert [path.name for path in copy.glob("**/.*")] == [".lock"], "which the run holds"
    assert (watched / "after-1" / "curves.png").read_bytes() != (
        watched / "after-2" / "curves.png"
    ).read_bytes()


def test_the_model_so_far_is_in_the_checkpoints(watched):
    """Under the names of the final one, and readable by `init=`."""
    so_far = watched / "after-2" / "checkpoint" / "round-000002" / "model.safetensors"
    assert not (watched / "after-2" / "model.safetensors").exists()
    assert {k: v.shape for k, v in load_file(so_far).items()} == {
        k: v.shape for k, v in load_file(watched / "run" / "model.safetensors").items()
    }
    again = pisa_fl.run(pisa_fl.compose(*QUICK, "rounds=0", f"init={so_far}"))
    lines = [json.loads(line) for line in (watched / "run" / "metrics.jsonl").read_text().splitlines()]
    assert again.metrics[0]["test_loss"] == lines[2]["test_loss"] != lines[3]["test_loss"]
    last = watched / "run" / "checkpoint" / "round-000003" / "model.safetensors"
    assert last.read_bytes() == (watched / "run" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("first", [0, 2])
def test_a_tracker_that_fails_is_a_warning_and_the_run_goes_on(watched, command, tmp_path, first):
    failing = ["+tracker.mine._target_=watchers.Failing", f"+tracker.mine.first={first}"]
    ended = command(*QUICK, *failing, "hydra.run.dir=run")
    assert (ended.status, ended.err) == (0, "")
    assert " ".join(ended.out.split()).count("Failing is left out from here on: the server") == 1
    whole = (watched / "run" / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole
