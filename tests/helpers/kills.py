"""Run as a script: a run that is killed before each of its file operations, and goes on each time.

Every run is a forked process, so that the modules are imported once; `python kills.py FOLDER KEEP FIRST STEP` kills at
every STEP-th operation from the FIRST on, and prints each after which a resume did not end like the run that nobody
killed.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import tensorboard.compat.proto.summary_pb2
import tensorboard.summary.writer.record_writer  # noqa: F401
from pictures import blank

import pisa_fl
from pisa_fl import checkpoint
from pisa_fl.engines.local import LocalGrid
from pisa_fl.federation import TooFewClientsError
from pisa_fl.results import pictures
from pisa_fl.results.console import Display

CLIENTS, ROUNDS = 3, 3
ENDED, SHORT, FAILED = 0, 3, 4
"""Exit statuses of a run: it came to its end, too few clients answered, anything else."""

OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


class Absent(LocalGrid):
    """Loses a reply of round 2 in every attempt at it but the last."""

    attempts = 1

    def deliver(self, messages, timeout):
        replies = list(super().deliver(messages, timeout))
        second = any(message.content["config"]["server-round"] == 2 for message in messages)
        return replies[1:] if second and self.attempts else replies


def engine(clients):
    return Absent(clients.host(clients.rows, 1, 250))


class Counter:
    """Counts a process's file operations below a folder, and kills it before one of them."""

    def __init__(self, folder, fatal):
        self.folder, self.fatal, self.count = str(folder), fatal, 0
        self.save = checkpoint.save_file
        os.fsync, checkpoint.save_file = self.count_fsync, self.count_save  # neither raises an audit event
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        below = event in ("os.remove", "os.rmdir") or self.folder in str(arguments[:2])
        if below and (written or event in OPERATIONS):
            self.next()

    def count_fsync(self, handle):  # and waits for no disk: a kill does not cut the power
        self.next()

    def count_save(self, tensors, file):
        self.next()
        self.save(tensors, file)
        if self.count + 1 == self.fatal:
            os.truncate(file, os.path.getsize(file) // 2)
        self.next()

    def next(self):
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def process(folder, attempts, fatal=None):
    """Start a run in the folder, or go on with the one there; how the process ended, and how often it counted."""
    counted = folder.with_suffix(".count")
    if (number := os.fork()) == 0:
        status = FAILED
        try:
            Absent.attempts = attempts
            counter = Counter(folder, fatal)
            begun = (folder / "config.yaml").exists()
            pisa_fl.resume(folder, engine) if begun else pisa_fl.run(config, folder, engine)
            status = ENDED
        except TooFewClientsError:
            status = SHORT
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
        finally:
            counted.write_text(str(counter.count))
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def outcome(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = {"".join(c for c in str(p.relative_to(folder)) if not c.isdigit()) for p in folder.rglob("*")}
    return (
        [line | {"seconds": 0} for line in lines],
        (folder / "model.safetensors").read_bytes(),
        (folder / "best.safetensors").read_bytes(),
        sorted(file for file in files if "tfevents" not in file and file != "failures.jsonl"),
    )


if __name__ == "__main__":
    base, keep, first, step = Path(sys.argv[1]), *map(int, sys.argv[2:])
    pictures.draw_curves = pictures.partitioners.draw = blank  # written like everything else
    Display.round = Display.finished = lambda *_: None
    config = pisa_fl.compose(
        *("model=logistic", f"clients={CLIENTS}", f"rounds={ROUNDS}", "partition.classes_per_client=4"),
        *("engine.threads=1", "progress=false", f"min_clients={CLIENTS}", "patience=0"),
        *("checkpoint.every=1", f"checkpoint.keep={keep}", "checkpoint.best=true"),
    )
    whole, killed = base / "whole", base / "killed"
    # a run that ends for want of replies, goes on, ends so again, and then comes to its end
    plan = [1, 1, 0]
    totals = []
    for stage, (attempts, status) in enumerate(zip(plan, [SHORT, SHORT, ENDED], strict=True)):
        assert process(whole, attempts) == status
        shutil.copytree(whole, base / f"after-{stage}")
        totals.append(int(whole.with_suffix(".count").read_text()))
    operations = [(i, n) for i, total in enumerate(totals) for n in range(1, total + 1)]
    for stage, fatal in operations[first::step]:
        shutil.rmtree(killed, ignore_errors=True)
        if stage:
            shutil.copytree(base / f"after-{stage - 1}", killed)
        assert process(killed, plan[stage], fatal) == -signal.SIGKILL
        if process(killed, 0) != ENDED or outcome(killed) != outcome(whole):
            print(f"process {stage}, operation {fatal} of {totals[stage]}: not the same")
    print(f"killed {len(operations[first::step])} times of {len(operations)}")
