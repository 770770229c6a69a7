"""The example of docs/adding_a_method.md runs as it stands there, and is as short as it says."""

from __future__ import annotations

import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.generate import main
from tests.helpers import REPOSITORY, char_tokenizer, run_command, run_main
from tests.helpers.online import write_prompts
from tests.helpers.training import metrics, write_config


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    text = (REPOSITORY / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) < 60
    path = tmp_path_factory.mktemp("example") / "my_method.py"
    path.write_text(code)
    return path


def test_the_example_pairs_and_trains(tmp_path, example, tiny_model):
    prompts = write_prompts(tmp_path / "prompts", count=12)
    generated = tmp_path / "generated"
    code, _, error = run_main(
        *(main, "--model", tiny_model, "--input_dir", prompts, "--output_dir", generated),
        *("--num_samples", 3, "--max_new_tokens", 6),
    )
    assert code == 0, error
    # A random model does not say please: let two samples of every prompt do so, the second in fewer tokens.
    (file,) = generated.glob("train-*.parquet")
    table = pq.read_table(file)
    rows, tokenizer = table.to_pylist(), char_tokenizer()
    for row in rows:
        if row["sample_index"] > 0:
            row["rejected"][-1]["content"] = "please" * (3 - row["sample_index"])
            row["rejected_token_ids"] = tokenizer(row["rejected"][-1]["content"])["input_ids"]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    done = run_command([sys.executable, example, "pair", "--input_dir", generated, "--output_dir", tmp_path / "pairs"])
    assert done.returncode == 0, done.stderr
    (pairs,) = (tmp_path / "pairs").glob("train_prefs-*.parquet")
    found = pq.read_table(pairs).to_pylist()
    assert len(found) == 12
    assert {row["chosen"][-1]["content"] for row in found} == {"please"}
    assert {(row["chosen_score"], row["rejected_score"]) for row in found} == {(1.0, 0.0)}
    config = write_config(tmp_path / "c.yaml", tiny_model, tmp_path / "pairs", max_steps=3)
    done = run_command([sys.executable, example, "train", config])
    assert done.returncode == 0, done.stderr[-3000:]
    record = metrics(tmp_path / "out")
    assert record["first_loss"] == pytest.approx(1.0, abs=1e-6)  # exp(0): the policy starts as its opponent
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert losses[-1] < 1.0
