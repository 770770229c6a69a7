"""The only place where text is converted to token ids.

Generation, SFT and preference training all take their prompts from :meth:`ChatEncoder.prompt_ids`, so a model is trained on
the ids that it was sampled with. Nothing here inspects the pad id: padding is masked by length, so pad = EOS is safe.
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
# Text that no template contains itself: rendered to see what a template does with a turn.
_PROBE = "Reply 7"


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
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"cannot load the tokenizer of {where} ({reason}): give a folder that contains tokenizer files, "
            "or a Hub name that is cached or reachable (HF_HUB_OFFLINE unset)"
        ) from error


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Prepend the text of the leading system turn to the first user turn, separated by a blank line."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return list(messages)
    system, user, *rest = messages
    return [{"role": user["role"], "content": f"{system['content']}\n\n{user['content']}"}, *rest]


class ChatEncoder:
    """Converts conversations to token ids and back with the tokenizer's own chat template.

    Attributes:
        end_id: the end-of-turn id that the template writes after a response (the EOS if it writes none).
        stop_ids: the ids that end a sampled response: end-of-turn and EOS, ascending.
        pad_id: an id to pad tensors with; never detect padding by it, since it may be the EOS.
    """

    def __init__(self, tokenizer: Any, system: SystemPolicy = "keep") -> None:
        """Probe the template once.

        Raises:
            InputError: the tokenizer has no chat template, the template cannot be rendered, or no token ends a turn.
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
        """Return the ids of a prompt, including the generation prompt, with at most one BOS.

        Args:
            prompt: the conversation before the response; its last turn is not the assistant's.

        Raises:
            InputError: the template rejects the conversation.
        """
        if not prompt or prompt[-1]["role"] == "assistant":
            raise InputError("a prompt must end with a user turn: give the conversation without its final response")
        return self._one_bos(self._render(self._prepare(prompt), tokenize=True, add_generation_prompt=True))

    def response_ids(self, conversation: Sequence[Message], prompt_ids: list[int] | None = None) -> list[int]:
        """Return the ids of the final assistant turn without the prompt, ending with exactly one end-of-turn id.

        ``prompt_ids`` are the ids of the preceding conversation, if the caller already has them.

        Raises:
            InputError: the conversation does not end with an assistant turn, or its response contains the end-of-turn token.
        """
        if not conversation or conversation[-1]["role"] != "assistant":
            raise InputError("a conversation must end with an assistant turn: add the response")
        response = self._response_tokens(conversation, prompt_ids or self.prompt_ids(conversation[:-1]))
        ids = response[: response.index(self.end_id)] if self.end_id in response else response
        reason = self.refusal(conversation[-1:])
        if reason or any(token in self.stop_ids for token in ids):
            raise InputError(reason or self._reserved_reason(self.tokenizer.convert_ids_to_tokens(self.end_id)))
        return [*ids, self.end_id]

    def aligned_ids(
        self, conversation: Sequence[Message], ended: bool
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Return the ids of a conversation's prompt, those of its last turn, and for each of the latter its span of characters
        in the text of that turn, ``(start, end)``.

        With ``ended`` the end-of-turn id is appended, with an empty span. Requires a tokenizer with character offsets.
        """
        text = conversation[-1]["content"]
        prompt_ids = self.prompt_ids(conversation[:-1])
        ids, spans = self._tokens_in_place(conversation, prompt_ids) or self._tokens_alone(text)
        end_ids = [self.end_id] if ended else []
        return prompt_ids, [*ids, *end_ids], [*spans, *((len(text), len(text)) for _ in end_ids)]

    def _tokens_in_place(
        self, conversation: Sequence[Message], prompt_ids: list[int]
    ) -> tuple[list[int], list[tuple[int, int]]] | None:
        """The tokens of the last turn's text as they follow the prompt; None if the template or a token that crosses the
        boundary hides where the text starts."""
        messages, text = self._prepare(conversation), conversation[-1]["content"]
        before = self._render(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = self._render(messages, tokenize=False, add_generation_prompt=False)
        said = text if text in whole[len(before) :] else text.strip()  # some templates strip whitespace
        start = whole.find(said, len(before)) if said and whole.startswith(before) else -1
        if start < 0:
            return None
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
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
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [(begin, end) for begin, end in encoded["offset_mapping"]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the response text of sampled ids, without end-of-turn and other special tokens."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # Some templates start a response with text of their own (Mistral: a space), which is not part of it.
        return text.removeprefix(self.response_prefix)

    def refusal(self, messages: Sequence[Message]) -> str | None:
        """Return why a conversation cannot be encoded faithfully (its text contains a control token), or None."""
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
        """Content hash of everything that affects how text is converted to ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return hash_json({"vocabulary": self.tokenizer.get_vocab(), "special": self.tokenizer.all_special_tokens})
        state = json.loads(backend.to_str())
        # Padding and truncation reflect the last call, not the tokenizer itself.
        state.pop("padding", None)
        state.pop("truncation", None)
        return hash_json({"tokenizer": state, "eos": self.tokenizer.eos_token, "bos": self.tokenizer.bos_token})

    @property
    def fingerprint(self) -> str:
        """One hash of tokenizer, template and system policy: equal fingerprints give equal ids."""
        return hash_text(self.tokenizer_hash, self.template_hash)

    @cached_property
    def _has_system_role(self) -> bool:
        """Whether the template renders the text of a system turn: some raise, some silently omit it."""
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
                "pass --system fold to move their text into the first user turn"
            )
        return list(messages)

    def _render(self, messages: Sequence[Message], tokenize: bool, add_generation_prompt: bool) -> Any:
        """Apply the template; return text, or ids (a list of int) if ``tokenize``."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=tokenize, add_generation_prompt=add_generation_prompt, return_dict=False
            )
        except Exception as error:  # a template may raise anything, and its message is what the user needs
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"the chat template of {self.name} rejects the turns '{roles}' ({error}): fix the row or the template"
            ) from error

    def _probe_response(self) -> tuple[str, int]:
        """Return the text that the template writes before a response, and the id it writes after one."""
        user = [{"role": "user", "content": "Hi"}]
        prompt = self._render(user, tokenize=False, add_generation_prompt=True)
        whole = self._render(
            [*user, {"role": "assistant", "content": _PROBE}], tokenize=False, add_generation_prompt=False
        )
        before, found, after = whole.rpartition(_PROBE)
        if not found:
            raise InputError(f"the chat template of {self.name} omits the assistant's text: fix the template")
        prefix = before.removeprefix(prompt) if before.startswith(prompt) else ""
        # Only a control token can end a turn: a template that writes plain text after a response ends with the EOS.
        control = {int(token) for token in getattr(self.tokenizer, "added_tokens_decoder", {})}
        control.update(self.tokenizer.all_special_ids)
        ids = self.tokenizer(after.strip(), add_special_tokens=False)["input_ids"] if after.strip() else []
        end_id = ids[0] if ids and ids[0] in control else self.tokenizer.eos_token_id
        if end_id is None:
            raise InputError(
                f"the tokenizer of {self.name} has neither an EOS token nor an end-of-turn token in its template, "
                "so a response could never end: set eos_token in tokenizer_config.json"
            )
        return prefix, int(end_id)

    def _reserved_texts(self) -> list[str]:
        """The texts of tokens that content must not contain, because they would start or end a turn."""
        ids = {*self.stop_ids, self.tokenizer.bos_token_id} - {None}
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(sorted(ids))]

    def _reserved_reason(self, text: str, role: str = "assistant") -> str:
        return f"the {role} turn contains the control token '{text}' as text: remove it from the row"

    def _response_tokens(self, conversation: Sequence[Message], prompt: list[int]) -> list[int]:
        """The ids of the final turn as the template writes them, including anything after the end of turn."""
        messages = self._prepare(conversation)
        whole = self._one_bos(self._render(messages, tokenize=True, add_generation_prompt=False))
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        # Not a prefix: a token crosses the boundary, or the template rewrites earlier turns. The text may still align.
        prompt_text = self._render(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole_text = self._render(messages, tokenize=False, add_generation_prompt=False)
        aligned = whole_text.startswith(prompt_text)
        text = whole_text[len(prompt_text) :] if aligned else conversation[-1]["content"]
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _one_bos(self, ids: list[int]) -> list[int]:
        """Drop a repeated BOS: some templates write one and the tokenizer adds another."""
        bos = self.tokenizer.bos_token_id
        start = 0
        while bos is not None and ids[start : start + 2] == [bos, bos]:
            start += 1
        return list(ids[start:])
