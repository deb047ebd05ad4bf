"""What the numbers say, in sentences that can be quoted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from pisa_fl.metric import Metric
from pisa_fl.results.report import numbers
from pisa_fl.results.report.paired import (
    LEVEL,
    Difference,
    Finding,
    differences,
    fewest_pairs,
    least_p,
)
from pisa_fl.results.report.rows import COSTS, Row, numbered

FEW = 3
"""Settings that a sentence names, at most."""

Verdict = Mapping[str, Sequence[str]]
"""Sentences by the heading that they stand under."""

FALLEN = 0.02
"""Share of its best round's quality that a row may lose until its end without being named."""

UNITS = {"rounds": "rounds", "passes": "passes over the data", "MB": "MB"}


def verdict(
    panels: dict[str, list[Row]],
    rows: Sequence[Row],
    runs: pd.DataFrame,
    quality: Metric,
    left_out: Sequence[str] = (),
) -> Verdict:
    """What the numbers say of who is ahead, of runs that failed, among them those left out, and of what they cost."""
    by_final, by_best = (
        differences(panels, runs, rows, measure(quality), quality)
        for measure in (numbers.final, numbers.best)
    )
    means = runs.groupby("row")[[numbers.final(quality), numbers.best(quality)]].mean()
    means.index = pd.Index([rows[int(number)].label for number in means.index])
    sentences = {
        "Who ends best": [
            *_winners(panels, by_final, means[numbers.final(quality)], quality),
            *_test(by_final),
        ],
        "Best round and last round": [
            *_other_order(panels, by_final, by_best, means[numbers.best(quality)], quality),
            *_fallen(rows, means, quality),
        ],
        "Runs that failed": _failed(rows, quality, left_out),
        "Budgets": _budgets(panels, runs, rows, quality),
    }
    return {heading: own for heading, own in sentences.items() if own}


def difference_in_words(difference: Difference, quality: Metric) -> str:
    """By how much one row is ahead, on average and seed by seed."""
    unit = "points" if quality.unit == "%" else quality.unit or f"of {quality.name}"
    own = difference.values
    if not own or not all(map(math.isfinite, own)):
        return ""
    mean, low, high = (f"{x:+.{quality.digits}f}" for x in (sum(own) / len(own), min(own), max(own)))
    text = f"{mean} {unit}" if low == high else f"{mean} {unit}, {low} to {high} by seed"
    rows = difference.ahead, difference.behind
    return text if all(len(own) == len(row.runs) for row in rows) else f"{text}, {len(own)} in common"


def some(names: Sequence[str], separator: str = ", ") -> str:
    """The first few of some names, and how many more there are."""
    left = len(names) - FEW
    return separator.join(names[:FEW]) + (f" and {left} more" if left > 0 else "")


def where(panel: str, first: str = "") -> str:
    """A panel's name, if it has one, and then the first word, as the beginning of a sentence."""
    return f"{panel}: {first}" if panel else first.capitalize()


def _winners(
    panels: dict[str, list[Row]], found: dict[str, list[Difference]], means: pd.Series, quality: Metric
) -> list[str]:
    sentences = []
    for panel, members in panels.items():
        if not (others := found[panel]):
            row = members[0]
            sentences.append(
                f"{where(panel)}{row.line} ends with {_mean(means[row.label], len(row.runs), quality)};"
                " there is nothing to compare it with."
            )
            continue
        ahead = others[0].ahead
        text = f"{where(panel)}{ahead.line} ends best, with {_mean(means[ahead.label], len(ahead.runs), quality)}."
        for finding in Finding:
            same = [other for other in others if other.finding == finding]
            if same:
                named = some([f"{other.behind.line} ({_behind(other, quality)})" for other in same], "; ")
                text += f" Against {named}: {finding}."
        sentences.append(text)
    return sentences


def _behind(difference: Difference, quality: Metric) -> str:
    told = [difference_in_words(difference, quality)]
    if not math.isnan(difference.p):
        told.append(f"p = {difference.p:.2g}")
    return ", ".join(part for part in told if part) or "no number"


def _mean(value: float, runs: int, quality: Metric) -> str:
    if not math.isfinite(value):
        return f"no finite {quality.name}"
    number = f"{value:.{quality.digits}f}{' %' if quality.unit == '%' else f' {quality.unit}'.rstrip()}"
    return f"{number} (mean of {runs} seeds)" if runs > 1 else f"{number} (one seed)"


def _test(found: dict[str, list[Difference]]) -> list[str]:
    """What the test was, and what it cannot say."""
    tested = [d for own in found.values() for d in own if not math.isnan(d.p)]
    if not tested:
        return []
    count = len(tested)
    rule = (
        f"Each federation's leader is tested against all others. A difference is called beyond seed noise if its p,"
        f" raised by Holm's method for the {count} tests, is below {LEVEL:g}."
        if count > 1
        else f"Below {LEVEL:g} a difference is called beyond seed noise."
    )
    sentences = [
        "Test: exact sign-flip permutation of the mean of the paired differences, two-sided; a pair is two runs of one"
        f" seed on the same deal. {rule}"
    ]
    most = max(len(d.values) for d in tested)
    if least_p(most) >= LEVEL:
        sentences.append(
            f"{most} seeds can never give p below {least_p(most):.2g}, whatever the numbers:"
            f" to prove one difference at {LEVEL:g} takes {fewest_pairs()} seeds"
            + (f", and with {count} tests {fewest_pairs(count)}." if count > 1 else ".")
        )
    elif count * least_p(most) >= LEVEL:
        sentences.append(
            f"With {count} tests, {most} seeds can never prove anything: it takes {fewest_pairs(count)} seeds."
        )
    return sentences


def _other_order(
    panels: dict[str, list[Row]],
    by_final: dict[str, list[Difference]],
    by_best: dict[str, list[Difference]],
    means: pd.Series,
    quality: Metric,
) -> list[str]:
    compared = [panel for panel in panels if by_final[panel]]
    sentences = []
    for panel in compared:
        last, best = by_final[panel][0].ahead, by_best[panel][0].ahead
        if last is not best:
            sentences.append(
                f"{where(panel, 'by')} the best round instead of the last {best.line} is ahead, with"
                f" {_mean(means[best.label], len(best.runs), quality)}."
            )
    if compared and not sentences:
        sentences.append("By the best round instead of the last, the same settings are ahead.")
    if compared:
        sentences.append("A best round is chosen on the test set, and flatters whoever swings.")
    return sentences


def _fallen(rows: Sequence[Row], means: pd.DataFrame, quality: Metric) -> list[str]:
    told = []
    for row in rows:
        last, best = (means.loc[row.label, name(quality)] for name in (numbers.final, numbers.best))
        if math.isfinite(last) and abs(best - last) > FALLEN * abs(best):
            told.append(f"{row.label} ({best:.{quality.digits}f}, then {last:.{quality.digits}f})")
    if not told:
        return []
    return [
        f"Worse at the end than in the best round, by more than {100 * FALLEN:g} % of it: {some(told, '; ')}."
    ]


def _failed(rows: Sequence[Row], quality: Metric, left_out: Sequence[str]) -> list[str]:
    total = sum(len(row.runs) for row in rows)
    sentences = []
    for kind, failed in (
        ("diverged (a last metric is no number)", lambda run: run.diverged),
        (
            f"ended at chance (no better in {quality.name} than one answer for all)",
            lambda run: run.chance is not None and not run.diverged,
        ),
    ):
        told = {row.label: [run.seed for run in row.runs if failed(run)] for row in rows}
        told = {label: sorted(seeds) for label, seeds in told.items() if seeds}
        if told:
            count = sum(map(len, told.values()))
            named = some([f"{label}, {numbered(seeds)}" for label, seeds in told.items()], "; ")
            sentences.append(f"{count} of {total} runs {kind}: {named}. All are counted.")
    if not sentences:
        sentences = ["None of the runs that are counted diverged, or ended at chance."]
    if left_out:
        sentences.append(f"Not counted: {some(left_out, '; ')}.")
    return sentences


def _budgets(
    panels: dict[str, list[Row]], runs: pd.DataFrame, rows: Sequence[Row], quality: Metric
) -> list[str]:
    """Which costs differ, and how good everybody was at the least of them."""
    spent = runs.groupby("row")[list(COSTS)].median()
    spent.index = pd.Index([rows[int(number)].label for number in spent.index])
    sentences: dict[str, list[str]] = {}
    form_of_quality = numbers.forms(quality)[numbers.final(quality)]
    for panel, members in panels.items():
        for cost in COSTS if len(members) > 1 else ():
            own = {row.line: float(spent.loc[row.label, cost]) for row in members}
            least, most = min(own.values()), max(own.values())
            if most <= 1.01 * least:
                continue
            form = numbers.forms(quality)[cost]
            told = [f"{line} {form.format(value)}" for line, value in own.items()]
            if len(told) > FEW:
                frugal, lavish = min(own, key=own.__getitem__), max(own, key=own.__getitem__)
                told = [f"from {form.format(least)} ({frugal}) to {form.format(most)} ({lavish})"]
            sentences.setdefault(f"Unequal {UNITS[cost]}: {', '.join(told)}.", []).append(panel)
            if least > 0:
                at = [(numbers.at_cost(row, cost, least * 1.0001, quality), row.line) for row in members]
                at.sort(reverse=quality.better == "higher")
                named = some([f"{line} has {numbers.shown(value, form_of_quality)}" for value, line in at])
                sentences.setdefault(
                    f"At {form.format(least)} {UNITS[cost]} each: {named} ({quality.label}, means).", []
                ).append(panel)
    if not sentences:
        return (
            ["On each federation all have the same rounds, passes and bytes."]
            if len(rows) > len(panels)
            else []
        )
    everywhere = [panel for panel, members in panels.items() if len(members) > 1]
    return [
        text if own == everywhere else f"{'; '.join(own)}: {text[0].lower()}{text[1:]}"
        for text, own in sentences.items()
    ]
