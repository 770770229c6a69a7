"""Step 1.5 with scores: labels on generated rows, pairs by pairing, counts, and everything that is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from spin.alignment.core.parquet import open_parquet
from spin.alignment.core.provenance import read_provenance
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.data.config import DataConfig
from spin.alignment.data.preferences import load_preferences, mix_preferences
from spin.alignment.pairs.counts import read_counts
from spin.alignment.rewards import GROUP_SCORERS, GroupLabels
from spin.alignment.training import encode_rows
from tests.helpers import char_tokenizer
from tests.helpers.gathering import gather, own_prompts, record, refusal, row, write
from tests.helpers.training import encode_split

SAMPLES = 4
SCORER = "tests.programs.test_convert_scored:quality"


def quality(prompt: str, response: str, reference: str) -> float:
    """Prompt 3 ties; elsewhere a higher sample is better, and the ground truth ("right") worth 1.5."""
    if response == "right":
        return 1.5
    return 0.0 if prompt == "3?" else float(response.split()[-1])


def broken(prompt: str, response: str, reference: str) -> float:
    return math.nan if (prompt, response) == ("4?", "wrong 2") else 0.0


class Preferences:
    """A preference model: sample 0 beats all others by 0.8, others are even; it fails on sample 3 of prompt 1."""

    closed = 0

    def __init__(self, settings):
        self.settings = settings

    def label(self, groups):
        return [self._label(group) for group in groups]

    def _label(self, group):
        size = len(group.responses)
        matrix = [
            [0.5 if i == k or 0 not in (i, k) else 0.8 if i == 0 else 0.2 for k in range(size)] for i in range(size)
        ]
        scores = [0.0] * size
        if group.prompt_id == "p1":
            scores[3] = None
        return GroupLabels(scores, matrix)

    def close(self):
        Preferences.closed += 1


class Contradiction(Preferences):
    def _label(self, group):
        labels = super()._label(group)
        labels.win_probs[1][2] = 0.9
        return labels


@pytest.fixture
def models(monkeypatch):
    monkeypatch.setitem(GROUP_SCORERS, "preferences", Preferences)
    monkeypatch.setitem(GROUP_SCORERS, "contradiction", Contradiction)


def write_samples(folder: Path, samples: int = SAMPLES, **changes) -> Path:
    for number in range(3):
        rows = [row(prompt, sample, **changes) for prompt in own_prompts(number) for sample in range(samples)]
        write(folder, number, rows, record(number, samples))
    return folder


@pytest.fixture
def generated(tmp_path):
    return write_samples(tmp_path / "in")


def convert(folder, out, *flags):
    code, _, errors = gather(folder, out, *flags)
    assert code == 0, errors
    counts = read_counts(out / "train_prefs.counts.json")
    return load_preferences(str(out), "train").to_list(), counts


def answers(pair):
    return pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]


def test_best_against_worst(generated, tmp_path):
    pairs, counts = convert(generated, tmp_path / "out", "--pairing", "best_vs_worst", "--scorer", SCORER)
    assert [pair["prompt_id"] for pair in pairs] == ["p0", "p1", "p2", "p4", "p5"]
    for pair in pairs:
        assert answers(pair) == ("wrong 3", "wrong 0")
        assert (pair["chosen_token_ids"], pair["rejected_token_ids"]) == ([3, 2], [0, 2])
        assert (pair["chosen_score"], pair["rejected_score"], pair["sample_index"]) == (3.0, 0.0, 0)
        assert (
            pair["chosen"][:-1] == pair["rejected"][:-1] == [{"role": "user", "content": pair["prompt_id"][1:] + "?"}]
        )
    assert counts == {
        "rows": 24,
        "failed": 0,
        "ties": 1,
        "identical": 0,
        "truncated": 0,
        "dropped": 0,
        "skipped": 0,
        "written": 5,
    }


def test_scores_are_float64_and_the_record_names_the_scorer(generated, tmp_path):
    convert(generated, tmp_path / "out", "--pairing", "win_rate", "--scorer", SCORER)
    (path,) = (tmp_path / "out").glob("train_prefs-*.parquet")
    schema = pq.read_schema(path)
    for name in ("score", "win_prob", "pair_win_prob"):
        assert str(schema.field(f"chosen_{name}").type) == str(schema.field(f"rejected_{name}").type) == "double"
    made = read_provenance(open_parquet(path).schema_arrow, path).extra
    assert (made["pairing"], made["scorer"]) == ("win_rate", SCORER)
    assert len(made["scorer_module_tests.programs.test_convert_scored"]) > 8


def test_win_rates_of_scores(generated, tmp_path):
    pairs, _ = convert(generated, tmp_path / "out", "--pairing", "win_rate", "--scorer", SCORER)
    # scores 0 1 2 3: mean of sigmoid(3), sigmoid(2), sigmoid(1) and 1/2
    wanted = (sum(1 / (1 + math.exp(-gap)) for gap in (1, 2, 3)) + 0.5) / 4
    for pair in pairs:
        assert (pair["chosen_win_prob"], pair["rejected_win_prob"]) == pytest.approx((wanted, 1 - wanted), rel=1e-14)
        assert pair["chosen_pair_win_prob"] == pytest.approx(1 / (1 + math.exp(-3)), rel=1e-14)


def test_written_labels_reach_the_encoded_pairs(generated, tmp_path, monkeypatch):
    pairs, _ = convert(generated, tmp_path / "out", "--pairing", "win_rate", "--scorer", SCORER)
    mixed = mix_preferences({str(tmp_path / "out"): 1.0}, ["train_prefs"], seed=0)["train"]
    config = DataConfig(dataset_mixer={"x": 1.0}, max_length=64, max_prompt_length=32)
    for loss, column in (("sppo", "win_prob"), ("sppo_single", "pair_win_prob")):
        # The fixture's ids are counters, not the ids of its texts.
        monkeypatch.setattr(encode_rows, "check_stored_ids", lambda *_: None)
        encoded, dropped = encode_split(mixed, ChatEncoder(char_tokenizer()), config, loss)
        assert len(encoded) == 5 and not dropped
        assert encoded[0][f"chosen_{column}"] == pairs[0][f"chosen_{column}"] > 0.5
        assert (encoded[0]["chosen_ids"], encoded[0]["rejected_ids"]) == ([3, 2], [0, 2])


def test_a_preference_model_and_its_failures(generated, tmp_path, models):
    before = Preferences.closed
    pairs, counts = convert(generated, tmp_path / "out", "--pairing", "win_rate", "--scorer", "preferences")
    assert (counts["failed"], counts["ties"], counts["written"]) == (1, 0, 6)
    # the best: (1/2 + 3 * 0.8) / 4, each other: (0.2 + 3 / 2) / 4; of prompt 1, three are left
    for pair in pairs:
        others = 2 if pair["prompt_id"] == "p1" else 3
        assert answers(pair) == ("wrong 0", "wrong 1")
        assert pair["chosen_win_prob"] == pytest.approx((0.5 + others * 0.8) / (others + 1), rel=1e-14)
        assert pair["rejected_win_prob"] == pytest.approx((0.2 + others * 0.5) / (others + 1), rel=1e-14)
        assert (pair["chosen_pair_win_prob"], pair["rejected_pair_win_prob"]) == pytest.approx((0.8, 0.2))
    assert Preferences.closed == before + 1


def test_every_sample(generated, tmp_path):
    pairs, counts = convert(generated, tmp_path / "out", "--pairing", "every_sample", "--scorer", SCORER)
    assert len(pairs) == counts["written"] == 12 and counts["ties"] == 0
    assert [pair["sample_index"] for pair in pairs[:2]] == [1, 3]
    baseline = math.log(sum(math.exp(score) for score in range(4)) / 4)
    assert [pairs[0][f"{half}_reward"] for half in ("chosen", "rejected")] == pytest.approx([-baseline, 1 - baseline])
    tied = [pair for pair in pairs if pair["prompt_id"] == "p3"]
    assert [(pair["chosen_reward"], pair["rejected_reward"]) for pair in tied] == [(0.0, 0.0)] * 2


def test_responses_without_a_partner_are_counted(generated, tmp_path, models):
    flags = ("--pairing", "every_sample", "--scorer", "preferences")
    pairs, counts = convert(generated, tmp_path / "out", *flags)
    # The scorer fails on one response to prompt 1: of the three others, the last is left over.
    assert (counts["failed"], counts["unpaired"], counts["written"]) == (1, 1, 11)
    assert [pair["sample_index"] for pair in pairs if pair["prompt_id"] == "p1"] == [1]


def test_the_best_against_the_truth(tmp_path):
    generated = write_samples(tmp_path / "in", 2)
    pairs, _ = convert(generated, tmp_path / "out", "--pairing", "best_vs_ground_truth", "--scorer", SCORER)
    # own responses are worth 0 and 1, the truth 1.5
    assert {answers(pair) for pair in pairs} == {("right", "wrong 1"), ("right", "wrong 0")}
    assert {pair["chosen_score"] for pair in pairs} == {1.5} and len(pairs) == 6
    assert pairs[0]["chosen_token_ids"] is None and pairs[0]["rejected_token_ids"] == [1, 2]


def test_best_against_random_is_the_same_every_time(generated, tmp_path):
    flags = ("--pairing", "best_vs_random", "--scorer", SCORER)
    first, _ = convert(generated, tmp_path / "one", *flags)
    assert first == convert(generated, tmp_path / "two", *flags)[0]
    assert {answers(pair)[0] for pair in first} == {"wrong 3"} and len({answers(pair)[1] for pair in first}) > 1


def test_a_chosen_response_that_was_cut_is_counted(tmp_path):
    for number in range(3):
        rows = [row(prompt, sample) for prompt in own_prompts(number) for sample in range(3)]
        for each in rows:
            each["rejected_finish_reason"] = "length" if each["sample_index"] == 2 else "stop"
        write(tmp_path / "in", number, rows, record(number, 3))
    flags = ("--pairing", "best_vs_worst", "--scorer", SCORER)
    _, counts = convert(tmp_path / "in", tmp_path / "out", *flags)
    assert (counts["truncated"], counts["written"]) == (5, 5)
    assert "5 truncated, 1 prompts tied" in refusal(tmp_path / "in", tmp_path / "none", *flags, "--truncated", "drop")


def test_a_chosen_response_of_eos_alone_can_be_loaded(tmp_path):
    for number in range(3):
        rows = [row(prompt, sample) for prompt in own_prompts(number) for sample in range(2)]
        for each in rows:
            if each["sample_index"] == 1:
                each["rejected"] = [each["rejected"][0], {"role": "assistant", "content": ""}]
        write(tmp_path / "in", number, rows, record(number, 2))
    flags = ("--pairing", "best_vs_worst", "--scorer", "tests.programs.test_convert_scored:shortest")
    pairs, _ = convert(tmp_path / "in", tmp_path / "out", *flags)
    assert {answers(pair) for pair in pairs} == {("", "wrong 0")}


def shortest(prompt: str, response: str, reference: str) -> float:
    return -float(len(response))


def test_prompts_without_truth_are_scored_against_each_other(tmp_path):
    generated = write_samples(tmp_path / "in", chosen=None)
    pairs, _ = convert(generated, tmp_path / "out", "--pairing", "best_vs_worst", "--scorer", SCORER)
    assert len(pairs) == 5 and answers(pairs[0]) == ("wrong 3", "wrong 0")


def test_a_second_call_finds_the_pairs_and_another_scorer_does_not(generated, tmp_path):
    flags = ("--pairing", "best_vs_worst", "--scorer", SCORER)
    convert(generated, tmp_path / "out", *flags)
    assert "already complete" in gather(generated, tmp_path / "out", *flags)[1]
    code, _, errors = gather(generated, tmp_path / "out", "--pairing", "best_vs_worst", "--scorer", "length_penalty")
    assert code == 2 and "extra.scorer" in errors


SCORED = ("--scorer", SCORER)
REFUSED = {
    "no scorer": (("--pairing", "best_vs_worst"), "pairing best_vs_worst compares scores: pass --scorer with one of"),
    "needless scorer": (SCORED, f"scorer is {SCORER}, but pairing ground_truth reads no scores: remove it"),
    "needless model": (("--scorer_model", "m"), "scorer_model is m, but pairing ground_truth reads no scores"),
    "needless address": (("--base_url", "http://h:1"), "base_url is http://h:1, but pairing ground_truth"),
    "unknown scorer": (("--pairing", "win_rate", "--scorer", "rewards"), "unknown scorer 'rewards': choose one of"),
    "no module": (("--pairing", "win_rate", "--scorer", "nowhere:score"), "module nowhere of scorer 'nowhere:score'"),
    "model of a rule": (
        ("--pairing", "win_rate", "--scorer", "math_answer", "--scorer_model", "m"),
        "math_answer does not read scorer_model",
    ),
    "no model": (("--pairing", "win_rate", "--scorer", "reward_model"), "the scorer reward_model needs a model"),
    "batch size": (
        ("--pairing", "win_rate", *SCORED, "--scorer_batch_size", "0"),
        "scorer_batch_size is 0: set it to 1 or more",
    ),
    "not finite": (
        ("--pairing", "best_vs_worst", "--scorer", "tests.programs.test_convert_scored:broken"),
        "returned nan on prompt p4, sample 2",
    ),
    "all tied": (
        ("--pairing", "best_vs_worst", "--scorer", "exact_match"),
        "no pair of the split 'train' remains (0 identical, 0 truncated, 6 prompts tied, 0 scores failed)",
    ),
    "contradiction": (
        ("--pairing", "win_rate", "--scorer", "contradiction"),
        "samples 1 and 2 of prompt p0 are 0.9 and 0.5: they must add up to 1",
    ),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_defects_are_named_and_nothing_is_written(generated, tmp_path, models, flags, message):
    assert message in refusal(generated, tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("pairing", "samples", "message"),
    [
        ("best_vs_worst", 1, "but there is 1: sample with --num_samples 2 or more"),
        ("every_sample", 1, "but there is 1: sample with --num_samples 2 or more"),
    ],
)
def test_too_few_samples_are_refused_before_a_row_is_read(tmp_path, monkeypatch, pairing, samples, message):
    generated = write_samples(tmp_path / "in", samples)
    monkeypatch.setattr(
        "spin.alignment.pairs.fraction_file.Fraction.batches", lambda self: pytest.fail("a row was read")
    )
    assert message in refusal(generated, tmp_path / "out", "--pairing", pairing, *SCORED)


@pytest.mark.parametrize("pairing", ["ground_truth", "best_vs_ground_truth"])
def test_a_pairing_with_the_truth_names_the_first_prompt_without_one(tmp_path, monkeypatch, pairing):
    generated = tmp_path / "in"
    for number in range(3):
        rows = [row(prompt, sample) for prompt in own_prompts(number) for sample in range(2)]
        for each in rows:
            if each["prompt_id"] in ("p3", "p4"):
                each["chosen"] = None
        write(generated, number, rows, record(number, 2))
    flags = SCORED if pairing != "ground_truth" else ()
    message = refusal(generated, tmp_path / "out", "--pairing", pairing, *flags)
    assert f"prompt p3 has no ground truth, which pairing {pairing} compares with: add it and generate again" in message


@pytest.mark.parametrize("scorer", ["exact_match", "math_answer"])
def test_a_rule_that_compares_with_the_truth_names_the_prompt_without_one(tmp_path, scorer):
    generated = write_samples(tmp_path / "in", chosen=None)
    message = refusal(generated, tmp_path / "out", "--pairing", "best_vs_worst", "--scorer", scorer)
    assert f"scorer {scorer} compares with the ground truth, but prompt p0 has none" in message


def test_an_error_leaves_earlier_pairs_as_they_were(generated, tmp_path):
    flags = ("--pairing", "best_vs_worst")
    before, _ = convert(generated, tmp_path / "out", *flags, *SCORED)
    code, _, errors = gather(
        generated, tmp_path / "out", *flags, "--scorer", "tests.programs.test_convert_scored:broken", "--overwrite"
    )
    assert code == 2 and "returned nan" in errors
    assert load_preferences(str(tmp_path / "out"), "train").to_list() == before


def test_batches_of_many_prompts_stay_apart(tmp_path, monkeypatch):
    """Record batches of two prompts: labels and pairs never cross a border."""
    monkeypatch.setattr("spin.alignment.pairs.fraction_file._BATCH_ROWS", 2 * SAMPLES)
    rows = [row(prompt, sample) for prompt in range(6) for sample in reversed(range(SAMPLES))]
    from tests.helpers.gathering import id_sum

    made = replace(
        record(0, SAMPLES), frac_len=0, extra={"fraction_ids": id_sum(range(6)), "all_ids": id_sum(range(6))}
    )
    write(tmp_path / "in", 0, rows, made)
    pairs, _ = convert(tmp_path / "in", tmp_path / "out", "--pairing", "best_vs_worst", *SCORED)
    assert [(pair["prompt_id"], *answers(pair)) for pair in pairs] == [
        (f"p{prompt}", "wrong 3", "wrong 0") for prompt in (0, 1, 2, 4, 5)
    ]
