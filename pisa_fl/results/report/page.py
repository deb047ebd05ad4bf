"""The report as one page of HTML, with everything in it that it needs: no network is asked for anything."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair as alt
import jinja2
import numpy as np
import pandas as pd

from pisa_fl.results.report import charts, numbers, repeat, tables
from pisa_fl.results.report.offline import library
from pisa_fl.results.report.rows import Row, numbered
from pisa_fl.system.text import visible

if TYPE_CHECKING:
    from pisa_fl.results.runs import Runs

TEMPLATE = Path(__file__).parent / "template"

TICKS = 150
"""Clients of a line that are drawn, at most; of more, as many in their order."""

DEALS = 12
"""Deals that are drawn, at most: the first federations'."""

CELLS = 20_000
"""Clients times classes of a deal that is drawn, at most; of a larger one there is its picture."""

DIGITS = 5
"""Of a number in a picture."""


def page(runs: Runs, title: str) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    curves, clients = runs.curves(), runs.clients()
    figures = {
        "curves": _curves(runs, curves),
        "skew": _skew(runs),
        "clients": _clients(runs, clients),
        "deals": _deals(runs),
    }
    text: str = environment.get_template("page.html").render(
        runs=runs,
        title=title or "Federated learning runs",
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        figures=figures,
        specs={f["id"]: f["chart"] for own in figures.values() for f in own if f.get("chart")},
        lines=[
            {"name": line, "color": charts.color(i), "dash": " ".join(map(str, charts.dash(i)))}
            for i, line in enumerate(runs.lines)
        ],
        costs=charts.COST_TITLES,
        pivot=tables.pivot(runs),
        results=[tables.results(runs, panel) for panel in runs.panels],
        target_costs=tables.costs(runs),
        compared=tables.compared(runs),
        client_table=tables.clients(clients, runs.quality),
        repeats=[(row, repeat.command(row)) for row in runs.rows],
        versions=_versions(runs.rows),
        library=library(),
    )
    return text


def _figure(
    name: str, chart: charts.Chart, title: str, description: str, data: Any, **more: Any
) -> dict[str, Any]:
    height = more.pop("height", charts.HEIGHT)
    spec = charts.spec(chart, description, height)
    return {"id": name, "title": title, "description": description, "chart": {"spec": spec, **data}, **more}


def _curves(runs: Runs, frame: pd.DataFrame) -> list[dict[str, Any]]:
    domain = charts.extent(frame)
    figures = []
    for index, (panel, title) in enumerate(runs.titles().items()):
        own = frame[frame["panel"] == panel]
        data = {
            cost: [
                {"line": line}
                | {key: _short(points[key]) for key in ("x", "median", "low", "high")}
                | {"seeds": int(points["seeds"].iloc[0])}
                for line, points in part.groupby("line", sort=False)
            ]
            for cost, part in own.groupby("cost", sort=False)
        }
        chart = charts.curves(alt.NamedData("points"), runs.lines, domain, "rounds", runs.quality)
        shown = ", ".join(own["line"].unique())
        description = f"Test {runs.quality.label} of {shown}: medians over seeds as lines, ranges as bands."
        figures.append(
            _figure(
                f"curves-{index}",
                chart,
                title,
                description,
                {"costs": data},
                table=tables.along(frame, panel, title, runs.quality),
            )
        )
    return figures


def _skew(runs: Runs) -> list[dict[str, Any]]:
    """Final quality against the federations, where there are several."""
    if len(runs.panels) < 2:
        return []
    name = numbers.final(runs.quality)
    rows = [
        {"panel": row.panel, "line": row.line}
        | {
            key: _number(own[column])
            for key, column in (("median", name), ("low", f"{name}, min"), ("high", f"{name}, max"))
        }
        for row, (_, own) in zip(runs.rows, runs.statistics.iterrows(), strict=True)
    ]
    chart = charts.against_skew(alt.NamedData("points"), runs.lines, list(runs.panels), runs.quality)
    title = f"Final {runs.quality.label} on each federation: median, and the range over seeds"
    return [
        _figure(
            "skew", chart, title, f"{title}. The table above has the numbers.", {"rows": rows}, height=320
        )
    ]


def _clients(runs: Runs, frame: pd.DataFrame) -> list[dict[str, Any]]:
    figures = []
    domain = [float(frame["value"].min()), float(frame["value"].max())] if len(frame) else []
    for index, (panel, title) in enumerate(runs.titles().items()):
        own = frame[frame["panel"] == panel]
        if not len(own):
            continue
        rows = [
            {"line": line, "client": int(one.client), "seed": int(one.seed), "value": _number(one.value)}
            for line, part in own.groupby("line", sort=False)
            for one in _thinned(part.sort_values("value")).itertuples()
        ]
        shown = [line for line in runs.lines if (own["line"] == line).any()]
        chart = charts.clients(alt.NamedData("points"), runs.lines, domain, runs.quality)
        description = (
            f"Final {runs.quality.label} of every client on its own examples. The table below has numbers."
        )
        figures.append(
            _figure(
                f"clients-{index}", chart, title, description, {"rows": rows}, height=30 * len(shown) + 20
            )
        )
    return figures


def _thinned(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.iloc[np.unique(np.linspace(0, len(frame) - 1, min(len(frame), TICKS)).round().astype(int))]


def _deals(runs: Runs) -> list[dict[str, Any]]:
    """What was dealt to whom, of each federation's first seed."""
    figures = []
    for index, rows in enumerate(list(runs.panels.values())[:DEALS]):
        run = rows[0].by_seed[rows[0].seeds[0]]
        title = f"{rows[0].title}, {numbered([run.seed])}"
        description = "Examples of each class that every client has"
        held = _held(run.directory / "partition.csv")
        if held is not None:
            classes = list(
                dict.fromkeys(one["class"] for one in sorted(held, key=lambda one: _natural(one["class"])))
            )
            table = _deal_table(held, classes, title)
            figures.append(
                _figure(
                    f"deal-{index}",
                    charts.deal(alt.NamedData("points"), classes),
                    title,
                    f"{description}; the stronger the colour, the more.",
                    {"rows": held},
                    height=min(320, 18 * len(classes) + 20),
                    table=table,
                )
            )
        elif (picture := run.directory / "partition.png").is_file():
            figures.append(
                {
                    "id": f"deal-{index}",
                    "title": title,
                    "description": f"{description}.",
                    "picture": _small(picture),
                }
            )
    return [figure for figure in figures if figure.get("chart") or figure.get("picture")]


def _held(path: Path) -> list[dict[str, Any]] | None:
    """What partition.csv says, if it can be drawn."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            held = [
                {"client": int(one["client"]), "class": one["class"], "examples": int(one["examples"])}
                for one in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return held if 0 < len(held) <= CELLS else None


def _deal_table(held: Sequence[dict[str, Any]], classes: Sequence[str], title: str) -> tables.Table:
    """The deal in numbers; of many clients, how many classes and examples each has."""
    counts: dict[int, dict[str, int]] = {}
    for one in held:
        counts.setdefault(one["client"], {})[one["class"]] = one["examples"]
    few = len(classes) <= 20
    header = ["client", "examples", "classes", *(f"class {name}" for name in classes if few)]
    body = [
        [
            str(client),
            str(sum(own.values())),
            str(len(own)),
            *(str(own.get(name, 0)) for name in classes if few),
        ]
        for client, own in sorted(counts.items())
    ]
    return tables.Table(
        f"Examples at each client: {title}.", header, [[*map(tables.Cell, cells)] for cells in body]
    )


def _small(path: Path) -> str:
    """A picture's address in a page that holds it, with fewer colours and so a few kilobytes."""
    from PIL import Image

    small = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(48).save(small, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"


def _versions(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """What the runs ran with, and how many did."""
    told: dict[str, int] = {}
    for run in (run for row in rows for run in row.runs):
        versions = run.summary.get("versions") or {}
        text = ", ".join(f"{name} {version}" for name, version in versions.items()) or "not told"
        if commit := run.summary.get("git_commit"):
            text += f"; commit {str(commit)[:12]}"
        told[text] = told.get(text, 0) + 1
    return list(told.items())


def _short(column: pd.Series) -> list[float | None]:
    return [_number(value) for value in column]


def _number(value: float) -> float | None:
    """A number with as many digits as a picture shows; None if it is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _natural(text: str) -> tuple[int, int, str]:
    return (0, int(text), "") if text.isdecimal() else (1, 0, text)
