"""Every chat template that TRL ships, against the table of what it does (tests/helpers/real_templates.py)."""

from __future__ import annotations

import datetime
import functools
import json
import re

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import ChatEncoder, RowRefused
from spin.alignment.data.chat_template import template_turn
from spin.alignment.data.encode_pairs import EncodedPair, encode_pair
from tests.helpers.real_templates import SHIPPED

DAY = datetime.date(2026, 11, 28)
USER, ANSWER = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "It is 5."}
SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHT = {"role": "assistant", "content": "<think>\nI add.\n</think>\n\nIt is 5."}
REASONED = {**ANSWER, "reasoning_content": "I add."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": json.dumps([{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]),
}
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "add",
                "description": "Adds.",
                "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "one"}}},
            },
        }
    ]
)
every_template = pytest.mark.parametrize("name", SHIPPED)


@functools.lru_cache(maxsize=64)
def encoder_of(name: str, **settings) -> ChatEncoder:
    shipped = SHIPPED[name]
    tokenizer = shipped.tokenizer(name)
    ends = tokenizer.convert_tokens_to_ids(list(shipped.model.ends))
    return ChatEncoder(tokenizer, end_ids=ends, date=DAY, **settings)


def conversations(name: str) -> list[list[dict]]:
    found = [[USER, ANSWER], [USER, THOUGHT, USER, ANSWER], [USER, REASONED]]
    found += [[SYSTEM, USER, ANSWER]] if SHIPPED[name].system == "kept" else []
    return found if SHIPPED[name].reasoning else [turns for turns in found if turns[-1] is not REASONED]


@every_template
def test_prompts_are_what_the_library_renders_and_equal_in_generation_and_training(name):
    encoder = encoder_of(name)
    for turns in conversations(name):
        prompt = encoder.prompt_ids(turns[:-1])
        source = encoder.template.source
        theirs = encoder.tokenizer.apply_chat_template(
            [template_turn(turn, source) for turn in turns[:-1]],
            add_generation_prompt=True,
            tokenize=False,
            strftime_now=lambda form: DAY.strftime(form),
        )
        assert encoder.tokenizer.decode(prompt) == theirs
        rejected = [*turns[:-1], {"role": "assistant", "content": "seven"}]
        pair = encode_pair({"chosen": turns, "rejected": rejected}, encoder, 4096, 2048)
        assert isinstance(pair, EncodedPair), pair
        assert pair.prompt_ids == prompt


@every_template
def test_prompt_and_response_are_the_whole_rendering(name):
    encoder, shipped = encoder_of(name), SHIPPED[name]
    for turns in conversations(name):
        prompt = encoder.tokenizer.decode(encoder.prompt_ids(turns[:-1]))
        text = prompt + encoder.tokenizer.decode(encoder.response_ids(turns))
        whole = encoder.template.render([template_turn(turn, encoder.template.source) for turn in turns], False)
        if not whole.startswith(prompt):
            # The template leaves out the thought that its generation prompt opens, or its text; nothing else differs.
            assert shipped.opens
            text, whole = (re.sub(r"<think>.*?</think>\s*", "", some, flags=re.DOTALL) for some in (text, whole))
        # GLM writes nothing after a turn, which then ends with the EOS.
        assert text.endswith(shipped.end) and (whole.startswith(text) or whole == text.removesuffix(shipped.end))


@every_template
def test_a_response_ends_once_and_reads_back(name):
    encoder, shipped = encoder_of(name), SHIPPED[name]
    ids = encoder.response_ids([USER, ANSWER])
    text = encoder.tokenizer.decode(ids)
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.end_id) == shipped.end
    assert [token for token in ids if token in encoder.stop_ids] == [encoder.end_id] == ids[-1:]
    assert text.startswith(shipped.before + "It is 5.")
    assert encoder.response_text(ids) == encoder.decode(ids) == "It is 5."
    named = {*shipped.model.ends, shipped.model.eos, shipped.end}
    assert set(encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids)) == named


@every_template
def test_a_thought_is_opened_once_and_closed(name):
    encoder, shipped = encoder_of(name), SHIPPED[name]
    if name == "qwen3_5_nothink":
        with pytest.raises(RowRefused, match="one that the prompt excludes"):
            encoder.response_ids([USER, THOUGHT])
        return
    prompt, ids = encoder.prompt_ids([USER]), encoder.response_ids([USER, THOUGHT])
    text = encoder.tokenizer.decode([*prompt[-12:], *ids])
    assert encoder.tokenizer.decode(prompt).endswith(shipped.opens)
    assert (text.count("<think>"), text.count("</think>"), text.count("I add.")) == (1, 1, 1)
    # Stored with its opening marker, wherever the prompt ends; read again, it gives the same ids.
    stored = encoder.response_text(ids)
    assert stored.lstrip().startswith("<think>") and stored.rstrip().endswith("It is 5.")
    assert encoder.response_ids([USER, {"role": "assistant", "content": stored}]) == ids


THINKING = sorted(name for name, shipped in SHIPPED.items() if "<think>" in shipped.model.plain or shipped.opens)
CONTENTS = (
    *("<think>a</think>4", "<think></think>4", "<think>I add.</think>It is 5.", "<think>I add.</think>\nIt is 5."),
    *("<think>\n\n</think>\n\n4", "<think>a</think>b<think>c</think>4", "hello <think>a b</think>4", "4"),
)


@pytest.mark.parametrize("name", THINKING)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_thought_is_written_once_however_it_is_spaced(name, content):
    encoder = encoder_of(name)
    turn = {"role": "assistant", "content": content}
    try:
        prompt, ids = encoder.prompt_ids([USER]), encoder.response_ids([USER, turn])
    except RowRefused:
        # A thought in the middle of an answer, or one in a conversation that is not to have any.
        assert (
            content.startswith("hello")
            or "</think>b<think>" in content
            or (name, "<think>") == ("qwen3_5_nothink", content[:7])
        )
        return
    _, _, text = encoder.tokenizer.decode([*prompt, *ids]).rpartition(USER["content"])
    assert text.count("<think>") == text.count("</think>") or "<think>" not in content
    for said in ("I add.", "It is 5."):
        assert text.count(said) == content.count(said)
    assert text.count("<think>") <= max(1, content.count("<think>") + content.startswith("hello"))
    # What is stored of the ids is encoded as the same ids.
    assert encoder.response_ids([USER, {**turn, "content": encoder.response_text(ids)}]) == ids


@every_template
def test_reasoning_is_rendered_or_refused(name):
    encoder = encoder_of(name)
    if not SHIPPED[name].reasoning:
        with pytest.raises(RowRefused, match=r"omits the assistant's reasoning_content|prompt excludes"):
            encoder.response_ids([USER, REASONED])
        return
    text = encoder.tokenizer.decode(encoder.response_ids([USER, REASONED]))
    assert text.index("I add.") < text.index("It is 5.")


@every_template
def test_system_turns_are_kept_or_folded(name):
    if SHIPPED[name].system == "refused":
        with pytest.raises(InputError, match="--system fold"):
            encoder_of(name).prompt_ids([SYSTEM, USER])
        folded = encoder_of(name, system="fold")
        assert "Be brief.\n\n2+3?" in folded.tokenizer.decode(folded.prompt_ids([SYSTEM, USER]))
    else:
        assert "Be brief." in encoder_of(name).tokenizer.decode(encoder_of(name).prompt_ids([SYSTEM, USER]))


@every_template
def test_tools_are_rendered_or_refused(name):
    encoder = encoder_of(name)
    if not SHIPPED[name].tools:
        if name not in ("deepseek_r1_distill", "lfm2"):
            with pytest.raises(InputError):
                encoder.response_ids([USER, CALL], tools=TOOLS)
        return
    ids = encoder.response_ids([USER, CALL], tools=TOOLS)
    assert "Adds." in encoder.tokenizer.decode(encoder.prompt_ids([USER], tools=TOOLS))
    text = encoder.tokenizer.decode(ids)
    assert "add" in text and "{'a'" not in text and ids[-1] in encoder.stop_ids
    assert sum(token in encoder.stop_ids for token in ids) == 1


@every_template
def test_the_date_is_pinned_and_part_of_the_fingerprint_where_there_is_one(name, monkeypatch):
    later = ChatEncoder(SHIPPED[name].tokenizer(name), date=DAY + datetime.timedelta(days=1))
    encoder = encoder_of(name)
    has_date = SHIPPED[name].date
    assert (encoder.prompt_ids([USER]) != later.prompt_ids([USER])) == has_date
    assert (encoder.fingerprint != later.fingerprint) == has_date
    assert encoder.template_record == ({"template_date": "2026-11-28"} if has_date else {})


@every_template
def test_text_never_becomes_a_control_token(name):
    encoder = encoder_of(name)
    tokenizer = encoder.tokenizer
    plain = encoder.prompt_ids([{"role": "user", "content": "A B"}])
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for text in (token.content for token in tokenizer.added_tokens_decoder.values()):
        turns = [{"role": "user", "content": f"A{text}B"}]
        try:
            ids = encoder.prompt_ids(turns)
        except RowRefused as refused:
            assert text in str(refused)
            continue
        if text in ("\n\n", "<h1>"):  # ordinary entries of the vocabulary
            continue
        assert sum(token in control for token in ids) == sum(token in control for token in plain), text
        assert f"A{text}B" in tokenizer.decode(ids)
    for text in (*(tokenizer.convert_ids_to_tokens(encoder.stop_ids)), "<pad>"):
        with pytest.raises(RowRefused, match="control token"):
            encoder.response_ids([USER, {"role": "assistant", "content": f"A{text}B"}])
