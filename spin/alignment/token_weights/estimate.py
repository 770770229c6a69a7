"""Computes token weights for a folder of preference files: read, score with one model at a time, compute weights, write."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say, say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_file, hash_text
from spin.alignment.core.resolve import module_record
from spin.alignment.core.sides import SIDES
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.data.config import DataConfig
from spin.alignment.data.data_card import write_data_card
from spin.alignment.data.preferences import load_preferences
from spin.alignment.data.stored_ids import check_origin
from spin.alignment.methods.weightings import PairTokens, draws, find_weighting, weights_of_pair
from spin.alignment.token_weights.config import WeightsConfig
from spin.alignment.token_weights.files import WeightedRow, find_splits, is_done, read_statistics, write_weighted
from spin.alignment.token_weights.model_scores import (
    Judge,
    align_rows,
    check_rows_fit,
    encode_rows,
    exact_gains,
    score_splits,
    teacher_gains,
    truncated_rows,
    with_prompts,
)
from spin.alignment.token_weights.stored_gains import gains_of_pair

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

SCORES_FOLDER = ".scores"
Gains = tuple[list[float], list[float]]
WritePage = Callable[[Path, Path, ChatEncoder, list[str], int], object]


@dataclass(frozen=True)
class Method:
    """How token weights are computed."""

    weighting: str
    transform: str
    settings: dict[str, float]
    seed: int
    limits: DataConfig
    batching: str

    @classmethod
    def of(cls, config: WeightsConfig) -> Method:
        """Return the method given by a configuration."""
        settings = config.transform_settings
        return cls(config.weighting, config.transform_name, settings, config.seed, config.limits, config.batching)

    @property
    def needs_models(self) -> bool:
        return find_weighting(self.weighting).needs_models

    @property
    def gives_gains(self) -> bool:
        return find_weighting(self.weighting).gives_gains

    def record(self) -> dict[str, Any]:
        """Return everything that determines the weights, besides models and rows."""
        own = {"weighting": self.weighting, **module_record("weighting", self.weighting)}
        if not self.gives_gains:
            return own
        lengths = {"max_length": self.limits.max_length, "max_prompt_length": self.limits.max_prompt_length}
        drawn = {"seed": self.seed} if draws(self.transform) else {}
        return {
            **own,
            "transform": self.transform,
            "params": self.settings,
            **(lengths if self.needs_models else {}),
            **drawn,
        }


@dataclass
class Split:
    """The rows of a split, their untruncated ids, and the reason why a row has none ("" if it has)."""

    name: str
    files: list[Path]
    rows: Dataset
    encoded: Dataset
    reasons: list[str]
    facts: dict[str, Any]
    encoder: ChatEncoder

    def __post_init__(self) -> None:
        self.usable = [index for index, reason in enumerate(self.reasons) if not reason]
        stored = [f"{side}_{name}" for side in SIDES for name in ("token_ids", "finish_reason")]
        kept = ["prompt_id", "sample_index", *(name for name in stored if name in self.rows.column_names)]
        self.facts_of_rows = self.rows.select_columns(kept)

    def stored_gains(self, position: int) -> Gains:
        """Return the gains that came with the usable row at a position.

        Raises:
            InputError: it has none, or they do not line up with its tokens.
        """
        index = self.usable[position]
        return gains_of_pair(
            self.rows[index], self.encoded[index], self.encoder, f"{self.files[0].parent} [{self.name}] row {index}"
        )

    def weighted(self, method: Method, gains: Callable[[int], Gains] | None) -> Iterator[WeightedRow]:
        """Yield the weights of every row; ``gains`` is called with a row's position among the usable rows."""
        position = 0
        for index, reason in enumerate(self.reasons):
            stored, row = self.facts_of_rows[index], self.encoded[index]
            if reason:  # stored ids and finish reasons are kept unchanged
                ids, ends = (
                    [stored.get(f"{side}_{name}") for side in SIDES] for name in ("token_ids", "finish_reason")
                )
                yield WeightedRow(ids, ends, (None, None), reason)
                continue
            ids = [row[f"{side}_ids"] for side in SIDES]
            pair = PairTokens(ids[0], ids[1], *(gains(position) if gains else ([], [])))
            position += 1
            # Seeds depend on the row's identity, not its position, so that weights do not change with the order of rows.
            name = (str(method.seed), stored["prompt_id"], str(stored["sample_index"]))
            seeds = (int(hash_text(*name, SIDES[0]), 16), int(hash_text(*name, SIDES[1]), 16))
            weights = weights_of_pair(method.weighting, pair, method.transform, method.settings, seeds)
            ends = [
                stored.get(f"{side}_finish_reason") or ("stop" if some[-1] in self.encoder.stop_ids else "length")
                for side, some in zip(SIDES, ids, strict=True)
            ]
            yield WeightedRow(ids, ends, weights)


def estimate_weights(config: WeightsConfig, write_page: WritePage | None = None) -> list[str]:
    """Compute token weights for every split of a folder of pairs; every process of a launch must call it.

    Args:
        write_page: writes the page requested by ``config.page``; called with file, weights folder, encoder, lines, rows.

    Returns:
        A summary of the weights: one line per split, and warnings.

    Raises:
        InputError: a model or a row cannot be used; raised before a model is loaded.
    """
    from spin.alignment.token_weights.judges import open_judges

    config.check_files()
    method = Method.of(config)
    *judges, encoder = open_judges(config)
    accelerator = make_accelerator()
    for remark in encoder.remarks if accelerator.is_main_process else ():
        say_error(remark)
    input_dir, output_dir = Path(config.input_dir), Path(config.output_dir)
    splits = open_splits(input_dir, output_dir, method, judges, encoder, config.overwrite)
    accelerator.wait_for_everyone()  # until all processes have checked the output, before the main process replaces it
    weight_splits(splits, output_dir, method, judges, accelerator)
    lines = describe(output_dir, method)
    if accelerator.is_main_process:
        write_data_card(output_dir, {})
        if config.page and write_page is not None:
            write_page(Path(config.page), output_dir, encoder, lines, config.page_rows)
        for line in lines if splits else [f"{output_dir} is already complete", *lines]:
            say(line)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return lines


def make_accelerator() -> Accelerator:
    """Return an accelerator that connects the processes of a launch. Each process holds a full model in the precision of its
    weights: sharding and mixed precision in a launch configuration are for training and ignored here."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ[name] = "false"
    import torch
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")


def open_splits(
    input_dir: Path,
    output_dir: Path,
    method: Method,
    judges: Sequence[Judge | None],
    encoder: ChatEncoder,
    overwrite: bool,
) -> list[Split]:
    """Read and encode every split of the input folder that does not have complete weights yet.

    Raises:
        InputError: no preference files, an invalid row, or existing output from other inputs or settings.
    """
    models = {name: judge.record() for name, judge in zip(("model_plus", "model_minus"), judges, strict=True) if judge}
    common = {**method.record(), **models, "tokenizer": encoder.fingerprint}
    splits = []
    for name, files in find_splits(input_dir).items():
        facts = {**common, "pairs": hash_text(*(f"{file.name}={hash_file(file)}" for file in files))}
        if is_done(output_dir, name, files, facts, overwrite):
            continue
        check_origin(input_dir, name, encoder)
        rows = load_preferences(str(input_dir), name)
        encoded, reasons = encode_rows(rows, encoder, f"{input_dir} [{name}]")
        split = Split(name, files, rows, encoded, reasons, facts, encoder)
        if not split.usable:
            raise InputError(f"{input_dir} [{name}] has no pair that can be weighted ({reasons[0]}): check the data")
        splits.append(split)
    return splits


def gains_of_splits(
    splits: Sequence[Split], folder: Path, method: Method, plus: Judge, minus: Judge, accelerator: Accelerator
) -> dict[str, Callable[[int], Gains]]:
    """Score all usable rows with one model at a time; return a function per split that maps a position to its gains.

    Every process must call it.

    Raises:
        InputError: a sequence does not fit into a model.
    """
    # Three cases: different tokenizers, one tokenizer with different chat templates, or the same ids for both models.
    aligned = plus.encoder.tokenizer_hash != minus.encoder.tokenizer_hash
    # ``ours`` are the rows in the student's ids, ``theirs`` the same responses as the other model reads them.
    theirs, ours = {}, {}
    for split in splits:
        rows, encoded = split.rows.select(split.usable), split.encoded.select(split.usable)
        ours[split.name] = encoded
        if aligned:
            theirs[split.name] = align_rows(rows, encoded, minus.encoder, plus.encoder)
        elif plus.encoder.template_hash != minus.encoder.template_hash:
            theirs[split.name] = with_prompts(rows, encoded, plus.encoder)
        else:
            theirs[split.name] = encoded
    passed = [
        {name: truncated_rows(rows, judge.encoder, method.limits) for name, rows in given.items()}
        for judge, given in ((plus, theirs), (minus, ours))
    ]
    for judge, given in zip((plus, minus), passed, strict=True):
        check_rows_fit(judge, given)
    teacher, student = (
        score_splits(judge, given, folder, method.batching, accelerator)
        for judge, given in zip((plus, minus), passed, strict=True)
    )

    def of_split(name: str) -> Callable[[int], Gains]:
        def gains(position: int) -> Gains:
            high, low = teacher[name][position], student[name][position]
            if aligned:
                row = theirs[name][position]
                found = [teacher_gains(row, side, high[side], low[side]) for side in SIDES]
            else:
                found = [exact_gains(high[side], low[side]) for side in SIDES]
            return found[0], found[1]

        return gains

    return {split.name: of_split(split.name) for split in splits}


def weight_splits(
    splits: Sequence[Split],
    output_dir: Path,
    method: Method,
    judges: Sequence[Judge | None],
    accelerator: Accelerator,
) -> None:
    """Compute and write the weights of splits; only the main process writes. Every process must call it."""
    plus, minus = judges
    gains: dict[str, Callable[[int], Gains]] = {}
    if method.gives_gains and not method.needs_models:
        gains = {split.name: split.stored_gains for split in splits}
    elif splits and plus is not None and minus is not None:
        gains = gains_of_splits(splits, output_dir / SCORES_FOLDER, method, plus, minus, accelerator)
    if accelerator.is_main_process:
        for split in splits:
            rows = split.weighted(method, gains.get(split.name))
            write_weighted(split.files, output_dir, split.name, split.facts, rows)
    accelerator.wait_for_everyone()


def describe(output_dir: Path, method: Method) -> list[str]:
    """Return a summary of the weights in a folder: one line per split, and warnings."""
    lines = []
    for path in sorted(output_dir.glob("*_prefs.weights.json")):
        split = path.name.partition("_prefs")[0]
        found = read_statistics(output_dir, split)
        lines.append(
            f"{split}: {found['rows']} rows weighted by {method.weighting}{_side(found, 'chosen')}{_side(found, 'rejected')}"
        )
        lines += [
            f"  {count} without weights (also skipped in training): {why}" for why, count in found["left_out"].items()
        ]
        lines += [f"warning: {line}" for line in warnings(found, method)]
    return lines


def _side(found: dict[str, Any], side: str) -> str:
    values = found[side]
    if not values["tokens"]:
        return f"; {side}: none"
    return f"; {side}: mean {values['mean']:.3f}, {values['min']:.3f} to {values['max']:.3f}"


def warnings(found: dict[str, Any], method: Method) -> list[str]:
    """Return warnings about unusual weights of a split, given its statistics."""
    sides = [found[side] for side in SIDES if found[side]["tokens"]]
    tokens = sum(side["tokens"] for side in sides)
    lines = []
    values = {side[key] for side in sides for key in ("min", "max")}
    how = f"transform {method.transform}" if method.gives_gains else f"weighting {method.weighting}"
    if len(values) == 1 and not find_weighting(method.weighting).constant:
        lines.append(
            f"every weight is {values.pop():g} ({how}): training on them is the same as without weights, up to that factor; "
            "choose another transform or other models"
        )
    negative = sum(side["negative"] for side in sides)
    if negative:
        lines.append(
            f"{negative / tokens:.1%} of the weights are negative ({how}), which reverses the gradient of their tokens; choose "
            "exponential, rank_based or threshold_and_scale to avoid that"
        )
    unscored = sum(found[side]["unscored"] for side in SIDES)
    if unscored:
        lines.append(
            f"{unscored} tokens are beyond max_length {method.limits.max_length} and have no weight (NaN): train with at most "
            "this max_length, or compute the weights again with a larger one"
        )
    return lines
