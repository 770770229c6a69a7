"""Step 1: prompts -> one shard of the model's own responses.

Writes ``{output_dir}/{split}-{data_frac:05d}.parquet`` with the columns of docs/data_format.md: prompt_id, sample_index,
chosen (ground truth), rejected (own response), rejected_token_ids, rejected_finish_reason. The rows of a fraction are made in
parts, each complete or absent, so a killed process is simply started again; under ``accelerate launch`` every process makes
its share of the parts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.errors import InputError, lookup
from spin.alignment.generation.base import PromptRequest, SamplingConfig
from spin.programs import Parser, interrupt_on_sigterm, run_program

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.chat import ChatEncoder
    from spin.alignment.generation import Response
    from spin.alignment.provenance import Provenance
    from spin.alignment.shards import FractionParts

BATCH_SIZE = 16
TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


def make_parser() -> Parser:
    parser = Parser(prog="generate.py", description="Generate a model's own responses to the prompts of a data set.")
    add = parser.add_argument
    add("--model", required=True, help="model folder or Hub name: the opponent")
    add("--revision", default=None, help="revision of a Hub model")
    add("--input_dir", required=True, help="prompts with ground truth: folder, file or Hub name")
    add("--output_dir", required=True, help="folder of the fractions")
    add("--split", default="train", help="split of the data")
    add("--data_frac", type=int, default=0, help="which fraction to generate")
    add("--frac_len", type=int, default=0, help="prompts in a fraction (0: all in one)")
    add("--backend", default="transformers", help="transformers or vllm")
    add("--num_samples", type=int, default=1, help="responses to each prompt")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top_p", type=float, default=1.0, help="nucleus sampling")
    add("--top_k", type=int, default=0, help="0 is off")
    add("--max_new_tokens", type=int, default=1024, help="longest response in tokens")
    add("--max_prompt_length", type=int, default=0, help="longest prompt in tokens (0: what the context leaves)")
    add("--seed", type=int, default=42, help="seed of the responses")
    add(
        "--batch_size",
        type=int,
        default=None,
        help="responses in flight at once (default: 16; vllm: its own, 256 or more)",
    )
    add("--tensor_parallel_size", type=int, default=1, help="GPUs of one engine (vllm)")
    add("--gpu_memory_utilization", type=float, default=0.9, help="share of GPU memory the engine takes (vllm)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="precision of the weights")
    add("--system", default="keep", choices=("keep", "fold"), help="fold: join system turns into the first user turn")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--iteration", type=int, default=0, help="iteration number, recorded in the provenance")
    add(
        "--flush_every",
        type=int,
        default=None,
        help="prompts in a part, what a killed process loses at most (default: 64 or batch_size; vllm: 512)",
    )
    add("--overwrite", action="store_true", help="replace a fraction that was made from something else")
    return parser


def check_options(options: Any) -> SamplingConfig:
    """Check every flag that can be checked without opening anything, fill in the backend's defaults; return the sampling."""
    from spin.alignment.generation import BACKENDS

    lookup(BACKENDS, options.backend, "generation backend")
    if options.backend == "transformers":
        if options.tensor_parallel_size > 1:
            raise InputError("tensor_parallel_size is for vllm: set it to 1 or pass --backend vllm")
        options.batch_size = BATCH_SIZE if options.batch_size is None else options.batch_size
    if options.flush_every is None:
        options.flush_every = 512 if options.backend == "vllm" else max(64, options.batch_size)
    for name, lowest in (
        ("data_frac", 0),
        ("frac_len", 0),
        ("max_prompt_length", 0),
        ("batch_size", 1),
        ("flush_every", 1),
        ("tensor_parallel_size", 1),
    ):
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise InputError(f"{name} is {value}: set it to {lowest} or more")
    if options.flush_every < (options.batch_size or 1):
        raise InputError(
            f"flush_every {options.flush_every} is smaller than batch_size {options.batch_size}, so no batch would be full: "
            "raise it to batch_size or more"
        )
    if Path(options.output_dir).exists() and not Path(options.output_dir).is_dir():
        raise InputError(f"output_dir {options.output_dir} is a file: give a folder")
    if not 0 < options.gpu_memory_utilization <= 1:
        raise InputError(f"gpu_memory_utilization is {options.gpu_memory_utilization}: set it above 0 and at most 1")
    return SamplingConfig(
        num_samples=options.num_samples,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )


def stated_provenance(options: Any, sampling: SamplingConfig, model_dir: Path) -> Provenance:
    """Return what is known of this fraction's origin before a tokenizer or a row is read.

    ``extra["inputs"]`` is one hash of every input file, so that a finished fraction is recognised in a second.
    """
    from spin.alignment.provenance import Provenance, hash_file, hash_text, hash_weights, package_versions
    from spin.alignment.readers import split_files

    data = Path(options.input_dir)
    data_files = split_files(data, options.split) if data.exists() else []
    weights_hash = hash_weights(model_dir)
    texts = sorted(file for pattern in TOKENIZER_FILES for file in model_dir.glob(pattern))
    contents = [f"{file.name}={hash_file(file)}" for file in (*texts, *data_files)]
    return Provenance(
        kind="generated",
        # A folder may be mounted elsewhere on another server; its weights tell what it is.
        model=model_dir.resolve().name if Path(options.model).is_dir() else options.model,
        model_revision=options.revision or "",
        weights_hash=weights_hash,
        backend=options.backend,
        sampling=sampling.as_dict() | {"dtype": options.dtype, "max_prompt_length": options.max_prompt_length},
        iteration=options.iteration,
        split=options.split,
        data_frac=options.data_frac,
        frac_len=options.frac_len,
        versions=package_versions(),
        extra={"inputs": hash_text(options.system, *contents)} if data_files else {},
    )


def is_known_complete(path: Path, stated: Provenance) -> bool:
    """Return whether the fraction is there and its input files and settings are the same, byte for byte."""
    from spin.alignment.provenance import read_provenance
    from spin.alignment.shards import open_parquet

    if not path.exists() or not stated.extra:
        return False
    found = read_provenance(open_parquet(path).schema_arrow, path)
    derived = ("tokenizer_hash", "chat_template_hash", "prompts_hash", "num_prompts")
    return not stated.differences(found, ignore=derived)


def full_provenance(stated: Provenance, prompts: Dataset, encoder: ChatEncoder) -> Provenance:
    """Add what the tokenizer and the rows say."""
    from spin.alignment.data import prompts_hash

    return replace(
        stated,
        tokenizer_hash=encoder.tokenizer_hash,
        chat_template_hash=encoder.template_hash,
        prompts_hash=prompts_hash(prompts),
        num_prompts=len(prompts),
    )


def already_done(parts: FractionParts, overwrite: bool) -> bool:
    """Return whether the fraction is there and made from the same things.

    Raises:
        InputError: it is there, but made from something else.
    """
    from spin.alignment.provenance import read_provenance
    from spin.alignment.shards import open_parquet

    if not parts.path.exists() or parts.is_merged():
        return parts.path.exists()
    if overwrite:
        return False
    found = read_provenance(open_parquet(parts.path).schema_arrow, parts.path)
    differences = parts.provenance.differences(found, ignore=("extra",))
    raise InputError(
        f"{parts.path} was made from something else ({'; '.join(differences)}): pass --overwrite or another output_dir"
    )


def encode_prompts(
    prompts: Dataset, encoder: ChatEncoder, longest: int
) -> tuple[list[tuple[dict[str, Any], PromptRequest]], list[dict[str, str]]]:
    """Encode every prompt of the fraction; return the (row, request) list, longest last, and the prompts left out."""
    kept, skipped = [], []
    for row in prompts:
        prompt = row["chosen"][:-1]
        if reason := encoder.refusal(prompt):
            skipped.append({"prompt_id": row["prompt_id"], "reason": reason})
            continue
        try:
            ids = encoder.prompt_ids(prompt)
        except InputError as error:
            raise InputError(f"prompt {row['prompt_id']}: {error}") from error
        if len(ids) > longest:
            skipped.append(
                {"prompt_id": row["prompt_id"], "reason": f"prompt of {len(ids)} tokens, at most {longest} fit"}
            )
            continue
        kept.append((row, PromptRequest(row["prompt_id"], tuple(ids))))
    kept.sort(key=lambda item: len(item[1].token_ids))
    return kept, skipped


def longest_prompt(options: Any, model_dir: Path) -> int:
    """Return the longest prompt allowed, in tokens: what ``max_prompt_length`` and the model's context leave.

    Raises:
        InputError: the context has no room for ``max_new_tokens`` behind any prompt.
    """
    from transformers import AutoConfig

    from spin.alignment.chat import context_length

    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=options.trust_remote_code)
    context = context_length(config)
    limits = [options.max_prompt_length] if options.max_prompt_length else []
    if context is not None:
        if context <= options.max_new_tokens:
            raise InputError(
                f"max_new_tokens {options.max_new_tokens} leaves no room for a prompt in the context of {context} tokens: "
                "lower it"
            )
        limits.append(context - options.max_new_tokens)
    return min(limits, default=sys.maxsize)


def response_rows(row: dict[str, Any], responses: list[Response], encoder: ChatEncoder) -> list[dict[str, Any]]:
    """Return the generated rows of one prompt."""
    return [
        {
            "prompt_id": row["prompt_id"],
            "sample_index": index,
            "chosen": row["chosen"],
            "rejected": [*row["chosen"][:-1], {"role": "assistant", "content": encoder.decode(response.token_ids)}],
            "rejected_token_ids": response.token_ids,
            "rejected_finish_reason": response.finish_reason,
        }
        for index, response in enumerate(responses)
    ]


class Progress:
    """What a person watches: rows, rows/s, tokens/s, share of cut responses, time left. A bar, or a line every 10 s."""

    def __init__(self, name: str, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.name, self.total = name, total
        self.prompts = self.rows = self.tokens = self.cut = 0
        self.started = self.told = time.monotonic()
        self.bar: Bar | None = None
        if sys.stderr.isatty():
            from rich.console import Console

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(name, total=total)

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.prompts += len({row["prompt_id"] for row in rows})
        self.rows += len(rows)
        self.tokens += sum(len(row["rejected_token_ids"]) for row in rows)
        self.cut += sum(row["rejected_finish_reason"] == "length" for row in rows)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.prompts, description=self.summary())
        elif time.monotonic() - self.told > 10:
            self.told = time.monotonic()
            rate = self.prompts / (self.told - self.started)
            print(f"{self.summary()}, {(self.total - self.prompts) / rate:.0f} s left", file=sys.stderr, flush=True)

    def summary(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        cut = self.cut / max(self.rows, 1)
        return (
            f"{self.name}: {self.prompts}/{self.total} prompts, {self.rows / seconds:.1f} rows/s, "
            f"{self.tokens / seconds:.0f} tokens/s, {cut:.1%} cut"
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        print(self.summary(), file=sys.stderr, flush=True)


def generate_parts(
    options: Any,
    sampling: SamplingConfig,
    work: list[tuple[dict[str, Any], PromptRequest]],
    parts: FractionParts,
    encoder: ChatEncoder,
) -> None:
    """Generate this process's share of the parts that are not there yet; the model is loaded only if there are any."""
    from spin.alignment.generation import BackendSettings, make_backend

    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    mine = [index for index in parts.pending() if index % processes == rank]
    if not mine:
        return
    settings = BackendSettings(
        model=options.model,
        revision=options.revision,
        dtype=options.dtype,
        batch_size=options.batch_size,
        tensor_parallel_size=options.tensor_parallel_size,
        # No longer than needed: an engine reserves cache for it.
        max_model_len=len(work[-1][1].token_ids) + sampling.max_new_tokens,
        gpu_memory_utilization=options.gpu_memory_utilization,
        trust_remote_code=options.trust_remote_code,
        stop_ids=encoder.stop_ids,
        pad_id=encoder.pad_id,
    )
    backend = make_backend(options.backend, settings)
    # An engine schedules a whole part by itself; the transformers backend is given a batch at a time to show progress.
    step = options.batch_size if options.backend == "transformers" else options.flush_every
    name = f"fraction {options.data_frac}" + (f" rank {rank}" if processes > 1 else "")
    progress = Progress(name, sum(len(work[parts.rows_of(index)]) for index in mine))
    try:
        for index in mine:
            rows: list[dict[str, Any]] = []
            part = work[parts.rows_of(index)]
            for start in range(0, len(part), step):
                batch = part[start : start + step]
                answers = backend.generate([request for _, request in batch], sampling)
                new = [
                    made
                    for (row, _), responses in zip(batch, answers, strict=True)
                    for made in response_rows(row, responses, encoder)
                ]
                rows += new
                progress.add(new)
            parts.write(index, rows)
    finally:
        progress.close()
        backend.close()


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    sampling = check_options(options)
    interrupt_on_sigterm()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rank = int(os.environ.get("RANK", "0"))
    from spin.alignment.chat import ChatEncoder, load_tokenizer
    from spin.alignment.data import GENERATED_SCHEMA, load_prompts
    from spin.alignment.model_utils import check_model_path, model_folder
    from spin.alignment.shards import FractionParts, fraction_path, fraction_rows

    check_model_path(options.model)
    model_dir = model_folder(options.model, options.revision)
    path = fraction_path(options.output_dir, options.split, options.data_frac)
    stated = stated_provenance(options, sampling, model_dir)
    if is_known_complete(path, stated):
        print(f"{path} is complete already")
        return
    prompts = load_prompts(options.input_dir, options.split)
    rows = fraction_rows(len(prompts), options.data_frac, options.frac_len)
    encoder = ChatEncoder(load_tokenizer(options.model, options.revision, options.trust_remote_code), options.system)
    provenance = full_provenance(stated, prompts, encoder)
    work, skipped = encode_prompts(prompts.select(rows), encoder, longest_prompt(options, model_dir))
    if not work:
        raise InputError(f"no prompt fits ({skipped[0]['reason']}): raise max_prompt_length or lower max_new_tokens")
    parts = FractionParts(path, GENERATED_SCHEMA, provenance, options.flush_every, len(work))
    if already_done(parts, options.overwrite):
        print(f"{path} is complete already")
        return
    for item in skipped if rank == 0 else ():
        print(f"left out prompt {item['prompt_id']}: {item['reason']}", file=sys.stderr)
    generate_parts(options, sampling, work, parts, encoder)
    # Whichever process ends last finds every part there and merges them.
    if parts.merge(skipped):
        print(f"wrote {path}")


if __name__ == "__main__":
    run_program(main)
