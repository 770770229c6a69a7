"""The two pages: self-contained, escaped, one structure; no white space that a response did not have."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import jinja2
import pytest

from spin.alignment.report.page import Page, kind_of, render_page, scored_on, texts
from spin.alignment.report.page_data import page_data
from spin.alignment.report.render import TEMPLATES, json_in_script, render
from spin.alignment.report.weights_page import Scale, Token, render_weights_page

NOBODY = {"role": "policy", "iteration": None}
SUMMARY = {
    "rows": [
        {**NOBODY, "model": "sft", "metric": "exact_match", "n": 100, "exact_at": {"0": 0.5}, "greedy_exact": 0.5},
        {**NOBODY, "model": "iter0", "greedy_exact": 0.6},
    ],
    "verdicts": ["iter0 against <sft>: up (better)", "iter0: down (worse)", "as before (no clear change)"],
    "warnings": ["a & b"],
}
LINEAGE = [["sft", "a<b", "-", "x & y"]]


class Elements(HTMLParser):
    """Lists (tag, class, text) of the leaves, and every tag that is not closed."""

    VOID = ("meta", "input")

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


def page_of(summary, **parts) -> str:
    """The page of a summary without training logs and responses."""
    data = page_data([("", SimpleNamespace(summary=summary, metrics={}, responses={}, lengths={}))])
    return render_page(Page("r<un>", "Self-play run r<un>", scored_on(summary), data, **parts))


def test_the_page_of_a_run():
    page = page_of(
        SUMMARY,
        headlines=[{"run": "", "sentence": "iter0 is <best>", "advice": "", "caveats": ["but & so"]}],
        result_headings=["model", "exact greedy"],
        result_rows=[[("sft", None), ("0.500", 0.5)], [("iter0", None), ("0.600", 0.6)]],
        warnings=SUMMARY["warnings"],
        verdicts=[(text, kind_of(text)) for text in SUMMARY["verdicts"]],
        lineage=[texts(LINEAGE[0])],
        costs=[[("sft/train", None), ("done", None), ("1.0 s", 1.0)]],
        cost_headings=["stage", "state", "time"],
        conditions=[("settings: train", [texts(("beta", "<1>"))])],
    )
    assert page.startswith("<!doctype html>") and not re.search(r"(src|href)=.?https?:", page)
    assert "default-src 'none'" in page and "connect-src" not in page  # only a page of `spin serve` may ask for news
    found = Elements(page)
    assert found.open == []
    assert [text for *_, text in found.of("title", "h1", "h2")] == [
        "SPIN: r<un>",
        "Self-play run r<un>",
        *("Results", "Progress over the iterations", "Lineage", "Time and memory", "Settings, packages and machine"),
    ]
    assert [text for *_, text in found.of("th")][:2] == ["model", "exact greedy"]
    assert [text for *_, text in found.of("td")] == [
        *("sft", "0.500", "iter0", "0.600"),
        *LINEAGE[0],
        *("sft/train", "done", "1.0 s", "beta", "<1>"),
    ]
    assert '<td data-value="0.6">0.600</td>' in page
    assert [(kind, text) for _, kind, text in found.of("li")] == [
        ("warning", "a & b"),
        ("better", SUMMARY["verdicts"][0]),
        ("worse", SUMMARY["verdicts"][1]),
        ("", SUMMARY["verdicts"][2]),
    ]
    said = [(kind, text) for _, kind, text in found.of("p")]
    assert said[0] == ("quiet", "exact_match on 100 held-out prompts")
    assert said[1:3] == [("sentence", "iter0 is <best>"), ("caveat", "but & so")]


def test_sections_without_content_are_left_out():
    bare = {"rows": [{**NOBODY, "model": "sft", "margin": math.nan}], "verdicts": [], "warnings": []}
    page = page_of(bare)
    found = Elements(page)
    assert [text for *_, text in found.of("h2")] == []
    assert found.of("li", "td") == [] and found.of("p")[0][2] == "not scored"


def test_data_in_a_script_cannot_end_it():
    text = json_in_script({"a": "</script><!--", "b": "é"})
    assert text == r'{"a":"\u003c/script>\u003c!--","b":"é"}' and json.loads(text) == {"a": "</script><!--", "b": "é"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_in_script(math.nan)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours #rrggbb (WCAG 2.2, 1.4.3)."""

    def luminance(color: str) -> float:
        parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_of_both_themes():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    themes = re.findall(r":root.*?\{(.*?)\}", (TEMPLATES / "base.css").read_text(), re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        color = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", theme))
        for ground in ("paper", "panel", "accent-soft"):
            for name in ("ink", "quiet", "good", "bad", "warn", "accent"):
                assert contrast(color[name], color[ground]) >= 4.5, (name, ground, theme)
        for ground in ("added", "removed", "found"):
            assert contrast(color["ink"], color[ground]) >= 4.5, (ground, theme)
        for name in ("edge", *(f"series-{number}" for number in range(8))):  # graphics need 3
            assert contrast(color[name], color["paper"]) >= 3, (name, theme)


def test_the_page_of_token_weights():
    chosen = [Token("a<", "a<", 0.5), Token("", "<eos>", 1.0), Token("\n\t", "nl", -1.0), Token("x'y", 'q"', math.nan)]
    page = render_weights_page([("user: hi <b>", {"chosen": chosen, "rejected": [Token(" b", "_b", 2.0)]})], ["1 & 2"])
    assert page.startswith("<!doctype html>") and not re.search("https?:", page)
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
