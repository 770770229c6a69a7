"""Scores one model on held-out prompts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say, say_error
from spin.alignment.core.errors import InputError
from spin.alignment.evaluation.config import EvaluateConfig

if TYPE_CHECKING:
    from pathlib import Path

    from spin.alignment.core.provenance import Provenance
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.data.held_out_rows import Skipped
    from spin.alignment.evaluation.answers import Answers
    from spin.alignment.evaluation.held_out import HeldOut
    from spin.alignment.evaluation.judged import Baseline


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a model on held-out prompts; return what is written to ``output_file``: the fields of ``evaluate_model.py``. Every
    response is written to ``eval.parquet`` next to it first.

    If ``output_file`` or ``cache_dir`` has the results of the same model, data and settings, those are returned. In several
    processes, each answers its part of the prompts; the main one scores and writes, and the others return an empty mapping.

    Raises:
        InputError: the model, every prompt or the metric cannot be used; if it can be known, before a model is loaded.
    """
    from spin.alignment.evaluation.answers import answer_all, own_place
    from spin.alignment.evaluation.judged import check_baselines, read_baselines
    from spin.alignment.evaluation.result_cache import result_key, stored_result
    from spin.alignment.models.vocabulary import ids_without_token

    is_main = own_place().is_main
    encoder, folder, model_config = open_model(config, is_main)
    tasks = resolved_tasks(config)
    held_out, skipped = load_held_out(config, encoder, model_config)
    baselines = read_baselines(config.against)
    metric = config.metric if config.win_rate_by is None else None
    check_baselines(baselines, held_out, config.temperatures[0], metric)
    made = provenance(config, encoder, folder, len(held_out))  # refuses damaged weights
    key = result_key(config, made, held_out)
    # The weights behind a server are unknown, so its results may be those of another model by now.
    reusable = made.weights_hash and not config.overwrite
    if reusable and (found := stored_result(config, key)) is not None:
        if is_main:
            say(f"{config.output_file} is already complete: {config.model} was evaluated with these settings")
        return found
    benchmarks = {} if tasks is None else {"tasks": tasks()}  # first: the data of a task may turn out to be missing
    answers = answer_all(config, held_out, encoder, ids_without_token(encoder.tokenizer, model_config))
    if not is_main:
        return {}
    skipped += without_likelihood(held_out, answers)
    rows = scored(config, answers, held_out, encoder, skipped)
    compare(config, rows, held_out, baselines)
    result = {
        "model": config.model,
        "weights_hash": made.weights_hash,
        "key": key,
        "metric": config.metric,
        "input_dir": config.input_dir,
        "split": config.split,
        **encoder.template_record,
        "n": len(held_out),
        "skipped": skipped,
        **averages(config, rows),
        **win_rates(config, rows, baselines),
        **benchmarks,
    }
    return write(config, rows, made, result)


def open_model(config: EvaluateConfig, is_main: bool) -> tuple[ChatEncoder, Path, Any]:
    """Check the settings and the files of the model; return its encoder, its folder and its configuration.

    Raises:
        InputError: naming the setting or file that cannot be used.
    """
    from spin.alignment.data.chat_encoder import load_encoder
    from spin.alignment.data.template_date import pinned_date
    from spin.alignment.generation import find_backend
    from spin.alignment.models.folder import check_model_path, model_folder
    from spin.alignment.models.vocabulary import check_control_tokens
    from spin.alignment.models.weights_check import check_model

    config.check_files()
    config.check_metric()
    served = find_backend(config.backend).needs_server
    check_model_path(config.model, needs_weights=not served)
    encoder = load_encoder(
        config.model,
        config.revision,
        config.trust_remote_code,
        system=config.system,
        chat_template_kwargs=config.chat_template_kwargs,
        date=pinned_date(config.template_date, ()),
    )
    for remark in encoder.remarks if is_main else ():
        say_error(remark)
    folder = model_folder(config.model, config.revision)
    model_config = check_model(folder, trust_remote_code=config.trust_remote_code, needs_weights=not served)
    check_control_tokens(encoder, model_config, config.model)
    return encoder, folder, model_config


def provenance(config: EvaluateConfig, encoder: ChatEncoder, folder: Path, count: int) -> Provenance:
    """Return the record of what the responses were made from. The weights of a served model are unknown."""
    from spin.alignment.core.provenance import Provenance, hash_weights, package_versions
    from spin.alignment.generation import find_backend
    from spin.alignment.models.precision import machine_dtype

    served = find_backend(config.backend).needs_server
    chosen = None if served else machine_dtype(folder, config.dtype)
    return Provenance(
        kind="evaluation",
        model=config.model,
        model_revision=config.revision or "",
        weights_hash="" if served else hash_weights(folder),
        tokenizer_hash=encoder.tokenizer_hash,
        chat_template_hash=encoder.template_hash,
        backend=config.backend,
        sampling={f"{temperature:g}": config.sampling(temperature).as_dict() for temperature in config.temperatures},
        split=config.split,
        num_prompts=count,
        versions=package_versions(),
        extra={"metric": config.metric} | ({"computed_in": chosen} if chosen else {}),
    )


def load_held_out(
    config: EvaluateConfig, encoder: ChatEncoder, model_config: Any
) -> tuple[list[HeldOut], list[Skipped]]:
    """Return the held-out prompts to score, and the rows that are skipped, each with the reason.

    Raises:
        InputError: the data cannot be read, or no row of it can be used.
    """
    from spin.alignment.data.held_out_rows import check_any_left, read_to_score
    from spin.alignment.evaluation.held_out import encode_held_out
    from spin.alignment.models.folder import context_length
    from spin.alignment.models.vocabulary import check_ids

    rows, unreadable = read_to_score(config.input_dir, config.split, config.compares, config.limit)
    rows, unscorable = scorable_rows(config, rows)
    context = context_length(model_config) or sys.maxsize
    held_out, unusable = encode_held_out(rows, encoder, context, config.max_new_tokens)
    unusable = unscorable + unusable
    check_any_left(held_out, unusable, f"{config.input_dir}, split {config.split}")
    for item in held_out:
        where = f"prompt {item.request.prompt_id}"
        check_ids((*item.request.token_ids, *item.ground_truth_ids), model_config, config.model, where)
    return held_out, [*unreadable, *unusable]


def scorable_rows(config: EvaluateConfig, rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Skipped]]:
    """Return the rows that have the columns which the metric and ``group_by`` read, and those that are skipped."""
    from spin.alignment.data.rows import scorer_columns

    usable, skipped = [], []
    for row in rows:
        try:
            config.check_columns(scorer_columns(row))
        except InputError as error:
            skipped.append({"prompt_id": row["prompt_id"], "reason": str(error)})
        else:
            usable.append(row)
    return usable, skipped


def without_likelihood(held_out: Sequence[HeldOut], answers: Answers) -> list[Skipped]:
    """Return the prompts whose ground truth has a log-likelihood that is not finite."""
    reason = "the log-likelihood of its ground truth is not finite"
    if all(value is None for value in answers.nats):  # none was computed (by a server), or average_nats() refuses all
        return []
    return [
        {"prompt_id": item.request.prompt_id, "reason": reason}
        for item, value in zip(held_out, answers.nats, strict=True)
        if item.ground_truth and value is None
    ]


def scored(
    config: EvaluateConfig,
    answers: Answers,
    held_out: Sequence[HeldOut],
    encoder: ChatEncoder,
    skipped: list[Skipped],
) -> list[dict[str, Any]]:
    """Return the scored rows of every temperature and sample in turn, in the order of the prompts. Responses that cannot be
    scored are added to ``skipped``.
    """
    from spin.alignment.evaluation.responses import scored_rows
    from spin.alignment.rewards import PAIRWISE, make_scorer

    settings = config.scorers[config.metric]
    scorer = make_scorer(replace(settings, score_reference=settings.name in PAIRWISE))
    rows: list[dict[str, Any]] = []
    try:
        for temperature, found in zip(config.temperatures, answers.responses, strict=True):
            for index, responses in enumerate(zip(*found, strict=True)):
                texts = [
                    encoder.response_text(response.token_ids, item.chat_template_kwargs)
                    for item, response in zip(held_out, responses, strict=True)
                ]
                rows += scored_rows(
                    *(config.model, temperature, held_out, responses, texts, scorer, skipped, config.group_by),
                    sample_index=index,
                )
    finally:
        scorer.close()
    known = {item.request.prompt_id: value for item, value in zip(held_out, answers.nats, strict=True)}
    return [row | {"nats": known[row["prompt_id"]]} for row in rows]


def compare(
    config: EvaluateConfig, rows: list[dict[str, Any]], held_out: Sequence[HeldOut], baselines: Sequence[Baseline]
) -> None:
    """Add the probability to beat each baseline to the rows of the first temperature."""
    from spin.alignment.evaluation.judged import judge_rows
    from spin.alignment.rewards import make_scorer

    if not baselines:
        return
    prompts = {item.request.prompt_id: item for item in held_out}
    own = [row for row in rows if row["temperature"] == config.temperatures[0]]
    by = config.win_rate_by
    scorer = None if by is None else make_scorer(config.scorers[by])
    try:
        for baseline in baselines:
            judge_rows(own, prompts, baseline, scorer)
    finally:
        if scorer is not None:
            scorer.close()


def averages(config: EvaluateConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the averages over the rows of each temperature, with ``group_by`` also those of each group, and the first few
    prompts with their (first) responses.

    Raises:
        InputError: the metric failed on every response, or no log-likelihood is finite.
    """
    from spin.alignment.evaluation.averages import average_groups, average_nats, average_responses
    from spin.alignment.generation import find_backend
    from spin.alignment.rewards import find_answer

    names = [f"{temperature:g}" for temperature in config.temperatures]
    parts = {
        name: [row for row in rows if row["temperature"] == temperature]
        for name, temperature in zip(names, config.temperatures, strict=True)
    }
    firsts = [[row for row in part if row["sample_index"] == 0][: config.samples] for part in parts.values()]
    samples = [
        {
            "prompt_id": some[0]["prompt_id"],
            "prompt": some[0]["prompt"],
            "ground_truth": some[0]["ground_truth"],
            "responses": {name: row["response"] for name, row in zip(names, some, strict=True)},
        }
        for some in zip(*firsts, strict=True)
    ]
    answer = find_answer(config.metric)
    return {
        "temperatures": {name: average_responses(part, answer) for name, part in parts.items()},
        **({} if config.group_by is None else {"groups": average_groups(parts, answer)}),
        **({} if find_backend(config.backend).needs_server else average_nats(parts[names[0]])),
        "samples": samples,
    }


def win_rates(config: EvaluateConfig, rows: Sequence[dict[str, Any]], baselines: Sequence[Baseline]) -> dict[str, Any]:
    """Return ``win_rates`` by name of the baseline; nothing without baselines."""
    from spin.alignment.evaluation.judged import win_rate_of

    temperature = config.temperatures[0]
    own = [row for row in rows if row["temperature"] == temperature]
    found = {}
    for baseline in baselines:
        stored = baseline.responses.by_temperature.get(f"{temperature:g}", {})
        others = {name: baseline.responses.all_of(f"{temperature:g}", name) for name in stored}
        rate = win_rate_of(own, others, baseline.name)
        if rate is not None:
            by = config.win_rate_by or config.metric
            found[baseline.name] = {"by": by, "temperature": f"{temperature:g}", **rate.as_row()}
    return {"win_rates": found} if baselines else {}


def resolved_tasks(config: EvaluateConfig) -> Callable[[], dict[str, Any]] | None:
    """Return what runs the tasks of lm-evaluation-harness, which are found first; None without any.

    Raises:
        InputError: the package is not installed, or it has no such task.
    """
    if not config.tasks:
        return None
    from spin.alignment.evaluation.answers import own_place
    from spin.alignment.evaluation.harness import find_tasks, run_tasks

    if own_place().count > 1:
        raise InputError(
            "tasks are run by one process: start the evaluation without accelerate launch, or remove the tasks"
        )
    tasks = find_tasks(config)
    return lambda: run_tasks(config, tasks)


def write(
    config: EvaluateConfig, rows: list[dict[str, Any]], made: Provenance, result: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the responses, then the result with their hash, and say the main numbers; return the result."""
    from spin.alignment.core.files import write_json_atomic
    from spin.alignment.core.provenance import hash_file
    from spin.alignment.data.held_out_rows import describe_skipped
    from spin.alignment.evaluation.responses import responses_path, write_responses
    from spin.alignment.evaluation.result_cache import keep_result

    stored = responses_path(config.output_file)
    write_responses(stored, rows, made)
    result = {**result, "responses_hash": hash_file(stored)}
    write_json_atomic(config.output_file, result)
    keep_result(config, result["key"], result)
    for line in describe_skipped(result["skipped"]):
        say_error(line)
    exact = ", ".join(f"T={name} {values['exact']:.3f}" for name, values in result["temperatures"].items())
    nll = f"; NLL of the ground truth {result['nll']:.4f} nats per token" if "nll" in result else ""
    say(f"{config.model}: {config.metric} {exact}{nll}")
    for name, found in result.get("win_rates", {}).items():
        say(
            f"  wins against {name} ({found['by']}): {found['win_rate']:.1%}, at equal lengths {found['lc_win_rate']:.1%}, ties "
            f"{found['tie_rate']:.1%} of {found['prompts']} prompts"
        )
    for name, task in result.get("tasks", {}).items():
        say(f"  {name} ({task['shots']}-shot): {task['metric']} {task['value']:.4f}")
    return result
