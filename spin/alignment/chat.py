"""The only place where text becomes token ids, and where truncation happens.

Generation and training build a prompt with the same call, so its ids are equal by construction. A response is the ids after
the prompt, ended by exactly one end-of-turn id when it ended by itself and by none when it was cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spin.alignment.errors import InputError
from spin.alignment.provenance import hash_text
from spin.alignment.readers import Message

SystemPolicy = Literal["keep", "fold"]
_PROBE = "probe"


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model folder or Hub name.

    Raises:
        InputError: there is none, or the Hub cannot be reached.
    """
    from transformers import AutoTokenizer

    if model.startswith((".", "/", "~")) and not Path(model).exists():
        raise InputError(f"model folder {model} does not exist: check the path")
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"cannot load a tokenizer from '{model}' ({reason}): give a model folder, or a Hub name that is cached or "
            "reachable (HF_HUB_OFFLINE=0)"
        ) from error


class ChatEncoder:
    """Messages to ids and back, by the tokenizer's own chat template.

    Attributes:
        end_id: the id that ends an assistant turn in this template (``<|im_end|>``, ``<|eot_id|>``, ``</s>`` ...).
        stop_ids: the ids at which generation stops: ``end_id`` and the tokenizer's EOS.
        pad_id: an id to pad with. Masks are made from lengths, so it may equal EOS.

    Raises:
        InputError: the tokenizer has no chat template, or neither the template nor the tokenizer ends a turn.
    """

    def __init__(self, tokenizer: Any, system: SystemPolicy = "keep") -> None:
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer of '{tokenizer.name_or_path}' has no chat template: use a chat model, or add chat_template.jinja"
            )
        if system not in ("keep", "fold"):
            raise InputError(f"system is '{system}': choose keep or fold")
        self.tokenizer = tokenizer
        self.system = system
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self.end_id = self._find_end_id()
        eos_id = tokenizer.eos_token_id
        self.stop_ids: list[int] = sorted({self.end_id} | ({eos_id} if eos_id is not None else set()))
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id
        self.template_hash = hash_text(str(tokenizer.chat_template), system)
        self.tokenizer_hash = _tokenizer_hash(tokenizer)

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Return the ids of everything before the assistant's turn, its header included; at most one BOS."""
        return self._one_bos(self._render(prompt, add_generation_prompt=True))

    def response_ids(self, conversation: Sequence[Message]) -> list[int]:
        """Return the ids of the last assistant turn, prompt excluded, ended by exactly one end-of-turn id.

        Raises:
            InputError: the response text itself contains the end-of-turn token.
        """
        prompt = self.prompt_ids(conversation[:-1])
        whole = self._one_bos(self._render(conversation, add_generation_prompt=False))
        ids = whole[len(prompt) :]
        if whole[: len(prompt)] == prompt and any(token in self.stop_ids for token in ids):
            # Templates add a line break or more behind the end of the turn: the model never has to say those.
            body = ids[: next(index for index, token in enumerate(ids) if token in self.stop_ids)]
            tail = ids[len(body) + 1 :]
        else:
            # The template rewrites the past (strips, adds thinking tags): take the response by itself.
            body = self.tokenizer(conversation[-1]["content"], add_special_tokens=False)["input_ids"]
            tail = []
        if any(token in self.stop_ids for token in (*body, *tail)):
            end = self.tokenizer.convert_ids_to_tokens(self.end_id)
            raise InputError(f"a response contains the end-of-turn token {end} as text: remove it from the row")
        return [*body, self.end_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a response: end of turn and other special tokens left out."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        turns = fold_system(messages) if self.system == "fold" else list(messages)
        try:
            ids = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
            )
        except Exception as error:  # a template may raise anything; what it says is what the user needs
            mend = "correct the roles of the row"
            if any(turn["role"] == "system" for turn in turns):
                mend = "if it knows no system role, set system to fold (the system turn then joins the first user turn)"
            raise InputError(f"the chat template refuses a conversation ({error}): {mend}") from error
        return list(ids)

    def _one_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        while bos is not None and len(ids) > 1 and ids[0] == bos and ids[1] == bos:
            ids = ids[1:]
        return ids

    def _find_end_id(self) -> int:
        user = {"role": "user", "content": _PROBE}
        whole = self._render([user, {"role": "assistant", "content": _PROBE}], add_generation_prompt=False)
        prompt = self._render([user], add_generation_prompt=True)
        behind = whole[len(prompt) :] if whole[: len(prompt)] == prompt else []
        end = next((token for token in behind if token in self._special_ids), self.tokenizer.eos_token_id)
        if end is None:
            raise InputError(
                f"neither the chat template nor the tokenizer of '{self.tokenizer.name_or_path}' ends a turn: set its eos_token"
            )
        return int(end)


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Join a leading system turn into the first user turn, a blank line between them."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return list(messages)
    system, user, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hash_text(core, repr(sorted(tokenizer.special_tokens_map.items(), key=str)))


@dataclass(frozen=True)
class EncodedPair:
    """One pair as ids: both responses follow the same, possibly truncated, prompt."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def encode_pair(
    row: Mapping[str, Any], encoder: ChatEncoder, max_length: int, max_prompt_length: int
) -> EncodedPair | str:
    """Encode a preference row; stored token ids are used as they are, text is encoded only where there are none.

    When the prompt and the longer response exceed ``max_length``, the prompt keeps its last ``max_prompt_length`` ids
    (and its BOS); what then still exceeds is cut from the end of the responses, and a cut response has no end-of-turn id.

    Returns:
        The encoded pair, or the reason why no pair is left (an empty response, identical responses after the cut).
    """
    prompt = encoder.prompt_ids(row["chosen"][:-1])
    chosen = list(row.get("chosen_token_ids") or encoder.response_ids(row["chosen"]))
    rejected = list(row.get("rejected_token_ids") or _rejected_ids(row, encoder))
    if len(prompt) + max(len(chosen), len(rejected)) > max_length:
        prompt = truncate_prompt(prompt, max_prompt_length, encoder.tokenizer.bos_token_id)
        room = max_length - len(prompt)
        chosen, rejected = chosen[:room], rejected[:room]
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        if not ids:
            return f"empty {name} response"
    return EncodedPair(prompt, chosen, rejected)


def _rejected_ids(row: Mapping[str, Any], encoder: ChatEncoder) -> list[int]:
    if not row["rejected"][-1]["content"]:
        return [encoder.end_id]
    ids = encoder.response_ids(row["rejected"])
    return ids[:-1] if row.get("rejected_finish_reason") == "length" else ids


def truncate_prompt(prompt: list[int], max_prompt_length: int, bos_id: int | None) -> list[int]:
    """Keep the last ``max_prompt_length`` ids of a prompt; a leading BOS stays in front."""
    if len(prompt) <= max_prompt_length:
        return prompt
    if bos_id is not None and prompt[0] == bos_id:
        return [bos_id, *prompt[len(prompt) - max_prompt_length + 1 :]]
    return prompt[len(prompt) - max_prompt_length :]
