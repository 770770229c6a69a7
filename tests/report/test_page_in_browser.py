"""The page in headless Chromium: no errors and no requests; sorting, filters, search, themes, keyboard and widths."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest

from benchmarks.page import make_page, open_once
from spin import cli
from spin.alignment.pipeline.lock import run_lock
from spin.alignment.pipeline.manifest import RunManifest, StageRecord
from spin.alignment.report.page import Page, render_page
from spin.alignment.report.page_data import page_data
from spin.alignment.report.serve import make_server
from spin.alignment.report.summary import evaluation_row
from tests.helpers import run_main
from tests.helpers.browser import CHROMIUM, browser
from tests.helpers.evaluations import ATTACK, write_finished_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")

HISTORY = [
    {"step": step, "epoch": step / 10, "loss": 1 / step, "rewards/margins": step / 10, "rewards/margins_se": 0.1}
    for step in (1, 2, 3)
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run with training logs, and that of its comparison with a copy."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("one", "two"):
        run_dir = write_finished_run(folder / name)
        for iteration in ("iter0", "iter1"):
            path = run_dir / iteration / "metrics.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"history": HISTORY}))
        code, _, err = run_main(cli.main, "report", run_dir)
        assert code == 0, err
    code, _, err = run_main(cli.main, "report", folder / "one" / "run", folder / "two" / "run")
    assert code == 0, err
    return folder / "one" / "run" / "report.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def tab(chromium, page):
    """The page, newly loaded; nothing may go wrong on it in a test."""
    chromium.resize(1280)
    chromium.prefer("light")
    chromium.problems.clear()
    chromium.open(page.as_uri())
    chromium.wait_for("charts.areDrawn()")
    yield chromium
    assert chromium.problems == []


def choose(tab, name: str, value: str) -> None:
    tab.run(
        f"(box => {{ box.value = {json.dumps(value)}; box.dispatchEvent(new Event('change', {{bubbles: true}})); "
        f"box.dispatchEvent(new Event('input', {{bubbles: true}})) }})(document.getElementById('sample-{name}'))"
    )


def count(tab) -> str:
    return tab.run("document.getElementById('sample-count').textContent")


def shown(tab, what: str) -> list[str]:
    return tab.run(f"[...document.querySelectorAll({json.dumps(what)})].map(found => found.textContent)")


def test_it_shows_everything(tab):
    assert tab.run("document.title") == "SPIN: run"  # nothing that a model said was run
    assert shown(tab, ".headline .sentence")[0].startswith("iter1 is the best")
    titles = shown(tab, "figcaption")
    assert {"Exact match, greedy", "Exact match, T=1", "Margin (last log; nats, times beta)", "Loss"} < set(titles)
    assert "Length in tokens, greedy (share of responses)" in titles
    assert len(shown(tab, "canvas")) == len(titles)
    assert tab.run("report.training.models.iter1.loss") == [[1, 2, 3], [1.0, 0.5, 0.333333]]


def test_models_stand_at_their_iteration(chromium, tmp_path):
    """The model without weights shares the place of the iteration that it belongs to; runs of different lengths are aligned."""
    row = {"metric": "exact_match", "n": 2, "exact_at": {"0": 0.5}}
    runs = {
        "a": [("sft", "start", None, 0.1), ("iter0_spin", "unweighted", 0, 0.2), ("iter0", "policy", 0, 0.3)],
        "b": [("sft", "start", None, 0.4), ("iter0", "policy", 0, 0.5), ("iter1", "policy", 1, 0.6)],
    }
    labelled = [
        (
            label,
            SimpleNamespace(
                summary={
                    "rows": [
                        row | {"model": name, "role": role, "iteration": iteration, "greedy_exact": value}
                        for name, role, iteration, value in models
                    ]
                },
                metrics={},
                responses={},
                lengths={},
            ),
        )
        for label, models in runs.items()
    ]
    file = tmp_path / "page.html"
    file.write_text(render_page(Page("a and b", "a and b", "", page_data(labelled))), encoding="utf-8")
    chromium.open(file.as_uri())
    chromium.wait_for("charts.areDrawn()")
    assert chromium.run("charts.dataOf('Exact match, greedy')") == {
        "a": [0.1, 0.3, None],
        "a without weights": [None, 0.2, None],
        "b": [0.4, 0.5, 0.6],
    }


def test_groups_and_parts_over_the_iterations(chromium, tmp_path):
    """One curve for each group and part, of self-play only; no chart has more curves than there are colours."""

    def score(value):
        return {"exact": value, "exact_interval": [value - 0.1, value + 0.1]}

    def evaluation(value):
        parts = {name: {"value": value + place / 8, "n": 4} for place, name in enumerate(("strict", "loose"))}
        groups = {f"g{number}": {"n": 2, "temperatures": {"0": score(value)}} for number in range(10)}
        return {"metric": "ifeval", "n": 4, "temperatures": {"0": score(value) | {"parts": parts}}, "groups": groups}

    roles = (("sft", "start", None, 0.25), ("sft_continued", "control", None, 0.75), ("iter0", "policy", 0, 0.5))
    rows = [
        evaluation_row(evaluation(value)) | {"model": name, "role": role, "iteration": iteration}
        for name, role, iteration, value in roles
    ]
    collected = SimpleNamespace(summary={"rows": rows}, metrics={}, responses={}, lengths={})
    file = tmp_path / "page.html"
    file.write_text(render_page(Page("run", "run", "", page_data([("", collected)]))), encoding="utf-8")
    chromium.open(file.as_uri())
    chromium.wait_for("charts.areDrawn()")
    assert chromium.run("charts.dataOf('Ifeval, greedy, parts')") == {"strict": [0.25, 0.5], "loose": [0.375, 0.625]}
    titles = [f"Ifeval, greedy, by group ({number} of 2)" for number in (1, 2)]
    sizes = [len(chromium.run(f"charts.dataOf('{title}')")) for title in titles]
    assert sizes == [8, 2] and chromium.run(f"charts.dataOf('{titles[1]}').g9") == [0.25, 0.5]
    file.write_text(
        render_page(Page("two", "two", "", page_data([("a", collected), ("b", collected)]))), encoding="utf-8"
    )
    chromium.open(file.as_uri())
    chromium.wait_for("charts.areDrawn()")
    assert [*chromium.run("charts.dataOf('Ifeval, greedy, by group (3 of 3)')")] == ["a g8", "a g9", "b g8", "b g9"]


def test_what_a_model_says_stays_text(tab):
    assert count(tab) == "100 of 100 prompts"
    assert ATTACK in shown(tab, "#sample-list .said") and not shown(tab, "#sample-list img, #sample-list script")


def test_tables_are_sorted_by_mouse_and_keyboard(tab):
    column = "#results tbody td:first-child"
    original = ["sft", "sft_continued", "iter0", "iter1"]
    assert shown(tab, column) == original
    tab.run("document.querySelectorAll('#results th button')[2].click()")  # T=1
    assert shown(tab, column) == ["iter1", "iter0", "sft_continued", "sft"]
    tab.run("document.querySelectorAll('#results th button')[2].focus()")
    tab.press("Enter")
    assert (
        shown(tab, column) == original
        and tab.run("document.querySelectorAll('#results th')[2].ariaSort") == "ascending"
    )
    tab.press("Enter")
    assert shown(tab, column) == original
    # Models without a margin come last in both directions.
    tab.run("[...document.querySelectorAll('#results th button')].find(b => b.textContent === 'margin').click()")
    assert set(shown(tab, column)[:2]) == {"iter0", "iter1"}


def test_filters_and_search(tab):
    expected = {
        "right": "40",
        "wrong": "60",
        "worse": "10",
        "better": "0",
        "changed": "0",
        "truncated": "0",
        "all": "100",
    }
    for name, number in expected.items():
        choose(tab, "filter", name)
        assert count(tab) == f"{number} of 100 prompts", name
    choose(tab, "temperature", "1")
    choose(tab, "filter", "better")
    assert count(tab) == "15 of 100 prompts"
    choose(tab, "filter", "all")
    choose(tab, "search", "3+99")
    assert count(tab) == "1 of 100 prompts" and shown(tab, "mark") == ["3+99"]
    choose(tab, "search", "ONERROR")
    assert count(tab) == "1 of 100 prompts" and set(shown(tab, "mark")) == {"onerror"}


def test_differences_and_models(tab):
    choose(tab, "base", "truth")
    first = "#sample-list article:first-of-type "
    assert shown(tab, f"{first}ins")[0] == "<0>" and shown(tab, f"{first}del")[0] == "3"
    choose(tab, "base", "none")
    assert shown(tab, f"{first}ins") == []
    assert len(shown(tab, f"{first}.answer")) == 4
    tab.run("document.querySelector('#sample-models input').click()")
    assert len(shown(tab, f"{first}.answer")) == 3
    compared = tab.run("words.compare('the cat sat on 12 mats', 'the dog sat on 13 mats')")
    assert compared == [
        *(["same", "the "], ["removed", "cat"], ["added", "dog"], ["same", " sat on "]),
        *(["removed", "12"], ["added", "13"], ["same", " mats"]),
    ]


def test_pages_of_responses(tab):
    assert len(shown(tab, "article")) == 20
    for _ in range(4):
        tab.run("document.getElementById('sample-next').click()")
    assert shown(tab, "#sample-page") == ["page 5 of 5"] and shown(tab, "article h3")[-1] == "p99"
    assert tab.run("document.getElementById('sample-next').disabled")


def test_themes(tab, page):
    def paper():
        return tab.run("getComputedStyle(document.body).backgroundColor")

    light = paper()
    tab.run("document.getElementById('theme').click()")
    dark = paper()
    assert light != dark and tab.run("document.documentElement.dataset.theme") == "dark"
    tab.run("document.getElementById('theme').click()")
    assert paper() == light
    tab.run("localStorage.clear()")
    tab.prefer("dark")
    tab.open(page.as_uri())
    assert paper() == dark


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["report.html", "compared-with-run.html"])
def test_the_page_never_scrolls_sideways(tab, page, width, name):
    tab.resize(width)
    tab.open((page.parent / name).as_uri())
    assert tab.run("document.documentElement.scrollWidth") == width
    assert tab.run("[...document.querySelectorAll('details')].forEach(part => part.open = true)") is None
    assert tab.run("document.documentElement.scrollWidth") == width


def test_training_on_one_axis_and_hidden_curves(tab):
    tab.run(
        "(box => { box.value = 'joined'; box.dispatchEvent(new Event('change')) })(document.getElementById('training-axis'))"
    )
    tab.wait_for("charts.areDrawn()")
    assert len(shown(tab, "#training-charts canvas")) == len(shown(tab, "#training-charts figcaption")) == 2
    name = "document.querySelector('#progress-charts .u-series:nth-of-type(2) th')"
    tab.run(f"{name}.focus()")
    tab.press("Enter")
    assert tab.run(f"{name}.ariaPressed") == "false"


def test_two_runs_on_one_page(tab, page):
    tab.open((page.parent / "compared-with-run.html").as_uri())
    assert len(shown(tab, ".headline")) == 2
    rows = shown(tab, "#results tbody td:first-child")
    assert len(rows) == 8 and len(set(rows)) == 8 and all(name.split(": ")[1] for name in rows)
    assert len(shown(tab, "#sample-list article:first-of-type .answer")) == 8
    assert any("no clear change" in text for text in shown(tab, "#results details li"))


def test_a_served_page_follows_the_run_and_keeps_what_the_reader_chose(chromium, tmp_path):
    run_dir = write_finished_run(tmp_path)
    manifest = RunManifest(run_dir)
    manifest.stages["iter1/train"] = StageRecord("running", {}, "")
    manifest.save()
    later = (run_dir / "iter1").rename(tmp_path / "iter1")
    server = make_server(run_dir, port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    chromium.problems.clear()
    try:
        with run_lock(run_dir):
            chromium.open(address)
            chromium.wait_for("document.getElementById('live').textContent.includes('iter1/train: running')")
            assert shown(chromium, ".headline .sentence")[0].startswith("iter0 is the best")
            row = "[...document.querySelectorAll('#costs tr')].find(row => row.textContent.includes('iter1/train'))"
            assert chromium.run(f"{row}.cells[2].textContent") == "–"  # its time is not known yet
            choose(chromium, "search", "3+99")
            later.rename(run_dir / "iter1")
            chromium.wait_for(
                "document.querySelector('.headline .sentence')?.textContent.startsWith('iter1 is the best')"
            )
            chromium.wait_for("document.getElementById('sample-count').textContent === '1 of 100 prompts'")
    finally:
        server.shutdown()
        server.server_close()
    assert {*chromium.problems} <= {f"request to {address}{path}" for path in ("", "live", "version", "favicon.ico")}


def test_a_long_run_is_small_and_loads_at_once(chromium, tmp_path):
    page = make_page(tmp_path, prompts=2000)
    assert 5e6 < page.stat().st_size < 20e6  # 10,000 different responses of about 1,000 characters
    chromium.resize(1280)
    chromium.problems.clear()
    # On an idle core half a second (benchmarks/page.py); other tests may run at the same time.
    assert open_once(chromium, page)["loaded_seconds"] < 10
    assert chromium.problems == [] and chromium.run("report.samples.prompts.length") == 2000
