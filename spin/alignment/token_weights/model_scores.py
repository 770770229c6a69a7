"""Log-probs of stored response tokens under frozen models, and the gains of tokens between two models."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_weights
from spin.alignment.core.sides import SIDES
from spin.alignment.data.chat_encoder import ChatEncoder, load_encoder, template_arguments
from spin.alignment.data.config import DataConfig
from spin.alignment.data.encode_pairs import EncodedPair, encode_pair, truncate_pair
from spin.alignment.data.stored_ids import ids_problem
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.folder import check_fits, check_model_path, model_folder
from spin.alignment.models.loading import load_model
from spin.alignment.models.vocabulary import check_control_tokens
from spin.alignment.models.weights_check import check_model
from spin.alignment.token_weights.align_tokens import aligned_gains, character_logps, token_spans

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from spin.alignment.logprobs.batch import PairDataset
    from spin.alignment.logprobs.pair_forward import PairForward
    from spin.alignment.logprobs.reference_store import ReferenceLogps

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# Tokens per packed row (no activations are saved for a backward pass), and pairs per padded batch.
_ROW_TOKENS, _PADDED_PAIRS = {"cpu": 2048}, 4
_GPU_ROW_TOKENS = 32_768
_NOT_TRUNCATED = 2**62


@dataclass(frozen=True)
class Judge:
    """A frozen model that scores tokens, with its tokenizer; its weights are not loaded yet."""

    config: ModelConfig
    folder: Path
    encoder: ChatEncoder
    weights_hash: str

    @classmethod
    def open(cls, config: ModelConfig, template: Mapping[str, Any]) -> Judge:
        """Check a model's folder and load its tokenizer; ``template`` is what :func:`open_encoder` takes.

        Raises:
            InputError: the model does not exist, has no weights, or its tokenizer has no usable chat template.
        """
        check_model_path(config.model_name_or_path)
        folder = model_folder(config.model_name_or_path, config.model_revision)
        model_config = check_model(folder, trust_remote_code=config.trust_remote_code)
        encoder = open_encoder(config, template)
        check_control_tokens(encoder, model_config, config.model_name_or_path)
        return cls(config, folder, encoder, hash_weights(folder))

    def record(self) -> dict[str, str]:
        """Return everything that determines the model's log-probs, for the provenance of files computed with it."""
        return {
            "model": self.config.model_name_or_path.rstrip("/"),
            "weights_hash": self.weights_hash,
            "tokenizer": self.encoder.fingerprint,
            "dtype": self.config.dtype,
        }


def open_encoder(config: ModelConfig, template: Mapping[str, Any]) -> ChatEncoder:
    """Return the chat encoder of a model's tokenizer; ``template`` has the keyword arguments of :func:`load_encoder`."""
    return load_encoder(config.model_name_or_path, config.model_revision, config.trust_remote_code, **template)


def check_offsets(teacher: ChatEncoder, student: ChatEncoder) -> bool:
    """Return whether teacher and student share a tokenizer, so that ids need no alignment.

    Raises:
        InputError: they do not, and the teacher's tokenizer provides no character offsets.
    """
    if teacher.tokenizer_hash == student.tokenizer_hash:
        return True
    if not getattr(teacher.tokenizer, "is_fast", False):
        raise InputError(
            f"the tokenizer of the teacher {teacher.name} has no character offsets, which are needed to align it with "
            f"{student.name}: use a teacher with a fast tokenizer (tokenizer.json), or one that shares the student's tokenizer"
        )
    return False


def encode_rows(rows: Dataset, encoder: ChatEncoder, where: str) -> tuple[Dataset, list[str]]:
    """Return the untruncated ids of preference rows, and the reason why a row has none ("" if it has).

    These are the ids that training uses: the stored ones if there are any, else those of the encoded text.

    Raises:
        InputError: stored ids are not from this tokenizer; the message names the row.
    """

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        pair = encode_pair(row, encoder, _NOT_TRUNCATED, _NOT_TRUNCATED)
        if isinstance(pair, str):
            return {name: [] for name in ID_COLUMNS} | {"reason": pair}
        found: dict[str, Any] = pair.columns()
        for side in SIDES:
            if problem := ids_problem(row, side, encoder):
                raise InputError(
                    f"{where} row {index}: {problem} with the tokenizer of {encoder.name}: pass models whose tokenizer encoded "
                    "the data"
                )
        return found | {"reason": ""}

    encoded = rows.map(
        encode, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False, desc="encode pairs"
    )
    return encoded.remove_columns("reason"), list(encoded["reason"])


def align_rows(rows: Dataset, encoded: Dataset, student: ChatEncoder, teacher: ChatEncoder) -> Dataset:
    """Return the same responses in a teacher's ids, with its own chat template, and the spans of both tokenizers' tokens.

    The text is decoded from the student's ids; columns ``{side}_places`` are the spans of the student's tokens, ``{side}_spans``
    those of the teacher's. If the student's response ends with an end-of-turn id, so does the teacher's.
    """

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for side in SIDES:
            ids = encoded[index][f"{side}_ids"]
            ended = ids[-1] in student.stop_ids
            text, places = student_text(student, ids[:-1] if ended else ids)
            conversation = [*row[side][:-1], {"role": "assistant", "content": text}]
            given = template_arguments(row)
            prompt_ids, teacher_ids, spans = teacher.aligned_ids(
                conversation, ended, **given
            )  # spans in characters of ``text``
            found["prompt_ids"] = prompt_ids
            # A response with neither text nor end-of-turn has nothing to score; one id is used as a placeholder.
            found |= {f"{side}_ids": teacher_ids or [teacher.end_id], f"{side}_spans": spans, f"{side}_places": places}
            found |= {f"{side}_length": len(text), f"{side}_ended": ended}
        return found

    return rows.map(
        encode, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False, desc="align tokens"
    )


def with_prompts(rows: Dataset, encoded: Dataset, encoder: ChatEncoder) -> Dataset:
    """Return the same response ids after prompts encoded with another chat template of the same tokenizer."""

    def prompt(row: dict[str, Any], index: int) -> dict[str, Any]:
        found = rows[index]
        return {"prompt_ids": encoder.prompt_ids(found["chosen"][:-1], **template_arguments(found))}

    return encoded.map(prompt, with_indices=True, load_from_cache_file=False, desc="teacher's prompts")


def student_text(encoder: ChatEncoder, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of response ids and the span of each, without the prefix that the template adds to a response."""

    def decode(some: list[int]) -> str:
        return encoder.raw_text(some)

    text, spans = token_spans(decode, ids)
    opening = len(encoder.response_prefix) if text.startswith(encoder.response_prefix) else 0
    return text[opening:], [(max(start - opening, 0), max(end - opening, 0)) for start, end in spans]


def truncated_rows(encoded: Dataset, encoder: ChatEncoder, limits: DataConfig) -> Dataset:
    """Return the rows truncated as in training, which is what the models score."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        pair = EncodedPair(row["prompt_ids"], {side: row[f"{side}_ids"] for side in SIDES})
        bos_id = encoder.tokenizer.bos_token_id
        return truncate_pair(pair, limits.max_length, limits.max_prompt_length, bos_id).columns()

    return encoded.select_columns(list(ID_COLUMNS)).map(cut, load_from_cache_file=False, desc="truncate pairs")


def check_rows_fit(judge: Judge, splits: Mapping[str, Dataset]) -> None:
    """Check the longest sequence and the largest token id against a model's configuration."""
    import pyarrow.compute as pc

    for rows in splits.values():
        table = rows.with_format("arrow")[:]
        prompt, *responses = (pc.list_value_length(table[name]) for name in ID_COLUMNS)
        longest = max(pc.max(pc.add(prompt, response)).as_py() for response in responses)
        check_fits(judge.folder, longest, max(pc.max(pc.list_flatten(table[name])).as_py() for name in ID_COLUMNS))


def score_splits(
    judge: Judge, splits: Mapping[str, Dataset], folder: Path, batching: str, accelerator: Accelerator
) -> dict[str, ReferenceLogps]:
    """Return the log-probs (nats) of all rows of all splits under one model, computing and storing those that are missing.

    The rows are divided among the processes; after an interruption only the missing ones are computed. The model is loaded only
    if something is missing, and freed afterwards. Every process must call it.
    """
    import torch
    from accelerate.utils import broadcast_object_list

    from spin.alignment.logprobs.batch import PairDataset
    from spin.alignment.logprobs.reference import compute_reference, log_progress
    from spin.alignment.logprobs.reference_store import (
        ReferenceKey,
        ReferenceLogps,
        discard_damaged,
        hash_tokens,
        store_path,
    )

    accelerator.wait_for_everyone()
    precision = f"{judge.config.dtype}, {batching}, {accelerator.device.type}"
    keys = {name: ReferenceKey(judge.weights_hash, hash_tokens(rows), precision) for name, rows in splits.items()}
    paths = {name: store_path(folder, name, key) for name, key in keys.items()}
    whole = [accelerator.is_main_process and [name for name, path in paths.items() if discard_damaged(path)]]
    whole = broadcast_object_list(whole)[0]
    missing = [name for name in paths if name not in whole]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        model = load_model(judge.config).to(accelerator.device).eval()
        forward = make_forward(model, judge, PairDataset(splits[missing[0]]), batching, accelerator)
        for name in missing:
            progress = log_progress(f"{judge.config.model_name_or_path}, {name} split")
            compute_reference(forward, PairDataset(splits[name]), paths[name], keys[name], accelerator, progress)
        # Free the weights before the second model is loaded: only one is in memory at a time.
        del model, forward
        gc.collect()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
    return {name: ReferenceLogps(path, keys[name], splits[name]) for name, path in paths.items()}


def make_forward(model: Any, judge: Judge, pairs: PairDataset, batching: str, accelerator: Accelerator) -> PairForward:
    """Return the forward pass of rows; packed rows of ``pairs`` are first compared with padded ones, as before training.

    Raises:
        InputError: this architecture does not support packed rows.
    """
    from spin.alignment.logprobs.packing_check import check_packed_forward
    from spin.alignment.logprobs.pair_forward import PairForward

    device = accelerator.device
    forward = PairForward.of(model, judge.encoder.pad_id, device, model.dtype, _PADDED_PAIRS)
    if batching == "packed":
        forward = forward.packed(_ROW_TOKENS.get(device.type, _GPU_ROW_TOKENS))
        check_packed_forward(forward, pairs)
    return forward


def exact_gains(plus: np.ndarray, minus: np.ndarray) -> list[float]:
    """Return the gains (nats) of the tokens that both models scored, given the same ids."""
    count = min(len(plus), len(minus))  # prompts may differ in length, so one model can be truncated earlier
    return (plus[:count].astype(np.float64) - minus[:count].astype(np.float64)).tolist()


def teacher_gains(row: Mapping[str, Any], side: str, teacher: np.ndarray, student: np.ndarray) -> list[float]:
    """Return the gains (nats) of a student's tokens from a row of :func:`align_rows` and both models' log-probs.

    The end-of-turn ids are compared directly, all other tokens through their characters.
    """
    spans, places = ([(int(a), int(b)) for a, b in row[f"{side}_{name}"]] for name in ("spans", "places"))
    ended = row[f"{side}_ended"]
    words = spans[:-1] if ended else spans
    shares = character_logps(teacher[: len(words)].tolist(), words, row[f"{side}_length"])
    gains = aligned_gains(shares, student[: len(places)].astype(np.float64).tolist(), places)
    if ended and len(teacher) == len(spans) and len(student) == len(places) + 1:
        gains.append(float(teacher[-1]) - float(student[-1]))
    return gains
