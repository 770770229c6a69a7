"""TRL's DPOTrainer takes the preference files as they are."""

from __future__ import annotations

import math

import pytest

from spin import convert_data
from spin.alignment.core.parquet import ParquetSink
from spin.alignment.core.provenance import Provenance
from spin.alignment.data.fractions import fraction_path
from spin.alignment.data.rows import GENERATED_SCHEMA
from tests.helpers import run_main

pytestmark = pytest.mark.slow


def test_dpo_trainer_trains_on_the_converted_file(tmp_path, tiny_model):
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    def row(number: int) -> dict:
        prompt = [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{number}+1?"}]
        answers = {"chosen": str(number + 1), "rejected": f"maybe {number}"}
        pair = {name: [*prompt, {"role": "assistant", "content": text}] for name, text in answers.items()}
        ids = {"rejected_token_ids": [5, 6], "rejected_finish_reason": "stop"}
        return {"prompt_id": str(number), "sample_index": 0, **pair, **ids}

    made = Provenance("generated", split="train", num_prompts=4)
    with ParquetSink(fraction_path(tmp_path / "generated", "train", 0), GENERATED_SCHEMA, made) as sink:
        sink.write([row(number) for number in range(4)])
    code, _, errors = run_main(
        convert_data.main, "--input_dir", tmp_path / "generated", "--output_dir", tmp_path / "pairs"
    )
    assert code == 0, errors

    files = str(tmp_path / "pairs" / "train_prefs-*.parquet")
    pairs = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    settings = DPOConfig(
        output_dir=str(tmp_path / "dpo"), max_steps=1, per_device_train_batch_size=4, use_cpu=True, bf16=False,
        report_to=[], logging_steps=1, save_strategy="no", beta=0.1, max_length=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    trainer = DPOTrainer(
        model, args=settings, train_dataset=pairs, processing_class=AutoTokenizer.from_pretrained(tiny_model)
    )
    trainer.train()
    (first,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    seen = trainer.train_dataset[0]
    assert len(trainer.train_dataset) == 4 and [turn["role"] for turn in seen["prompt"]] == ["system", "user"]
    assert (seen["chosen"][0]["content"], seen["rejected"][0]["content"]) == ("1", "maybe 0")
