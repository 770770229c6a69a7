"""The page that compares two runs: their models side by side, on the same prompts where they were evaluated on the same."""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.core.errors import InputError
from spin.alignment.pipeline.diff import Row, differences, sorted_differences
from spin.alignment.report.collected import Collected
from spin.alignment.report.page import Cell, Page, cost_table, kind_of, result_table, scored_on, texts
from spin.alignment.report.page_data import named, page_data
from spin.alignment.report.reported_run import ReportedRun
from spin.alignment.report.verdicts import verdict

Labelled = Sequence[tuple[str, Collected]]


def labels_of(runs: Sequence[ReportedRun]) -> list[str]:
    """Return what the runs are called: the names of their folders, as much of the path as tells them apart.

    Raises:
        InputError: a run is compared with itself.
    """
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise InputError(f"{runs[0].folder} is given twice: name two runs to compare")
    for parts in (1, 2):
        names = ["/".join(run.folder.resolve().parts[-parts:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def comparison_page(labelled: Labelled) -> Page:
    """Return the page that compares runs."""
    reasons = why_incomparable(labelled)
    headings, rows = result_table(labelled)
    names = [label for label, _ in labelled]
    headlines = [{"run": label, **found.summary["headline"]} for label, found in labelled if found.summary["headline"]]
    return Page(
        name=" and ".join(names),
        title="Self-play runs " + " and ".join(names),
        subtitle=scored_on(labelled[0][1].summary),
        data=page_data(labelled, with_samples=not reasons),
        headlines=headlines,
        result_headings=headings,
        result_rows=rows,
        warnings=[*reasons, *(named(label, line) for label, found in labelled for line in found.summary["warnings"])],
        verdicts=[] if reasons else [(text, kind_of(text)) for text in verdicts_between(labelled)],
        difference_headings=("where", "what", *names),
        differences=[texts(row) for row in what_differs(labelled)],
        lineage=[texts((named(label, row[0]), *row[1:])) for label, found in labelled for row in found.run.lineage],
        cost_headings=cost_table(labelled[0][1])[0],
        costs=[[_named(label, row[0]), *row[1:]] for label, found in labelled for row in cost_table(found)[1]],
    )


def _named(label: str, cell: Cell) -> Cell:
    return named(label, cell[0]), cell[1]


def what_differs(labelled: Labelled) -> list[Row]:
    """Return the settings, data, packages and machines that differ between the first two runs, as far as both recorded them."""
    left, right = (found.run.manifest for _, found in labelled[:2])
    if left is None or right is None:
        return []
    found = sorted_differences(differences(left, right))
    return [*found.settings, *found.data, *found.environment]


def why_incomparable(labelled: Labelled) -> list[str]:
    """Return why the models of the runs cannot be compared prompt by prompt; empty if they can."""
    metrics = {row["metric"] for _, found in labelled for row in found.summary["rows"] if "metric" in row}
    if len(metrics) > 1:
        return [
            f"the runs are scored by different metrics ({', '.join(sorted(metrics))}): their models are not compared"
        ]
    prompts: dict[str, tuple[str, str | None]] = {}
    for _, found in labelled:
        for responses in found.responses.values():
            for name, row in responses.by_prompt.items():
                if prompts.setdefault(name, (row["prompt"], row["ground_truth"])) != (
                    row["prompt"],
                    row["ground_truth"],
                ):
                    return [f"the runs have different held-out prompts (such as {name}): their models are not compared"]
    answered = [{name for item in found.responses.values() for name in item.by_prompt} for _, found in labelled]
    if all(answered) and not set.intersection(*answered):
        return ["the runs have no held-out prompt in common: their models are not compared"]
    return []


def verdicts_between(labelled: Labelled) -> list[str]:
    """Return the comparisons of the best models of two runs, then those of models with the same name."""
    (one, left), (other, right) = labelled[:2]
    responses = {named(label, name): found for label, run in labelled for name, found in run.responses.items()}
    mine, theirs = (
        {row["model"]: row | {"model": named(label, row["model"])} for row in run.summary["rows"]}
        for label, run in ((one, left), (other, right))
    )
    best = [run.summary["headline"].get("best") for run in (left, right)]
    pairs = [(best[0], best[1])] if None not in best and best[0] != best[1] else []
    pairs += [(name, name) for name in mine if name in theirs]
    return [
        line for before, after in pairs for line in verdict(theirs[after], mine[before], named(one, before), responses)
    ]
