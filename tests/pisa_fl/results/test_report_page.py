"""The page of a report in a real browser: no request, no error, readable by everybody, and its controls work."""

import json
import re
import shutil

import altair as alt
import pandas as pd
import pytest
from omegaconf import OmegaConf
from test_report import chosen, write_run

from pisa_fl import compose
from pisa_fl.config import resolve
from pisa_fl.results.report import charts, page, repeat, report
from pisa_fl.results.runs import load_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage")
STRANGE = "</script><b>'\"{{x}}\U0001f600"


def write_sweep(folder, alphas=(0.1, 1.0), seeds=2, rounds=300):
    """Two methods, some alphas, some seeds: with clients, deals, and a run of a name that is not for pages."""
    for alpha in alphas:
        for strategy, start in (("sisa", 0.6), ("fedavg", 0.3)):
            for seed in range(seeds):
                config = chosen(
                    f"strategy={strategy}",
                    "partition=dirichlet",
                    f"partition.alpha={alpha}",
                    f"rounds={rounds}",
                    seed=seed,
                )
                config["choices"]["strategy"] = STRANGE if strategy == "sisa" else strategy
                values = [0.1, *(start + i / 2000 + seed / 100 for i in range(rounds))]
                path = write_run(
                    folder / f"{strategy}-{alpha}-{seed}", config, values, mb=1 + (strategy == "sisa")
                )
                own = {str(c): {"examples": 10, "accuracy": 0.5 + c / 20, "loss": 1.0} for c in range(4)}
                (path / "clients.jsonl").write_text(json.dumps({"round": rounds, "clients": own}) + "\n")
                (path / "partition.csv").write_text(
                    f"client,class,examples\n0,0,5\n1,{STRANGE.replace(chr(34), '')},7\n"
                )
    return folder


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = write_sweep(tmp_path_factory.mktemp("runs"))
    report([folder], folder, STRANGE, latex=True)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture
def opened(browser, page_file):
    """Opens the page; afterwards, nothing was asked of a network and nothing was complained of."""
    said, contexts = [], []

    def open_page(**device):
        contexts.append(browser.new_context(**device))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-drawn='1']")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == [page_file.as_uri()] * len(contexts)


def drawn(page):
    return int(page.evaluate("document.documentElement.dataset.drawn"))


def after_redrawing(page, act):
    before = drawn(page)
    act()
    page.wait_for_function(f"document.documentElement.dataset.drawn > {before}")


def test_nothing_but_the_page_is_needed(page_file):
    text = page_file.read_text()
    library, runs = len(page.library()), 8
    assert library + (len(text.encode()) - library) * 60 / runs < 3_000_000, "of 60 runs"
    assert not re.search(r"""(?:src|href)=["']?(?!data:|#|\{)[^"'>\s]""", text.partition('id="figures"')[0])
    assert STRANGE not in text
    assert (page_file.parent / "report.tex").is_file()


def test_curves_are_drawn_and_controls_work_by_keyboard(opened):
    page = opened(viewport={"width": 1200, "height": 900})
    assert page.locator(".chart svg").count() == page.locator(".chart").count() == 2 + 1 + 2 + 2
    lines = "#curves-0 .mark-line path"
    assert page.locator(lines).count() == 2
    assert "rounds" in page.locator("#curves-0 svg").text_content()
    first = page.locator("input[name=line]").first
    first.focus()
    after_redrawing(page, lambda: page.keyboard.press("Space"))
    assert not first.is_checked()
    assert page.locator(lines).count() == 1
    assert page.locator("#status").inner_text() == "1 shown, against rounds."
    after_redrawing(page, lambda: page.locator("input[value=passes]").check())
    after_redrawing(page, lambda: page.locator("input[name=log]").check())
    assert "passes over the data" in page.locator("#curves-0 svg").text_content()
    page.locator("#curves-0 svg").hover()
    assert "median accuracy, %" in page.locator("#vg-tooltip-element").inner_text()


def test_plots_of_a_notebook_are_drawn_without_a_network(browser, page_file, tmp_path):
    runs = load_runs(page_file.parent)
    one = charts.run(pd.DataFrame(runs.rows[0].runs[0].metrics), "accuracy")
    cells = [plot._repr_mimebundle_()["text/html"] for plot in (runs.plot("MB"), one, one)]
    file = tmp_path / "cells.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{''.join(cells)}")
    context, said = browser.new_context(), []
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_function("document.querySelectorAll('.mark-line path').length >= 6")
    assert [page.locator("svg.marks").nth(i).locator(".mark-line path").count() for i in range(3)] == [
        4,
        1,
        1,
    ]
    context.close()
    assert said == [file.as_uri()]
    with alt.renderers.enable("json"):  # what was chosen there counts
        assert "text/html" not in one._repr_mimebundle_()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_it(opened, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core checks the page")
    page = opened(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []


def test_on_a_phone_and_on_paper(opened):
    page = opened(viewport={"width": 360, "height": 740}, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator("#curves-0 svg").bounding_box()["width"] <= 360
    page.emulate_media(media="print", color_scheme="dark")
    paper, ink = page.evaluate(
        "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
    )
    assert (paper, ink) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)")
    assert not page.locator("nav").is_visible()


@pytest.mark.parametrize(
    ("overrides", "command"),
    [
        ((), "pisa-fl model=logistic rounds=2 seed=3"),
        (
            (
                "strategy=fedavg",
                "partition=dirichlet",
                "partition.alpha=0.1",
                "clients=7",
                "engine.workers=0",
            ),
            "pisa-fl model=logistic partition=dirichlet strategy=fedavg partition.alpha=0.1 clients=7 rounds=2 seed=3",
        ),
        (
            ("strategy/preconditioner=second_moment", "strategy.lr=0.1", "+model.x='a b'", "targets=[0.5]"),
            "pisa-fl model=logistic strategy/preconditioner=second_moment strategy.lr=0.1 '+model.x='\"'\"'a b'\"'\"''"
            " rounds=2 seed=3",
        ),
    ],
)
def test_commands_repeat_runs(tmp_path, overrides, command):
    config = resolve(compose("model=logistic", "rounds=2", "seed=3", *overrides))
    write_run(tmp_path / "a", OmegaConf.to_container(config), [0.1, 0.2, 0.3])
    (row,) = load_runs(tmp_path).rows
    assert repeat.command(row) == command


def test_no_command_is_given_for_what_cannot_be_composed(tmp_path):
    config = chosen()
    config["strategy"]["server"]["no_such_key"] = [{"a": 1}]
    del config["strategy"]["server"]["wire"]
    write_run(tmp_path / "a", config, [0.1, 0.2, 0.3])
    write_run(
        tmp_path / "b",
        OmegaConf.to_container(OmegaConf.create({"name": "x", "seed": 0, "strategy": {"lr": 1}})),
        [0.1, 0.2, 0.4],
    )
    assert [repeat.command(row) for row in load_runs(tmp_path).rows] == [None, None]
