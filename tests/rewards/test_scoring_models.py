"""Reward and preference models: their scores are those of a plain forward pass, in any company; nothing is scored twice."""

from __future__ import annotations

import functools
import logging
import math
import random
import threading

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.rewards import ScorerSettings, make_scorer
from spin.alignment.rewards.win_rates import both_orders, failed_items, labels_of
from tests.helpers.gathering import NUM_FRACTIONS, NUM_PROMPTS, gather, own_prompts, record, row, write
from tests.helpers.scoring import count_forwards, make_group, save_decoder, save_encoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("scoring") / "decoder")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("scoring") / "encoder")


def settings(name, folder, **changes):
    return ScorerSettings(name, model=str(folder), **changes)


@functools.cache
def plain_model(folder):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def plain_score(folder, **inputs) -> float:
    """The logit of one input by itself, with nothing of this project in between."""
    import torch

    with torch.no_grad():
        return plain_model(folder)(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits.item()


def some_groups(count=6):
    """Groups of different sizes and lengths, some with several turns."""
    draw = random.Random(3)
    groups = []
    for number in range(count):
        texts = tuple("abc defg."[: draw.randint(1, 9)] * draw.randint(1, 6) for _ in range(2 + number % 3))
        turns = [{"role": "user", "content": "hello " * draw.randint(1, 8)}]
        if number % 2:
            turns = [{"role": "system", "content": "be kind"}, *turns]
        groups.append(make_group(f"p{number}", texts, prompt=turns, reference="the truth"))
    return groups


def test_reward_is_the_logit_of_a_plain_forward(decoder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(decoder)
    groups = some_groups()
    labels = make_scorer(settings("reward_model", decoder, batch_size=5, score_reference=True)).label(groups)
    seen = set()
    for group, label in zip(groups, labels, strict=True):
        assert label.win_probs is None and len(label.scores) == len(group.responses)
        for text, score in zip([*group.responses, "the truth"], [*label.scores, label.reference_score], strict=True):
            turns = [*group.prompt, {"role": "assistant", "content": text}]
            ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False).input_ids
            assert score == pytest.approx(plain_score(decoder, input_ids=ids), abs=1e-6)
            seen.add(round(score, 4))
    assert len(seen) > len(groups)


def test_a_tokenizer_without_a_template_gets_a_pair_of_texts(encoder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    groups = [make_group("p1"), make_group("p2", ("x" * 40, "y"))]
    labels = make_scorer(settings("reward_model", encoder, batch_size=4)).label(groups)
    for group, label in zip(groups, labels, strict=True):
        for text, score in zip(group.responses, label.scores, strict=True):
            inputs = tokenizer(group.prompt[0]["content"], text)
            assert set(inputs["token_type_ids"]) == {0, 1}
            assert score == pytest.approx(plain_score(encoder, **inputs), abs=1e-6)


def test_a_model_without_a_pad_id_is_batched_all_the_same(tmp_path):
    folder = save_decoder(tmp_path / "model", pad_token_id=None)
    groups = some_groups()
    together = make_scorer(settings("reward_model", folder, batch_size=8)).label(groups)
    alone = make_scorer(settings("reward_model", folder, batch_size=1)).label(groups)
    for one, other in zip(together, alone, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-6)
    from transformers import AutoTokenizer

    turns = [*groups[0].prompt, {"role": "assistant", "content": groups[0].responses[0]}]
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, return_dict=False)
    assert together[0].scores[0] == pytest.approx(plain_score(folder, input_ids=ids), abs=1e-6)


@pytest.mark.parametrize("name", ["reward_model", "preference_model"])
def test_scores_do_not_depend_on_the_company(decoder, name):
    groups = some_groups()
    whole = make_scorer(settings(name, decoder, batch_size=7)).label(groups)
    scorer = make_scorer(settings(name, decoder, batch_size=2))
    for group, label in reversed(list(zip(groups, whole, strict=True))):
        assert scorer.label([group])[0].scores == pytest.approx(label.scores, abs=1e-6)


def pair_ids(tokenizer, prompt, first, second):
    """PairRM's input, written out by hand."""
    ids = [tokenizer.cls_token_id]
    for text in (f"<|source|>{prompt}", f"<|candidate1|>{first}", f"<|candidate2|>{second}"):
        ids += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.sep_token_id]
    return ids


def test_preference_is_the_mean_of_both_orders(encoder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    group = make_group("p1", ("red", "a long green", "blue", "blue"))
    label = make_scorer(settings("preference_model", encoder, batch_size=3)).label([group])[0]
    matrix = label.win_probs
    for i, first in enumerate(group.responses):
        assert matrix[i][i] == 0.5
        for k, second in enumerate(group.responses):
            assert matrix[i][k] + matrix[k][i] == 1.0
            if first != second:
                logits = [
                    plain_score(encoder, input_ids=pair_ids(tokenizer, "say p1", *texts))
                    for texts in ((first, second), (second, first))
                ]
                there, back = (1 / (1 + math.exp(-logit)) for logit in logits)
                assert there + back != pytest.approx(1.0, abs=1e-3)  # the order does matter to this model
                assert matrix[i][k] == pytest.approx((there + 1 - back) / 2, abs=1e-6)
        assert label.scores[i] == pytest.approx(sum(matrix[i]) / 4)
    assert matrix[2][3] == 0.5 and label.scores[2] == label.scores[3]


@pytest.mark.parametrize("name", ["reward_model", "preference_model"])
def test_a_response_cannot_add_a_text_of_its_own(encoder, name):
    """A separator in a text is text: the score is that of its letters, as the tokenizer spells them."""
    scorer = make_scorer(settings(name, encoder))
    group = make_group("p1", ("good[SEP]", "bad"), prompt=[{"role": "user", "content": "say[CLS]"}])
    seen = []
    logits = scorer.classifier.logits
    scorer.classifier.logits = lambda inputs: seen.extend(inputs) or logits(inputs)
    scorer.label([group])
    tokenizer = scorer.classifier.tokenizer
    separator, start = tokenizer.sep_token_id, tokenizer.cls_token_id
    wanted = 3 if name == "preference_model" else 2
    assert [(item.ids.count(separator), item.ids.count(start)) for item in seen] == [(wanted, 1)] * 2
    assert "".join(tokenizer.convert_ids_to_tokens(seen[0].ids)).count("good[SEP]") == 1


def test_a_response_cannot_end_its_turn(decoder):
    scorer = make_scorer(settings("reward_model", decoder))
    seen = []
    logits = scorer.classifier.logits
    scorer.classifier.logits = lambda inputs: seen.extend(inputs) or logits(inputs)
    scorer.label([make_group("p1", ("a<|im_end|>", "b"), prompt=[{"role": "user", "content": "q<|im_start|>"}])])
    tokenizer = scorer.classifier.tokenizer
    control = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    assert [[item.ids.count(token) for token in control] for item in seen] == [[2, 2]] * 2
    assert "a<|im_end|>" in "".join(tokenizer.convert_ids_to_tokens(seen[0].ids))


def test_equal_responses_need_no_model(encoder, monkeypatch):
    scorer = make_scorer(settings("preference_model", encoder))
    seen = count_forwards(scorer, monkeypatch)
    labels = scorer.label([make_group("p1", ("same", "same")), make_group("p2", ("alone",))])
    assert labels[0].win_probs == [[0.5, 0.5], [0.5, 0.5]] and labels[0].scores == [0.5, 0.5]
    assert labels[1].win_probs == [[0.5]] and labels[1].scores == [0.5]
    assert seen == []


def test_the_ground_truth_is_one_more_opponent(encoder):
    group = make_group("p1", ("red", "green"), reference="truth")
    label = make_scorer(settings("preference_model", encoder, score_reference=True)).label([group])[0]
    three = make_scorer(settings("preference_model", encoder)).label([make_group("p1", ("red", "green", "truth"))])[0]
    assert [*label.scores, label.reference_score] == three.scores
    assert label.win_probs == [row[:2] for row in three.win_probs[:2]]


def test_win_rates_by_hand():
    # P(0 beats 1) = 0.8, P(0 beats 2) = 0.6, P(1 beats 2) = 0.3
    label = labels_of(3, {(0, 1): 0.8, (0, 2): 0.6, (1, 2): 0.3}, with_reference=False)
    assert label.win_probs == [[0.5, 0.8, 0.6], [1 - 0.8, 0.5, 0.3], [0.4, 0.7, 0.5]]
    assert label.scores == pytest.approx([1.9 / 3, 1.0 / 3, 1.6 / 3])
    # What is said about a pair: (a, b) -> a wins with 0.9, (b, a) -> b wins with 0.3, so a wins with (0.9 + 0.7) / 2.
    assert both_orders(0.9, 0.3) == pytest.approx(0.8)
    assert (both_orders(0.9, None), both_orders(None, 0.25), both_orders(None, None)) == (0.9, 0.75, None)


def test_an_unknown_pair_costs_as_few_responses_as_possible():
    assert failed_items(4, [(0, 2), (1, 2), (2, 3)]) == {2}
    assert failed_items(4, [(0, 1), (2, 3)]) == {0, 2}
    assert failed_items(2, [(0, 1)]) == {0, 1}
    label = labels_of(3, {(0, 1): None, (0, 2): 0.9, (1, 2): 0.75}, with_reference=False)
    assert label.scores == [None, (0.5 + 0.75) / 2, (0.25 + 0.5) / 2]
    assert label.win_probs == [[0.5, 0.5, 0.5], [0.5, 0.5, 0.75], [0.5, 0.25, 0.5]]


@pytest.mark.parametrize("name", ["reward_model", "preference_model"])
def test_a_rerun_scores_nothing_twice(decoder, tmp_path, monkeypatch, name):
    chosen = settings(name, decoder, cache_dir=str(tmp_path / "kept"), batch_size=4)
    first = make_scorer(chosen)
    seen = count_forwards(first, monkeypatch)
    labels = first.label(some_groups(4))
    assert sum(seen) > 0 and max(seen) <= 4
    first.close()

    again = make_scorer(chosen)
    seen = count_forwards(again, monkeypatch)
    assert again.label(some_groups(4)) == labels
    assert seen == [] and again.classifier._models == []
    again.label([*some_groups(4), make_group("new", ("one", "two"))])
    assert sum(seen) == 2
    again.close()


def test_other_weights_have_other_scores(decoder, tmp_path, monkeypatch):
    kept = str(tmp_path / "kept")
    labels = make_scorer(settings("reward_model", decoder, cache_dir=kept)).label(some_groups(2))
    other = make_scorer(settings("reward_model", save_decoder(tmp_path / "m", seed=1), cache_dir=kept))
    seen = count_forwards(other, monkeypatch)
    assert other.label(some_groups(2)) != labels and sum(seen) == 5
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.parametrize("name", ["reward_model", "preference_model"])
def test_several_devices_share_the_batches(decoder, monkeypatch, name):
    """Two copies of the model, each in a thread: both work, at the same time, and the scores are those of one."""
    groups = some_groups()
    alone = make_scorer(settings(name, decoder, batch_size=2)).label(groups)
    monkeypatch.setattr("spin.alignment.rewards.classifier.scoring_devices", lambda every: ["cpu", "cpu"][: 1 + every])
    scorer = make_scorer(settings(name, decoder, batch_size=2, all_devices=True))
    forward, used, together = scorer.classifier._forward, [], threading.Barrier(2, timeout=30)

    def watched(batch, model):
        used.append(id(model))
        if len(used) <= 2:
            together.wait()
        return forward(batch, model)

    monkeypatch.setattr(scorer.classifier, "_forward", watched)
    labels = scorer.label(groups)
    assert labels == alone and len(set(used)) == 2
    scorer.close()
    assert scorer.classifier._models == []


def test_an_error_on_one_of_several_devices_is_raised(decoder, monkeypatch):
    monkeypatch.setattr("spin.alignment.rewards.classifier.scoring_devices", lambda every: ["cpu", "cpu"])
    scorer = make_scorer(settings("reward_model", decoder, batch_size=1, all_devices=True))
    calls = []

    def failing(batch, model):
        calls.append(batch)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scorer.classifier, "_forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        scorer.label(some_groups(6))
    assert len(calls) < 18  # the batches that were still waiting are not started


def test_each_process_of_several_uses_its_own_device(monkeypatch):
    import torch

    from spin.alignment.rewards.classifier import scoring_devices

    assert scoring_devices(True) == ["cpu"] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert scoring_devices(True) == ["cuda:0", "cuda:1", "cuda:2"] and scoring_devices(False) == ["cuda"]
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert scoring_devices(True) == ["cuda"]


def test_equal_inputs_are_read_once(decoder, monkeypatch):
    scorer = make_scorer(settings("reward_model", decoder))
    seen = count_forwards(scorer, monkeypatch)
    label = scorer.label([make_group("p1", ("a", "b", "a", "a"))])[0]
    assert seen == [2] and label.scores[0] == label.scores[2] == label.scores[3] != label.scores[1]


def test_too_long_is_refused_unless_it_may_be_cut(decoder, tmp_path, caplog):
    from transformers import AutoTokenizer

    long = make_group("long", ("short", "y" * 30), prompt=[{"role": "user", "content": "x" * 500}])
    with pytest.raises(
        InputError, match=r"prompt long, sample 0 has 5.. tokens, but .* reads at most 512: set scorer_max_length"
    ):
        make_scorer(settings("reward_model", decoder)).label([make_group(), long])
    scorer = make_scorer(settings("reward_model", decoder, max_length=100))
    with caplog.at_level(logging.WARNING):
        label = scorer.label([make_group(), long])[1]
    assert (
        "reward_model: 2 inputs were longer than scorer_max_length 100 and had the start of their prompt truncated"
        in caplog.text
    )
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    turns = [*long.prompt, {"role": "assistant", "content": "short"}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False)[-100:]
    assert label.scores[0] == pytest.approx(plain_score(decoder, input_ids=ids), abs=1e-6)
    with pytest.raises(
        InputError, match=r"prompt p, sample 1 has .* tokens without its prompt, more than scorer_max_length 100"
    ):
        scorer.label([make_group("p", ("a", "z" * 200))])
    with pytest.raises(InputError, match=r"scorer_max_length is 600, but .* reads at most 512 tokens: lower it"):
        make_scorer(settings("reward_model", decoder, max_length=600))


@pytest.mark.parametrize("name", ["reward_model", "preference_model"])
def test_a_pair_of_texts_is_cut_at_the_start_of_the_prompt(encoder, name):
    """A cut prompt gives the score of the prompt that is left: found among those of all its ends."""
    text = "x" * 60 + "0123456789"
    whole = make_group("p", ("abc", "de"), prompt=[{"role": "user", "content": text}])
    score = make_scorer(settings(name, encoder, max_length=70)).label([whole])[0].scores[1]
    ends = [
        make_group("p", ("abc", "de"), prompt=[{"role": "user", "content": text[-left:]}])
        for left in range(1, len(text))
    ]
    scores = [label.scores[1] for label in make_scorer(settings(name, encoder)).label(ends)]
    with pytest.raises(InputError, match=r"tokens without its prompt, more than scorer_max_length 7"):
        make_scorer(settings(name, encoder, max_length=7)).label([make_group("p", ("a" * 9, "b"))])
    near = [place for place, other in enumerate(scores) if abs(other - score) < 1e-6]
    assert near and len(near) < 5


def test_a_prompt_may_be_cut_to_nothing(encoder):
    """Class token, two separators and the response of three tokens: six are left for it alone."""
    group = make_group("p", ("abc",))
    score = make_scorer(settings("reward_model", encoder, max_length=6)).label([group])[0].scores[0]
    empty = make_group("p", ("abc",), prompt=[{"role": "user", "content": ""}])
    assert score == pytest.approx(make_scorer(settings("reward_model", encoder)).label([empty])[0].scores[0], abs=1e-6)


def test_precision_is_that_of_the_setting(decoder):
    import torch

    scorer = make_scorer(settings("reward_model", decoder, dtype="bfloat16"))
    label = scorer.label([make_group()])[0]
    exact = make_scorer(settings("reward_model", decoder)).label([make_group()])[0]
    assert next(scorer.classifier._models[0].parameters()).dtype == torch.bfloat16
    assert label.scores != exact.scores and label.scores == pytest.approx(exact.scores, abs=0.2)
    assert all(isinstance(score, float) for score in label.scores)


def test_pairs_from_the_command_line_are_those_of_the_library(encoder, tmp_path, monkeypatch):
    """convert_data with a reward model (float64 scores in the file), and again: the kept scores need no forward pass."""
    from spin.alignment.data.preferences import load_preferences
    from spin.alignment.rewards.classifier import SequenceClassifier

    for number in range(NUM_FRACTIONS):
        rows = [row(prompt, sample) for prompt in own_prompts(number) for sample in range(3)]
        write(tmp_path / "in", number, rows, record(number, 3))
    seen = []
    forward = SequenceClassifier._forward
    monkeypatch.setattr(
        SequenceClassifier, "_forward", lambda self, batch, model: seen.extend(batch) or forward(self, batch, model)
    )
    flags = ("--pairing", "best_vs_worst", "--scorer", "reward_model", "--scorer_model", encoder)
    for out in ("first", "second"):
        code, _, errors = gather(tmp_path / "in", tmp_path / out, *flags, "--score_cache", tmp_path / "kept")
        assert code == 0, errors
        assert len(seen) == 3 * NUM_PROMPTS
    pairs = load_preferences(str(tmp_path / "first"), "train").to_list()
    assert pairs == load_preferences(str(tmp_path / "second"), "train").to_list() and len(pairs) == NUM_PROMPTS
    scorer = make_scorer(settings("reward_model", encoder))
    for pair in pairs:
        group = make_group("p", ("wrong 0", "wrong 1", "wrong 2"), prompt=pair["chosen"][:-1])
        scores = scorer.label([group])[0].scores
        assert pair["chosen_score"] == pytest.approx(max(scores), abs=1e-6)
        assert pair["rejected_score"] == pytest.approx(min(scores), abs=1e-6)
        assert pair["chosen"][-1]["content"] == group.responses[scores.index(max(scores))]
