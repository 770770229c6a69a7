"""The two pages: self-contained, escaped, one structure; no white space that a response did not have."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import jinja2
import pytest

from spin.alignment.report.page import render_page
from spin.alignment.report.render import render
from spin.alignment.report.weights_page import Scale, Token, render_weights_page

SUMMARY = {
    "rows": [
        {"model": "sft", "metric": "exact_match", "n": 100, "greedy_exact": 0.5},
        {"model": "iter0", "greedy_exact": 0.6},
    ],
    "verdicts": ["iter0 against <sft>: up (better)", "iter0: down (worse)", "as before (no clear change)"],
    "warnings": ["a & b"],
}
SAMPLES = [{"prompt": "3+1 <b>", "ground_truth": "4", "responses": {"sft": '"5"\n\n line', "iter0": "'4'"}}]
LINEAGE = [["sft", "a<b", "-", "x & y"]]


class Elements(HTMLParser):
    """Lists (tag, class, text) of the leaves, and every tag that is not closed."""

    VOID = ("meta", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.leaves: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))
        self.text = ""

    def handle_data(self, data):
        self.text += data

    def handle_endtag(self, tag):
        name, kind = self.open.pop()
        assert name == tag
        self.leaves.append((tag, kind, self.text))
        self.text = ""

    def of(self, *tags: str) -> list[tuple[str, str, str]]:
        return [leaf for leaf in self.leaves if leaf[0] in tags]


def test_the_page_of_a_run():
    page = render_page("r<un>", SUMMARY, SAMPLES, LINEAGE, b"\x89PNG")
    assert page.startswith("<!doctype html>") and "http" not in page
    assert 'src="data:image/png;base64,iVBORw=="' in page
    found = Elements(page)
    assert found.open == []
    assert [text for *_, text in found.of("title", "h1", "h2")] == [
        "SPIN: r<un>",
        "Self-play run r<un>",
        *("Results", "Progress", "Verdict", "Warnings", "Lineage", "Before and after"),
    ]
    assert [text for *_, text in found.of("th")][:2] == ["model", "exact greedy"]
    assert [text for *_, text in found.of("td")] == ["sft", "0.500", "iter0", "0.600", *LINEAGE[0]]
    assert [(kind, text) for _, kind, text in found.of("li")] == [
        ("better", SUMMARY["verdicts"][0]),
        ("worse", SUMMARY["verdicts"][1]),
        ("", SUMMARY["verdicts"][2]),
        ("warning", "a & b"),
    ]
    assert [text for *_, text in found.of("dt")] == ["prompt", "ground truth", "sft", "iter0"]
    assert [text for *_, text in found.of("dd")] == ["3+1 <b>", "4", '"5"\n\n line', "'4'"]
    assert (
        "exact_match on 100 held-out prompts; bars: 95 % intervals; verdicts: the same prompts, at the 5 % level"
        in page
    )


def test_sections_without_content_are_left_out():
    bare = {"rows": [{"model": "sft", "nll": 1.0}], "verdicts": [], "warnings": []}
    found = Elements(render_page("r", bare, [], [], b""))
    assert [text for *_, text in found.of("h2")] == ["Results", "Progress", "Lineage"]
    assert found.of("li", "dl") == [] and "not scored; bars" in found.of("p")[0][2]


def test_the_page_of_token_weights():
    chosen = [Token("a<", "a<", 0.5), Token("", "<eos>", 1.0), Token("\n\t", "nl", -1.0), Token("x'y", 'q"', math.nan)]
    page = render_weights_page([("user: hi <b>", {"chosen": chosen, "rejected": [Token(" b", "_b", 2.0)]})], ["1 & 2"])
    assert page.startswith("<!doctype html>") and "http" not in page
    # Weights run from -1 to 2 around their mean 0.625; 0.75 is the strongest colour.
    assert (
        '<dt>chosen</dt><dd><span class="t" style="background: rgba(var(--less), 0.06)" title="a&lt;: 0.500">a&lt;</span>'
        '<span class="t end" style="background: rgba(var(--more), 0.20)" title="&lt;eos&gt;: 1.000">&lt;eos&gt;</span>'
        '<span class="t minus" style="background: rgba(var(--less), 0.75)" title="nl: -1.000">⏎\n⇥\t</span>'
        '<span class="t none" title="q&#34;: not scored">x&#39;y</span></dd>'
    ) in page
    assert '<dd><span class="t" style="background: rgba(var(--more), 0.75)" title="_b: 2.000"> b</span></dd>' in page
    found = Elements(page)
    assert found.open == [] and found.of("p")[0][2] == "1 & 2"
    assert [text for *_, text in found.of("dt")] == ["prompt", "chosen", "rejected"]
    legend = [text for *_, text in found.of("span")][:6]
    assert legend == ["weight:", "-1", "-0.188", "0.625", "1.31", "2"]


def test_equal_weights_have_no_colour_and_one_mark():
    scale = Scale.of([1.0, 1.0, math.nan])
    assert scale.marks() == [1.0] and scale.style(1.0) == "background: rgba(var(--less), 0.00)"
    assert Scale.of([]) == Scale(1.0, 1.0, 1.0)


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        render("weights", facts=[], pairs=[])
