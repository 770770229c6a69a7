"""The only place where text is converted to token ids.

Generation, SFT and preference training all take their prompts from :meth:`ChatEncoder.prompt_ids`, so a model is trained on
the ids that it was sampled with. Nothing here inspects the pad id: padding is masked by length, so pad = EOS is safe.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.core.hub import hub_reason
from spin.alignment.core.provenance import hash_json, hash_text
from spin.alignment.data.chat_template import ChatTemplate
from spin.alignment.data.control_tokens import MARK, ids_of_texts
from spin.alignment.data.conversation_text import ConversationText, RowRefused, SystemPolicy
from spin.alignment.data.encode_together import Steps, run_alone, run_together
from spin.alignment.data.end_of_turn import model_end_ids
from spin.alignment.data.template_date import today
from spin.alignment.data.tokenizer_calls import decode_ids, hash_tokenizer
from spin.alignment.data.turns import Message

T = TypeVar("T")


def load_tokenizer(model: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model folder or Hub name.

    Raises:
        InputError: there is none, or the Hub cannot be reached.
    """
    from transformers import AutoTokenizer

    name = str(model)
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise InputError(f"model folder {name} does not exist: give the folder of a saved model or a Hub name")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files fail anywhere, and the tokenizers library raises bare Exceptions
        where = f"{name} at revision {revision}" if revision else name
        if "trust_remote_code" in str(error):
            raise InputError(
                f"the tokenizer of {where} needs code that comes with it: read it, and set trust_remote_code if you trust it"
            ) from error
        reason = reason_of(error) if Path(name).is_dir() else hub_reason(error)
        raise InputError(
            f"cannot load the tokenizer of {where} ({reason}): give a folder that contains tokenizer files, "
            "or a Hub name that is cached or reachable (HF_HUB_OFFLINE unset)"
        ) from error


def load_encoder(
    model: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    system: SystemPolicy = "keep",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    date: datetime.date | None = None,
) -> ChatEncoder:
    """Return the chat encoder of a model folder or Hub name, with the end-of-turn ids that its files name.

    Raises:
        InputError: as :func:`load_tokenizer` and :class:`ChatEncoder`, or a damaged ``generation_config.json``.
    """
    tokenizer = load_tokenizer(model, revision, trust_remote_code)
    ends = model_end_ids(model, revision)
    return ChatEncoder(tokenizer, system, chat_template_kwargs=chat_template_kwargs, date=date, end_ids=ends)


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of :class:`ChatEncoder` methods that a row carries: its ``tools`` and ``chat_template_kwargs``."""
    return {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name) is not None}


class ChatEncoder:
    """Converts conversations to token ids and back with the tokenizer's own chat template.

    Methods that take a conversation also take what its row carries: ``tools`` (JSON text of the list) and
    ``chat_template_kwargs`` (JSON text of template arguments for this row).

    Attributes:
        end_id: the end-of-turn id that the template writes after a response (the EOS if it writes none).
        stop_ids: the ids that end a sampled response: end-of-turn, EOS and those that the model's files name, ascending.
        pad_id: an id to pad tensors with; never detect padding by it, since it may be the EOS.
        response_prefix, response_suffix: what the template writes around the text of a response.
    """

    def __init__(
        self,
        tokenizer: Any,
        system: SystemPolicy = "keep",
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
        end_ids: Iterable[int] = (),
    ) -> None:
        """Probe the template once.

        Args:
            chat_template_kwargs: template arguments for every row, such as ``enable_thinking``.
            date: the day that a template with the date sees (default: today).
            end_ids: further ids that end a response, see :func:`model_end_ids`.

        Raises:
            InputError: the tokenizer has no chat template, the template cannot be rendered, or no token ends a turn.
        """
        self.tokenizer = tokenizer
        self.system = system
        self.name = getattr(tokenizer, "name_or_path", "") or "tokenizer"
        self.template = ChatTemplate(tokenizer, self.name, chat_template_kwargs or {}, date or today())
        self.text = ConversationText(self.template, system, end_ids)
        self.end_id: int = self.text.end_id
        self.stop_ids: list[int] = self.text.stop_ids
        self.response_prefix, self.response_suffix = self.text.response_prefix, self.text.response_suffix
        self.thought = self.text.thought
        self.pad_id: int = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._hidden = {self.pad_id, tokenizer.bos_token_id} - {None}

    def prompt_ids(
        self, prompt: Sequence[Message], tools: str | None = None, chat_template_kwargs: str | None = None
    ) -> list[int]:
        """Return the ids of a prompt, including the generation prompt, with at most one BOS.

        Args:
            prompt: the conversation before the response; its last turn is not the assistant's.

        Raises:
            InputError: the template rejects the conversation.
            RowRefused: its text contains a control token, or the template omits its tools.
        """
        return self.run(self.prompt_steps(self.text.prompt(prompt, tools, chat_template_kwargs)))

    def prompt_steps(self, text: str) -> Steps[list[int]]:
        """The steps (:mod:`.encode_together`) from the text of a prompt to its ids."""
        return self._one_bos((yield text))

    def run(self, steps: Steps[T]) -> T:
        """Run the steps of one row; raises what they raise."""
        return run_alone(steps, self.encode_all)

    def ids_of_prompts(
        self, prompts: Sequence[tuple[Sequence[Message], Mapping[str, Any]]]
    ) -> list[list[int] | InputError]:
        """Return :meth:`prompt_ids` of many prompts, given with what their rows carry (:func:`template_arguments`): ids, or the
        error that it would raise. Texts are encoded in one call, which is faster."""

        def steps(prompt: Sequence[Message], arguments: Mapping[str, Any]) -> Steps[list[int]]:
            text = self.text.prompt(prompt, arguments.get("tools"), arguments.get("chat_template_kwargs"))
            return (yield from self.prompt_steps(text))

        return run_together([steps(*item) for item in prompts], self.encode_all)

    def response_ids(
        self,
        conversation: Sequence[Message],
        prompt_ids: list[int] | None = None,
        tools: str | None = None,
        chat_template_kwargs: str | None = None,
    ) -> list[int]:
        """Return the ids of the final assistant turn without the prompt, ending with exactly one end-of-turn id.

        Prompt and response together are the template's own rendering of the conversation. Where its generation prompt opens
        a thought that it does not write in finished turns, they continue that thought with the turn's own, or close it.

        ``prompt_ids`` are the ids of the preceding conversation, if the caller already has them.

        Raises:
            InputError: the conversation does not end with an assistant turn, or the template rejects it.
            RowRefused: its text contains a control token, or the template would write something else than the turn.
        """
        return self.run(self.response_steps(conversation, prompt_ids, tools, chat_template_kwargs))

    def response_steps(
        self,
        conversation: Sequence[Message],
        prompt_ids: list[int] | None = None,
        tools: str | None = None,
        chat_template_kwargs: str | None = None,
        prompt_text: str | None = None,
    ) -> Steps[list[int]]:
        """The steps of :meth:`response_ids`. ``prompt_text`` is the text of the preceding conversation, if it is known."""
        if not conversation or conversation[-1]["role"] != "assistant":
            raise InputError("a conversation must end with an assistant turn: add the response")
        prompt, response = self.text.prompt_and_response(conversation, tools, chat_template_kwargs, prompt_text)
        before = prompt_ids or self._one_bos((yield prompt))
        whole = self._one_bos((yield prompt + response))
        # A token that crosses the boundary cannot be sampled: the response is then encoded by itself.
        ids = whole[len(before) :] if whole[: len(before)] == before else (yield response)
        ends = [place for place, token in enumerate(ids) if token in self.stop_ids]
        # A template may end a tool call with another of the model's ends than an answer.
        return ids[: ends[0] + 1] if ends else [*ids, self.end_id]

    def prompt_text(self, prompt_ids: Sequence[int]) -> str:
        """Return the text of a prompt for a server that encodes text itself.

        Raises:
            RowRefused: this tokenizer would encode it to other ids.
        """
        text: str = self.tokenizer.decode(
            list(prompt_ids),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,
        )
        if self.tokenizer(text, add_special_tokens=False)["input_ids"] != list(prompt_ids):
            raise RowRefused("no text encodes to the ids of this prompt (a turn contains a control token as text)")
        return text

    def continuation_ids(self, prompt_ids: Sequence[int], text: str) -> list[int]:
        """Return the ids of a text that follows a prompt, without an end of turn: of those of both together the ones behind the
        prompt's, or, where a token would cross the boundary, those of the text alone. Control tokens are encoded as such."""
        alone: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        try:
            whole = self.tokenizer(self.prompt_text(prompt_ids) + text, add_special_tokens=False)["input_ids"]
        except RowRefused:
            return alone
        return whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == list(prompt_ids) else alone

    def aligned_ids(
        self,
        conversation: Sequence[Message],
        ended: bool,
        tools: str | None = None,
        chat_template_kwargs: str | None = None,
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Return the ids of a conversation's prompt, those of its last turn, and for each of the latter its span of characters
        in the text of that turn, ``(start, end)``.

        With ``ended`` the end-of-turn id is appended, with an empty span. Requires a tokenizer with character offsets.
        """
        text = conversation[-1]["content"]
        prompt = self.text.prompt(conversation[:-1], tools, chat_template_kwargs)
        prompt_ids = self.run(self.prompt_steps(prompt))
        ids, spans = self._tokens_in_place(conversation, prompt, prompt_ids, tools, chat_template_kwargs) or (
            self._tokens_alone(text)
        )
        end_ids = [self.end_id] if ended else []
        return prompt_ids, [*ids, *end_ids], [*spans, *((len(text), len(text)) for _ in end_ids)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled ids without end-of-turn, padding and BOS, as far as it is the response's own: not what the
        template writes around one. Markers of its parts (thoughts, channels, tool calls) stay."""
        return self._own_text(self.raw_text(token_ids))

    def response_text(self, token_ids: Sequence[int], chat_template_kwargs: str | None = None) -> str:
        """Return the text of a whole response, as rows store it: :meth:`decode`, after the thought that the generation prompt
        opens, if it does (with the template arguments of the row) and the response continues it."""
        return self.readings(token_ids, chat_template_kwargs)[0]

    def response_texts(
        self, responses: Sequence[Sequence[int]], chat_template_kwargs: Sequence[str | None] | None = None
    ) -> list[str]:
        """Return :meth:`response_text` of many responses, decoded in one call; ``chat_template_kwargs`` are those of each row."""
        texts = decode_ids(self.tokenizer, [self._own_ids(ids) for ids in responses])
        carried = chat_template_kwargs or [None] * len(texts)
        return [self._readings(text, arguments)[0] for text, arguments in zip(texts, carried, strict=True)]

    def readings(self, token_ids: Sequence[int], chat_template_kwargs: str | None = None) -> tuple[str, str]:
        """Return :meth:`response_text` and :meth:`decode` of a response."""
        return self._readings(self.raw_text(token_ids), chat_template_kwargs)

    def _readings(self, text: str, row_arguments: str | None) -> tuple[str, str]:
        thought = self.text.thought_with(row_arguments)
        opened = thought.opener if thought and not text.startswith(self.response_prefix or thought.closing) else ""
        own = self._own_text(text)
        return opened + own, own

    def _own_text(self, text: str) -> str:
        # Some templates start a response with text of their own (Mistral: a space), which is not part of it.
        return text.removeprefix(self.response_prefix).removesuffix(self.response_suffix)

    def raw_text(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled ids, without end-of-turn, padding and BOS."""
        return decode_ids(self.tokenizer, [self._own_ids(token_ids)])[0]

    def _own_ids(self, token_ids: Sequence[int]) -> list[int]:
        """Return sampled ids without the end of turn, padding and BOS."""
        ids = list(token_ids)
        while ids and ids[-1] in self.stop_ids:
            ids.pop()
        return ids if self._hidden.isdisjoint(ids) else [token for token in ids if token not in self._hidden]

    def refusal(self, messages: Sequence[Message]) -> str | None:
        """Return why a conversation cannot be encoded faithfully (its text contains a control token), or None."""
        return self.text.refusal(messages)

    @cached_property
    def template_hash(self) -> str:
        """Content hash of the chat template, its arguments and its date (if it has any), and of the system policy."""
        more = [hash_json(self.template.arguments)] if self.template.arguments else []
        more += [self.template.date.isoformat()] if self.template.uses_date else []
        return hash_text(self.template.hashed, self.system, *more)

    @cached_property
    def tokenizer_hash(self) -> str:
        """Content hash of everything that affects how text is converted to ids."""
        return hash_tokenizer(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        """One hash of tokenizer, template, template arguments, date and system policy: equal fingerprints give equal ids."""
        return hash_text(self.tokenizer_hash, self.template_hash)

    @property
    def template_record(self) -> dict[str, Any]:
        """What decides the template's text besides the template, as provenance records it: ``chat_template_kwargs`` if there
        are any, ``template_date`` if the template has a date."""
        record: dict[str, Any] = {}
        if self.template.arguments:
            record["chat_template_kwargs"] = self.template.arguments
        if self.template.uses_date:
            record["template_date"] = self.template.date.isoformat()
        return record

    @property
    def remarks(self) -> list[str]:
        """What a user should know about this template, a line each; programs print them once."""
        lines = []
        if self.thought is not None:
            lines.append(
                f"the chat template of {self.name} opens a thought ({self.thought.tag}) in the generation prompt: a ground truth "
                f"with a thought continues it, one without closes it first ({self.thought.closing!r})"
            )
        if self.template.uses_date:
            lines.append(
                f"the chat template of {self.name} contains the date: it is {self.template.date.isoformat()} for every row "
                "(template_date)"
            )
        if self.text.foreign_ends:
            lines.append(
                f"generation_config.json of {self.name} names ids that are no control tokens of its tokenizer as ends "
                f"({', '.join(map(str, self.text.foreign_ends))}): they do not end a response"
            )
        return lines

    def encode_all(self, texts: Sequence[str]) -> list[list[int] | InputError]:
        """Return the ids of rendered texts, or why one cannot be encoded. Marks keep what stands around them from becoming one
        token."""
        return [self._checked(text, ids) for text, ids in zip(texts, ids_of_texts(self.tokenizer, texts), strict=True)]

    def _checked(self, text: str, ids: list[int]) -> list[int] | InputError:
        if MARK not in text:
            return ids
        kept = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if kept.strip() != text.replace(MARK, "").strip():  # tokenizers that start every text with a space
            return RowRefused(
                "a turn contains a control token as text, which this tokenizer cannot spell: remove it from the row"
            )
        return ids

    def _tokens_in_place(
        self,
        conversation: Sequence[Message],
        prompt: str,
        prompt_ids: list[int],
        tools: str | None,
        row_arguments: str | None,
    ) -> tuple[list[int], list[tuple[int, int]]] | None:
        """The tokens of the last turn's text as they follow the prompt; None if the template or a token that crosses the
        boundary hides where the text starts."""
        text = conversation[-1]["content"]
        try:
            whole = prompt + self.text.prompt_and_response(conversation, tools, row_arguments)[1]
        except RowRefused:
            return None
        said = text if text in whole[len(prompt) :] else text.strip()  # some templates strip whitespace
        start = whole.find(said, len(prompt)) if said and MARK not in whole else -1
        if start < 0:
            return None
        encoded = self.tokenizer(
            whole, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=False
        )
        ids, offsets, end = list(encoded["input_ids"]), encoded["offset_mapping"], start + len(said)
        first = next(number for number, (_, until) in enumerate(offsets) if until > start)
        last = max(number for number, (begin, _) in enumerate(offsets) if begin < end)
        if self._one_bos(ids[:first]) != prompt_ids:
            return None
        # From offsets in the rendered conversation to offsets in the text of the turn.
        moved = start - text.index(said)
        places = offsets[first : last + 1]
        return ids[first : last + 1], [(begin - moved, min(until, end) - moved) for begin, until in places]

    def _tokens_alone(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=False
        )
        return list(encoded["input_ids"]), [(begin, end) for begin, end in encoded["offset_mapping"]]

    def _one_bos(self, ids: list[int]) -> list[int]:
        """Drop a repeated BOS: some templates write one and the tokenizer adds another."""
        bos = self.tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


__all__ = ["ChatEncoder", "RowRefused", "load_encoder", "load_tokenizer", "template_arguments"]
