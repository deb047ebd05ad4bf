"""A client's state file: what it gives back, who may read it, and what kills and damage do to it."""

import json
import multiprocessing
import os
import pickle
import random
import signal
import stat
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pisa_fl.clients.host import ClientState
from pisa_fl.config import ConfigurationError
from pisa_fl.flower import state_file
from pisa_fl.flower.state_file import StateFile

LONG = 50_000

vectors = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=7).map(
        lambda x: torch.tensor(x)
    ),
    max_size=4,
)
rounds = st.integers(0, 2**31 - 1)
states = st.builds(ClientState, rounds, vectors, st.none() | rounds, vectors)


def whole(number):
    """A state in which everything follows from one number."""
    return ClientState(
        number, {"x": torch.full((LONG,), number)}, number + 1, {"x": torch.full((LONG,), number + 1)}
    )


def assert_equal(state, expected):
    assert (state.round, state.pending_round) == (expected.round, expected.pending_round)
    for part, other in ((state.accepted, expected.accepted), (state.pending, expected.pending)):
        assert part.keys() == other.keys()
        assert all(torch.equal(part[name], other[name]) for name in other)


def assert_whole(state):
    assert_equal(state, whole(state.round))


def file_of(root):
    [path] = root.rglob("client-*.safetensors")
    return path


@contextmanager
def warnings():
    """What is warned of meanwhile."""
    with patch.object(state_file.log, "warning") as warn:
        said = []
        warn.side_effect = lambda text, *values: said.append(text % values)
        yield said


@contextmanager
def process(work, *arguments):
    """A process of its own that does some work; killed at the end if it is still there."""
    started = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    started.start()
    try:
        yield started
    finally:
        started.kill()
        started.join()


# --- what is saved and loaded


@settings(deadline=None)
@given(before=states, state=states)
def test_a_state_comes_back_as_it_was_saved(tmp_path_factory, before, state):
    root = tmp_path_factory.mktemp("state")
    file = StateFile(str(root), "an_experiment-1", 3)
    with file.locked():
        file.save(before)
        file.save(state)
        assert_equal(file.load(), state)
    assert_equal(StateFile(str(root), "an_experiment-1", 3).load(), state)


def test_a_client_without_a_file_is_at_the_start_and_nothing_is_said(tmp_path):
    with warnings() as said:
        assert_equal(StateFile(str(tmp_path), "e", 0).load(), ClientState())
    assert said == []
    assert list(tmp_path.iterdir()) == []


def test_experiments_and_clients_never_share(tmp_path):
    files = {(name, client): StateFile(str(tmp_path), name, client) for name in "ab" for client in (1, 2, 11)}
    for position, (key, file) in enumerate(files.items()):
        with file.locked():
            file.save(ClientState(position, {"x": torch.tensor([float(position)])}))
        assert file.rows("deal", lambda key=key: np.array([ord(key[0]), key[1]])).tolist() == [
            ord(key[0]),
            key[1],
        ]
    for position, (key, file) in enumerate(files.items()):
        assert_equal(file.load(), ClientState(position, {"x": torch.tensor([float(position)])}))
        assert file.rows("deal", lambda: np.arange(0)).tolist() == [ord(key[0]), key[1]]


@pytest.mark.parametrize(
    "name", ["../up", "..", ".", "a/b", "/", "/tmp", "", "a" * 65, "a b", "a\n", "ä", "a\0"]
)
def test_a_name_that_is_no_folders_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"engine\.experiment=") as caught:
        StateFile(str(tmp_path), name, 0)
    assert "letters, digits" in str(caught.value)


def test_where_the_files_are(tmp_path, monkeypatch):
    def where(root):
        file = StateFile(root, "e", 7)
        with file.locked():
            file.save(ClientState())
        path = file_of(tmp_path)
        path.unlink()
        return path.relative_to(tmp_path)

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PISA_FL_STATE", str(tmp_path / "variable"))
    assert where(str(tmp_path / "given")) == Path("given/e/client-7.safetensors")
    assert where("~/given") == Path("home/given/e/client-7.safetensors")
    assert where(None) == Path("variable/e/client-7.safetensors")
    monkeypatch.delenv("PISA_FL_STATE")
    assert where(None) == Path("home/.local/state/pisa-fl/e/client-7.safetensors")


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_only_the_owner_can_read(tmp_path, mask):
    before = os.umask(mask)
    try:
        file = StateFile(str(tmp_path / "root"), "e", 0)
        for number in (1, 2):
            file.rows("deal", lambda: np.arange(5))
            with file.locked():
                file.save(whole(number))
    finally:
        os.umask(before)
    folder = tmp_path / "root" / "e"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert {Path(name).suffix for name in modes} >= {".safetensors", ".npy"}
    assert set(modes.values()) == {0o600}


# --- others at the same time


def save_for_ever(root):
    file = StateFile(root, "e", 0)
    with file.locked():
        number = file.load().round
        while True:
            number += 1
            file.save(whole(number))


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_reader_always_sees_a_whole_state(tmp_path):
    file = StateFile(str(tmp_path), "e", 0)
    seen = set()
    with warnings() as said, process(save_for_ever, str(tmp_path)):
        wait_for(lambda: file.load().round)
        while len(seen) < 100:
            state = file.load()
            assert_whole(state)
            seen.add(state.round)
    assert said == []
    assert min(seen) >= 1


def test_a_process_killed_while_it_saves_leaves_a_whole_state_and_no_lock(tmp_path):
    file = StateFile(str(tmp_path), "e", 0)
    last = 0
    draw = random.Random(5)
    for _ in range(10):
        with process(save_for_ever, str(tmp_path)) as saving:
            wait_for(lambda before=last: file.load().round > before + 1)
            time.sleep(draw.uniform(0, 0.02))
            os.kill(saving.pid, signal.SIGKILL)
            saving.join()
            assert saving.exitcode == -signal.SIGKILL
        with warnings() as said, file.locked():
            state = file.load()
        assert said == []
        assert_whole(state)
        assert state.round > last
        last = state.round


def count_up(root, times):
    file = StateFile(root, "e", 0)
    for _ in range(times):
        with file.locked():
            state = file.load()
            file.save(ClientState(state.round + 1))


def test_two_processes_answer_for_a_client_one_after_the_other(tmp_path):
    with process(count_up, str(tmp_path), 200) as one, process(count_up, str(tmp_path), 200) as other:
        one.join(60)
        other.join(60)
        assert (one.exitcode, other.exitcode) == (0, 0)
    assert StateFile(str(tmp_path), "e", 0).load().round == 400


def test_an_exception_gives_the_lock_back(tmp_path):
    file = StateFile(str(tmp_path), "e", 0)
    with pytest.raises(ZeroDivisionError), file.locked():
        _ = 1 / 0
    with process(count_up, str(tmp_path), 1) as other:
        other.join(60)
        assert other.exitcode == 0


# --- damage


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def head(**changes):
    return json.dumps({"version": "2", "round": 1, "pending_round": None} | changes).encode() + b"\n"


def assert_lost(root, content):
    """A file of this content counts as lost, with a warning, and the next save makes it good again."""
    file = StateFile(str(root), "e", 0)
    with file.locked():
        file.save(whole(4))
        path = file_of(root)
        good = path.read_bytes()
        path.write_bytes(content(good))
        with warnings() as said:
            assert_equal(file.load(), ClientState())
        assert len(said) == 1
        assert said[0].startswith(str(path))
        file.save(whole(5))
        assert_whole(file.load())


DAMAGE = {
    "empty": lambda good: b"",
    "another version": lambda good: good.replace(b'"2"', b'"3"', 1),
    "a number for the version": lambda good: good.replace(b'"2"', b"2", 1),
    "no version": lambda good: good.replace(b"version", b"ersion", 1),
    "no round": lambda good: good.replace(b'"round"', b'"mound"', 1),
    "an endless round": lambda good: good.replace(b'"round": 4', b'"round": Infinity', 1),
    "a round that is none": lambda good: good.replace(b'"round": 4', b'"round": null', 1),
    "a list": lambda good: b"[1]\n" + good.partition(b"\n")[2],
    "nothing behind the rounds": lambda good: good.partition(b"\n")[0] + b"\n",
    "garbage behind the rounds": lambda good: head() + os.urandom(3000),
    "a header without end": lambda good: head() + b"\xff" * 8 + b"{}",
    "deep brackets": lambda good: b"[" * 100_000,
    "no text": lambda good: b"\xff\xfe\n",
    "zeros": lambda good: bytes(len(good)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_counts_as_lost(tmp_path, damage):
    assert_lost(tmp_path, DAMAGE[damage])


@settings(deadline=None, max_examples=50)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_counts_as_lost(tmp_path_factory, share):
    assert_lost(tmp_path_factory.mktemp("state"), lambda good: good[: int(share * len(good))])


@settings(deadline=None, max_examples=100)
@given(garbage=st.binary(max_size=200), behind=st.booleans())
def test_garbage_counts_as_lost(tmp_path_factory, garbage, behind):
    assert_lost(tmp_path_factory.mktemp("state"), lambda good: head() + garbage if behind else garbage)


@pytest.mark.parametrize("behind", [False, True])
def test_no_pickle_is_read(tmp_path, behind):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    assert_lost(tmp_path, lambda good: head() + trap if behind else trap)
    file = StateFile(str(tmp_path), "e", 1)
    file.rows("deal", lambda: np.arange(2))
    [path] = tmp_path.rglob("*.npy")
    for content in (trap, object_array(Trap(tmp_path / "sprung"))):
        path.write_bytes(content)
        assert file.rows("deal", lambda: np.arange(3)).tolist() == [0, 1, 2]
    assert not (tmp_path / "sprung").exists()


def object_array(thing):
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickle.dumps([thing])


@pytest.mark.parametrize(
    "put",
    [
        lambda path: (path / "more").mkdir(parents=True),
        os.mkfifo,
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(path),
    ],
    ids=["a folder", "a pipe", "a dangling link", "a link to itself"],
)
def test_what_is_no_file_counts_as_lost_and_is_replaced(tmp_path, put):
    (tmp_path / "e").mkdir()
    for name in ("client-0.safetensors", "client-0.new"):
        put(tmp_path / "e" / name)
    file = StateFile(str(tmp_path), "e", 0)
    with warnings() as said:
        assert_equal(file.load(), ClientState())
    assert len(said) == 1
    file.save(whole(5))
    assert_whole(file.load())
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["client-0.safetensors"]


def test_another_clients_or_experiments_file_counts_as_lost(tmp_path):
    own = StateFile(str(tmp_path), "e", 0)
    with own.locked():
        own.save(whole(5))
    own.rows("deal", lambda: np.arange(3))
    for experiment, client in (("e", 1), ("f", 0)):
        (tmp_path / experiment).mkdir(exist_ok=True)
        for path in (tmp_path / "e").glob("client-0*"):
            copy = tmp_path / experiment / path.name.replace("client-0", f"client-{client}")
            copy.write_bytes(path.read_bytes())
        other = StateFile(str(tmp_path), experiment, client)
        with warnings() as said:
            assert_equal(other.load(), ClientState())
            assert other.rows("deal", lambda: np.arange(9)).tolist() == [*range(9)]
        assert len(said) == 2


def test_a_state_of_another_version_or_model_counts_as_lost(tmp_path, monkeypatch):
    file = StateFile(str(tmp_path), "e", 0)
    with file.locked():
        file.save(whole(3))
        assert_whole(file.load({"x": LONG, "y": 2}))
        with warnings() as said:
            for sizes in ({"x": LONG + 1}, {"y": LONG}, {}):
                assert_equal(file.load(sizes), ClientState())
            for value in (float("nan"), float("inf")):
                file.save(ClientState(3, {"x": torch.tensor([1.0, value])}))
                assert_equal(file.load(), ClientState())
            monkeypatch.setattr(state_file, "VERSION", "0")
            file.save(whole(3))
            monkeypatch.undo()
            assert_equal(file.load(), ClientState())
        assert len(said) == 6


def test_no_flipped_bit_goes_unseen(tmp_path):
    file = StateFile(str(tmp_path), "e", 0)
    state = ClientState(3, {"dual": torch.arange(9.0)}, 4, {"dual": -torch.arange(9.0)})
    rows = np.array([5, 3, 2**40, 0])
    with file.locked():
        file.save(state)
    file.rows("deal", lambda: rows)
    draw = random.Random(0)
    paths = [file_of(tmp_path), *tmp_path.rglob("*.npy")]
    for path in paths:
        good = path.read_bytes()
        for bit in draw.sample(range(8 * len(good)), 60):
            flipped = bytearray(good)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with warnings() as said:
                loaded = file.load()
                dealt = file.rows("deal", lambda: rows)
            assert len(said) == 1
            assert dealt.tolist() == rows.tolist()
            assert_equal(loaded, ClientState() if path == paths[0] else state)
            path.write_bytes(good)


def test_a_folder_that_cannot_be_made_is_said_with_its_name(tmp_path):
    (tmp_path / "e").touch()
    file = StateFile(str(tmp_path), "e", 0)
    for work in (lambda: file.locked().__enter__(), lambda: file.rows("deal", lambda: np.arange(3))):
        with pytest.raises(OSError, match=f"{tmp_path}/e"):
            work()
    with pytest.raises(ConfigurationError, match=r"engine\.state='~nobody_here/x' names no path"):
        StateFile("~nobody_here/x", "e", 0)


# --- rows


def test_rows_are_dealt_once(tmp_path):
    rows = np.array([5, 3, 2**40, 0])
    dealt = StateFile(str(tmp_path), "e", 0).rows("deal", lambda: rows)
    again = StateFile(str(tmp_path), "e", 0).rows("deal", lambda: pytest.fail("dealt again"))
    assert dealt.tolist() == again.tolist() == rows.tolist()
    assert again.dtype == rows.dtype
    assert (
        StateFile(str(tmp_path), "e", 0).rows("another deal", lambda: rows[::-1]).tolist()
        == rows[::-1].tolist()
    )
    assert (
        StateFile(str(tmp_path), "e", 0).rows("deal", lambda: pytest.fail("dealt again")).tolist()
        == rows.tolist()
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[:5],
        lambda good: good[:-1],
        lambda good: os.urandom(len(good)),
        lambda good: b"PK\x03\x04" + good,
        lambda good: good.replace(b"'shape': (4,)", b"'shape': ((((", 1),
    ],
    ids=["empty", "header cut", "data cut", "garbage", "an archive's beginning", "header damaged"],
)
def test_damaged_rows_are_dealt_again(tmp_path, damage):
    file = StateFile(str(tmp_path), "e", 0)
    file.rows("deal", lambda: np.array([1, 2, 3, 4]))
    [path] = tmp_path.rglob("*.npy")
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert path.read_bytes() != good
    assert file.rows("deal", lambda: np.array([1, 2, 3, 4])).tolist() == [1, 2, 3, 4]
    assert path.read_bytes() == good


def test_rows_that_cannot_be_dealt_leave_nothing(tmp_path):
    file = StateFile(str(tmp_path), "e", 0)
    with pytest.raises(ZeroDivisionError):
        file.rows("deal", lambda: 1 / 0)
    assert file.rows("deal", lambda: np.array([1])).tolist() == [1]


def deal_slowly(root):
    def deal():
        with open(Path(root, "deals"), "a") as log:
            log.write("dealt\n")
        time.sleep(0.2)
        return np.arange(3)

    StateFile(root, "e", 0).rows("deal", deal)


def test_two_processes_deal_once(tmp_path):
    with process(deal_slowly, str(tmp_path)) as one, process(deal_slowly, str(tmp_path)) as other:
        one.join(60)
        other.join(60)
        assert (one.exitcode, other.exitcode) == (0, 0)
    assert (tmp_path / "deals").read_text() == "dealt\n"
