"""Data sets against known facts of MNIST, files written here byte by byte, and torchvision's transforms."""

import gzip
import hashlib
import os
import pickle
import re
import shutil
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as oracle
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torchvision.datasets import CIFAR10

from pisa_fl.data import ImageData
from pisa_fl.data.augment import CropFlip
from pisa_fl.data.cache import DIGESTS, cached
from pisa_fl.data.cifar import CLASSES

ROOT = Path(__file__).parents[3]
CONF = ROOT / "conf" / "data"
SHARED = Path(os.environ.get("PISA_FL_TEST_DATA", ROOT.parent / "shared" / "data"))
FASHION = Path("/usr/share/datasets/fashion-mnist")

needs_mnist = pytest.mark.skipif(
    not (SHARED / "mnist").is_dir(), reason=f"MNIST's idx files are not in {SHARED}/mnist (PISA_FL_TEST_DATA)"
)
needs_fashion = pytest.mark.skipif(
    not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


def load(name, **keys):
    """Load as the command line does; without a cache unless one is named."""
    config = OmegaConf.load(CONF / f"{name}.yaml")
    if "cache" in config:
        keys = {"cache": None, **keys}
    return instantiate(config, **keys)


def refusal(name, kind, **keys):
    """Return the one sentence with which loading is refused."""
    with pytest.raises(InstantiationException) as caught:
        load(name, **keys)
    error = caught.value.__cause__
    assert type(error) is kind
    sentence = str(error)
    assert "\n" not in sentence
    return sentence


# ---------------------------------------------------------------- MNIST and what ships with the package

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def source(name):
    content = gzip.decompress((SHARED / "mnist" / f"{name}.gz").read_bytes())
    assert hashlib.md5(content).hexdigest() == MD5[name]
    return content


@needs_mnist
@pytest.mark.parametrize(
    ("split", "prefix", "counts", "first"),
    [
        ("train", "train", [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], [5, 0, 4, 1, 9]),
        ("test", "t10k", [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009], [7, 2, 1, 0, 4]),
    ],
)
def test_mnist_is_the_published_one(split, prefix, counts, first):
    data = load("mnist", root=str(SHARED / "mnist"))
    images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
    assert np.bincount(labels).tolist() == counts
    assert labels[:5].tolist() == first
    content = source(f"{prefix}-images-idx3-ubyte")
    assert struct.unpack(">IIII", content[:16]) == (2051, len(images), 28, 28)
    assert images.tobytes() == content[16:]
    assert labels.tolist() == list(source(f"{prefix}-labels-idx1-ubyte")[8:])


@needs_mnist
@pytest.mark.parametrize(("split", "prefix", "each"), [("train", "train", 1000), ("test", "t10k", 200)])
def test_mnist_mini_is_the_first_of_every_class_in_file_order(split, prefix, each):
    data = load("mnist_mini")
    content, seen, expected = source(f"{prefix}-images-idx3-ubyte"), Counter(), []
    for position, label in enumerate(source(f"{prefix}-labels-idx1-ubyte")[8:]):
        seen[label] += 1
        if seen[label] <= each:
            expected.append((label, content[16 + 784 * position : 16 + 784 * (position + 1)]))
    assert getattr(data, f"{split}_labels").tolist() == [label for label, _ in expected]
    assert getattr(data, f"{split}_images").tobytes() == b"".join(pixels for _, pixels in expected)


def test_mnist_mini_facts():
    """What can be known without the idx files."""
    data = load("mnist_mini")
    assert data.shape == (1, 28, 28)
    assert (data.train_images.dtype, data.train_labels.dtype) == (np.uint8, np.int64)
    assert np.bincount(data.train_labels).tolist() == [1000] * 10
    assert np.bincount(data.test_labels).tolist() == [200] * 10
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert (data.train_images.sum(), data.test_images.sum()) == (264_042_938, 48_879_943)
    assert data.classes == tuple("0123456789")


def check_normalisation(data):
    pixels = data.train_images / 255
    assert np.allclose(data.mean, pixels.mean((0, 2, 3)), atol=5e-5)
    assert np.allclose(data.std, pixels.std((0, 2, 3)), atol=5e-5)


@needs_mnist
def test_mnist_normalisation_is_of_its_training_images():
    check_normalisation(load("mnist", root=str(SHARED / "mnist")))


@needs_fashion
def test_fashion_mnist_of_debian():
    data = load("fashion_mnist", root=str(FASHION))
    assert np.bincount(data.train_labels).tolist() == [6000] * 10
    assert data.train_labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert data.classes[9] == "Ankle boot"
    check_normalisation(data)


# ---------------------------------------------------------------- idx files

RANDOM = np.random.default_rng(0)
TINY = {
    "train-images-idx3-ubyte": RANDOM.integers(256, size=(7, 4, 3), dtype=np.uint8),
    "train-labels-idx1-ubyte": RANDOM.integers(10, size=7, dtype=np.uint8),
    "t10k-images-idx3-ubyte": RANDOM.integers(256, size=(5, 4, 3), dtype=np.uint8),
    "t10k-labels-idx1-ubyte": RANDOM.integers(10, size=5, dtype=np.uint8),
}


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_tiny(folder, rename=lambda name: name, encode=lambda content: content):
    folder.mkdir(exist_ok=True)
    for name, array in TINY.items():
        (folder / rename(name)).write_bytes(encode(idx(array)))
    return folder


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize(("suffix", "encode"), [("", bytes), (".gz", gzip.compress), (".gz", bytes)])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_under_all_usual_names(tmp_path, name, separator, suffix, encode):
    write_tiny(tmp_path, lambda file: file.replace("-idx", f"{separator}idx") + suffix, encode)
    data = load(name, root=str(tmp_path))
    assert np.array_equal(data.train_images[:, 0], TINY["train-images-idx3-ubyte"])
    assert np.array_equal(data.train_labels, TINY["train-labels-idx1-ubyte"])
    assert np.array_equal(data.test_images[:, 0], TINY["t10k-images-idx3-ubyte"])
    assert np.array_equal(data.test_labels, TINY["t10k-labels-idx1-ubyte"])
    assert data.train_labels.dtype == np.int64
    assert data.shape == (1, 4, 3)


IMAGES = idx(TINY["train-images-idx3-ubyte"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "starts 0x, not 0x00000803"),
        (IMAGES[:10], "starts 0x00000803, not 0x00000803 and 3 sizes"),
        (idx(TINY["train-labels-idx1-ubyte"]), "starts 0x00000801, not 0x00000803"),
        (b"\0\0\x0d\x03" + IMAGES[4:], "starts 0x00000d03, not 0x00000803"),
        (b"<html>no such page</html>", "not a whole idx file"),
        (IMAGES[:-1], "99 bytes where its header promises 100"),
        (IMAGES + b"\0", "more where its header promises 100"),
        (gzip.compress(IMAGES + bytes(10**7), mtime=0), "more where its header promises 100"),
        (gzip.compress(IMAGES, mtime=0)[:-12], "broken gzip"),
        (gzip.compress(IMAGES, mtime=0)[:40] + bytes(30), "broken gzip"),
        (gzip.compress(IMAGES, mtime=0)[:-8] + bytes(8), "broken gzip"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, content, reason):
    damaged = write_tiny(tmp_path) / "train-images-idx3-ubyte"
    damaged.write_bytes(content)
    sentence = refusal("mnist", ValueError, root=str(tmp_path))
    assert sentence.startswith(f"data.root: {damaged} is not a whole idx file")
    assert reason in sentence
    assert sentence.endswith("fetch it again")


def test_missing_folder_and_missing_file(tmp_path):
    sentence = refusal("mnist", FileNotFoundError, root=str(tmp_path / "nowhere"))
    assert re.fullmatch(r"data\.root=.*nowhere is not a folder; give .*, or null to download", sentence)
    write_tiny(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    sentence = refusal("mnist", FileNotFoundError, root=str(tmp_path))
    assert f"data.root={tmp_path} has no file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz" in sentence


def test_counts_that_differ_and_labels_out_of_range(tmp_path):
    labels = write_tiny(tmp_path) / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(6, np.uint8)))
    sentence = refusal("mnist", ValueError, root=str(tmp_path))
    assert re.search(r"data\.root: .*has 7 images but .*has 6 labels; fetch both again", sentence)
    labels.write_bytes(idx(np.full(7, 10, np.uint8)))
    assert "run from 10 to 10 but there are 10 classes" in refusal("mnist", ValueError, root=str(tmp_path))


# ---------------------------------------------------------------- the cache


@pytest.fixture
def tiny(tmp_path):
    return {"root": str(write_tiny(tmp_path / "idx")), "cache": str(tmp_path / "cache")}


def entries(tiny):
    return sorted(Path(tiny["cache"]).glob("*"))


def same(one, other):
    return all(
        np.array_equal(getattr(one, f"{split}_{kind}"), getattr(other, f"{split}_{kind}"))
        for split in ("train", "test")
        for kind in ("images", "labels")
    )


def test_second_load_decodes_nothing(tiny, monkeypatch):
    first = load("mnist", **tiny)
    monkeypatch.setattr("pisa_fl.data.mnist.read_idx", lambda *_: pytest.fail("decoded again"))
    second = load("mnist", **tiny)
    assert same(first, second)
    assert isinstance(second.train_images, np.memmap)
    assert second.classes == first.classes
    assert [path.name.rpartition("-")[0] for path in entries(tiny)] == ["mnist"]
    assert second.normalise(second.train_images).shape == (7, 1, 4, 3)


def test_a_changed_source_is_decoded_again(tiny):
    load("mnist", **tiny)
    file = Path(tiny["root"], "train-labels-idx1-ubyte")
    file.write_bytes(idx(np.arange(7, dtype=np.uint8)))
    os.utime(file, ns=(0, 0))
    assert load("mnist", **tiny).train_labels.tolist() == list(range(7))
    assert len(entries(tiny)) == 2


def test_a_source_replaced_with_its_size_and_time_is_decoded_again(tiny):
    load("mnist", **tiny)
    file = Path(tiny["root"], "train-labels-idx1-ubyte")
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    for labels in (np.arange(7, dtype=np.uint8), np.ones(7, np.uint8)):  # written in place, then a new file
        file.write_bytes(idx(labels))
        os.utime(file, ns=times)
        assert load("mnist", **tiny).train_labels.tolist() == labels.tolist()
        file.unlink()


def swap_names(entry):
    train, test = entry / "train_labels.npy", entry / "test_labels.npy"
    train.rename(entry / "spare")
    test.rename(train)
    (entry / "spare").rename(test)


def damage_header(entry):
    file = entry / "train_images.npy"
    file.write_bytes(file.read_bytes().replace(b"'shape': (7", b"'shape': ((", 1))


def put_pickle(entry):
    np.save(entry / "train_images.npy", np.array([{"not": "pixels"}], object), allow_pickle=True)


def put(name, make):
    def change(entry):
        (entry / name).unlink()
        make(entry / name)

    return change


DAMAGE = {
    "truncated": lambda entry: os.truncate(entry / "train_images.npy", 200),
    "more bytes": lambda entry: (entry / "train_images.npy").open("ab").write(b"x"),
    "empty": put("train_images.npy", Path.touch),
    "missing": put("train_images.npy", lambda path: None),
    "a folder": put("train_images.npy", Path.mkdir),
    "a pipe": put("train_images.npy", os.mkfifo),
    "a pickle": put_pickle,
    "a header that is no Python": damage_header,
    "labels under each other's name": swap_names,
    "no digests": put(DIGESTS, lambda path: None),
    "digests that are no text": put(DIGESTS, lambda path: path.write_bytes(b"\xff{")),
    "digests of nothing": put(DIGESTS, lambda path: path.write_text("{}")),
    "a pipe for digests": put(DIGESTS, os.mkfifo),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again(tiny, caplog, damage):
    expected = load("mnist", root=tiny["root"])
    load("mnist", **tiny)
    [entry] = entries(tiny)
    DAMAGE[damage](entry)
    assert same(load("mnist", **tiny), expected)
    assert f"data.cache: {entry} is damaged" in caplog.text
    caplog.clear()
    assert same(load("mnist", **tiny), expected)
    assert not caplog.text
    assert entries(tiny) == [entry]


def test_no_flipped_bit_of_an_entry_goes_unseen(tiny, caplog):
    expected = load("mnist", root=tiny["root"])
    load("mnist", **tiny)
    [entry] = entries(tiny)
    files = sorted(entry.iterdir())
    for _ in range(40):
        file = files[RANDOM.integers(len(files))]
        content = bytearray(file.read_bytes())
        content[RANDOM.integers(len(content))] ^= 1 << RANDOM.integers(8)
        file.write_bytes(content)
        caplog.clear()
        assert same(load("mnist", **tiny), expected)
        assert "is damaged" in caplog.text


def test_an_entry_under_anothers_name_is_not_used(tiny, caplog, monkeypatch):
    load("mnist", **tiny)
    [old] = entries(tiny)
    monkeypatch.setattr("pisa_fl.data.cache.VERSION", "of tomorrow")
    load("mnist", **tiny)
    [new] = {*entries(tiny)} - {old}  # another way of decoding has an entry of its own
    assert not caplog.text
    shutil.rmtree(new)
    old.rename(new)
    load("mnist", **tiny)
    assert "it is of another source" in caplog.text


@pytest.mark.parametrize("put", [Path.touch, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_folder_in_an_entrys_place_is_replaced(tiny, put):
    load("mnist", **tiny)
    [entry] = entries(tiny)
    shutil.rmtree(entry)
    put(entry)
    load("mnist", **tiny)
    assert isinstance(load("mnist", **tiny).train_images, np.memmap)
    assert entries(tiny) == [entry]


def test_a_damaged_entry_that_cannot_be_replaced_is_left_out(tiny, caplog, monkeypatch):
    expected = load("mnist", **tiny)
    [entry] = entries(tiny)
    (entry / "train_labels.npy").write_bytes(b"")

    def read_only(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pisa_fl.data.cache.os.replace", read_only)
    assert same(load("mnist", **tiny), load("mnist", root=tiny["root"]))
    assert "is damaged" in caplog.text
    assert "going without" in caplog.text
    assert expected.shape == (1, 4, 3)


def test_without_a_writable_cache_the_data_are_read_all_the_same(tiny, tmp_path, caplog):
    (tmp_path / "file").touch()
    data = load("mnist", root=tiny["root"], cache=str(tmp_path / "file" / "cache"))
    assert same(data, load("mnist", root=tiny["root"]))
    assert re.search(r"data\.cache: going without, since .* cannot be written", caplog.text)


def test_a_cache_that_fills_up_leaves_nothing_behind(tiny, monkeypatch):
    save = np.save

    def full(file, array, **options):
        if file.name == "test_labels.npy":
            raise OSError(28, "No space left on device")
        save(file, array, **options)

    monkeypatch.setattr(np, "save", full)
    assert same(load("mnist", **tiny), load("mnist", root=tiny["root"]))
    assert entries(tiny) == []


def test_of_two_processes_that_decode_at_once_either_may_finish_first(tmp_path):
    arrays = {key: np.arange(3) for key in ("train_images", "train_labels", "test_images", "test_labels")}
    arrays["classes"] = np.array(["a"])

    def slow():
        cached(str(tmp_path), "name", ["source"], lambda: arrays)
        entry.append(next(tmp_path.iterdir()).stat().st_ino)
        return arrays

    entry = []
    assert isinstance(cached(str(tmp_path), "name", ["source"], slow)["train_images"], np.memmap)
    # the first one's stays, since it may be being read
    assert [folder.stat().st_ino for folder in tmp_path.iterdir()] == entry


def test_the_cache_follows_the_environment(monkeypatch):
    config = OmegaConf.load(CONF / "mnist.yaml")
    monkeypatch.delenv("PISA_FL_CACHE", raising=False)
    assert config.cache == "~/.cache/pisa-fl"
    monkeypatch.setenv("PISA_FL_CACHE", "/somewhere")
    assert config.cache == "/somewhere"


# ---------------------------------------------------------------- the hub


def test_download(monkeypatch, tmp_path):
    pixels = RANDOM.integers(256, size=(4, 32, 32, 3), dtype=np.uint8)
    labels = [9, 0, 3, 3]
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    table = datasets.Dataset.from_dict(
        {"img": [Image.fromarray(each) for each in pixels], "label": labels}, features
    )
    asked = []

    def answer(name):
        asked.append(name)
        return {"train": table, "test": table.select([1])}

    monkeypatch.setattr(datasets, "load_dataset", answer)
    for _ in range(2):
        data = load("cifar10", cache=str(tmp_path))
        assert np.array_equal(data.train_images, pixels.transpose(0, 3, 1, 2))
        assert data.train_labels.tolist() == labels
        assert data.test_labels.tolist() == [0]
    assert asked == ["uoft-cs/cifar10"]


def test_download_of_grey_images(monkeypatch):
    pixels = RANDOM.integers(256, size=(2, 28, 28), dtype=np.uint8)
    split = {"image": [Image.fromarray(each) for each in pixels], "label": [1, 8]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": split, "test": split})
    assert np.array_equal(load("mnist").test_images[:, 0], pixels)


@pytest.mark.parametrize("error", [ConnectionError("down"), datasets.exceptions.DatasetNotFoundError("gone")])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_no_hub_and_no_root(monkeypatch, error, name):
    def fail(_):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    sentence = refusal(name, FileNotFoundError)
    assert re.fullmatch(
        r"data\.root is not set and \S+ cannot be downloaded .*; set data\.root to .*", sentence
    )


# ---------------------------------------------------------------- folders of images

SIZES = {("train", "ant"): 3, ("train", "bee"): 2, ("test", "ant"): 1, ("test", "bee"): 2}


def write_tree(root, sizes=SIZES, shape=(5, 6, 3)):
    """Write PNG files, which lose nothing, and return their pixels by split."""
    pixels = {"train": [], "test": []}
    for (split, name), count in sizes.items():
        (root / split / name).mkdir(parents=True)
        for number in range(count):
            picture = RANDOM.integers(256, size=shape, dtype=np.uint8)
            Image.fromarray(picture).save(root / split / name / f"{number:03}.png")
            pixels[split].append(picture)
    return {split: np.stack(pictures) for split, pictures in pixels.items()}


def test_imagefolder(tmp_path):
    pixels = write_tree(tmp_path / "tree")
    (tmp_path / "tree" / "train" / "ant" / "notes.txt").write_text("not an image")
    for _ in range(2):
        data = load("imagefolder", path=str(tmp_path / "tree"), cache=str(tmp_path / "cache"))
        assert np.array_equal(data.train_images, pixels["train"].transpose(0, 3, 1, 2))
        assert np.array_equal(data.test_images, pixels["test"].transpose(0, 3, 1, 2))
        assert data.train_labels.tolist() == [0, 0, 0, 1, 1]
        assert data.test_labels.tolist() == [0, 1, 1]
        assert data.classes == ("ant", "bee")
        assert data.mean == data.std == (0.5, 0.5, 0.5)


def test_imagefolder_resizes_and_turns_grey(tmp_path):
    write_tree(tmp_path)
    first, other = tmp_path / "train" / "ant" / "000.png", tmp_path / "test" / "bee" / "001.png"
    grey = load("imagefolder", path=str(tmp_path), channels=1)
    assert grey.shape == (1, 5, 6)
    # ITU-R 601-2 luma
    colour = np.asarray(Image.open(first)).astype(float)
    assert np.abs(grey.train_images[0, 0] - colour @ [0.299, 0.587, 0.114]).max() <= 1
    Image.new("RGB", (50, 9), (10, 20, 30)).save(other)
    mixed = load("imagefolder", path=str(tmp_path))
    assert mixed.shape == (3, 5, 6)
    assert (mixed.test_images[-1] == np.array([10, 20, 30])[:, None, None]).all()
    small = load("imagefolder", path=str(tmp_path), image_size=4)
    assert small.shape == (3, 4, 4)


def test_imagefolder_options_have_cache_entries_of_their_own(tmp_path):
    write_tree(tmp_path / "tree")
    keys = {"path": str(tmp_path / "tree"), "cache": str(tmp_path / "cache")}
    shapes = [load("imagefolder", **keys, **more).shape for more in ({}, {"image_size": 4}, {"channels": 1})]
    assert shapes == [(3, 5, 6), (3, 4, 4), (1, 5, 6)]
    Image.new("RGB", (6, 5), (1, 2, 3)).save(tmp_path / "tree" / "train" / "bee" / "new.png")
    assert load("imagefolder", **keys).train_labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_imagefolder_refusals(tmp_path):
    path = str(tmp_path)
    assert f"data.path={path} has no folder 'train'" in refusal("imagefolder", FileNotFoundError, path=path)
    (tmp_path / "train").mkdir()
    assert f"data.path={path} has no folder 'test'" in refusal("imagefolder", FileNotFoundError, path=path)
    (tmp_path / "test").mkdir()
    assert "holds no class folders; give each" in refusal("imagefolder", ValueError, path=path)
    write_tree(tmp_path)
    (tmp_path / "test" / "cow").mkdir()
    sentence = refusal("imagefolder", ValueError, path=path)
    assert re.fullmatch(
        r"data\.path: the class folders \['cow'\] of .*test hold no images; fill or remove them", sentence
    )
    Image.fromarray(RANDOM.integers(256, size=(5, 6, 3), dtype=np.uint8)).save(
        tmp_path / "test" / "cow" / "0.png"
    )
    sentence = refusal("imagefolder", ValueError, path=path)
    assert "class folders ['cow'] in only one of 'train' and 'test'; add or remove them" in sentence
    (tmp_path / "train" / "cow").mkdir()
    whole = (tmp_path / "test" / "cow" / "0.png").read_bytes()
    for content in (b"", b"text", whole[:80]):
        (tmp_path / "train" / "cow" / "0.png").write_bytes(content)
        sentence = refusal("imagefolder", ValueError, path=path)
        assert re.search(r"data\.path: .*0\.png is not a readable image .*; replace or remove it", sentence)
    assert "data.channels=2 must be 1" in refusal("imagefolder", ValueError, path=path, channels=2)
    assert "data.image_size=0 must be" in refusal("imagefolder", ValueError, path=path, image_size=0)


def one_of_each(root, write):
    """A tree in which `write(path)` wrote the first training image, and the rest is 8 bits, (5, 6)."""
    write_tree(root, shape=(5, 6))
    path = root / "train" / "ant" / "000.png"
    path.unlink()
    write(path)
    return path


GREY = RANDOM.random((5, 6))
ALPHA = RANDOM.integers(256, size=(5, 6), dtype=np.uint8)
COLOUR = RANDOM.integers(256, size=(5, 6, 3), dtype=np.uint8)
BYTES = np.rint(GREY * 255).astype(np.uint8)
LONG = np.rint(GREY * 65535).astype(np.uint16)
LONG[0, 0] = 4242


def over_white(colour, alpha):
    share = (alpha / 255)[..., None]
    return colour * share + 255 * (1 - share)


def saved(pixels, kind, mode=None, **options):
    """A writer of pixels in a format of Pillow's, in a mode if that does not follow from them."""
    image = Image.fromarray(pixels)
    return lambda path: (image if mode is None else image.convert(mode)).save(path, kind, **options)


def written(mode, kind, pixels):
    """A writer of raw pixels in a mode that arrays do not tell."""
    image = Image.frombytes(mode, (6, 5), np.ascontiguousarray(pixels).tobytes())
    return lambda path: image.save(path, kind)


def premultiplied(path):
    """Write black with an alpha that TIFF's tag ExtraSamples (338) says the colours are multiplied with."""
    written("RGBA", "TIFF", np.dstack([BLACK, ALPHA]))(path)
    content = path.read_bytes()
    tag = struct.pack("<HHI", 338, 3, 1)
    assert content.count(tag + b"\2") == 1
    path.write_bytes(content.replace(tag + b"\2", tag + b"\1"))


def palette(alpha=None):
    image = Image.fromarray((np.arange(30) % 7).astype(np.uint8).reshape(5, 6), "L")
    image = Image.frombytes("P", (6, 5), image.tobytes())
    image.putpalette(COLOUR.reshape(-1, 3)[:7].tobytes())
    more = {} if alpha is None else {"transparency": alpha[:7].tobytes()}
    return lambda path: image.save(path, "PNG", **more)


def rgb(pixels):
    return np.repeat(pixels[..., None], 3, 2)


INDEX = (np.arange(30) % 7).reshape(5, 6)
PALETTE = COLOUR.reshape(-1, 3)[:7]
BLACK = np.zeros((5, 6, 3), np.uint8)
SQUARE = np.where(BYTES > 127, 255, 0)

MODES = {
    "1": (saved(BYTES > 127, "PNG"), rgb(SQUARE)),
    "L": (saved(BYTES, "PNG"), rgb(BYTES)),
    "L with a transparent value": (
        saved(BYTES, "PNG", transparency=int(BYTES[0, 0])),
        rgb(np.where(BYTES[0, 0] == BYTES, 255, BYTES)),
    ),
    "LA": (written("LA", "PNG", np.stack([BYTES, ALPHA], 2)), over_white(rgb(BYTES), ALPHA)),
    "LA, black": (written("LA", "PNG", np.stack([BLACK[..., 0], ALPHA], 2)), over_white(BLACK, ALPHA)),
    "I;16": (saved(LONG, "PNG"), rgb(LONG / 257)),
    "I;16 with a transparent value": (
        saved(LONG, "PNG", transparency=4242),
        rgb(np.where(LONG == 4242, 65535, LONG) / 257),
    ),
    "I;16 in TIFF": (saved(LONG, "TIFF"), rgb(LONG / 257)),
    "I;16B": (written("I;16B", "TIFF", LONG.astype(">u2")), rgb(LONG / 257)),
    "I": (saved(LONG.astype(np.int32), "TIFF"), rgb(LONG / 257)),
    "I, PGM": (saved(LONG.astype(np.int32), "PPM"), rgb(LONG / 257)),
    "F": (saved(GREY.astype(np.float32), "TIFF"), rgb(GREY * 255)),
    "P": (palette(), PALETTE[INDEX]),
    "P with alpha": (palette(ALPHA.ravel()), over_white(PALETTE[INDEX], ALPHA.ravel()[:7][INDEX])),
    "RGB": (saved(COLOUR, "PNG"), COLOUR),
    "RGB with a transparent colour": (
        saved(COLOUR, "PNG", transparency=tuple(COLOUR[0, 0].tolist())),
        np.where((COLOUR[0, 0] == COLOUR).all(2, keepdims=True), 255, COLOUR),
    ),
    "RGBA": (saved(np.dstack([COLOUR, ALPHA]), "PNG"), over_white(COLOUR, ALPHA)),
    "RGBA, black": (
        saved(np.dstack([BLACK, ALPHA]), "WEBP", lossless=True, exact=True),
        over_white(BLACK, ALPHA),
    ),
    "RGBa": (premultiplied, over_white(BLACK, ALPHA)),
    "RGBX": (written("RGBX", "TIFF", np.dstack([COLOUR, ALPHA])), COLOUR),
    "CMYK": (
        written("CMYK", "TIFF", np.dstack([COLOUR, ALPHA])),
        (255.0 - COLOUR) * (255.0 - ALPHA[..., None]) / 255,
    ),
    "YCbCr": (written("YCbCr", "TIFF", np.dstack([BYTES, BLACK[..., :2] + 128])), rgb(BYTES)),
    # CIE L* of 100 is white, of 0 black
    "LAB": (written("LAB", "TIFF", np.dstack([SQUARE, BLACK[..., :2]]).astype(np.uint8)), rgb(SQUARE)),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_is_read_as_it_is_shown(tmp_path, mode):
    write, expected = MODES[mode]
    one_of_each(tmp_path, write)
    grey, colour = (
        load("imagefolder", path=str(tmp_path), channels=channels).train_images[0] for channels in (1, 3)
    )
    # one step for each rounding on the way
    assert np.abs(colour.transpose(1, 2, 0) - expected).max() <= 1
    assert np.abs(grey[0] - expected @ [0.299, 0.587, 0.114]).max() <= 1.6
    assert len(np.unique(colour)) > 1


def test_16_bits_are_rounded_to_the_nearest(tmp_path):
    one_of_each(tmp_path, saved(LONG, "PNG"))
    grey = load("imagefolder", path=str(tmp_path), channels=1).train_images[0, 0]
    assert np.array_equal(grey, np.rint(LONG / 257))


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((5, 6), 2**30, np.int32), "run from 1073741824 to 1073741824 where 0 is black and 65535"),
        (np.full((5, 6), -5, np.int32), "run from -5 to -5"),
        (BYTES.astype(np.int32), "to 255" if BYTES.max() == 255 else "where 0 is black and 65535 is white"),
        (BYTES.astype(np.uint16), "where 0 is black and 65535 is white"),
        (BYTES.astype(np.float32), "where 0 is black and 1 is white"),
        (GREY.astype(np.float32) - 0.5, "where 0 is black and 1 is white"),
        (np.full((5, 6), np.nan, np.float32), "run from nan to nan"),
    ],
)
def test_a_range_that_cannot_be_told_is_refused(tmp_path, pixels, reason):
    path = one_of_each(tmp_path, saved(pixels, "TIFF"))
    sentence = refusal("imagefolder", ValueError, path=str(tmp_path))
    assert sentence.startswith(f"data.path: {path} is not a readable image (its grey values ")
    assert reason in sentence


@pytest.mark.parametrize(("turn", "undone"), [(3, 2), (6, -1), (8, 1)])
def test_a_picture_is_turned_upright(tmp_path, turn, undone):
    exif = Image.Exif()
    exif[0x0112] = turn
    one_of_each(tmp_path, lambda path: Image.fromarray(COLOUR).save(path, "PNG", exif=exif))
    data = load("imagefolder", path=str(tmp_path))
    assert np.array_equal(data.train_images[0].transpose(1, 2, 0), np.rot90(COLOUR, undone))


def test_every_ending_counts_and_nothing_hidden(tmp_path, caplog):
    write_tree(tmp_path)
    ant = tmp_path / "train" / "ant"
    colours = {}
    for number, ending in enumerate(["BMP", "gif", "jfif", "JPG", "jp2", "tif", "webp"]):
        Image.new("RGB", (6, 5), (30 * number,) * 3).save(ant / f"x{number}.{ending}")
        colours[ending] = 30 * number
    below = ant / "y" / "z"
    below.mkdir(parents=True)
    Image.new("RGB", (6, 5), (250,) * 3).save(below / "0.png")
    film = [Image.new("RGB", (6, 5), (grey,) * 3) for grey in (100, 200)]
    film[0].save(below / "1.gif", save_all=True, append_images=film[1:])
    for folder in (ant, ant / "y", tmp_path / "train", tmp_path / "test"):
        for hidden in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
            (folder / hidden).mkdir()
            shutil.copy(ant / "000.png", folder / hidden / "0.png")
        (folder / "._000.png").write_bytes(b"Mac OS X")
        (folder / ".DS_Store").touch()
    (ant / "y" / "back").symlink_to(tmp_path / "train")
    (ant / "y" / "again").symlink_to(ant)
    data = load("imagefolder", path=str(tmp_path))
    assert data.classes == ("ant", "bee")
    means = data.train_images[data.train_labels == 0].mean((1, 2, 3))
    assert np.abs(means[3:] - [*colours.values(), 250, 100]).max() < 2
    assert not caplog.text
    (ant / "photo.heic").touch()
    assert len(load("imagefolder", path=str(tmp_path)).train_images) == len(data.train_images)
    assert "files that end in .heic are no pictures and are left out" in caplog.text


def png(width, height):
    """A PNG file that promises so many pixels, and holds few."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    ):
        parts += [
            struct.pack(">I", len(content)),
            kind,
            content,
            struct.pack(">I", zlib.crc32(kind + content)),
        ]
    return b"".join(parts)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (os.mkfifo, "is not a file with content"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.write_bytes(png(9500, 9500)), "exceeds limit"),  # of which Pillow only warns
        (lambda path: path.write_bytes(png(2**31 - 1, 2**31 - 1)), "exceeds limit"),
        (
            lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
            "cannot identify",
        ),
    ],
    ids=["a pipe", "a dangling link", "a link to itself", "large", "huge", "a program"],
)
def test_what_is_no_picture_is_refused(tmp_path, write, reason):
    path = one_of_each(tmp_path, write)
    with pytest.raises(InstantiationException) as caught:
        load("imagefolder", path=str(tmp_path))
    assert isinstance(caught.value.__cause__, ValueError | OSError)
    assert str(path) in str(caught.value.__cause__)
    assert reason in str(caught.value.__cause__)


def test_more_pixels_than_memory_holds_are_refused_before_they_are_made(tmp_path, monkeypatch):
    write_tree(tmp_path / "tree")
    write_tiny(tmp_path / "idx")
    promise = struct.pack(">4I", 0x803, 2**31, 2**31, 2**31)
    for content in (promise, gzip.compress(promise)):
        (tmp_path / "idx" / "train-images-idx3-ubyte").write_bytes(content)
        sentence = refusal("mnist", ValueError, root=str(tmp_path / "idx"))
        assert re.search(r"train-images-idx3-ubyte promises would take 9\.9e\+18 GB", sentence)
    assert "data.image_size=9999 must be" in refusal(
        "imagefolder", ValueError, path=str(tmp_path / "tree"), image_size=9999
    )
    monkeypatch.setattr(os, "sysconf", lambda _: 10)
    sentence = refusal("imagefolder", ValueError, path=str(tmp_path / "tree"))
    assert sentence.startswith(
        "data.image_size: 8 images of 6 x 5 would take 7.2e-07 GB, more than the 1e-07 GB"
    )


def test_names_that_are_no_utf8(tmp_path):
    root = write_tree(tmp_path) and tmp_path
    for split in ("train", "test"):
        os.rename(root / split / "ant", os.fsencode(root / split) + b"/caf\xe9")
    for _ in range(2):
        data = load("imagefolder", path=str(root), cache=str(tmp_path / "cache"))
        assert data.classes == ("bee", "caf\udce9")
        assert len(data.digest) == 64


# ---------------------------------------------------------------- CIFAR-10


def test_cifar10_from_folders(tmp_path):
    sizes = {(split, name): 1 for split in ("train", "test") for name in CLASSES}
    pixels = write_tree(tmp_path, sizes, (32, 32, 3))
    data = load("cifar10", root=str(tmp_path))
    assert np.array_equal(data.train_images, pixels["train"].transpose(0, 3, 1, 2))
    assert data.train_labels.tolist() == list(range(10))
    assert data.classes == CLASSES
    assert isinstance(data.augment, CropFlip)
    assert load("cifar10", root=str(tmp_path), augment=None).augment is None


def test_cifar10_root_that_holds_something_else(tmp_path):
    root = str(tmp_path)
    sentence = refusal("cifar10", FileNotFoundError, root=root)
    assert f"data.root={root} holds neither cifar-10-batches-py nor train/<class>" in sentence
    write_tree(tmp_path)
    sentence = refusal("cifar10", ValueError, root=root)
    assert "lacks CIFAR-10's ten class folders; use data=imagefolder" in sentence


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_batches(root, monkeypatch):
    """Write the python version of CIFAR-10 with two images a file, and have torchvision expect it."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    pixels, labels, sums = [], [], {}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]:
        batch = {"label_names": list(CLASSES)}
        if name != "batches.meta":
            data = RANDOM.integers(256, size=(2, 3072), dtype=np.uint8)
            batch = {"data": data, "labels": RANDOM.integers(10, size=2).tolist()}
            pixels.append(data)
            labels += batch["labels"]
        (folder / name).write_bytes(pickle.dumps(batch))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums.pop("batches.meta")})
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums.pop("test_batch")]])
    monkeypatch.setattr(CIFAR10, "train_list", list(sums.items()))
    return folder, np.concatenate(pixels), labels


def test_cifar10_from_batches(tmp_path, monkeypatch):
    _, pixels, labels = write_batches(tmp_path, monkeypatch)
    data = load("cifar10", root=str(tmp_path))
    # a row of a batch is 1,024 red, then 1,024 green, then 1,024 blue pixels, row by row
    assert np.array_equal(data.train_images.reshape(10, -1), pixels[:10])
    assert np.array_equal(data.test_images.reshape(2, -1), pixels[10:])
    assert [*data.train_labels, *data.test_labels] == labels


def test_cifar10_batches_that_are_not_the_published_ones_are_never_unpickled(tmp_path, monkeypatch):
    folder, _, _ = write_batches(tmp_path, monkeypatch)
    (folder / "data_batch_3").write_bytes(pickle.dumps(Canary(tmp_path / "unpickled")))
    sentence = refusal("cifar10", ValueError, root=str(tmp_path))
    assert re.search(
        r"data\.root: a file of .* is missing or differs from the published one; fetch", sentence
    )
    assert not (tmp_path / "unpickled").exists()
    pickle.loads((folder / "data_batch_3").read_bytes())
    assert (tmp_path / "unpickled").exists()


# ---------------------------------------------------------------- augmentation


def batch(count=300, shape=(3, 5, 7)):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_augmented_images_are_crops_of_the_padded_ones_mirrored_or_not():
    images = batch()
    kept = images.clone()
    augmented = CropFlip(padding=2, flip=True)(images, seeded(0))
    assert augmented.shape == images.shape
    assert torch.equal(images, kept)
    found = Counter()
    for image, result in zip(images, augmented, strict=True):
        padded = oracle.pad(image, [2])
        crops = {
            (top, left, mirrored): oracle.hflip(crop) if mirrored else crop
            for top in range(5)
            for left in range(5)
            for crop in [oracle.crop(padded, top, left, 5, 7)]
            for mirrored in (False, True)
        }
        matches = [draw for draw, crop in crops.items() if torch.equal(crop, result)]
        assert len(matches) == 1
        found.update(matches)
    # 300 draws out of 50: all rows, columns and flips are about as frequent as they should be
    for axis, choices in ((0, 5), (1, 5), (2, 2)):
        frequency = Counter()
        for draw, count in found.items():
            frequency[draw[axis]] += count
        assert len(frequency) == choices
        assert max(abs(count - 300 / choices) for count in frequency.values()) < 40
    assert len(found) > 45


def test_augmentation_is_repeatable_and_takes_all_randomness_from_the_generator():
    images, augment = batch(), CropFlip(padding=4, flip=True)
    first = augment(images, seeded(7))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generator = seeded(7)
    assert torch.equal(augment(images, generator), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(augment(images, generator), first)
    assert not torch.equal(augment(images, seeded(8)), first)


def test_augmentation_switched_off_in_part():
    images = batch()
    assert torch.equal(CropFlip(padding=0, flip=False)(images, seeded(0)), images)
    flipped = CropFlip(padding=0, flip=True)(images, seeded(0))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert ((flipped == images).flatten(1).all(1) ^ mirrored).all()
    assert 100 < mirrored.sum() < 200


def test_impossible_options_of_augmentation_are_refused():
    for padding in (-1, True):
        with pytest.raises(ValueError, match=rf"data\.augment\.padding={padding} must be 0 or more pixels"):
            CropFlip(padding=padding, flip=True)
    with pytest.raises(ValueError, match=r"data\.augment\.flip=5 must be true or false"):
        CropFlip(padding=1, flip=5)


# ---------------------------------------------------------------- ImageData


@pytest.fixture
def data():
    images = RANDOM.integers(256, size=(6, 2, 4, 3), dtype=np.uint8)
    labels = np.array([0, 1, 2, 0, 1, 2])
    return ImageData(images, labels, images[:2], labels[:2], ("a", "b", "c"), (0.4, 0.6), (0.2, 0.3))


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_normalise_is_torchvisions(data, kind):
    images = torch.tensor(data.train_images)
    expected = oracle.normalize(oracle.convert_image_dtype(images), [0.4, 0.6], [0.2, 0.3])
    result = data.normalise(kind(data.train_images))
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_floats_are_not_divided_by_255(data):
    floats = replace(data, train_images=data.train_images / 255, test_images=data.test_images / 255)
    result = floats.normalise(floats.train_images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, data.normalise(data.train_images))


@pytest.mark.filterwarnings("error")
def test_read_only_arrays_are_copied(data):
    """PyTorch warns of a tensor that shares read-only memory, by default only once in a process."""
    data.train_images.flags.writeable = False
    torch.set_warn_always(True)
    try:
        data.normalise(data.train_images)
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"train_images": np.zeros((6, 4, 3), np.uint8)}, "train_images is uint8 of shape (6, 4, 3); give"),
        ({"test_images": np.zeros((2, 2, 4, 3), np.int32)}, "test_images is int32 of shape"),
        (
            {"train_labels": np.zeros(6, np.int32)},
            "train_labels is int32 of shape (6,) for 6 images; give one",
        ),
        ({"test_labels": np.zeros(3, np.int64)}, "test_labels is int64 of shape (3,) for 2 images"),
        (
            {"train_images": np.zeros((0, 2, 4, 3)), "train_labels": np.zeros(0, np.int64)},
            "at least one image",
        ),
        ({"classes": ("a", "b")}, "train_labels run from 0 to 2 but there are 2 classes"),
        ({"test_labels": np.array([-1, 0])}, "test_labels run from -1 to 0"),
        (
            {"test_images": np.zeros((2, 2, 4, 4), np.uint8)},
            "but test images are uint8 (2, 4, 4); make them the same",
        ),
        ({"mean": (0.5,)}, "data.mean has 1 numbers but the images have 2 channels; give one"),
        ({"std": (0.5, 0.5, 0.5)}, "data.std has 3 numbers but the images have 2 channels"),
        ({"std": (0.5, 0.0)}, "data.std=[0.5, 0.0] must be positive"),
        ({"std": (0.5, 1e-40)}, "make pixels infinite"),
        ({"mean": (0.5, 1e300)}, "make pixels infinite"),
        ({"classes": ("a", "b", "a")}, "has a name twice"),
        ({"train_images": np.zeros((6, 2, 4, 0), np.uint8)}, "train_images is uint8 of shape (6, 2, 4, 0)"),
        ({"train_images": np.zeros((6, 2, 4, 3), ">f4")}, "train_images is >f4 of shape"),
        (
            {"test_images": np.zeros((2, 2, 4, 3))},
            "but test images are float64 (2, 4, 3); make them the same",
        ),
        (
            {"train_images": np.full((6, 2, 4, 3), np.nan), "test_images": np.zeros((2, 2, 4, 3))},
            "train_images has values that are not finite",
        ),
        (
            {"train_images": np.zeros((6, 2, 4, 3)), "test_images": np.full((2, 2, 4, 3), -np.inf)},
            "test_images has values that are not finite",
        ),
        ({"augment": 5}, "data.augment cannot augment an image ('int' object is not callable)"),
        ({"augment": lambda images, _: images[..., 1:]}, "it makes torch.Size([1, 2, 4, 2]) of"),
        ({"augment": CropFlip(padding=4, flip=True)}, "padding=4 is more than an image of 4 x 3 has"),
    ],
)
def test_parts_that_do_not_fit_are_refused(data, change, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        replace(data, **change)


def test_numbers_from_the_configuration():
    augment = {"_target_": "pisa_fl.data.augment.CropFlip", "padding": 3, "flip": False}
    data = load("mnist_mini", mean=0.25, std=[0.5], augment=augment)
    assert (data.mean, data.std) == ((0.25,), (0.5,))
    assert data.augment.padding == 3
    sentence = refusal("mnist_mini", ValueError, mean=[0.1, 0.2])
    assert "data.mean has 2 numbers but the images have 1 channels" in sentence
    for key in ("mean", "std"):
        for value in (float("nan"), [float("inf")], True, "1", None, [[0.5]], [None], 10**400):
            sentence = refusal("mnist_mini", ValueError, **{key: value})
            assert re.match(rf"data\.{key}=.* must be a finite number, or a list with one for each", sentence)


@pytest.mark.parametrize(
    ("name", "key"),
    [("mnist", "root"), ("cifar10", "root"), ("imagefolder", "path"), ("mnist_mini", "cache")],
)
@pytest.mark.parametrize("value", ["", "a\0b", "~nobody_of_this_name/x", 5, True])
def test_what_names_no_path_is_refused(name, key, value):
    sentence = refusal(name, ValueError, **{key: value})
    assert re.match(rf"data\.{key}=.* names no path", sentence)


@pytest.mark.parametrize("name", ["mnist_mini", "mnist", "fashion_mnist", "cifar10", "imagefolder"])
def test_every_key_of_the_configuration_is_explained(name):
    lines = (CONF / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all("  # " in line for line in lines[1:] if "_target_" not in line)
