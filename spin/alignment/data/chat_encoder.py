"""The only place where text becomes token ids, and where truncation happens.

Generation, SFT and preference training all take their prompt from :meth:`ChatEncoder.prompt_ids`, so the ids a model was
sampled with are the ids it is trained on. Nothing here looks at a pad id: padding is masked by length, so pad = EOS is safe.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_json, hash_text
from spin.alignment.data.formats import Message

SystemPolicy = Literal["keep", "fold"]
SYSTEM_POLICIES: tuple[SystemPolicy, ...] = ("keep", "fold")
_PROBE = "Reply 7"


def load_tokenizer(model: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model folder or Hub name.

    Raises:
        InputError: there is none, or it cannot be reached.
    """
    from transformers import AutoTokenizer

    name = str(model)
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise InputError(f"model folder {name} does not exist: give the folder of a saved model or a Hub name")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        where = f"{name} at revision {revision}" if revision else name
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"cannot load the tokenizer of {where} ({reason}): give a folder that holds tokenizer files, "
            "or a Hub name that is cached or reachable (HF_HUB_OFFLINE unset)"
        ) from error


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Put the text of the leading system turn in front of the first user turn, a blank line between."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return list(messages)
    system, user, *rest = messages
    return [{"role": user["role"], "content": f"{system['content']}\n\n{user['content']}"}, *rest]


class ChatEncoder:
    """Conversations to token ids and back, through the tokenizer's own chat template.

    Attributes:
        end_id: the end-of-turn id the template writes after a response (the EOS where it writes none).
        stop_ids: the ids that end a response when sampled: end-of-turn and EOS, ascending.
        pad_id: an id to fill tensors with; never tell padding by it, it may be the EOS.
    """

    def __init__(self, tokenizer: Any, system: SystemPolicy = "keep") -> None:
        """Probe the template once.

        Raises:
            InputError: the tokenizer has no chat template, its template cannot be rendered, or nothing ends a turn.
        """
        if system not in SYSTEM_POLICIES:
            raise InputError(f"unknown system policy '{system}': choose one of {', '.join(SYSTEM_POLICIES)}")
        self.tokenizer = tokenizer
        self.system = system
        self.name = getattr(tokenizer, "name_or_path", "") or "tokenizer"
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer of {self.name} has no chat template: add chat_template.jinja to its folder "
                "or start from a chat (SFT) model"
            )
        self.response_prefix, self.end_id = self._probe_response()
        eos = tokenizer.eos_token_id
        self.stop_ids: list[int] = sorted({self.end_id} if eos is None else {self.end_id, eos})
        self.pad_id: int = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._reserved = self._reserved_texts()

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Return the ids of a prompt, generation prompt included, at most one BOS.

        Args:
            prompt: the conversation before the response; its last turn is not the assistant's.

        Raises:
            InputError: the template refuses the conversation.
        """
        if not prompt or prompt[-1]["role"] == "assistant":
            raise InputError("a prompt must end with a user turn: give the conversation without its final response")
        return self._one_bos(self._render(self._prepare(prompt), tokenize=True, add_generation_prompt=True))

    def response_ids(self, conversation: Sequence[Message], prompt_ids: list[int] | None = None) -> list[int]:
        """Return the ids of the final assistant turn, prompt excluded, with exactly one terminal end-of-turn id.

        ``prompt_ids`` are those of the conversation before it, where the caller has them already.

        Raises:
            InputError: the conversation does not end with an assistant turn, or its response contains the end-of-turn token.
        """
        if not conversation or conversation[-1]["role"] != "assistant":
            raise InputError("a conversation must end with an assistant turn: add the response")
        response = self._response_tokens(conversation, prompt_ids or self.prompt_ids(conversation[:-1]))
        ids = response[: response.index(self.end_id)] if self.end_id in response else response
        if any(token in self.stop_ids for token in ids) or (reason := self.refusal(conversation[-1:])):
            raise InputError(reason or self._reserved_reason(self.tokenizer.convert_ids_to_tokens(self.end_id)))
        return [*ids, self.end_id]

    def aligned_ids(
        self, conversation: Sequence[Message], ended: bool
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Return the ids of a conversation's prompt, those of its last turn, and for each of the latter the characters of that
        turn's text it stands for, ``(start, end)``.

        With ``ended`` the end-of-turn id comes last, with an empty span. Needs a tokenizer with character offsets.
        """
        text = conversation[-1]["content"]
        prompt_ids = self.prompt_ids(conversation[:-1])
        ids, spans = self._tokens_in_place(conversation, prompt_ids) or self._tokens_alone(text)
        end_ids = [self.end_id] if ended else []
        return prompt_ids, [*ids, *end_ids], [*spans, *((len(text), len(text)) for _ in end_ids)]

    def _tokens_in_place(
        self, conversation: Sequence[Message], prompt_ids: list[int]
    ) -> tuple[list[int], list[tuple[int, int]]] | None:
        """The tokens of the last turn's text as they follow the prompt; None where the template or a merge hides the border."""
        messages, text = self._prepare(conversation), conversation[-1]["content"]
        before = self._render(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = self._render(messages, tokenize=False, add_generation_prompt=False)
        said = text if text in whole[len(before) :] else text.strip()  # some templates strip white space
        start = whole.find(said, len(before)) if said and whole.startswith(before) else -1
        if start < 0:
            return None
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets, end = list(encoded["input_ids"]), encoded["offset_mapping"], start + len(said)
        first = next(number for number, (_, until) in enumerate(offsets) if until > start)
        last = max(number for number, (begin, _) in enumerate(offsets) if begin < end)
        if self._one_bos(ids[:first]) != prompt_ids:
            return None
        moved = start - text.index(said)
        places = offsets[first : last + 1]
        return ids[first : last + 1], [(begin - moved, min(until, end) - moved) for begin, until in places]

    def _tokens_alone(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [(begin, end) for begin, end in encoded["offset_mapping"]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the response text of sampled ids: end-of-turn and other special tokens left out."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # Some templates open a response with text of their own (Mistral: a space): not part of what was said.
        return text.removeprefix(self.response_prefix)

    def refusal(self, messages: Sequence[Message]) -> str | None:
        """Return why a conversation cannot be encoded faithfully (its text holds a control token), or None."""
        for message in messages:
            for text in self._reserved:
                if text in message["content"]:
                    return self._reserved_reason(text, message["role"])
        return None

    @cached_property
    def template_hash(self) -> str:
        """Content hash of the chat template and of the system policy."""
        template = self.tokenizer.chat_template
        return hash_text(template if isinstance(template, str) else json.dumps(template, sort_keys=True), self.system)

    @cached_property
    def tokenizer_hash(self) -> str:
        """Content hash of everything that turns text into ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return hash_json({"vocabulary": self.tokenizer.get_vocab(), "special": self.tokenizer.all_special_tokens})
        state = json.loads(backend.to_str())
        # Padding and truncation are how a caller last used it, not what it is.
        state.pop("padding", None)
        state.pop("truncation", None)
        return hash_json({"tokenizer": state, "eos": self.tokenizer.eos_token, "bos": self.tokenizer.bos_token})

    @property
    def fingerprint(self) -> str:
        """One hash of tokenizer, template and system policy: equal fingerprints give equal ids."""
        return hash_text(self.tokenizer_hash, self.template_hash)

    @cached_property
    def _has_system_role(self) -> bool:
        """Whether the template writes the text of a system turn: some raise, some silently leave it out."""
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "Hi"}]
        try:
            return _PROBE in self._render(messages, tokenize=False, add_generation_prompt=True)
        except InputError:
            return False

    def _prepare(self, messages: Sequence[Message]) -> list[Message]:
        if messages[0]["role"] != "system":
            return list(messages)
        if self.system == "fold":
            return fold_system(messages)
        if not self._has_system_role:
            raise InputError(
                f"the chat template of {self.name} has no system role but the data has system turns: "
                "give --system fold to put their text into the first user turn"
            )
        return list(messages)

    def _render(self, messages: Sequence[Message], tokenize: bool, add_generation_prompt: bool) -> Any:
        """Apply the template: text, or ids (list of int) when ``tokenize``."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=tokenize, add_generation_prompt=add_generation_prompt, return_dict=False
            )
        except Exception as error:  # a template may raise anything; what it says is what the user needs
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"the chat template of {self.name} refuses the turns '{roles}' ({error}): mend the row or the template"
            ) from error

    def _probe_response(self) -> tuple[str, int]:
        """Return the text the template puts before a response, and the id it puts after one."""
        user = [{"role": "user", "content": "Hi"}]
        prompt = self._render(user, tokenize=False, add_generation_prompt=True)
        whole = self._render(
            [*user, {"role": "assistant", "content": _PROBE}], tokenize=False, add_generation_prompt=False
        )
        before, found, after = whole.rpartition(_PROBE)
        if not found:
            raise InputError(f"the chat template of {self.name} leaves out the assistant's text: mend the template")
        prefix = before.removeprefix(prompt) if before.startswith(prompt) else ""
        control = {int(token) for token in getattr(self.tokenizer, "added_tokens_decoder", {})}
        control.update(self.tokenizer.all_special_ids)
        ids = self.tokenizer(after.strip(), add_special_tokens=False)["input_ids"] if after.strip() else []
        end_id = ids[0] if ids and ids[0] in control else self.tokenizer.eos_token_id
        if end_id is None:
            raise InputError(
                f"the tokenizer of {self.name} has neither an EOS token nor an end-of-turn token in its template, "
                "so no response could end: set eos_token in tokenizer_config.json"
            )
        return prefix, int(end_id)

    def _reserved_texts(self) -> list[str]:
        """The token texts that content may not hold: they would open or end a turn."""
        ids = {*self.stop_ids, self.tokenizer.bos_token_id} - {None}
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(sorted(ids))]

    def _reserved_reason(self, text: str, role: str = "assistant") -> str:
        return f"the {role} turn contains the control token '{text}' as text: remove it from the row"

    def _response_tokens(self, conversation: Sequence[Message], prompt: list[int]) -> list[int]:
        """The final turn's ids as the template writes them, anything after the end of turn included."""
        messages = self._prepare(conversation)
        whole = self._one_bos(self._render(messages, tokenize=True, add_generation_prompt=False))
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        # Not a prefix: tokens merged across the border, or the template rewrites the past. The text may still line up.
        prompt_text = self._render(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole_text = self._render(messages, tokenize=False, add_generation_prompt=False)
        aligned = whole_text.startswith(prompt_text)
        text = whole_text[len(prompt_text) :] if aligned else conversation[-1]["content"]
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _one_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        start = 0
        while bos is not None and ids[start : start + 2] == [bos, bos]:
            start += 1
        return list(ids[start:])
