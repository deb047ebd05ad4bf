"""`partition=own`: clients of a real federation that bring their own data."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from omegaconf import OmegaConf
from PIL import Image
from test_flower_grid import Clock, SuperLink, engine_on, write_digits

from pisa_fl import ConfigurationError, compose, prepare, resume, run
from pisa_fl.clients.host import CLIENT_FAILED
from pisa_fl.config import resolve
from pisa_fl.data.folder import imagefolder
from pisa_fl.engines.base import identify
from pisa_fl.flower import app as flower_app
from pisa_fl.flower import grid as flower_grid
from pisa_fl.flower.state_file import StateFile
from pisa_fl.from_config import one_client
from pisa_fl.results.result import Interrupted
from pisa_fl.results.run_directory import STOP

COLOURS = {"red": 0, "green": 1, "blue": 2}
CLASSES = "[blue,green,red]"
LABELS = {"blue": 0, "green": 1, "red": 2}
SIDE = 6


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """What a process keeps is of this test alone, and nobody really waits."""
    monkeypatch.setattr(flower_grid, "time", Clock())
    flower_app.hosted.cache_clear()
    if TaskIdentity._run_id is None:
        identify()
    yield
    flower_app.hosted.cache_clear()


def paint(folder, number, seed=0, side=SIDE):
    """Noisy images below a folder, {path: how many}, in the colour that the path's last part names."""
    draw = np.random.default_rng(seed)
    for path, count in number.items():
        (folder / path).mkdir(parents=True)
        for position in range(count):
            pixels = draw.integers(0, 120, (side, side, 3), np.uint8)
            pixels[:, :, COLOURS.get(Path(path).name, 0)] += 130
            Image.fromarray(pixels).save(folder / path / f"{position:03}.png")
    return folder


@pytest.fixture
def server(tmp_path):
    """The server's folder: test images of all classes, and a training image of each, which nobody uses."""
    tests = {f"test/{colour}": 10 for colour in COLOURS}
    return paint(tmp_path / "server", tests | {f"train/{colour}": 1 for colour in COLOURS}, seed=9)


@pytest.fixture(autouse=True)
def owners(tmp_path, monkeypatch):
    """Where the clients write, by their owners' word."""
    monkeypatch.setenv("PISA_FL_STATE", str(tmp_path / "states"))
    monkeypatch.setenv("PISA_FL_CACHE", str(tmp_path / "cache"))


def configure(folder, data, *overrides):
    own = ["engine=flower", "partition=own", "engine.experiment=e"]
    small = ["model=logistic", "batch_size=4", "device=cpu", "patience=0", "progress=false"]
    images = ["data=imagefolder", f"data.path={data}", f"data.cache={folder}/cache"]
    return resolve(compose(*own, "engine.threads=1", *small, *images, *overrides))


def app(config, number, before=None, **node_config):
    """The ClientApp of client `number`, in a new process for each message."""
    text = {"hydra": OmegaConf.to_yaml(config)}
    context = Context(7, 99, {"partition-id": number} | node_config, RecordDict(), text)

    def answer(message):
        flower_app.hosted.cache_clear()
        if before is not None:
            before(message)
        return flower_app.client(message, context)

    return answer


def introduction(config, number, **node_config):
    """What a client says of itself, or why it does not."""
    question = Message(RecordDict({"config": ConfigRecord({"version": "?"})}), 99, "query")
    reply = app(config, number, **node_config)(question)
    if reply.has_error():
        assert reply.error.code == CLIENT_FAILED
        assert "\n" not in reply.error.reason
        return reply.error.reason
    return dict(reply.content["config"])


# --- where it does not go


def test_the_local_engine_refuses_it_in_one_sentence(command, tmp_path):
    for overrides in (["engine=local"], ["engine=flower"]):
        ended = command("partition=own", *overrides)
        assert ended.status == 2
        assert ended.err == (
            "pisa-fl: partition=own needs real clients: engine=flower engine.connection=NAME\n"
        )
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigurationError, match="partition=own needs real clients"):
        run(compose("partition=own"))


def test_the_server_needs_test_images(tmp_path):
    data = paint(tmp_path / "server", {"train/red": 2, "train/blue": 2})
    config = configure(tmp_path, data, f"data.classes={CLASSES}")
    link = SuperLink()
    with pytest.raises(ConfigurationError) as caught:
        run(config, tmp_path / "run", engine_on(link))
    assert str(caught.value) == "data: there are no test examples, which the server needs"
    assert not (tmp_path / "run").exists()


def test_own_data_and_a_folder_go_together(tmp_path, server):
    own = paint(tmp_path / "own", {"train/red": 2})
    config = configure(tmp_path, server, f"data.classes={CLASSES}")
    dealt = configure(
        tmp_path, server, f"data.classes={CLASSES}", "+partition._target_=partitioners.IidPartitioner"
    )
    together = "client 0: partition=own and `data` in the node-config go together"
    assert introduction(config, 0).startswith(together)
    assert introduction(dealt, 0, data=str(own)).startswith(together)
    file = StateFile(str(tmp_path / "states"), "e", 0)
    for wrong, folder in ((config, None), (dealt, str(own))):
        with pytest.raises(ConfigurationError, match="go together"):
            one_client(wrong, 0, folder, file)


def test_a_data_set_without_a_folder_cannot_be_a_clients_own(tmp_path):
    config = resolve(compose("engine=flower", "partition=own", "engine.experiment=e"))
    said = introduction(config, 0, data=str(tmp_path))
    assert said.startswith("client 0: data has neither path nor root")


def test_a_folder_that_is_not_there_is_named(tmp_path, server):
    config = configure(tmp_path, server, f"data.classes={CLASSES}")
    said = introduction(config, 2, data="/nowhere/at/all")
    assert said.startswith("client 2: data.path=/nowhere/at/all has no folder 'train'")


# --- labels


def labels_by_colour(data):
    """Labels of the images in which a colour is the strongest."""
    strongest = data.train_images.mean(axis=(2, 3)).argmax(axis=1)
    return {
        colour: set(data.train_labels[strongest == channel].tolist()) for colour, channel in COLOURS.items()
    }


def test_clients_with_different_classes_agree_on_the_labels(tmp_path, server):
    config = configure(tmp_path, server, f"data.classes={CLASSES}")
    folders = {
        0: paint(tmp_path / "zero", {"train/red": 3, "train/blue": 2}),
        1: paint(tmp_path / "one", {"train/green": 4}),
        2: paint(tmp_path / "two", {"train/green": 1, "train/red": 1, "test/blue": 2}),
    }
    held = {0: {"red", "blue"}, 1: {"green"}, 2: {"green", "red"}}
    for number, folder in folders.items():
        said = introduction(config, number, data=str(folder))
        assert (said["classes"], said["shape"]) == (["blue", "green", "red"], [3, SIDE, SIDE])
        for _ in ("decoded", "from the cache"):
            clients = one_client(config, number, str(folder), StateFile(str(tmp_path), "e", number))
            assert labels_by_colour(clients.data) == {
                colour: {LABELS[colour]} if colour in held[number] else set() for colour in COLOURS
            }
            assert clients.rows[number].tolist() == list(range(said["examples"]))
    assert len(one_client(config, 2, str(folders[2]), StateFile(str(tmp_path), "e", 2)).data.test_images) == 2


def test_without_named_classes_a_client_that_lacks_one_is_turned_away(tmp_path, server, caplog):
    config = configure(tmp_path, server, "data.classes=null", "rounds=0")
    other = paint(
        tmp_path / "one", {f"{split}/{name}": 1 for split in ("train", "test") for name in ("blue", "red")}
    )
    link = SuperLink()
    link.join(app(config, 0, data=str(other)))
    grid = prepare(config, engine_on(link)).grid
    assert grid.get_node_ids() == []
    assert "client 0 has classes ['blue', 'red'], the server ['blue', 'green', 'red']" in caplog.text


def test_an_unknown_class_is_refused(tmp_path, server):
    config = configure(tmp_path, server, f"data.classes={CLASSES}")
    folder = paint(tmp_path / "own", {"train/red": 1, "train/yellow": 1})
    said = introduction(config, 0, data=str(folder))
    assert said == (
        f"client 0: data.path={folder} has class folders ['yellow'] that data.classes lacks; add or remove them"
    )


def test_an_unknown_class_among_the_test_images_is_refused(tmp_path):
    folder = paint(tmp_path / "own", {"train/red": 1, "test/yellow": 1})
    with pytest.raises(ValueError, match=r"'yellow'.* that data.classes lacks"):
        imagefolder(str(folder), None, 0.5, 0.5, classes=["red"])


def test_classes_may_have_numbers_for_names(tmp_path):
    server = paint(
        tmp_path / "server", {f"{split}/{name}": 1 for split in ("train", "test") for name in (3, 7)}
    )
    config = configure(tmp_path, server, "data.classes=[3,7]")
    assert list(config.data.classes) == [3, 7]
    own = paint(tmp_path / "own", {"train/7": 2})
    assert introduction(config, 0, data=str(own))["classes"] == ["3", "7"]
    clients = one_client(config, 0, str(own), StateFile(str(tmp_path), "e", 0))
    assert clients.data.train_labels.tolist() == [1, 1]


def test_images_of_another_size_are_turned_away(tmp_path, server, caplog):
    config = configure(tmp_path, server, f"data.classes={CLASSES}")
    link = SuperLink()
    link.join(app(config, 0, data=str(paint(tmp_path / "own", {"train/red": 2}, side=SIDE + 2))))
    assert prepare(config, engine_on(link)).grid.get_node_ids() == []
    assert "client 0 has shape [3, 8, 8], the server [3, 6, 6]" in caplog.text
    # data.image_size makes them the same
    caplog.clear()
    config = configure(tmp_path, server, f"data.classes={CLASSES}", f"data.image_size={SIDE}")
    link.join(app(config, 0, data=str(tmp_path / "own")))
    assert prepare(config, engine_on(link)).grid.get_node_ids() == [0]


# --- whole federations


def own_folders(tmp_path):
    """Each client's classes, and how many images."""
    numbers = [{"train/red": 20}, {"train/green": 14, "train/red": 4}, {"train/blue": 26}]
    return [paint(tmp_path / f"own-{i}", number, seed=i) for i, number in enumerate(numbers)]


EXAMPLES = {0: 20, 1: 18, 2: 26}


@pytest.mark.parametrize("strategy", ["sisa", "fedavg"])
def test_a_federation_of_own_data_learns_and_counts_what_was_introduced(tmp_path, server, strategy):
    rounds = ["rounds=12"] + (["strategy.local_epochs=1"] if strategy == "fedavg" else [])
    config = configure(
        tmp_path, server, f"data.classes={CLASSES}", f"strategy={strategy}", "clients=3", *rounds
    )
    link = SuperLink()
    for number, folder in enumerate(own_folders(tmp_path)):
        link.join(app(config, number, data=str(folder)))
    result = run(config, tmp_path / "run", engine_on(link))
    first, *others = result.metrics
    assert first["passes"] == 0
    assert [line["passes"] for line in others] == list(range(1, 13))
    assert all((line["clients_ok"], line["clients_failed"]) == (3, 0) for line in others)
    assert others[-1]["test_loss"] < 0.7 * first["test_loss"]
    assert others[-1]["train_loss"] < 0.7 * others[0]["train_loss"]
    assert others[-1]["test_accuracy"] > 0.9
    assert not (tmp_path / "run" / "partition.json").exists()
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_passes_count_the_examples_of_those_who_have_been_met(tmp_path, server):
    chosen = ["strategy=sisa", "clients=3", "rounds=3", "min_clients=1"]
    config = configure(tmp_path, server, f"data.classes={CLASSES}", *chosen)
    link = SuperLink()
    folders = own_folders(tmp_path)

    def second_comes(message):
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
            link.join(app(config, 1, data=str(folders[1])))

    link.join(app(config, 0, second_comes, data=str(folders[0])))
    result = run(config, None, engine_on(link))
    assert [line["clients_ok"] for line in result.metrics[1:]] == [1, 1, 2]
    assert [line["passes"] for line in result.metrics[:3]] == [0, 1, 2]
    assert result.metrics[3]["passes"] == (3 * EXAMPLES[0] + EXAMPLES[1]) / (EXAMPLES[0] + EXAMPLES[1])


def test_a_federation_of_own_data_is_stopped_and_resumed_to_the_same_bits(tmp_path, server):
    config = configure(tmp_path, server, f"data.classes={CLASSES}", "strategy=sisa", "clients=3", "rounds=4")
    folders = own_folders(tmp_path)

    def link(before=None, seed=0):
        made = SuperLink(seed=seed)
        for number in range(3):
            made.join(app(config, number, before, data=str(folders[number])))
        return made

    undisturbed = run(config, None, engine_on(link()))
    directory = tmp_path / "run"
    for number in range(3):
        (tmp_path / "states" / "e" / f"client-{number}.safetensors").unlink()

    def stop(message):
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
            (directory / STOP).touch()

    with pytest.raises(Interrupted):
        run(config, directory, engine_on(link(stop)))
    assert not (directory / STOP).exists()
    resumed = resume(directory, engine_on(link(seed=5)))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for line, expected in zip(lines, undisturbed.metrics, strict=True):
        assert line | {"seconds": 0} == expected | {"seconds": 0}
    own, other = resumed.model.state_dict(), undisturbed.model.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_idx_files_may_be_a_clients_own(tmp_path):
    write_digits(tmp_path / "server", train=10, test=50, seed=1)
    held = {0: ([1, 4], 30), 1: ([0, 2, 3], 45)}
    config = configure(tmp_path, "x", "clients=2", "strategy=sisa", "rounds=3")
    digits = compose("data=mnist", f"data.root={tmp_path}/server", f"data.cache={tmp_path}/cache").data
    config.data = digits
    link = SuperLink()
    for number, (classes, train) in held.items():
        folder = write_digits(tmp_path / f"own-{number}", train, 5, classes, seed=number + 2)
        link.join(app(config, number, data=str(folder)))
        said = introduction(config, number, data=str(folder))
        assert (said["examples"], said["shape"], len(said["classes"])) == (train, [1, 28, 28], 10)
        clients = one_client(config, number, str(folder), StateFile(str(tmp_path), "e", number))
        assert set(clients.data.train_labels.tolist()) == set(classes)
    result = run(config, None, engine_on(link))
    assert [line["passes"] for line in result.metrics] == [0, 1, 2, 3]
    assert config.data.root == f"{tmp_path}/server"
