"""`pisa-fl-report FOLDER...`: a finished sweep, or any run directories, as a page, tables and figures.

Runs whose configurations differ only in the seed become one row; what else differs between them becomes a column.
Written into the first folder, or `--output`: `report.html`, one page with everything in it, `report.md`, with the
verdict and notes on what is missing below the table, `report.csv`, one plain number a column, `comparison.png` (quality
against rounds, passes and bytes, one row a federation) and, where something was swept, `sweep.png` (final quality
against it).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pisa_fl.config.explain import explain
from pisa_fl.system.files import write
from pisa_fl.system.text import tolerate_any_text, visible

if TYPE_CHECKING:
    from pisa_fl.results.runs import Runs  # slow to import, as are the pictures: `--help` needs neither


def report(
    folders: Sequence[Path], output: Path, title: str, pivot: bool = False, latex: bool = False
) -> str:
    """Write the page, the tables and the figures into `output`; table, verdict and notes as Markdown are also returned.

    Args:
        folders: Run directories, or folders of sweeps.
        output: Where to write; made if it is not there.
        title: Of the page and of the pictures.
        pivot: Whether the Markdown also has final quality by strategy and federation.
        latex: Whether to write report.tex as well: that table if there is `pivot`, else the one of all settings.

    Raises:
        ValueError: There is no finished run.
        OSError: A file cannot be written.
    """
    from pisa_fl.results.figures import draw_comparison
    from pisa_fl.results.report import tables
    from pisa_fl.results.report.latex import latex as in_latex
    from pisa_fl.results.report.page import page
    from pisa_fl.results.report.sweep import sweep
    from pisa_fl.results.runs import load_runs

    runs = load_runs(*folders)
    output.mkdir(parents=True, exist_ok=True)
    titles = runs.titles()
    curves = {
        titles[name]: {row.line: [run.metrics for run in row.runs] for row in rows}
        for name, rows in runs.panels.items()
    }
    _draw(
        output / "comparison.png", lambda path: draw_comparison(curves, title, path, runs.quality), runs.notes
    )
    _draw(output / "sweep.png", sweep(runs, title), runs.notes)
    text = _markdown(runs, pivot)
    write(output / "report.md", text)
    write(output / "report.csv", _csv(runs))
    write(output / "report.html", page(runs, title))
    if latex:
        write(output / "report.tex", in_latex(tables.pivot(runs) if pivot else tables.settings(runs)))
    return text


def _markdown(runs: Runs, pivot: bool) -> str:
    from pisa_fl.results.report import tables

    text = tables.markdown(tables.settings(runs))
    if pivot:
        table = tables.pivot(runs)
        text += f"\n## {table.caption}\n\n{tables.markdown(table)}"
    text += "\n## Verdict\n"
    for heading, sentences in runs.verdict.items():
        text += f"\n{heading}:\n\n" + "".join(f"- {visible(sentence)}\n" for sentence in sentences)
    if runs.notes:
        text += "\n## Notes\n\n" + "".join(f"* {visible(note)}\n" for note in runs.notes)
    return text


def _csv(runs: Runs) -> str:
    from pisa_fl.results.settings import written

    table = runs.table()
    for name in list(table)[: list(table).index("seeds")]:
        table[name] = [visible(written(row.values[name])) if name in row.values else "" for row in runs.rows]
    text: str = table.round(6).to_csv(index=False)
    return text


def _draw(path: Path, draw: Callable[[Path], None] | None, notes: list[str]) -> None:
    """Draw a picture in place of an earlier one; one that cannot be drawn is a note."""
    path.unlink(missing_ok=True)
    try:
        if draw is not None:
            draw(path)
    except Exception as error:
        notes.append(f"{path.name} is missing, it could not be drawn: {explain(error)}")


def main() -> None:
    """Entry point of `pisa-fl-report`."""
    parser = argparse.ArgumentParser(
        prog="pisa-fl-report",
        description="A page, tables and figures of finished runs, and a verdict in words.",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run directories, or folders of a sweep")
    parser.add_argument("--output", type=Path, help="where to write; the first folder if not given")
    parser.add_argument("--title", default="", help="title of the page and the pictures")
    parser.add_argument("--pivot", action="store_true", help="also a table of strategies by federations")
    parser.add_argument(
        "--latex", action="store_true", help="also report.tex: that table, or else all settings"
    )
    parser.add_argument("--version", action="version", version=f"pisa-fl {version('pisa-fl')}")
    arguments = parser.parse_args()
    tolerate_any_text()
    output = arguments.output or arguments.folders[0]
    try:
        text = report(arguments.folders, output, arguments.title, arguments.pivot, arguments.latex)
    except (ValueError, OSError) as error:
        print(f"pisa-fl-report: {visible(explain(error))}", file=sys.stderr)
        sys.exit(2)
    more = ", report.tex" if arguments.latex else ""
    written = (
        f"\nwritten to {visible(str(output))}: report.html, report.md, report.csv{more} and the pictures"
    )
    try:
        print(text + written, flush=True)
    except BrokenPipeError:  # whoever reads it, as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
