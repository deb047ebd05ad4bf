"""A picture of a partition: who holds how much of what."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partitioners.base import Partition
from partitioners.partition import replacing


def plain(text: str, longest: int = 60) -> str:
    """A user's text as a picture can show it: one line that is not too long, and no formula between dollar signs.

    Args:
        text: whatever it holds, control characters and halves of surrogate pairs included.
        longest: characters that are left of it; what is cut out is cut from the middle.
    """
    shown = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    if len(shown) > longest:
        half = (longest - 1) // 2
        shown = f"{shown[:half]}…{shown[-half:]}"
    if shown.startswith("_"):  # which would leave it out of a legend
        shown = f" {shown}"
    return shown.replace("$", r"\$")


def draw(partition: Partition, labels: NDArray[np.integer], classes: Sequence[str], path: str | Path) -> None:
    """Draw the number of examples of every class at every client, and above it the clients' sizes.

    Args:
        partition: every client's indices into `labels`.
        labels: the examples' classes, integers from 0 to len(classes)-1, shape (n,).
        classes: the classes' names.
        path: the PNG file to write; it is either complete or not there.
    """
    from matplotlib.colors import PowerNorm  # a slow import that only pictures need
    from matplotlib.figure import Figure

    counts = np.stack([np.bincount(labels[indices], minlength=len(classes)) for indices in partition], axis=1)
    clients, few = len(partition), len(partition) <= 20 and len(classes) <= 20

    figure = Figure(figsize=(10, 3 + min(7, 0.3 * len(classes))), dpi=120, layout="constrained")
    sizes, table = figure.subplots(2, 1, sharex=True, height_ratios=[1, max(2, min(5, 0.3 * len(classes)))])
    figure.suptitle(f"{counts.sum():,} examples of {len(classes)} classes dealt to {clients} clients")

    sizes.stairs(counts.sum(axis=0), np.arange(clients + 1) - 0.5, fill=True, color="tab:gray")
    sizes.set_ylabel("examples")
    sizes.spines[["top", "right"]].set_visible(False)

    # A root scale, so that a few examples are told from none beside a client that has hundreds.
    norm = PowerNorm(0.5, vmin=0, vmax=counts.max())
    present = np.ma.masked_equal(counts, 0)
    image = table.imshow(present, cmap="Blues", norm=norm, aspect="auto", interpolation="nearest")
    table.set_xlabel("client")
    table.set_ylabel("class")
    if len(classes) <= 30:
        table.set_yticks(range(len(classes)), [plain(name, 24) for name in classes])
    if few:
        table.set_xticks(range(clients))
        for (class_, client), count in np.ndenumerate(counts):
            if count:
                shade = "white" if count > 0.4 * counts.max() else "black"
                table.text(client, class_, f"{count}", ha="center", va="center", color=shade, fontsize=8)
    figure.colorbar(image, ax=table, label="examples", pad=0.01)

    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
