"""Prompts, responses and truncation across the chat templates of real model families."""

from __future__ import annotations

import re

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import ChatEncoder, RowRefused, load_tokenizer
from spin.alignment.data.encode_pairs import EncodedPair, encode_pair, truncate_prompt
from tests.helpers import CHATML, char_tokenizer
from tests.helpers.chat_templates import FAMILIES

QUESTION = {"role": "user", "content": "What is 2+3?"}
ANSWER = {"role": "assistant", "content": "It is 5."}
MULTI = [QUESTION, ANSWER, {"role": "user", "content": "Twice that?"}, {"role": "assistant", "content": "10"}]
SYSTEM = {"role": "system", "content": "Be brief."}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def conversations(family):
    yield [QUESTION, ANSWER]
    yield MULTI
    if family.system:
        yield [SYSTEM, *MULTI]


@every_family
def test_training_sees_the_prompt_that_generation_saw(family):
    encoder = ChatEncoder(family.tokenizer())
    for messages in conversations(family):
        prompt = encoder.prompt_ids(messages[:-1])
        rejected = [*messages[:-1], {"role": "assistant", "content": "seven"}]
        pair = encode_pair({"chosen": messages, "rejected": rejected}, encoder, 4096, 2048)
        assert isinstance(pair, EncodedPair) and pair.prompt_ids == prompt
        text = encoder.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        assert prompt == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        # Llama-2 opens every exchange with a BOS of its own; a doubled one it must not have either.
        bos = encoder.tokenizer.bos_token_id
        assert bos is None or prompt[:2] != [bos, bos]


@every_family
def test_response_has_exactly_one_terminal_id_and_decodes_to_its_text(family):
    encoder = ChatEncoder(family.tokenizer())
    end = encoder.tokenizer.convert_tokens_to_ids(family.end)
    assert encoder.end_id == end and set(encoder.stop_ids) == {end, encoder.tokenizer.eos_token_id}
    for messages in conversations(family):
        ids = encoder.response_ids(messages)
        assert ids[-1] == end and sum(token in encoder.stop_ids for token in ids) == 1
        assert encoder.decode(ids).strip() == messages[-1]["content"]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if name != "llama-2"])
def test_decoding_a_response_gives_back_its_exact_text(name):
    """Mistral's leading space and the like belong to the template; Llama-2 also adds one behind the text."""
    encoder = ChatEncoder(FAMILIES[name].tokenizer())
    assert encoder.decode(encoder.response_ids([QUESTION, ANSWER])) == "It is 5."


def test_prompt_and_response_are_the_rendered_conversation():
    encoder = ChatEncoder(FAMILIES["llama-3"].tokenizer())
    text = encoder.tokenizer.decode(encoder.prompt_ids([QUESTION]) + encoder.response_ids([QUESTION, ANSWER]))
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2+3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nIt is 5.<|eot_id|>"
    )


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_template_without_system_role_says_so_and_folds_on_request(name):
    tokenizer = FAMILIES[name].tokenizer()
    with pytest.raises(InputError, match=r"no system role.*--system fold"):
        ChatEncoder(tokenizer).prompt_ids([SYSTEM, QUESTION])
    folded = ChatEncoder(tokenizer, system="fold").prompt_ids([SYSTEM, QUESTION])
    assert "Be brief.\n\nWhat is 2+3?" in tokenizer.decode(folded)


def test_template_that_silently_drops_the_system_turn_is_refused():
    template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}<|im_end|>{% endfor %}"
    with pytest.raises(InputError, match="no system role"):
        ChatEncoder(char_tokenizer(template=template)).prompt_ids([SYSTEM, QUESTION])


def test_doubled_bos_is_reduced_to_one():
    tokenizer = FAMILIES["zephyr"].tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + tokenizer.chat_template
    ids = ChatEncoder(tokenizer).prompt_ids([QUESTION])
    assert ids.count(tokenizer.bos_token_id) == 1


def test_pad_equal_to_eos_keeps_the_terminal_id():
    tokenizer = FAMILIES["zephyr"].tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    encoder = ChatEncoder(tokenizer)
    assert encoder.pad_id == encoder.end_id == encoder.response_ids([QUESTION, ANSWER])[-1]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: char_tokenizer(template=None), "no chat template"),
        (lambda: char_tokenizer(special=["[A]"], eos_token=None, template="{{ messages[-1]['content'] }}"), "EOS"),
        (lambda: char_tokenizer(template="{{ messages[0]['content'] }}"), "omits the assistant's text"),
    ],
)
def test_unusable_tokenizers_are_refused(tokenizer, message):
    with pytest.raises(InputError, match=message):
        ChatEncoder(tokenizer())


def test_wrong_turns_and_control_tokens_are_refused():
    encoder = ChatEncoder(FAMILIES["mistral"].tokenizer())
    with pytest.raises(InputError, match="rejects the turns 'user, user'"):
        encoder.prompt_ids([QUESTION, QUESTION])
    with pytest.raises(InputError, match="must end with a user turn"):
        encoder.prompt_ids([QUESTION, ANSWER])
    shouting = [QUESTION, {"role": "assistant", "content": "a </s> b"}]
    with pytest.raises(InputError, match="control token '</s>'"):
        encoder.response_ids(shouting)
    assert "</s>" in str(encoder.refusal(shouting)) and encoder.refusal([QUESTION, ANSWER]) is None


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(str(tmp_path / "nowhere"))
    offline = r"cannot load the tokenizer of no-such-org/no-such-model \(it is not in the Hub cache, and HF_HUB_OFFLINE is set\)"
    with pytest.raises(InputError, match=offline):
        load_tokenizer("no-such-org/no-such-model")


def test_fingerprint_changes_with_template_and_policy():
    tokenizer, other = FAMILIES["zephyr"].tokenizer(), FAMILIES["mistral"].tokenizer()
    assert ChatEncoder(tokenizer).fingerprint == ChatEncoder(FAMILIES["zephyr"].tokenizer()).fingerprint
    assert ChatEncoder(tokenizer).tokenizer_hash == ChatEncoder(other).tokenizer_hash
    prints = {
        ChatEncoder(tokenizer).fingerprint,
        ChatEncoder(tokenizer, "fold").fingerprint,
        ChatEncoder(other).fingerprint,
    }
    assert len(prints) == 3
    before = ChatEncoder(tokenizer).tokenizer_hash
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=4)
    assert ChatEncoder(tokenizer).tokenizer_hash == before


class TestTruncation:
    """A prompt of 4 + 12 ids (BOS first) worked by hand with the Mistral template: <s> '[INST] ' ... ' [/INST]'."""

    encoder = ChatEncoder(FAMILIES["mistral"].tokenizer())

    def pair(self, max_length, max_prompt_length, chosen="abc", rejected=(5, 6), **columns):
        prompt = [{"role": "user", "content": "q"}]
        row = {"chosen": [*prompt, {"role": "assistant", "content": chosen}], "rejected_token_ids": list(rejected)}
        row["rejected"] = [*prompt, {"role": "assistant", "content": "xy"}]
        return encode_pair({**row, **columns}, self.encoder, max_length, max_prompt_length)

    def test_nothing_is_cut_while_it_fits(self):
        # <s> + "[INST] q [/INST]" = 1 + 16 ids; " abc</s>" = 5 ids
        pair = self.pair(max_length=22, max_prompt_length=4)
        assert (len(pair.prompt_ids), len(pair.chosen_ids), pair.rejected_ids) == (17, 5, [5, 6])

    def test_prompt_keeps_bos_and_its_end_then_responses_are_cut_without_eos(self):
        whole = self.pair(max_length=22, max_prompt_length=4)
        pair = self.pair(max_length=8, max_prompt_length=4)
        assert pair.prompt_ids == [whole.prompt_ids[0], *whole.prompt_ids[-3:]]
        assert pair.chosen_ids == whole.chosen_ids[:4] and self.encoder.end_id not in pair.chosen_ids
        assert pair.rejected_ids == [5, 6]

    def test_empty_responses_are_named(self):
        assert "empty chosen response after truncation" in self.pair(max_length=4, max_prompt_length=4)
        assert self.pair(100, 50, rejected=()) == "empty rejected response"

    def test_sampled_ids_are_used_as_they_are(self):
        assert self.pair(100, 50, rejected=(7, 7, 7)).rejected_ids == [7, 7, 7]
        assert self.pair(100, 50, chosen_token_ids=[9, 8]).chosen_ids == [9, 8]

    def test_text_only_response_cut_by_length_has_no_eos(self):
        ended = self.pair(100, 50, rejected_token_ids=None, rejected_finish_reason="stop")
        cut = self.pair(100, 50, rejected_token_ids=None, rejected_finish_reason="length")
        assert ended.rejected_ids == [*cut.rejected_ids, self.encoder.end_id]

    def test_different_prompts_are_refused(self):
        with pytest.raises(InputError, match="different prompts"):
            encode_pair({"chosen": [QUESTION, ANSWER], "rejected": MULTI}, self.encoder, 100, 50)

    def test_truncate_prompt_by_hand(self):
        assert truncate_prompt([1, 2, 3, 4, 5], 3, bos_id=1) == [1, 4, 5]
        assert truncate_prompt([1, 2, 3, 4, 5], 3, bos_id=None) == [3, 4, 5]
        assert truncate_prompt([1, 2, 3, 4, 5], 1, bos_id=1) == [1]
        assert truncate_prompt([1, 2], 3, bos_id=1) == [1, 2]


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ("{% for m in messages if m['role'] == 'assistant' %}", "omits the text of a user turn (turn 0)"),
        ("{% for m in messages[-2:] %}", "omits the text of a user turn (turn 0)"),
    ],
)
def test_a_template_that_omits_a_turn_of_the_prompt_refuses_the_row(turns, says):
    written = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    encoder = ChatEncoder(
        char_tokenizer(template=turns + written + "{{ '<|im_start|>assistant\n' if add_generation_prompt }}")
    )
    history = [
        {"role": role, "content": text} for role, text in (("user", "One"), ("assistant", "Two"), ("user", "Three"))
    ]
    with pytest.raises(RowRefused, match=re.escape(says)):
        encoder.prompt_ids(history)


@pytest.mark.parametrize("what", ["[1, 2, 3]|random", "lipsum(n=1)"])
def test_a_template_with_chance_is_refused(what):
    with pytest.raises(InputError, match="rejects the turns"):
        ChatEncoder(char_tokenizer(template=f"{{{{ {what} }}}}" + CHATML))
