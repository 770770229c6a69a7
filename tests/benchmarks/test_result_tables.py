"""The tables of results: means, intervals and spread by hand, runs that are collected, and pages that are stale."""

from __future__ import annotations

import json

import pytest

from benchmarks import demo_plot, demos, result_tables
from scripts.make_docs import up_to_date
from spin.alignment.core.files import read_json
from spin.alignment.report import write_report
from tests.helpers import REPOSITORY, run_main
from tests.helpers.evaluations import write_finished_run


def test_mean_interval_and_spread_by_hand():
    rows = [{"n": 100, "greedy_exact": 0.5, "nll": 0.2}, {"n": 100, "greedy_exact": 0.7, "nll": 0.4}]
    # Wilson's intervals of 50 and 70 of 100: 0.4038 to 0.5962 and 0.6042 to 0.7811; halves 0.0962 and 0.0885.
    half = (0.0962**2 + 0.0885**2) ** 0.5 / 2
    assert result_tables.half_width(rows, "greedy_exact") == pytest.approx(half, abs=1e-4)
    assert result_tables.cell(rows, "greedy_exact", "{:.3f}") == "0.600 ±0.065 (0.500 to 0.700)"
    assert result_tables.cell(rows, "nll", "{:.2f}") == "0.30 (0.20 to 0.40)"  # no error is known, so none is stated
    assert result_tables.cell([*rows[:1], {"nll_interval": [0.3, 0.5], "nll": 0.4, "n": 9}], "margin", "{:.2f}") == "–"
    sure = [{"n": 500, "greedy_exact": 1.0}]
    assert result_tables.cell(sure, "greedy_exact", "{:.3f}") == "1.000 ±0.004"


def test_paired_verdicts_are_counted_over_seeds():
    def row(difference, p_value):
        return {"against_start": {"greedy_exact": {"difference": difference, "p_value": p_value}}}

    rows = [row(0.1, 0.001), row(0.1, 0.2), row(-0.1, 0.01)]
    assert result_tables.compared(rows, "greedy_exact") == "better in 1, worse in 1 of 3"
    assert result_tables.compared(rows, "nll") == "–" and result_tables.compared([{}], "greedy_exact") == "–"


def test_the_table_of_the_chat_demo_by_hand(monkeypatch):
    def row(model, prompts, kinds, **against):
        groups = {"held-out prompts": prompts, "held-out kinds": kinds}
        scores = {
            name: {"n": 9, "greedy_exact": value, "greedy_exact_interval": [value - 0.1, value + 0.1]}
            for name, value in groups.items()
        }
        paired = {side: {"greedy_exact/held-out prompts": item} for side, item in against.items()}
        return {"model": model, "n": 18, "sampled_exact": 0.5, "mean_length": 40.0, "groups": scores, **paired}

    def seed(online, difference, p_value):
        against = {"difference": difference, "se": 0.03, "p_value": p_value, "prompts": 9}
        return [row("sft", 0.2, 0.1), row("sft_continued", 0.3, 0.1), row("online", online, 0.2, against_start=against)]

    found = {"chat": {"machine": "two cores", "seeds": {"1": seed(0.4, 0.2, 0.001), "2": seed(0.5, 0.3, 0.2)}}}
    monkeypatch.setattr(result_tables, "demos", lambda: found)
    shares, differences, caption = result_tables.results_table("chat").split("\n\n")

    def last_of(table, number):
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        return dict(zip(cells[0], cells[number], strict=True))

    online = last_of(shares, -1)
    assert online["model"] == "**online DPO**"
    assert online["prompts, greedy"] == "0.450 ±0.071 (0.400 to 0.500)"  # 0.1 / sqrt(2)
    assert online["kinds, greedy"] == "0.200 ±0.071" and online["kinds, T=1"] == "–"
    against_start, against_control = last_of(differences, 2), last_of(differences, 3)
    assert against_start["paired difference"] == "online DPO against the start"
    assert against_start["prompts, greedy"] == "+0.250 ±0.042 (clear in 1 of 2)"  # 1.96 * 0.03 / sqrt(2)
    assert against_control["prompts, greedy"] == against_start["kinds, greedy"] == "–"
    assert "seeds 1, 2, 18 held-out prompts each, two cores" in caption


def test_finished_runs_are_collected(tmp_path):
    from spin.alignment.pipeline.config import open_run

    finished_run = write_finished_run(tmp_path)
    write_report(open_run(finished_run))
    out = tmp_path / "demos.json"
    out.write_text(json.dumps({"other": {"machine": "m", "seeds": {}}}))
    code, _, err = run_main(demos.main, "demo", finished_run, "--out", out)
    assert code == 0, err
    found = read_json(out)
    assert found["other"] and found["demo"]["machine"]
    ((seed, rows),) = found["demo"]["seeds"].items()
    assert seed == str(open_run(finished_run).seed) and [row["model"] for row in rows][:2] == ["sft", "sft_continued"]
    last = rows[-1]
    assert last["greedy_exact"] == 0.4 and last["greedy_exact_interval"] and last["nll_se"] > 0
    assert last["against_start"]["greedy_exact"] == {
        "difference": pytest.approx(-0.1),
        "se": pytest.approx(0.0302, abs=1e-4),
        "p_value": pytest.approx(2 / 2**10),
        "prompts": 100,
    }
    of_another_machine = {"machine": "m", "seeds": {"99": [], seed: []}}
    out.write_text(json.dumps({"demo": of_another_machine}))
    assert run_main(demos.main, "demo", finished_run, "--add", "--out", out)[0] == 0
    joined = read_json(out)["demo"]
    assert joined["machine"] == f"m; {found['demo']['machine']}"
    assert joined["seeds"] == {"99": [], seed: found["demo"]["seeds"][seed]}
    code, _, err = run_main(demos.main, "demo", finished_run, finished_run, "--out", out)
    assert code == 2 and "give runs of different seeds" in err


@pytest.mark.parametrize("name", result_tables.TABLES)
def test_every_table_has_values_and_intervals_of_every_model(name):
    lines = result_tables.results_table(name).splitlines()
    assert len(lines) == len(result_tables.TABLES[name]) + 4
    for line in lines[2:-2]:
        assert all("±" in text for text in line.split("|")[2:5]), line
    assert "held-out prompts each" in lines[-1] and "cores" in lines[-1]


def test_a_changed_number_makes_a_page_stale():
    page = (REPOSITORY / "docs" / "demos.md").read_text(encoding="utf-8")
    assert up_to_date(page) == page
    number = result_tables.cell(result_tables.rows_of("online", "online"), "greedy_exact", "{:.3f}")
    assert number in page and up_to_date(page.replace(number, "0.999 ±0.001")) == page
    inline = "<!-- value: online / online / greedy_exact -->"
    assert f"{inline}0.92<!-- end -->" in up_to_date(f"{inline}0.5<!-- end -->")


def test_the_picture_of_the_readme_has_the_committed_numbers(tmp_path, monkeypatch):
    assert demo_plot.numbers_in(demo_plot.PICTURE) == demo_plot.numbers()
    picture = tmp_path / "demos.png"
    assert demo_plot.draw(picture) and not demo_plot.draw(picture)
    mean, half, *seeds = demo_plot.numbers_in(picture)["online/online/greedy_exact"]
    assert mean == pytest.approx(sum(seeds) / 3, abs=1e-4) and 0 < half < 0.03
    monkeypatch.setattr(
        demo_plot,
        "rows_of",
        lambda *_: [{"greedy_exact": 0.5, "sampled_exact": 0.5, "greedy_exact/held-out prompts": 0.5, "n": 10}],
    )
    assert demo_plot.draw(picture)
