"""Data sets of the library `datasets` on disk, in all its forms, against the arrays that they were made of."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pisa_fl.config import ConfigurationError, compose, resolve
from pisa_fl.from_config import _data

RANDOM = np.random.default_rng(0)
PIXELS = {"train": RANDOM.integers(256, size=(8, 5, 6), dtype=np.uint8)}
PIXELS["test"] = RANDOM.integers(256, size=(3, 5, 6), dtype=np.uint8)
LABELS = {"train": [2, 0, 1, 2, 0, 1, 2, 0], "test": [0, 2, 1]}
NAMES = ["wasp", "ant", "bee"]  # not in the order of the alphabet


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


@pytest.fixture(scope="module")
def splits():
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=NAMES))
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"picture": [Image.fromarray(one) for one in PIXELS[split]], "kind": LABELS[split]}, features
            )
            for split in PIXELS
        }
    )


def load(name, path, *overrides):
    return _data(resolve(compose(f"data={name}", f"data.path={path}", *overrides)))


def saved(splits, folder):
    splits.save_to_disk(folder)


def parquet(splits, folder):
    for split, rows in splits.items():
        rows.to_parquet(folder / f"{split}.parquet")


def names_of_files(splits, folder):
    """Tables of names of pictures, and of classes by name."""
    for split in splits:
        lines = []
        for number, (pixels, label) in enumerate(zip(PIXELS[split], LABELS[split], strict=True)):
            Image.fromarray(pixels).save(folder.parent / f"{split} {number}.png")
            lines.append({"picture": f"../{split} {number}.png", "kind": NAMES[label]})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))


COLUMNS = ("data.image=picture", "data.label=kind")


@pytest.mark.parametrize("write", [saved, parquet, names_of_files])
def test_images_and_classes_are_those_that_were_written(splits, tmp_path, write):
    (tmp_path / "data").mkdir()
    write(splits, tmp_path / "data")
    named = names_of_files is write
    own = f"data.classes=[{','.join(NAMES)}]" if named else "data.classes=null"
    cached = f"data.cache={tmp_path / 'cache'}"
    data = load("huggingface", tmp_path / "data", *COLUMNS, own, cached)
    for split in PIXELS:
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        assert np.array_equal(images[:, 0], PIXELS[split])
        assert labels.tolist() == LABELS[split]
    assert data.classes == tuple(NAMES)
    assert isinstance(data.train_images, np.memmap)
    assert load("huggingface", tmp_path / "data", *COLUMNS, "data.cache=null", own).digest == data.digest
    if named:  # those that are not told are in the order of the alphabet
        assert load("huggingface", tmp_path / "data", *COLUMNS, cached).classes == ("ant", "bee", "wasp")


def test_a_share_of_the_only_split_is_for_testing(splits, tmp_path):
    splits["train"].save_to_disk(tmp_path / "data")
    data = load("huggingface", tmp_path / "data", *COLUMNS, "data.test_split=0.25", "data.cache=null")
    assert (len(data.train_images), len(data.test_images)) == (6, 2)
    both = np.concatenate([data.train_images, data.test_images])[:, 0]
    assert {one.tobytes() for one in both} == {one.tobytes() for one in PIXELS["train"]}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.image=img"], "data.image=img is none of the columns picture, kind"),
        (["data.label=y"], "data.label=y is none of the columns picture, kind"),
        (["data.image=kind"], "data.image=kind holds no image in row 0 of train but int: name a column of"),
        (["data.test_split=val"], "data.test_split=val is none of the splits train, test: name one of them"),
        (["data.test_split=1.5"], "data.test_split=1.5 must be where .* or a share between 0 and 1"),
        (["data.classes=[ant,bee]"], "data.label=kind has the class wasp in training .* not in data.classes"),
        (["data.name=a/b"], "data.name and data.path: give one of them"),
        (["data.path=/nowhere"], "data.path=/nowhere is not a folder"),
    ],
)
def test_what_cannot_be_is_said(splits, tmp_path, overrides, sentence):
    splits.save_to_disk(tmp_path)
    with pytest.raises(ConfigurationError, match=sentence):
        load("huggingface", tmp_path, *COLUMNS, "data.cache=null", *overrides)


def test_no_hub(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigurationError, match=r"data.name=owner/none cannot be loaded \(.*\); data.path takes"
    ):
        load("huggingface", "null", "data.name=owner/none", "data.cache=null")


def test_a_table_is_what_it_is_as_csv(tmp_path):
    table = pd.DataFrame(RANDOM.normal(size=(30, 3)), columns=list("abc"))
    table["colour"] = RANDOM.choice(["red", "blue"], 30)
    table["kind"] = RANDOM.choice(NAMES, 30)
    rows = datasets.Dataset.from_pandas(table.assign(kind=table["kind"].map(NAMES.index)))
    rows.cast_column("kind", datasets.ClassLabel(names=NAMES)).save_to_disk(tmp_path / "data")
    table.to_csv(tmp_path / "table.csv", index=False)
    whole = ["data.target=kind", "data.ignore=[c]"]
    ours = load("huggingface_table", tmp_path / "data", *whole, "data.test_split=0.2")
    theirs = load("csv", tmp_path / "table.csv", *whole, "data.test=0.2")
    assert ours.columns == theirs.columns == ("a", "b", "colour=blue", "colour=red")
    assert ours.digest == theirs.digest
