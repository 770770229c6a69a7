"""One generation step: settings, prompts, provenance, and the fractions to work on."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say, say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import part_of, recorded
from spin.alignment.generation.base import GenerationBackend, PromptRequest
from spin.alignment.generation.config import ADAPTER_FILES, GenerateConfig

if TYPE_CHECKING:
    from spin.alignment.core.provenance import Provenance
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.data.prompt_store import PromptStore
    from spin.alignment.generation.fraction_work import GenerationJob
    from spin.alignment.generation.leases import Worker
    from spin.alignment.generation.worker import GenerationRun

_POLL_SECONDS = 0.2


def expected_provenance(config: GenerateConfig, model_dir: Path, date: datetime.date | None = None) -> Provenance:
    """Return the provenance of the fractions as far as it is known before the tokenizer or any row is read; ``date`` is that
    of a chat template that has one.

    ``extra["inputs"]`` is one hash of every input file, so that a finished fraction is recognised within a second.
    """
    from spin.alignment.core.provenance import Provenance, hash_file, hash_text, hash_weights, package_versions
    from spin.alignment.data.end_of_turn import model_end_ids
    from spin.alignment.data.source_files import split_files
    from spin.alignment.data.source_names import is_local
    from spin.alignment.generation import find_backend
    from spin.alignment.models.folder import model_files
    from spin.alignment.models.precision import machine_dtype

    data_files = split_files(config.input_dir, config.split) if is_local(config.input_dir) else []
    # A server chooses the weights that it loads; the local folder may contain only the tokenizer.
    has_weights = not find_backend(config.backend).needs_server or any(model_dir.glob("*.safetensors"))
    weights_hash = hash_weights(model_dir) if has_weights else ""
    settings: dict[str, Any] = recorded(config)
    if config.adapter:
        settings["adapter"] = hash_text(*(hash_file(Path(config.adapter) / name) for name in ADAPTER_FILES))
    if config.batch_invariant:
        settings["batch_invariant"] = True
    if config.token_ids != "sampled":
        settings["token_ids"] = config.token_ids
    if not find_backend(config.backend).needs_server and (chosen := machine_dtype(model_dir, config.dtype)):
        settings["computed_in"] = chosen
    if config.chat_template_kwargs:
        settings["chat_template_kwargs"] = config.chat_template_kwargs
    if date is not None:
        settings["template_date"] = date.isoformat()
    if len(ends := model_end_ids(model_dir)) > 1:
        settings["end_ids"] = list(ends)
    # Only what decides ids: a folder may also contain metrics, with the seconds that its training took.
    texts = [file for file in model_files(model_dir) if file.suffix != ".safetensors"]
    contents = [f"{file.name}={hash_file(file)}" for file in (*texts, *data_files)]
    return Provenance(
        kind="generated",
        # A folder may be mounted elsewhere on another machine; the hash of its weights identifies it.
        model=model_dir.resolve().name if Path(config.model).is_dir() else config.model,
        model_revision=config.revision or "",
        weights_hash=weights_hash,
        backend=config.backend,
        sampling=config.sampling.as_dict() | settings,
        iteration=config.iteration,
        split=config.split,
        frac_len=config.frac_len,
        versions=package_versions(),
        extra={"inputs": hash_text(config.system, *contents)} if data_files else {},
    )


def open_store(config: GenerateConfig, stated: Provenance, worker: Worker) -> PromptStore:
    """Open the prompts, which one of the processes writes while the others wait. Processes share the store of local files, while
    each has its own store of a Hub data set.

    Raises:
        FileNotFoundError: another process has finished all work and removed the working files meanwhile.
    """
    from spin.alignment.data.fractions import PARTS_FOLDER
    from spin.alignment.data.prompt_store import PromptStore
    from spin.alignment.generation.leases import Leases

    parts = Path(config.output_dir) / PARTS_FOLDER
    name = f"prompts-{config.split}-{stated.extra.get('inputs', worker.name)}"
    path, leases, told = parts / f"{name}.arrow", Leases(parts, worker, config.lease_timeout), False
    while (store := PromptStore.found(path)) is None:
        if leases.claim(name):
            try:
                return PromptStore.open(path, config.input_dir, config.split)
            finally:
                leases.release(name)
        if not parts.is_dir():
            raise FileNotFoundError(path)
        if not told:
            say_error(f"waiting for {leases.owner(name) or 'another worker'}, which reads the prompts")
            told = True
        time.sleep(_POLL_SECONDS)
    return store


def wanted_fractions(config: GenerateConfig, stated: Provenance, store: PromptStore) -> list[int]:
    """Return the requested fractions that are not complete yet.

    Raises:
        InputError: a fraction exists but was generated from other inputs or settings, or the data has no such fraction.
    """
    from spin.alignment.core.parquet import check_whole, open_parquet
    from spin.alignment.core.provenance import read_provenance
    from spin.alignment.data.fractions import check_fraction, fraction_path, num_fractions

    if config.data_frac != "auto":
        check_fraction(len(store), config.data_frac, config.frac_len)
    numbers = range(num_fractions(len(store), config.frac_len)) if config.data_frac == "auto" else [config.data_frac]
    wanted = []
    for number in numbers:
        path = fraction_path(config.output_dir, config.split, number)
        if path.exists():
            try:
                found = read_provenance(open_parquet(path).schema_arrow, path)
                check_whole(path)
            except InputError as error:
                path.rename(path.with_suffix(".torn"))
                say_error(f"set aside as {path.with_suffix('.torn').name} and generated again: {error}")
                wanted.append(number)
                continue
            differences = stated.differences(found)
            if not differences:
                continue
            if not config.overwrite:
                raise InputError(
                    f"{path} was generated from other inputs ({'; '.join(differences)}): pass --overwrite or another output_dir"
                )
        wanted.append(number)
    if len(wanted) < len(numbers):
        say(f"{len(numbers) - len(wanted)} of {len(numbers)} fractions are already complete")
    return wanted


def date_of_template(config: GenerateConfig, model_dir: Path) -> datetime.date | None:
    """Return the date that a chat template with today's date sees, None for any other: the setting, else that of the fractions
    in the output folder, else the one that the first process recorded there.

    Raises:
        InputError: the existing fractions were generated with different dates.
    """
    from spin.alignment.data.fractions import PARTS_FOLDER
    from spin.alignment.data.template_date import pinned_date, recorded_in_rows, shared_date, template_has_date

    if not template_has_date(model_dir):
        return None
    recorded = () if config.overwrite else (recorded_in_rows(sorted(Path(config.output_dir).glob("*.parquet"))),)
    return pinned_date(config.template_date, recorded) or shared_date(Path(config.output_dir) / PARTS_FOLDER)


def open_model(config: GenerateConfig, model_dir: Path, date: datetime.date | None = None) -> tuple[Any, ChatEncoder]:
    """Check the model, its adapter and its tokenizer from their files; return the model's configuration and its encoder.

    Raises:
        InputError: a file is damaged, or weights, adapter or tokenizer do not fit the configuration.
    """
    from spin.alignment.data.chat_encoder import load_encoder
    from spin.alignment.generation import find_backend
    from spin.alignment.models.vocabulary import check_control_tokens
    from spin.alignment.models.weights_check import check_model

    trusted, served = config.trust_remote_code, find_backend(config.backend).needs_server
    model_config = check_model(model_dir, trust_remote_code=trusted, needs_weights=not served)
    if config.adapter and not served:
        from spin.alignment.models.adapters import check_adapter

        check_adapter(Path(config.adapter), model_dir, model_config, trusted)
    encoder = load_encoder(
        config.model,
        config.revision,
        trusted,
        system=config.system,
        chat_template_kwargs=config.chat_template_kwargs,
        date=date,
    )
    check_control_tokens(encoder, model_config, str(model_dir))
    return model_config, encoder


def make_job(
    config: GenerateConfig, stated: Provenance, model_config: Any, encoder: ChatEncoder, worker: Worker
) -> GenerationJob:
    """Open the prompts; return what all fractions share."""
    import pyarrow as pa

    from spin.alignment.data.rows import GENERATED_SCHEMA, OPTIONAL_COLUMNS
    from spin.alignment.generation.fraction_work import GenerationJob, longest_prompt
    from spin.alignment.models.folder import context_length

    store = open_store(config, stated, worker)
    context = context_length(model_config)
    schema = store.features.extend(GENERATED_SCHEMA)
    if config.logprobs:
        schema = schema.append(pa.field("rejected_logprobs", OPTIONAL_COLUMNS["rejected_logprobs"]))
    return GenerationJob(
        store=store,
        encoder=encoder,
        sampling=config.sampling,
        schema=schema,
        output_dir=Path(config.output_dir),
        split=config.split,
        frac_len=config.frac_len,
        longest_prompt=longest_prompt(config, context),
        context=context,
        model_config=model_config,
        provenance=replace(
            stated,
            tokenizer_hash=encoder.tokenizer_hash,
            chat_template_hash=encoder.template_hash,
            prompts_hash=store.prompts_hash,
            num_prompts=len(store),
        ),
        lease_timeout=config.lease_timeout,
        overwrite=config.overwrite,
    )


def engine_length(
    config: GenerateConfig, job: GenerationJob, several: bool, requests: Sequence[PromptRequest]
) -> int | None:
    """Return the longest prompt plus response, in tokens: no longer than needed, since an engine reserves cache for it."""
    if not config.max_new_tokens:
        return job.context
    if not several:
        return len(requests[0].token_ids) + config.max_new_tokens
    # The engine is started once and also serves the prompts of later fractions, which may be longer.
    if config.max_prompt_length:
        return min(config.max_prompt_length + config.max_new_tokens, job.context or sys.maxsize)
    return job.context


def load_backend(
    config: GenerateConfig, job: GenerationJob, several: bool, requests: Sequence[PromptRequest]
) -> GenerationBackend:
    """Load the model, for prompts like ``requests`` (longest first)."""
    from spin.alignment.generation import make_backend
    from spin.alignment.generation.base import BackendSettings
    from spin.alignment.models.vocabulary import ids_without_token

    settings = part_of(
        config,
        BackendSettings,
        model=config.model,
        revision=config.revision,
        adapter=config.adapter,
        dtype=config.dtype,
        max_model_len=engine_length(config, job, several, requests),
        trust_remote_code=config.trust_remote_code,
        stop_ids=job.encoder.stop_ids,
        masked_ids=ids_without_token(job.encoder.tokenizer, job.model_config),
        pad_id=job.encoder.pad_id,
        decode=job.encoder.decode,
        encoder=job.encoder,
    )
    return make_backend(config.backend, settings)


def generate(config: GenerateConfig) -> None:
    """Generate the requested fractions, together with any other processes that work on the output folder.

    On SIGTERM the responses in flight are finished and written, then KeyboardInterrupt is raised.

    Raises:
        InputError: the model, the prompts or the output folder cannot be used; raised before a model is loaded.
    """
    from spin.alignment.data.data_card import RESPONSES, write_data_card
    from spin.alignment.generation import find_backend
    from spin.alignment.generation.finished_fractions import already_complete
    from spin.alignment.generation.fraction_journal import clear_parts
    from spin.alignment.models.folder import check_model_path, model_folder

    config.check_files()
    # A process that forks after a tokenizer has used its thread pool gets warnings, or a deadlock in the child.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    check_model_path(config.model, needs_weights=not find_backend(config.backend).needs_server)
    model_dir = model_folder(config.model, config.revision)
    date = date_of_template(config, model_dir)
    stated = expected_provenance(config, model_dir, date)
    num_prompts = already_complete(config, stated)
    if num_prompts:
        say(f"{config.output_dir} is already complete ({config.split}, fraction {config.data_frac})")
    else:
        try:
            num_prompts = work(config, stated, model_dir, date)
        except FileNotFoundError:
            # Another process has merged the last fraction and removed the working files while this one was starting.
            num_prompts = already_complete(config, stated)
            if not num_prompts:
                raise
    folder = Path(config.output_dir)
    if clear_parts(folder, config.split, num_prompts, config.frac_len):
        write_data_card(folder, {}, RESPONSES)  # every process that sees the end writes the same bytes


def work(config: GenerateConfig, stated: Provenance, model_dir: Path, date: datetime.date | None = None) -> int:
    """Work on the requested fractions until they are merged; return the number of prompts of the split."""
    from spin.alignment.core.allocator import frozen_objects
    from spin.alignment.data.fractions import PARTS_FOLDER
    from spin.alignment.generation.leases import Worker
    from spin.alignment.generation.progress import GenerationProgress
    from spin.alignment.generation.worker import GenerationRun

    rank = int(os.environ.get("RANK", "0"))
    name = "all fractions" if config.data_frac == "auto" else f"fraction {config.data_frac}"
    progress = GenerationProgress(name + (f" rank {rank}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""))
    model_config, encoder = open_model(config, model_dir, date)  # before anything is written
    with Worker(Path(config.output_dir) / PARTS_FOLDER / "workers") as worker, frozen_objects():
        try:
            job = make_job(config, stated, model_config, encoder, worker)
            for remark in job.encoder.remarks if rank == 0 else ():
                say_error(remark)
            fractions = wanted_fractions(config, job.provenance, job.store)
        except InputError:
            withdraw(worker)
            raise
        if fractions:
            several = len(fractions) > 1
            run = GenerationRun(
                job,
                fractions,
                worker,
                lambda requests: load_backend(config, job, several, requests),
                config.prompts_in_part,
                progress,
            )
            with stopped_by_sigterm(run):
                run.run()
        if not stated.extra:  # the private store of a Hub data set, see open_store()
            job.store.remove()
    return len(job.store)


def withdraw(worker: Worker) -> None:
    """Remove what a worker has written before it found its input unusable, if it is the first to write to the folder."""
    parts = worker.folder.parent
    if any(path != worker.folder and path.is_dir() for path in parts.iterdir()):
        return
    if any(path != worker.path for path in worker.folder.iterdir()):
        return
    for path in (*parts.glob("*prompts-*"), worker.path):
        path.unlink(missing_ok=True)
    for folder in (worker.folder, parts, parts.parent):
        with suppress(OSError):  # something else is in it
            folder.rmdir()


@contextmanager
def stopped_by_sigterm(run: GenerationRun) -> Iterator[None]:
    """Let SIGTERM stop the run gracefully inside the context. Only the main thread can install signal handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: run.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
