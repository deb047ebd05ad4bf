"""Pictures of runs: accuracy and loss against what they cost, and comparisons of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Mapping[str, float]

COSTS = {"round": "rounds", "passes": "passes over the data", "megabytes": "megabytes, both ways"}
"""What accuracy is drawn against: a communication, a computation and a payload."""


def draw_curves(metrics: Sequence[Metrics], title: str, path: Path) -> None:
    """One run: test accuracy against rounds, losses, and for ADMM methods the residuals."""
    has_residuals = any("primal_residual" in m for m in metrics)
    figure, axes = _figure(2 + has_residuals, title)
    rounds = [m["round"] for m in metrics]
    axes[0].plot(rounds, [100 * m["test_accuracy"] for m in metrics], color="C0")
    _label(axes[0], "rounds", "test accuracy, %")
    axes[1].plot(rounds, [m["test_loss"] for m in metrics], color="C0", label="test")
    axes[1].plot(rounds, [m["train_loss"] for m in metrics], color="C1", label="training")
    axes[1].set_yscale("log")
    axes[1].legend(frameon=False)
    _label(axes[1], "rounds", "loss, nats")
    if has_residuals:
        later = [m for m in metrics if m.get("dual_residual")]  # not before the duals have moved
        for key, color in (("primal_residual", "C2"), ("dual_residual", "C3")):
            axes[2].plot(
                [m["round"] for m in later], [m[key] for m in later], color=color, label=key.split("_")[0]
            )
        axes[2].set_yscale("log")
        axes[2].legend(frameon=False)
        _label(axes[2], "rounds", "residual")
    _save(figure, path)


def draw_comparison(runs: Mapping[str, Sequence[Sequence[Metrics]]], title: str, path: Path) -> None:
    """Several methods on one federation: accuracy against rounds, passes and bytes.

    Args:
        runs: Name of each method -> the metrics of its runs (seeds); a line is their median, a band their range.
        title: Of the picture.
        path: Where to write it.
    """
    figure, axes = _figure(len(COSTS), title)
    for ax, (cost, label) in zip(axes, COSTS.items(), strict=True):
        for index, (name, seeds) in enumerate(runs.items()):
            length = min(len(metrics) for metrics in seeds)
            table = [[100 * m["test_accuracy"] for m in metrics[:length]] for metrics in seeds]
            middle = [sorted(column)[len(column) // 2] for column in zip(*table, strict=True)]
            x = [_cost(m, cost) for m in seeds[0][:length]]
            ax.plot(x, middle, color=f"C{index}", label=name)
            if len(seeds) > 1:
                low, high = zip(*((min(c), max(c)) for c in zip(*table, strict=True)), strict=True)
                ax.fill_between(x, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
        _label(ax, label, "test accuracy, %")
        if cost != "round":
            ax.set_xscale("symlog", linthresh=1)
    figure.legend(
        *axes[0].get_legend_handles_labels(), frameon=False, loc="outside right upper", fontsize="small"
    )
    _save(figure, path)


def draw_sweep(
    table: Mapping[str, Sequence[tuple[float | str, Sequence[float]]]], parameter: str, path: Path
) -> None:
    """Final accuracy of several methods against a swept parameter.

    Args:
        table: Name of each method -> (value of the parameter, final accuracies 0..1 of its seeds), in order.
        parameter: Name of the parameter.
        path: Where to write the picture.
    """
    figure, (ax,) = _figure(1, "")
    for index, (name, points) in enumerate(table.items()):
        values = [str(value) for value, _ in points]
        middle = [100 * sorted(a)[len(a) // 2] for _, a in points]
        low = [m - 100 * min(a) for m, (_, a) in zip(middle, points, strict=True)]
        high = [100 * max(a) - m for m, (_, a) in zip(middle, points, strict=True)]
        ax.errorbar(values, middle, yerr=(low, high), color=f"C{index}", marker="o", capsize=3, label=name)
    _label(ax, parameter, "final test accuracy, %")
    ax.legend(frameon=False)
    _save(figure, path)


def _cost(line: Metrics, cost: str) -> float:
    return (line["bytes_up"] + line["bytes_down"]) / 1e6 if cost == "megabytes" else line[cost]


def _figure(columns: int, title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow imports, that only pictures need
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _label(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
