"""Small generated fractions with the sums of ids that generate.py records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from spin import convert_data
from spin.alignment.core.parquet import ParquetSink
from spin.alignment.core.provenance import Provenance, id_number
from spin.alignment.data.fractions import fraction_path
from spin.alignment.data.rows import GENERATED_SCHEMA
from tests.helpers import run_main

NUM_PROMPTS, FRAC_LEN = 6, 2
LOGPROBS = pa.field("rejected_logprobs", pa.list_(pa.float32()))
NUM_FRACTIONS = NUM_PROMPTS // FRAC_LEN
Key = tuple[int, int]


def id_sum(prompts: Iterable[int | str]) -> str:
    return f"{sum(id_number(name(prompt)) for prompt in prompts) % 2**64:016x}"


def name(prompt: int | str) -> str:
    return f"p{prompt}"


def row(prompt: int | str, sample: int, **changes: object) -> dict:
    question = {"role": "user", "content": f"{prompt}?"}
    return {
        "prompt_id": name(prompt),
        "sample_index": sample,
        "chosen": [question, {"role": "assistant", "content": "right"}],
        "rejected": [question, {"role": "assistant", "content": f"wrong {sample}"}],
        "rejected_token_ids": [sample, 2],
        "rejected_finish_reason": "stop",
        **changes,
    }


def own_prompts(number: int) -> list[int]:
    return list(range(number * FRAC_LEN, (number + 1) * FRAC_LEN))


def own_keys(number: int, num_samples: int) -> list[Key]:
    return [(prompt, sample) for prompt in own_prompts(number) for sample in range(num_samples)]


def record(number: int, num_samples: int = 1, keyed: bool = True, **extra: str) -> Provenance:
    sums = {"fraction_ids": id_sum(own_prompts(number)), "all_ids": id_sum(range(NUM_PROMPTS))} if keyed else {}
    return Provenance(
        "generated",
        model="m",
        split="train",
        prompts_hash="h",
        num_prompts=NUM_PROMPTS,
        data_frac=number,
        frac_len=FRAC_LEN,
        sampling={"num_samples": num_samples},
        extra={**sums, **extra},
    )


def write(
    folder: Path,
    number: int,
    rows: Sequence[dict],
    made: Provenance,
    skipped: Sequence[str] = (),
    schema: pa.Schema = GENERATED_SCHEMA,
    split: str = "train",
) -> Path:
    left_out = [{"prompt_id": prompt_id, "reason": "too long"} for prompt_id in skipped]
    with ParquetSink(fraction_path(folder, split, number), schema, replace(made, split=split), left_out) as sink:
        sink.write(rows)
    return sink.path


def write_keys(folder: Path, fractions: Sequence[Sequence[Key]], num_samples: int, keyed: bool = True) -> None:
    """Write fractions that hold the given (prompt, sample) rows, with the record of whole ones."""
    for number, keys in enumerate(fractions):
        write(folder, number, [row(*key) for key in keys], record(number, num_samples, keyed))


def write_whole(folder: Path, num_samples: int = 1, keyed: bool = True) -> Path:
    write_keys(folder, [own_keys(number, num_samples) for number in range(NUM_FRACTIONS)], num_samples, keyed)
    return folder


def gather(folder: Path, out: Path, *flags: object) -> tuple[int, str, str]:
    """Run convert_data.py; return (exit code, stdout, stderr)."""
    return run_main(convert_data.main, "--input_dir", folder, "--output_dir", out, *flags)


def refusal(folder: Path, out: Path, *flags: object) -> str:
    """Run convert_data.py, which must refuse and leave nothing; return its error."""
    code, printed, errors = gather(folder, out, *flags)
    assert code == 2 and printed == "" and errors.splitlines()[-1].startswith("error: "), (code, errors)
    assert not content(out)
    return errors.splitlines()[-1]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def one(folder: Path, number: int, split: str = "train") -> Callable[[], object]:
    """Return what writes one whole fraction when it is called."""
    return lambda: write(
        folder, number, [row(prompt, 0) for prompt in own_prompts(number)], record(number), split=split
    )
