"""One generation step: settings, prompts, provenance, and the fractions to work on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say, say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.program import Parser
from spin.alignment.generation.base import GenerationBackend, PromptRequest, SamplingConfig

if TYPE_CHECKING:
    from spin.alignment.core.provenance import Provenance
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.data.prompt_store import PromptStore
    from spin.alignment.generation.fraction_work import GenerationJob

TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def make_parser() -> Parser:
    parser = Parser(prog="generate.py", description="Generate a model's own responses to the prompts of a data set.")
    add = parser.add_argument
    add("--model", required=True, help="model folder or Hub name: the opponent")
    add("--revision", default=None, help="revision of a Hub model")
    add("--adapter", default=None, help="folder of LoRA adapters to put on the model")
    add("--input_dir", required=True, help="prompts with ground truth: folder, file or Hub name")
    add("--output_dir", required=True, help="folder of the fractions, shared by all servers")
    add("--split", default="train", help="split of the data")
    add("--data_frac", default="0", help="which fraction to generate; auto: every one that nobody has finished")
    add("--frac_len", type=int, default=0, help="prompts in a fraction (0: all in one)")
    add("--backend", default="transformers", help="transformers, vllm or openai")
    add("--base_url", default=None, help="address of a running server, such as http://host:8000/v1 (openai)")
    add("--num_samples", type=int, default=1, help="responses to each prompt")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top_p", type=float, default=1.0, help="nucleus sampling")
    add("--top_k", type=int, default=0, help="0 is off")
    add("--min_p", type=float, default=0.0, help="least probability relative to the likeliest token; 0 is off")
    add("--repetition_penalty", type=float, default=1.0, help="1 is off")
    add("--stop", nargs="+", default=[], help="texts that end a response; they are cut from it")
    add("--max_new_tokens", type=int, default=1024, help="longest response in tokens; 0: what the context leaves")
    add("--max_prompt_length", type=int, default=0, help="longest prompt in tokens (0: what the context leaves)")
    add("--logprobs", action="store_true", help="store the log-prob of every sampled token")
    add("--seed", type=int, default=42, help="seed of the responses")
    add("--batch_size", type=int, default=None, help="responses in flight at once (default: the backend's own)")
    add("--tensor_parallel_size", type=int, default=1, help="GPUs of one engine (vllm)")
    add("--gpu_memory_utilization", type=float, default=0.9, help="share of GPU memory the engine takes (vllm)")
    add("--batch_invariant", action="store_true", help="the same responses in any batch (vllm, H100 or newer; slower)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="precision of the weights")
    add("--system", default="keep", choices=("keep", "fold"), help="fold: join system turns into the first user turn")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--iteration", type=int, default=0, help="iteration number, recorded in the provenance")
    add(
        "--flush_every",
        type=int,
        default=None,
        help="finished prompts in a part: what a killed process loses at most (default: 64; vllm, openai: 512)",
    )
    add("--lease_timeout", type=float, default=60.0, help="seconds without a sign of life until a server is given up")
    add("--overwrite", action="store_true", help="replace a fraction that was made from something else")
    return parser


def check_options(options: Any) -> SamplingConfig:
    """Check every flag that can be checked without opening anything, fill in the backend's defaults; return the sampling."""
    from spin.alignment.generation import check_backend_settings, find_backend

    backend = find_backend(options.backend)
    check_backend_settings(options.backend, vars(options))
    if (options.base_url is not None) != backend.needs_server:
        raise InputError(f"base_url and --backend {_serving()} belong together: give both or neither")
    if options.data_frac != "auto":
        try:
            options.data_frac = int(options.data_frac)
        except ValueError:
            raise InputError(f"data_frac is '{options.data_frac}': give a number, or auto") from None
    if options.flush_every is None:
        options.flush_every = backend.flush_every
    for name, lowest in (
        ("data_frac", 0),
        ("frac_len", 0),
        ("max_prompt_length", 0),
        ("batch_size", 1),
        ("flush_every", 1),
        ("tensor_parallel_size", 1),
        ("lease_timeout", 1),
    ):
        value = getattr(options, name)
        if value not in (None, "auto") and value < lowest:
            raise InputError(f"{name} is {value}: set it to {lowest} or more")
    if Path(options.output_dir).exists() and not Path(options.output_dir).is_dir():
        raise InputError(f"output_dir {options.output_dir} is a file: give a folder")
    if not 0 < options.gpu_memory_utilization <= 1:
        raise InputError(f"gpu_memory_utilization is {options.gpu_memory_utilization}: set it above 0 and at most 1")
    if options.adapter is not None:
        _check_adapter(Path(options.adapter))
    return SamplingConfig(
        num_samples=options.num_samples,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        max_new_tokens=options.max_new_tokens,
        stop=tuple(options.stop),
        logprobs=options.logprobs,
        seed=options.seed,
    )


def _serving() -> str:
    """Return the names of the backends that ask a running server."""
    from spin.alignment.generation import BACKENDS, find_backend

    return ", ".join(name for name in BACKENDS if find_backend(name).needs_server)


def _check_adapter(folder: Path) -> None:
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"adapter {folder} holds no {' and no '.join(missing)}: give the folder of saved LoRA adapters"
        )


def stated_provenance(options: Any, sampling: SamplingConfig, model_dir: Path) -> Provenance:
    """Return what is known of the fractions' origin before a tokenizer or a row is read.

    ``extra["inputs"]`` is one hash of every input file, so that a finished fraction is recognised in a second.
    """
    from spin.alignment.core.provenance import Provenance, hash_file, hash_text, hash_weights, package_versions
    from spin.alignment.data.source_files import split_files
    from spin.alignment.generation import find_backend

    data = Path(options.input_dir)
    data_files = split_files(data, options.split) if data.exists() else []
    # What a server has loaded is its own affair; the folder here may hold the tokenizer alone.
    has_weights = not find_backend(options.backend).needs_server or any(model_dir.glob("*.safetensors"))
    weights_hash = hash_weights(model_dir) if has_weights else ""
    settings: dict[str, Any] = {"dtype": options.dtype, "max_prompt_length": options.max_prompt_length}
    if options.adapter:
        settings["adapter"] = hash_text(*(hash_file(Path(options.adapter) / name) for name in ADAPTER_FILES))
    if options.batch_invariant:
        settings["batch_invariant"] = True
    texts = sorted(file for pattern in TOKENIZER_FILES for file in model_dir.glob(pattern))
    contents = [f"{file.name}={hash_file(file)}" for file in (*texts, *data_files)]
    return Provenance(
        kind="generated",
        # A folder may be mounted elsewhere on another server; its weights tell what it is.
        model=model_dir.resolve().name if Path(options.model).is_dir() else options.model,
        model_revision=options.revision or "",
        weights_hash=weights_hash,
        backend=options.backend,
        sampling=sampling.as_dict() | settings,
        iteration=options.iteration,
        split=options.split,
        frac_len=options.frac_len,
        versions=package_versions(),
        extra={"inputs": hash_text(options.system, *contents)} if data_files else {},
    )


def is_known_complete(path: Path, stated: Provenance) -> bool:
    """Return whether a fraction is there and its input files and settings are the same, byte for byte."""
    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import read_provenance

    if not path.exists() or not stated.extra:
        return False
    try:
        found = read_provenance(open_parquet(path).schema_arrow, path)
    except InputError:  # torn: it is set aside later, with a word
        return False
    derived = ("tokenizer_hash", "chat_template_hash", "prompts_hash", "num_prompts", "data_frac", "extra")
    return not stated.differences(found, ignore=derived) and stated.extra["inputs"] == found.extra.get("inputs")


def known_complete(options: Any, stated: Provenance) -> int:
    """Return the number of prompts when everything asked for is there, else 0; no prompt is read, every fraction tells it."""
    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import read_provenance
    from spin.alignment.data.fractions import fraction_path, num_fractions

    first = fraction_path(options.output_dir, options.split, 0 if options.data_frac == "auto" else options.data_frac)
    if not is_known_complete(first, stated):
        return 0
    num_prompts = read_provenance(open_parquet(first).schema_arrow, first).num_prompts
    others = range(1, num_fractions(num_prompts, options.frac_len)) if options.data_frac == "auto" else ()
    paths = (fraction_path(options.output_dir, options.split, number) for number in others)
    return num_prompts if all(is_known_complete(path, stated) for path in paths) else 0


def open_store(options: Any, stated: Provenance, worker: str) -> PromptStore:
    """Open the prompts; a store of local files is shared with other processes, that of a Hub data set is this process's own."""
    from spin.alignment.data.fractions import PARTS_FOLDER
    from spin.alignment.data.prompt_store import PromptStore

    name = f"prompts-{options.split}-{stated.extra.get('inputs', worker)}.arrow"
    return PromptStore.open(Path(options.output_dir) / PARTS_FOLDER / name, options.input_dir, options.split)


def wanted_fractions(options: Any, stated: Provenance, store: PromptStore) -> list[int]:
    """Return the fractions to make: those asked for that are not there yet.

    Raises:
        InputError: a fraction is there, but made from something else, or the data has no such fraction.
    """
    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import read_provenance
    from spin.alignment.data.fractions import check_fraction, fraction_path, num_fractions

    if options.data_frac != "auto":
        check_fraction(len(store), options.data_frac, options.frac_len)
    numbers = range(num_fractions(len(store), options.frac_len)) if options.data_frac == "auto" else [options.data_frac]
    wanted = []
    for number in numbers:
        path = fraction_path(options.output_dir, options.split, number)
        if path.exists():
            try:
                found = read_provenance(open_parquet(path).schema_arrow, path)
            except InputError as error:
                path.rename(path.with_suffix(".torn"))
                say_error(f"set aside as {path.with_suffix('.torn').name} and made again: {error}")
                wanted.append(number)
                continue
            differences = stated.differences(found)
            if not differences:
                continue
            if not options.overwrite:
                raise InputError(
                    f"{path} was made from something else ({'; '.join(differences)}): pass --overwrite or another output_dir"
                )
        wanted.append(number)
    if len(wanted) < len(numbers):
        say(f"{len(numbers) - len(wanted)} of {len(numbers)} fractions are complete already")
    return wanted


def make_job(options: Any, sampling: SamplingConfig, stated: Provenance, model_dir: Path, worker: str) -> GenerationJob:
    """Open the prompts and the tokenizer; return what all fractions have in common."""
    import pyarrow as pa
    from transformers import AutoConfig

    from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
    from spin.alignment.data.rows import GENERATED_SCHEMA, OPTIONAL_COLUMNS
    from spin.alignment.generation.fraction_work import GenerationJob, longest_prompt
    from spin.alignment.models.folder import context_length

    store = open_store(options, stated, worker)
    encoder = ChatEncoder(load_tokenizer(options.model, options.revision, options.trust_remote_code), options.system)
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=options.trust_remote_code)
    context = context_length(config)
    schema = GENERATED_SCHEMA
    if sampling.logprobs:
        schema = schema.append(pa.field("rejected_logprobs", OPTIONAL_COLUMNS["rejected_logprobs"]))
    return GenerationJob(
        store=store,
        encoder=encoder,
        sampling=sampling,
        schema=schema,
        output_dir=Path(options.output_dir),
        split=options.split,
        frac_len=options.frac_len,
        longest_prompt=longest_prompt(options, context),
        context=context,
        provenance=replace(
            stated,
            tokenizer_hash=encoder.tokenizer_hash,
            chat_template_hash=encoder.template_hash,
            prompts_hash=store.prompts_hash,
            num_prompts=len(store),
        ),
        patience=options.lease_timeout,
        overwrite=options.overwrite,
    )


def engine_length(options: Any, job: GenerationJob, several: bool, requests: Sequence[PromptRequest]) -> int | None:
    """Return the longest prompt plus response, in tokens: no longer than needed, since an engine reserves cache for it."""
    if not options.max_new_tokens:
        return job.context
    if not several:
        return len(requests[0].token_ids) + options.max_new_tokens
    # The engine is started once, for prompts of later fractions too.
    if options.max_prompt_length:
        return min(options.max_prompt_length + options.max_new_tokens, job.context or sys.maxsize)
    return job.context


def load_backend(
    options: Any, job: GenerationJob, several: bool, requests: Sequence[PromptRequest]
) -> GenerationBackend:
    """Load the model, for prompts like ``requests`` (longest first)."""
    from spin.alignment.generation import make_backend
    from spin.alignment.generation.base import BackendSettings

    encoder: ChatEncoder = job.encoder
    settings = BackendSettings(
        model=options.model,
        revision=options.revision,
        adapter=options.adapter,
        dtype=options.dtype,
        batch_size=options.batch_size,
        tensor_parallel_size=options.tensor_parallel_size,
        max_model_len=engine_length(options, job, several, requests),
        gpu_memory_utilization=options.gpu_memory_utilization,
        trust_remote_code=options.trust_remote_code,
        stop_ids=encoder.stop_ids,
        pad_id=encoder.pad_id,
        decode=encoder.decode,
        batch_invariant=options.batch_invariant,
        base_url=options.base_url,
    )
    return make_backend(options.backend, settings)


def generate(options: Any, sampling: SamplingConfig, stated: Provenance, model_dir: Path) -> None:
    """Work on the fractions asked for until they are merged, together with whoever else does."""
    from spin.alignment.data.fractions import PARTS_FOLDER
    from spin.alignment.generation.fraction_journal import clear_parts
    from spin.alignment.generation.leases import Worker
    from spin.alignment.generation.progress import GenerationProgress
    from spin.alignment.generation.worker import GenerationRun

    rank = int(os.environ.get("RANK", "0"))
    name = "all fractions" if options.data_frac == "auto" else f"fraction {options.data_frac}"
    progress = GenerationProgress(name + (f" rank {rank}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""))
    with Worker(Path(options.output_dir) / PARTS_FOLDER / "workers") as worker:
        job = make_job(options, sampling, stated, model_dir, worker.name)
        fractions = wanted_fractions(options, job.provenance, job.store)
        if fractions:
            several = len(fractions) > 1
            run = GenerationRun(
                job,
                fractions,
                worker,
                lambda requests: load_backend(options, job, several, requests),
                options.flush_every,
                progress,
            )
            signal.signal(signal.SIGTERM, lambda *_: run.stop())
            run.run()
        if not stated.extra:
            job.store.remove()
    clear_parts(Path(options.output_dir), options.split, len(job.store), options.frac_len)
