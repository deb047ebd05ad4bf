"""The interactive charts of a page and of a notebook, in Vega-Lite.

Colours are Okabe and Ito's, which colour-blind readers tell apart; every line has a dash pattern and a marker of its
own beside them. In a page, colours are names of CSS variables, so that it turns dark with the reader's screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from pisa_fl.metric import Metric
from pisa_fl.results.report.offline import OfflineChart, OfflineColumn

Chart = alt.Chart | alt.LayerChart | alt.FacetChart

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
"""Of lines, in their order; then from the first again."""

DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 4])
"""Of lines, in their order: as many as have no common divisor with the colours, so that 35 lines differ."""

SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")

COST_TITLES = {"rounds": "rounds", "passes": "passes over the data", "MB": "megabytes, both ways"}

HEIGHT = 230


def color(index: int, page: bool = True) -> str:
    """Colour of a line; in a page a variable, for light and dark."""
    return f"var(--line-{index % len(COLORS)})" if page else COLORS[index % len(COLORS)]


def dash(index: int) -> list[int]:
    """Dash pattern of a line."""
    return DASHES[index % len(DASHES)]


def curves(
    data: pd.DataFrame | alt.NamedData,
    lines: Sequence[str],
    domain: Sequence[float],
    cost: str,
    quality: Metric,
    page: bool = True,
    number: int = 0,
) -> Chart:
    """Medians of one panel, with bands over seeds.

    Args:
        data: x, median, low, high, seeds, line; or the name of what a page has of them.
        lines: Those of all panels, so that one has its colour everywhere.
        domain: Of the quality, in all panels.
        cost: What x is.
        quality: What they are compared by.
        page: Whether it is for a page, which has a legend of its own.
        number: Of charts that are put into one, which it is.
    """
    label = f"test {quality.label}"
    legend = (
        None if page else alt.Legend(title=None, orient="bottom", columns=2, labelLimit=400, symbolOpacity=1)
    )
    base = alt.Chart(data).encode(
        x=alt.X("x:Q", title=COST_TITLES[cost], scale=alt.Scale(nice=False)),
        color=alt.Color(
            "line:N", legend=legend, scale=_scale(lines, [color(i, page) for i in range(len(lines))])
        ),
    )
    dashes = alt.StrokeDash(
        "line:N", legend=legend, scale=_scale(lines, [dash(i) for i in range(len(lines))])
    )
    axis = alt.Y("median:Q", title=label, scale=alt.Scale(domain=list(domain), zero=False))
    band = base.mark_area(opacity=0.16, strokeWidth=0).encode(y=alt.Y("low:Q", title=label), y2="high:Q")
    hover = alt.selection_point(
        name=f"hover{number}", nearest=True, on="pointermove", empty=False, clear="pointerout"
    )
    points = (
        base.mark_point(filled=True, size=60)
        .encode(
            y=axis,
            opacity=alt.condition(hover, alt.value(1), alt.value(0)),
            tooltip=[
                alt.Tooltip("line:N", title="strategy"),
                alt.Tooltip("x:Q", title=COST_TITLES[cost], format=".4~g"),
                alt.Tooltip("median:Q", title=f"median {quality.label}", format=f".{quality.digits}f"),
                alt.Tooltip("low:Q", title="lowest seed", format=f".{quality.digits}f"),
                alt.Tooltip("high:Q", title="highest seed", format=f".{quality.digits}f"),
                alt.Tooltip("seeds:Q"),
            ],
        )
        .add_params(hover)
    )
    return alt.layer(band, base.mark_line(strokeWidth=2).encode(y=axis, strokeDash=dashes), points)


def against_skew(data: alt.NamedData, lines: Sequence[str], panels: Sequence[str], quality: Metric) -> Chart:
    """Final quality of every line on every federation: medians, ranges, and every seed.

    Args:
        data: panel, line, median, low, high.
        lines: Their names, in order.
        panels: The federations' names, in order.
        quality: What they are compared by.
    """
    label = f"final test {quality.label}"
    base = alt.Chart(data).encode(
        x=alt.X(
            "panel:N", sort=list(panels), title=None, axis=alt.Axis(labelAngle=0 if len(panels) < 5 else -35)
        ),
        color=alt.Color("line:N", legend=None, scale=_scale(lines, [color(i) for i in range(len(lines))])),
        xOffset=alt.XOffset("line:N", sort=list(lines), scale=alt.Scale(paddingOuter=0.4)),
    )
    axis = alt.Y("median:Q", title=label, scale=alt.Scale(zero=False))
    tooltip = [
        alt.Tooltip("line:N", title="strategy"),
        alt.Tooltip("panel:N", title="federation"),
        alt.Tooltip("median:Q", title=f"median {quality.label}", format=f".{quality.digits}f"),
        alt.Tooltip("low:Q", title="lowest seed", format=f".{quality.digits}f"),
        alt.Tooltip("high:Q", title="highest seed", format=f".{quality.digits}f"),
    ]
    return alt.layer(
        base.mark_line(strokeWidth=1.5, opacity=0.6).encode(
            y=axis,
            strokeDash=alt.StrokeDash(
                "line:N", legend=None, scale=_scale(lines, [dash(i) for i in range(len(lines))])
            ),
        ),
        base.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", title=label), y2="high:Q"),
        base.mark_point(filled=True, size=90, opacity=1).encode(
            y=axis,
            shape=alt.Shape(
                "line:N",
                legend=None,
                scale=_scale(lines, [SHAPES[i % len(SHAPES)] for i in range(len(lines))]),
            ),
            tooltip=tooltip,
        ),
    )


def clients(data: alt.NamedData, lines: Sequence[str], domain: Sequence[float], quality: Metric) -> Chart:
    """Final quality on every client's own examples: a tick a client of a seed, and their median."""
    base = alt.Chart(data).encode(
        y=alt.Y("line:N", sort=list(lines), title=None, axis=alt.Axis(labelLimit=150)),
        x=alt.X(
            "value:Q",
            title=f"{quality.label}, clients' own",
            scale=alt.Scale(domain=list(domain), zero=False, nice=True),
        ),
        color=alt.Color("line:N", legend=None, scale=_scale(lines, [color(i) for i in range(len(lines))])),
    )
    return alt.layer(
        base.mark_tick(opacity=0.45, thickness=2, bandSize=16).encode(
            tooltip=[
                alt.Tooltip("line:N", title="strategy"),
                alt.Tooltip("client:Q"),
                alt.Tooltip("seed:Q"),
                alt.Tooltip("value:Q", title=quality.label, format=f".{quality.digits}f"),
            ]
        ),
        base.mark_point(filled=True, size=70, opacity=1, shape="diamond").encode(x="median(value):Q"),
    )


def deal(data: alt.NamedData, classes: Sequence[str]) -> Chart:
    """What every client has of every class; the stronger the colour the more, by the root of the number."""
    return (
        alt.Chart(data)
        .mark_rect(color="var(--deal)")
        .encode(
            x=alt.X("client:O", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("class:N", sort=list(classes), axis=alt.Axis(labelLimit=110, labelOverlap=True)),
            opacity=alt.Opacity(
                "examples:Q", legend=None, scale=alt.Scale(type="sqrt", domainMin=0, range=[0.04, 1])
            ),
            tooltip=["client:O", "class:N", "examples:Q"],
        )
    )


def notebook(
    frame: pd.DataFrame, titles: Mapping[str, str], lines: Sequence[str], cost: str, quality: Metric
) -> alt.VConcatChart:
    """The curves of all panels, one below the other, with colours of their own and a legend.

    Raises:
        ValueError: There is no such cost.
    """
    if cost not in COST_TITLES:
        raise ValueError(f"cost must be one of {', '.join(COST_TITLES)}, got {cost}")
    domain = extent(frame)
    own = frame[frame["cost"] == cost]
    charts = [
        curves(
            own[own["panel"] == panel], lines, domain, cost, quality, page=False, number=number
        ).properties(title=title, width=420, height=HEIGHT)
        for number, (panel, title) in enumerate(titles.items())
    ]
    return OfflineColumn(vconcat=charts)


def run(frame: pd.DataFrame, name: str) -> alt.Chart:
    """One run: a test metric against rounds."""
    tested = frame[["round", f"test_{name}"]].dropna()
    y = alt.Y(f"test_{name}:Q", title=f"test {name}", scale=alt.Scale(zero=False))
    line = OfflineChart(tested).mark_line(point=True, color=COLORS[0])
    return line.encode(x=alt.X("round:Q", title="rounds"), y=y, tooltip=["round", f"test_{name}"])


def extent(frame: pd.DataFrame) -> list[float]:
    """Least and greatest quality of all curves."""
    return [float(frame["low"].min()), float(frame["high"].max())]


def spec(chart: Chart, description: str, height: int = HEIGHT) -> dict[str, Any]:
    """A chart of a page, whose data the page has and whose width is what there is."""
    sized = chart.properties(width="container", height=height, description=description)
    made: dict[str, Any] = sized.to_dict(validate=False)
    made.pop("config", None)  # the page has one for all
    return made


def _scale(lines: Sequence[str], values: Sequence[Any]) -> alt.Scale:
    return alt.Scale(domain=list(lines), range=list(values))
