"""What keeps a client running, with stand-ins for Flower's commands; and what one SuperNode does for a dead one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from hosts import wait_for

from pisa_fl.engines.base import identify
from pisa_fl.flower.former_life import Life, make_up

STAND_IN = """#!/bin/sh
umask 077
echo $$ "$@" >>{name}.lives
[ -e {name}.fails ] && exit 1
exec sleep 1000
"""
GIVEN = ["--port", "9101", "--auth-supernode-private-key", "client-0", "--node-config", "partition-id=0"]
NODE, EXECUTOR = "pisa-fl-supernode", "pisa-fl-superexec"


@pytest.fixture
def keep(tmp_path):
    """Starts a keeper in a client's folder; ended with all that it started."""
    (tmp_path / "bin").mkdir()
    for name in (NODE, EXECUTOR):
        (tmp_path / "bin" / name).write_text(STAND_IN.format(name=name))
        (tmp_path / "bin" / name).chmod(0o755)
    started = []

    def start():
        (tmp_path / "client-0").touch()
        line = [sys.executable, "-m", "pisa_fl.flower.keeper", ".", "--", *GIVEN]
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        started.append(
            subprocess.Popen(line, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
    for name in (NODE, EXECUTOR):
        for line in lives(tmp_path, name):
            if alive(int(line[0])):
                os.kill(int(line[0]), signal.SIGKILL)


def lives(folder, name):
    path = folder / f"{name}.lives"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_whichever_of_the_two_is_killed_both_are_started_again(keep, tmp_path):
    keeper = keep()
    for number, victim in enumerate((NODE, EXECUTOR), start=1):
        wait_for(lambda: len(lives(tmp_path, EXECUTOR)) == number, str)  # noqa: B023
        os.kill(int(lives(tmp_path, victim)[-1][0]), signal.SIGKILL)
    wait_for(lambda: len(lives(tmp_path, EXECUTOR)) == 3, str)
    secret = ["--superexec-auth-secret-file", "superexec-secret"]
    given = [*GIVEN, "--isolation", "process"]
    for (node, *arguments), (_, *others) in zip(
        lives(tmp_path, NODE), lives(tmp_path, EXECUTOR), strict=True
    ):
        assert arguments == given + secret
        own = ["--insecure", "--runtime-api-address", "127.0.0.1:9101", "--parent-pid", node]
        assert others == own + secret
    assert (tmp_path / "superexec-secret").stat().st_mode & 0o777 == 0o600
    assert len((tmp_path / "superexec-secret").read_bytes()) == 32
    second = keep()
    assert second.wait(60) == 1, "the lock is held"
    assert second.stderr.read() == f"{tmp_path}: this client runs already\n"
    keeper.terminate()
    assert keeper.wait(60) == 0
    assert f"{NODE} has ended: both are started again in 1 s\n" in keeper.stderr.read()
    assert not any(alive(int(line[0])) for name in (NODE, EXECUTOR) for line in lives(tmp_path, name))


def test_a_keeper_that_is_killed_leaves_no_lock_and_what_fails_is_tried_less_and_less_often(keep, tmp_path):
    (tmp_path / f"{NODE}.fails").touch()
    first = keep()
    wait_for(lambda: len(lives(tmp_path, NODE)) == 2, str)
    first.kill()
    first.wait()
    second = keep()
    wait_for(lambda: len(lives(tmp_path, NODE)) == 4, str)
    second.send_signal(signal.SIGINT)
    assert second.wait(60) == 0, "also while it waits"
    said = second.stderr.read().splitlines()
    assert [line.rpartition(" in ")[2] for line in said] == ["1 s", "2 s"][: len(said)]


def test_the_next_supernode_answers_for_the_dead_one(tmp_path):
    if TaskIdentity._run_id is None:
        identify()
    path, asked = tmp_path / "life.json", []
    for number in range(3):
        message = Message(RecordDict(), 7 + number, "train")
        message.metadata.__dict__["_message_id"] = f"message-{number}"
        asked.append(message)
    life = Life(path)
    assert (life.node, life.owed) == (None, [])
    life.begin(77)
    for message in asked:
        life.took(message)
    life.answered(Message(RecordDict(), reply_to=asked[1]))

    sent, pushed = [], []

    def send(reply, tree, seconds):
        if reply.metadata.reply_to_message_id == "message-0":
            raise RuntimeError("its run has ended")
        sent.append(reply)
        return {tree.object_id}, "session"

    after = Life(path)
    assert after.node == 77
    after.begin(77)
    make_up(after, send, lambda *part: pushed.append(part))
    [reply] = sent
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE, "as if Flower had said so"
    assert (reply.metadata.reply_to_message_id, reply.metadata.src_node_id) == ("message-2", 9)
    assert pushed == [(reply.metadata.run_id, "session", reply.object_id, reply.deflate())]
    assert list(get_all_nested_objects(reply)) == [reply.object_id]
    assert Life(path).owed == [], "once"

    after.took(asked[0])
    path.rename(tmp_path / "copied.json")
    assert Life(tmp_path / "copied.json").node is None, "another folder's, or another host's"
    path.write_text("{")
    assert Life(path).node is None
