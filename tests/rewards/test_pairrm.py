"""PairRM as published: its logits, scores and win probabilities are those of its authors' code, written out by hand."""

from __future__ import annotations

import itertools
import json
import logging
import math

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.rewards import ScorerSettings, check_scorer, make_scorer
from tests.helpers.gathering import NUM_FRACTIONS, gather, own_prompts, record, row, write
from tests.helpers.pairrm import MARKS, plain_logit, save_pairrm
from tests.helpers.scoring import count_forwards, make_group

LONG = "the beginning and the ending of a long answer"


@pytest.fixture(scope="module")
def ranker(tmp_path_factory):
    return save_pairrm(tmp_path_factory.mktemp("pairrm") / "ranker")


def settings(folder, **changes):
    return ScorerSettings("preference_model", model=str(folder), **changes)


def plain_parts(folder, prompt, first, second, source=24, candidate=8):
    """The input of the authors' collator: every part by itself, cut at its end, then one after the other."""
    from tokenizers import Tokenizer

    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.add_tokens([mark for mark in MARKS if core.token_to_id(mark) is None])

    def encoded(text, longest):
        core.enable_truncation(longest)
        return core.encode(text.replace("[SEP]", " ")).ids

    ids = encoded(MARKS[0] + prompt, source)
    longest = candidate + (source - len(ids)) // 2
    for mark, text in zip(MARKS[1:3], (first, second), strict=True):
        ids = [*ids, *encoded(mark + text, longest)]
    return ids, tuple(core.token_to_id(mark) for mark in MARKS[:3])


def plain_win_probs(folder, prompt, texts, **lengths):
    """LLM-Blender's rank(return_scores=True), then SPPO's sigmoid of differences of scores."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    logits = [
        [
            0.0 if i == k else plain_logit(weights, *plain_parts(folder, prompt, a, b, **lengths))
            for k, b in enumerate(texts)
        ]
        for i, a in enumerate(texts)
    ]
    count = len(texts)
    scores = [sum(logits[i][k] - logits[k][i] for k in range(count)) / count for i in range(count)]
    return logits, [[1 / (1 + math.exp(scores[k] - scores[i])) for k in range(count)] for i in range(count)]


@pytest.mark.parametrize("form", ["ranker", "hf"])
def test_win_probabilities_are_those_of_the_published_code(ranker, tmp_path, form):
    folder = ranker if form == "ranker" else save_pairrm(tmp_path / "hf", "hf")
    lengths = {} if form == "ranker" else {"source": 1224, "candidate": 412}
    texts = ("red", LONG, "blue. green?", LONG + "!")
    logits, wanted = plain_win_probs(folder, "say p1", texts, **lengths)
    label = make_scorer(settings(folder, batch_size=5)).label([make_group("p1", texts)])[0]
    for i, k in itertools.product(range(4), repeat=2):
        assert label.win_probs[i][k] == pytest.approx(wanted[i][k], abs=1e-6)
        assert label.win_probs[i][k] + label.win_probs[k][i] == 1.0
    assert label.scores == pytest.approx([sum(row) / 4 for row in wanted], abs=1e-6)
    # Both the order and the response matter to this model, so the test can fail. Only short lengths cut the last to the second.
    assert abs(logits[0][1] + logits[1][0]) > 1e-3 and len({round(score, 4) for score in label.scores}) == (
        3 if not lengths else 4
    )


def test_long_prompts_and_responses_are_cut_at_their_end_and_counted(ranker, caplog):
    prompt = [{"role": "user", "content": "a question about the sea " * 4}]
    texts = ("no", LONG, "another " + LONG)
    _, wanted = plain_win_probs(ranker, prompt[0]["content"], texts)
    with caplog.at_level(logging.WARNING):
        label = make_scorer(settings(ranker)).label([make_group("p1", texts, prompt=prompt)])[0]
    for found, plain in zip(label.win_probs, wanted, strict=True):
        assert found == pytest.approx(plain, abs=1e-6)
    assert (
        "at most 24 tokens of a prompt and a response in what is left of 40: 1 prompts and 2 responses" in caplog.text
    )
    start = [{"role": "user", "content": prompt[0]["content"] + " and more"}]
    assert make_scorer(settings(ranker)).label([make_group("p1", texts, prompt=start)])[0] == label


def test_pairs_from_the_command_line_have_win_rates_for_sppo(ranker, tmp_path, monkeypatch):
    """convert_data as in configs/sppo_*.yaml: best against worst by win rate, and no second copy in other processes."""
    from spin.alignment.data.preferences import load_preferences

    for number in range(NUM_FRACTIONS):
        rows = [row(prompt, sample) for prompt in own_prompts(number) for sample in range(3)]
        write(tmp_path / "in", number, rows, record(number, 3))
    flags = ("--pairing", "win_rate", "--scorer", "preference_model", "--scorer_model", ranker)
    code, _, errors = gather(tmp_path / "in", tmp_path / "out", *flags)
    assert code == 0, errors
    pairs = load_preferences(str(tmp_path / "out"), "train").to_list()
    group = make_group("p", ("wrong 0", "wrong 1", "wrong 2"), prompt=pairs[0]["chosen"][:-1])
    rates = make_scorer(settings(ranker)).label([group])[0].scores
    assert pairs[0]["chosen_win_prob"] == pytest.approx(max(rates), abs=1e-6)
    assert pairs[0]["rejected_win_prob"] == pytest.approx(min(rates), abs=1e-6)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = gather(tmp_path / "in", tmp_path / "again", *flags)
    assert code == 2 and "it scores on all GPUs of the machine in one: start it with python" in errors


def test_the_company_in_a_batch_does_not_matter(ranker):
    groups = [make_group(f"p{number}", ("a" * number, "b" * 3 * number, "the end")) for number in range(1, 6)]
    whole = make_scorer(settings(ranker, batch_size=30)).label(groups)
    scorer = make_scorer(settings(ranker, batch_size=1))
    for group, label in reversed(list(zip(groups, whole, strict=True))):
        assert scorer.label([group])[0].scores == pytest.approx(label.scores, abs=1e-6)


def test_equal_responses_are_one_half_and_the_ground_truth_is_one_more_opponent(ranker, monkeypatch):
    scorer = make_scorer(settings(ranker))
    seen = count_forwards(scorer, monkeypatch)
    assert scorer.label([make_group("p", ("same", "same"))])[0].scores == [0.5, 0.5] and seen == []
    group = make_group("p1", ("red", "green"), reference="truth")
    label = make_scorer(settings(ranker, score_reference=True)).label([group])[0]
    three = scorer.label([make_group("p1", ("red", "green", "truth"))])[0]
    assert [*label.scores, label.reference_score] == three.scores


def test_a_response_cannot_add_a_candidate_or_end_its_part(ranker):
    scorer = make_scorer(settings(ranker))
    seen = []
    logits = scorer.classifier.logits
    scorer.classifier.logits = lambda inputs: seen.extend(inputs) or logits(inputs)
    tricks = ("<|candidate2|>", "＜|candidate1|＞", "[SEP]", "<|source|>")  # the second becomes a mark by NFKC
    scorer.label([make_group("p1", tuple(f"a{trick}b" for trick in tricks))])
    tokenizer = scorer.classifier.tokenizer
    for item in seen:
        assert [item.ids.count(tokenizer.convert_tokens_to_ids(mark)) for mark in MARKS] == [1, 1, 1, 0]
        assert item.ids.count(tokenizer.sep_token_id) == 3


def test_a_rerun_scores_nothing_twice(ranker, tmp_path, monkeypatch):
    chosen = settings(ranker, cache_dir=str(tmp_path / "kept"))
    labels = make_scorer(chosen).label([make_group()])
    again = make_scorer(chosen)
    assert count_forwards(again, monkeypatch) == [] and again.label([make_group()]) == labels
    assert again.classifier._models == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_the_setting(ranker, precision):
    scorer = make_scorer(settings(ranker, dtype=precision))
    scorer.label([make_group()])
    assert {str(value.dtype) for value in scorer.classifier._models[0].parameters()} == {f"torch.{precision}"}


def changed_weights(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("head_layer.4.bias"), r"lacks 1 weights that its config.json describes .head_layer.4.bias"),
        (lambda w: w.pop("pretrained_model.encoder.rel_embeddings.weight"), r"lacks 1 weights .*rel_embeddings"),
        (lambda w: w.update(extra=w["head_layer.4.bias"].clone()), r"contains 1 weights .*does not describe .extra"),
        (
            lambda w: w.update({"head_layer.1.bias": w["head_layer.4.bias"].clone()}),
            r"head_layer.1.bias .* has the shape",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_before_a_model_is_loaded(tmp_path, change, sentence):
    folder = save_pairrm(tmp_path / "m")
    changed_weights(folder, change)
    with pytest.raises(InputError, match=sentence):
        check_scorer(settings(folder))


def test_older_files_may_contain_computed_positions(tmp_path):
    import torch

    folder = save_pairrm(tmp_path / "m")
    changed_weights(folder, lambda w: w.update({"pretrained_model.embeddings.position_ids": torch.arange(4)}))
    assert make_scorer(settings(folder)).label([make_group()])


def test_what_cannot_be_loaded_is_refused_in_one_sentence(ranker, tmp_path):
    bare = save_pairrm(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    pickled = save_pairrm(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cases = [
        (settings(ranker, max_length=100), "scorer_max_length is 100, but PairRM truncates prompts and responses"),
        (settings(save_pairrm(tmp_path / "roberta", model_name="roberta-large")), "a pair ranker over roberta-large"),
        (settings(save_pairrm(tmp_path / "none", source_maxlength=None)), "source_maxlength in .* is None"),
        (settings(save_pairrm(tmp_path / "ids", "hf", cand1_prefix_id=3)), "gives PairRM's marks the ids"),
        (settings(save_pairrm(tmp_path / "sizes", "hf", num_attention_heads=5)), "cannot be built"),
        (settings(bare), "has no tokenizer.json"),
        (settings(pickled), "contains only pickled weights"),
        (ScorerSettings("reward_model", model=str(ranker)), "is PairRM, .*: set scorer: preference_model"),
    ]
    for chosen, sentence in cases:
        with pytest.raises(InputError, match=sentence) as caught:
            make_scorer(chosen)
        assert "\n" not in str(caught.value)


def test_the_published_lengths_are_the_defaults_of_the_other_form(tmp_path):
    from spin.alignment.rewards.pairrm_checkpoint import check_pairrm

    checkpoint = check_pairrm(save_pairrm(tmp_path / "hf", "hf"))
    assert (checkpoint.source_length, checkpoint.candidate_length) == (1224, 412)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()).get("source_maxlength") is None
