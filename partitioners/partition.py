"""Partitions as plain indices: dealing, checking, saving and loading them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from partitioners.base import IndexPartitioner, Partition, labelled

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


def deal(partitioner: Partitioner, labels: NDArray[np.integer]) -> Partition:
    """Deal examples to clients with this package's, Flower's or a user's own partitioner.

    The partitioner is assigned an in-memory data set of columns `index` and `label` (a Flower partitioner
    takes `partition_by="label"`); as Flower has it, a partitioner deals only once.

    Args:
        partitioner: a partitioner with no data set assigned yet.
        labels: the examples' classes, integers of shape (n,).

    Returns:
        Every client's indices into `labels`, int64, in the partitioner's order.

    Raises:
        ValueError: an example is dealt twice, a client is empty, or the partitioner refuses.
    """
    if isinstance(partitioner, IndexPartitioner):  # Flower's way round takes a millisecond a client
        partitioner.assign(labels)
        partition = partitioner.partition
    else:
        partitioner.dataset = labelled(labels)
        parts = map(partitioner.load_partition, range(partitioner.num_partitions))
        partition = [part.with_format("numpy")["index"][:] for part in parts]
    check(partition, len(labels), source=type(partitioner).__name__)
    return partition


def check(partition: Partition, num_examples: int, source: str) -> None:
    """Check that examples are 0..num_examples-1, none is dealt twice, and no client is empty; some may be left out.

    Raises:
        ValueError: it is not so; the sentence says that `source` is to blame.
    """
    for client, indices in enumerate(partition):
        if len(indices) == 0:
            raise ValueError(
                f"{source} deals client {client} no example: lower clients or change the partition"
            )
    dealt = np.concatenate(partition)
    if dealt.min() < 0 or dealt.max() >= num_examples:
        raise ValueError(
            f"{source} deals examples {dealt.min()} to {dealt.max()} but the data set has 0 to "
            f"{num_examples - 1}: use the partition with the data set it was made for"
        )
    times = np.bincount(dealt, minlength=num_examples)
    if repeated := (times > 1).sum():
        raise ValueError(
            f"{source} deals {repeated} of {num_examples} examples more than once: each may have one client"
        )


def save(partition: Partition, path: str | Path) -> None:
    """Write {"0": [indices], "1": [...], ...} as JSON; the file is either complete or not there."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({str(i): indices.tolist() for i, indices in enumerate(partition)}))


def save_counts(
    partition: Partition, labels: NDArray[np.integer], classes: Sequence[str], path: str | Path
) -> None:
    """Write how many examples of each class every client has: client, class, examples; what it has none of is left out.

    Args:
        partition: every client's indices into `labels`.
        labels: the examples' classes, integers from 0 to len(classes)-1, shape (n,).
        classes: the classes' names.
        path: the CSV file; it is either complete or not there.
    """
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="replace") as file,
    ):
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(("client", "class", "examples"))
        for client, indices in enumerate(partition):
            counts = np.bincount(labels[indices], minlength=len(classes))
            lines.writerows((client, classes[c], counts[c]) for c in map(int, np.flatnonzero(counts)))


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Another file to write, which then takes the path's place; it is gone if it cannot be written.

    Raises:
        OSError: It cannot; the path is named.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path) -> Partition:
    """Read what `save` wrote, as int64 arrays in the file's order.

    Raises:
        ValueError: the file cannot be read, or is not JSON of that shape with the keys 0..n-1.
    """
    if Path(path).is_fifo():  # it would be waited for
        raise ValueError(f"path={path} is a pipe: set it to a run's partition.json")
    try:
        clients = json.loads(Path(path).read_text())
        lists = [clients[str(client)] for client in range(len(clients))]
        if not lists or not all(type(index) is int for indices in lists for index in indices):
            raise TypeError
        return [np.array(indices, dtype=np.int64) for indices in lists]
    except OSError as error:
        raise ValueError(f"path={path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise ValueError(
            f'path={path} is not a partition file, {{"0": [indices], "1": [indices], ...}} with the clients\' '
            "numbers without a gap: set it to a run's partition.json"
        ) from None
