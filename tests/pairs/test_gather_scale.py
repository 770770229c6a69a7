"""Gathering many rows: memory stays flat, and the rows are those of the slow path."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.alignment.core.parquet import ParquetSink
from spin.alignment.core.provenance import Provenance
from spin.alignment.data.fractions import fraction_path
from spin.alignment.data.rows import GENERATED_SCHEMA, MESSAGES
from spin.alignment.methods.pairings import PAIRINGS
from tests.helpers import run_command
from tests.helpers.gathering import gather, id_sum

NUM_SAMPLES, FRACTIONS, CHUNK = 2, 4, 5000
FILLER = "and so on " * 10
# Not ru_maxrss: a child inherits that of the process which started it.
PEAK = """
import re, sys
from pathlib import Path
from spin import convert_data
convert_data.main(sys.argv[1:])
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def conversations(texts: list[str]) -> pa.Array:
    """Columns of two turns each: the same question, then a text."""
    turns = [part for text in texts for part in ("question", text)]
    roles = pa.array(["user", "assistant"] * len(texts))
    values = pa.StructArray.from_arrays([roles, pa.array(turns)], fields=list(MESSAGES.value_type))
    return pa.ListArray.from_arrays(pa.array(range(0, len(turns) + 1, 2), pa.int32()), values)


def rows_of(prompts: range) -> pa.Table:
    keys = [(prompt, sample) for prompt in prompts for sample in range(NUM_SAMPLES)]
    columns = [
        pa.array([f"p{prompt}" for prompt, _ in keys]),
        pa.array([sample for _, sample in keys], pa.int32()),
        conversations([f"answer {prompt} {FILLER}" for prompt, _ in keys]),
        conversations([f"answer {prompt // 10 * 10 + sample} {FILLER}" for prompt, sample in keys]),
        pa.array([[prompt % 1000, sample, 2] for prompt, sample in keys], pa.list_(pa.int32())),
        pa.array(["length" if prompt % 7 == 0 else "stop" for prompt, _ in keys]),
    ]
    return pa.Table.from_arrays(columns, schema=GENERATED_SCHEMA)


def write_many(folder: Path, num_rows: int) -> Path:
    num_prompts = num_rows // NUM_SAMPLES
    frac_len, all_ids = num_prompts // FRACTIONS, id_sum(range(num_prompts))
    for number in range(FRACTIONS):
        mine = range(number * frac_len, (number + 1) * frac_len)
        made = Provenance(
            "generated", split="train", prompts_hash="h", num_prompts=num_prompts, data_frac=number, frac_len=frac_len,
            sampling={"num_samples": NUM_SAMPLES}, extra={"fraction_ids": id_sum(mine), "all_ids": all_ids},
        )  # fmt: skip
        with ParquetSink(fraction_path(folder, "train", number), GENERATED_SCHEMA, made) as sink:
            for start in range(mine.start, mine.stop, CHUNK):
                sink.write(rows_of(range(start, min(start + CHUNK, mine.stop))))
    return folder


def peak_mib(folder: Path, out: Path) -> int:
    flags = ["--input_dir", folder, "--output_dir", out, "--identical", "drop", "--max_rows_per_file", 8000]
    result = run_command([sys.executable, "-c", PEAK, *flags], timeout=120)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_more_rows_take_no_more_memory(tmp_path, monkeypatch):
    # Fewer rows than this do not fill the buffers once.
    few = peak_mib(write_many(tmp_path / "few", 80_000), tmp_path / "few_out")
    folder = write_many(tmp_path / "many", 200_000)
    many = peak_mib(folder, tmp_path / "many_out")
    assert many - few < 20, f"{few} MiB at 80,000 rows, {many} MiB at 200,000"
    monkeypatch.setitem(PAIRINGS, "ground_truth", lambda rows: [dict(row) for row in rows])
    code, _, errors = gather(folder, tmp_path / "slow", "--identical", "drop", "--max_rows_per_file", 8000)
    assert code == 0, errors
    fast, slow = (sorted((tmp_path / name).glob("train_prefs-*.parquet")) for name in ("many_out", "slow"))
    assert [path.name for path in fast] == [path.name for path in slow] and len(fast) == 23
    assert all(pq.read_table(ours).equals(pq.read_table(theirs)) for ours, theirs in zip(fast, slow, strict=True))
    assert (tmp_path / "many_out" / "train_prefs.counts.json").read_text() == (
        tmp_path / "slow" / "train_prefs.counts.json"
    ).read_text()
