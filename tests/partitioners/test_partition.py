"""Partitions as indices: dealing with anybody's partitioner, files, the picture, the configuration."""

import json
import subprocess
import sys
from pathlib import Path

import flwr_datasets.partitioner as flower
import numpy as np
import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from omegaconf import OmegaConf

import partitioners as p

CONF = Path(__file__).parents[2] / "conf" / "partition"
LABELS = np.repeat(np.arange(10), 100)


class Fixed(flower.Partitioner):
    """Somebody's own partitioner, that deals what it is told."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    @property
    def num_partitions(self):
        return len(self.parts)

    def load_partition(self, partition_id):
        return self.dataset.select(self.parts[partition_id])


# --- deal


def test_deal_reads_a_foreign_partitioner():
    partition = p.deal(Fixed([[3, 0], [1, 2]]), np.array([5, 5, 6, 6]))
    assert [indices.tolist() for indices in partition] == [[3, 0], [1, 2]]
    assert all(indices.dtype == np.int64 for indices in partition)


def test_deal_reads_flowers_partitioners():
    partition = p.deal(flower.IidPartitioner(3), np.zeros(7, dtype=int))
    assert [indices.tolist() for indices in partition] == [[0, 1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            [[0, 1, 2, 3], []],
            "Fixed deals client 1 no example: lower clients or change the partition",
        ),
        (
            [[0, 1], [1]],
            "Fixed deals 1 of 4 examples more than once: each may have one client",
        ),
        (
            [[0, 1, 2, 3], [3, 2]],
            "Fixed deals 2 of 4 examples more than once: each may have one client",
        ),
    ],
)
def test_deal_checks_a_foreign_partitioner(parts, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        p.deal(Fixed(parts), np.zeros(4, dtype=int))
    assert str(error.value) == sentence


def test_a_partitioner_deals_only_once():
    for partitioner in (p.IidPartitioner(3, 0), flower.IidPartitioner(3)):
        p.deal(partitioner, LABELS)
        with pytest.raises(ValueError, match="only once"):
            p.deal(partitioner, LABELS)


def test_a_partitioner_without_data_says_so():
    partitioner = p.IidPartitioner(3, 0)
    assert not partitioner.is_dataset_assigned()
    with pytest.raises(AttributeError, match="assign a data set"):
        partitioner.load_partition(0)


def test_the_names_are_flowers_partitioners_in_a_new_process():
    program = """
import partitioners, sys
assert not {"datasets", "flwr_datasets"} & set(sys.modules)
names = [name for name in partitioners.__all__ if name.endswith("Partitioner")]
classes = [getattr(partitioners, name) for name in names]
from flwr_datasets.partitioner import Partitioner
assert len(classes) == 9 and all(issubclass(each, Partitioner) for each in classes)
assert all(each.__name__ == name for each, name in zip(classes, names, strict=True))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(ImportError, match="Nonsense"):
        from partitioners import Nonsense  # noqa: F401


def test_deal_to_ten_thousand_clients():
    labels = np.random.default_rng(0).integers(0, 10, 60_000)
    partition = p.deal(p.LabelSkewPartitioner(10_000, 0, 2), labels)
    assert len(partition) == 10_000
    assert all(len(np.unique(labels[indices])) == 2 for indices in partition)


def test_deal_writes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    p.deal(p.IidPartitioner(3, 0), LABELS)
    p.deal(
        flower.ShardPartitioner(3, "label", num_shards_per_partition=2, keep_incomplete_shard=True),
        LABELS[:6],
    )
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


# --- files


@settings(max_examples=30, deadline=None)
@given(clients=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_saved_deal_comes_back_from_its_file(tmp_path_factory, clients, seed):
    path = tmp_path_factory.mktemp("deal") / "partition.json"
    dealt = p.deal(p.ShardsPartitioner(clients, seed, 2), LABELS)
    p.save(dealt, path)
    assert [file.name for file in path.parent.iterdir()] == ["partition.json"]
    assert json.loads(path.read_text()) == {str(i): indices.tolist() for i, indices in enumerate(dealt)}
    for partition in (p.load(path), p.deal(p.FromFilePartitioner(clients, path), LABELS)):
        assert [indices.tolist() for indices in partition] == [indices.tolist() for indices in dealt]


def test_keys_need_no_order(tmp_path):
    path = tmp_path / "partition.json"
    path.write_text('{"1": [0], "0": [2, 1]}')
    assert [indices.tolist() for indices in p.load(path)] == [[2, 1], [0]]


def test_a_file_keeps_its_order_through_the_deal(tmp_path):
    path = tmp_path / "partition.json"
    path.write_text('{"0": [4, 1, 3], "1": [5, 0, 2]}')
    partitioner = p.FromFilePartitioner(2, path)
    dealt = p.deal(partitioner, np.array([0, 0, 1, 1, 2, 2]))
    assert [indices.tolist() for indices in dealt] == [[4, 1, 3], [5, 0, 2]]
    assert partitioner.load_partition(1)["index"] == [5, 0, 2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[[0], [1]]",
        "3",
        "null",
        "{}",
        '{"0": [0], "2": [1]}',
        '{"1": [0], "2": [1]}',
        '{"a": [0]}',
        '{"0": 0}',
        '{"0": "01"}',
        '{"0": [0.0]}',
        '{"0": [true]}',
        '{"0": [[0]]}',
        '{"0": [99999999999999999999]}',
        "\x00",
    ],
)
def test_a_file_that_is_no_partition(tmp_path, text):
    path = tmp_path / "partition.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        p.deal(p.FromFilePartitioner(1, path), LABELS)
    assert str(error.value) == (
        f'path={path} is not a partition file, {{"0": [indices], "1": [indices], ...}} with the clients\' numbers '
        "without a gap: set it to a run's partition.json"
    )


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"^path=.*none.json cannot be read: No such file or directory$"):
        p.deal(p.FromFilePartitioner(1, tmp_path / "none.json"), LABELS)
    with pytest.raises(ValueError, match=r"^path=.* cannot be read: Is a directory$"):
        p.deal(p.FromFilePartitioner(1, tmp_path), LABELS)


def test_a_file_for_other_clients(tmp_path):
    path = tmp_path / "partition.json"
    path.write_text('{"0": [0], "1": [1]}')
    with pytest.raises(
        ValueError, match=r"partition among 2 clients but num_partitions=3: set num_partitions=2$"
    ):
        p.deal(p.FromFilePartitioner(3, path), LABELS)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '{"0": [0, 1], "1": [1]}',
            r"deals 1 of 3 examples more than once: each may have one client",
        ),
        ('{"0": [0, 1], "1": []}', r"deals client 1 no example"),
        (
            '{"0": [0, 1], "1": [3]}',
            r"deals examples 0 to 3 but the data set has 0 to 2: use the partition with",
        ),
        ('{"0": [0, 1], "1": [-1]}', r"deals examples -1 to 1 but the data set has 0 to 2"),
    ],
)
def test_a_file_for_other_data(tmp_path, text, sentence):
    path = tmp_path / "partition.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"partition.json {sentence}"):
        p.deal(p.FromFilePartitioner(2, path), np.zeros(3, dtype=int))


# --- picture


@pytest.mark.parametrize("clients", [1, 10, 100])
def test_picture(tmp_path, clients):
    partition = p.deal(p.IidPartitioner(clients, 0), LABELS)
    p.draw(partition, LABELS, [str(class_) for class_ in range(10)], tmp_path / "partition.png")
    image = imread(tmp_path / "partition.png")
    assert image.shape[:2] == (720, 1200)
    assert image[..., :3].std() > 0.05
    assert [file.name for file in tmp_path.iterdir()] == ["partition.png"]


# --- configuration


DEALING = sorted(file for file in CONF.glob("*.yaml") if file.stem != "own")  # which deals nothing


@pytest.mark.parametrize("file", DEALING, ids=lambda file: file.stem)
def test_configuration_deals(file, tmp_path):
    config = OmegaConf.create({"clients": 10, "seed": 3, "partition": OmegaConf.load(file)})
    if file.stem == "from_file":
        assert OmegaConf.is_missing(config.partition, "path")
        config.partition.path = str(tmp_path / "partition.json")
        p.save(p.deal(p.IidPartitioner(10, 0), LABELS), config.partition.path)
    partitioner = instantiate(config.partition)
    assert type(partitioner) is getattr(p, type(partitioner).__name__)
    assert isinstance(partitioner, flower.Partitioner)
    assert partitioner.num_partitions == len(p.deal(partitioner, LABELS)) == 10


def test_configurations_are_all_there():
    assert {file.stem for file in DEALING} == {
        "dirichlet",
        "feature_noise",
        "from_file",
        "iid",
        "label_skew",
        "natural",
        "quantity",
        "shards",
    }
