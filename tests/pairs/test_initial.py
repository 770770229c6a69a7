"""convert_data.py --initial: the initial model's responses beside the pairs."""

from __future__ import annotations

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import open_parquet
from spin.alignment.core.provenance import read_provenance
from spin.alignment.core.sides import INITIAL, SIDES
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.data.config import DataConfig
from spin.alignment.data.encode_pairs import encode_pair
from spin.alignment.training.preference_data import largest
from tests.helpers import char_tokenizer
from tests.helpers.gathering import (
    NUM_FRACTIONS,
    own_keys,
    own_prompts,
    record,
    refusal,
    row,
    write,
    write_whole,
)
from tests.helpers.gathering import gather as run_convert
from tests.helpers.training import encode_split

RESPONSES = (*SIDES, INITIAL)


def write_initial(folder, num_samples=1, **facts):
    """The same prompts, other answers: ``first 0`` with the ids 7, sample, 2."""
    for number in range(NUM_FRACTIONS):
        rows = []
        for prompt, sample in own_keys(number, num_samples):
            made = row(prompt, sample, rejected_token_ids=[7, sample, 2])
            made["rejected"] = [made["rejected"][0], {"role": "assistant", "content": f"first {sample}"}]
            rows.append(made | {"rejected_finish_reason": "length" if prompt == 0 else "stop"})
        write(folder, number, rows, replace(record(number, num_samples), weights_hash="initial", **facts))
    return folder


def pairs_of(folder):
    return [item for path in sorted(folder.glob("*.parquet")) for item in pq.read_table(path).to_pylist()]


def test_every_pair_gets_the_response_to_its_prompt_and_sample(tmp_path):
    generated, initial = write_whole(tmp_path / "in", num_samples=2), write_initial(tmp_path / "initial", num_samples=2)
    code, _, errors = run_convert(generated, tmp_path / "out", "--initial", initial)
    assert code == 0, errors
    rows = pairs_of(tmp_path / "out")
    assert len(rows) == 12
    for item in rows:
        assert item["initial"][:-1] == item["chosen"][:-1]
        assert item["initial"][-1]["content"] == f"first {item['sample_index']}"
        assert item["initial_token_ids"] == [7, item["sample_index"], 2]
        assert item["initial_finish_reason"] == ("length" if item["prompt_id"] == "p0" else "stop")
    (file,) = (tmp_path / "out").glob("*.parquet")
    assert read_provenance(open_parquet(file).schema_arrow, file).extra["initial_weights"] == "initial"
    # the same again is complete; other responses of the initial model are noticed
    assert "already complete" in run_convert(generated, tmp_path / "out", "--initial", initial)[1]
    other = write_initial(tmp_path / "other", num_samples=2, model="another")
    code, _, errors = run_convert(generated, tmp_path / "out", "--initial", other)
    assert code == 2 and "initial_hash" in errors


def test_a_cut_initial_response_counts_as_truncated(tmp_path):
    generated, initial = write_whole(tmp_path / "in"), write_initial(tmp_path / "initial")
    assert run_convert(generated, tmp_path / "out", "--initial", initial, "--truncated", "drop")[0] == 0
    assert [item["prompt_id"] for item in pairs_of(tmp_path / "out")] == [f"p{number}" for number in range(1, 6)]


def test_what_does_not_fit_is_refused(tmp_path):
    generated = write_whole(tmp_path / "in", num_samples=2)
    assert "initial is missing, which is not a folder" in refusal(generated, tmp_path / "out", "--initial", "missing")
    few = write_initial(tmp_path / "few", num_samples=1)
    sentence = refusal(generated, tmp_path / "out", "--initial", few)
    assert "has no response to prompt p0, sample 1" in sentence and "with the same num_samples" in sentence
    foreign = write_initial(tmp_path / "foreign", num_samples=2, tokenizer_hash="other")
    assert "different tokenizer or chat template" in refusal(generated, tmp_path / "out", "--initial", foreign)
    (foreign / "train-00000.parquet").unlink()
    assert "which has no train-00000.parquet" in refusal(generated, tmp_path / "out", "--initial", foreign)
    torn = write_initial(tmp_path / "torn", num_samples=2)
    (torn / "train-00001.parquet").unlink()
    assert "train fraction 1 of 3 is missing" in refusal(generated, tmp_path / "out", "--initial", torn)
    assert own_prompts(1) == [2, 3]


def triplet(**changes):
    prompt = [{"role": "user", "content": "q"}]
    texts = {"chosen": "ab", "rejected": "cde", "initial": "fghi"}
    row = {name: [*prompt, {"role": "assistant", "content": text}] for name, text in texts.items()}
    return {"prompt_id": "p", "sample_index": 0, "source": "d", **row, **changes}


def test_three_responses_are_cut_together():
    """The longest one decides; sampled ids are used as they are, and a cut response has no EOS."""
    encoder = ChatEncoder(char_tokenizer())
    whole = encode_pair(triplet(), encoder, 64, 32, RESPONSES)
    assert [len(whole.responses[name]) for name in RESPONSES] == [3, 4, 5]
    prompt = len(whole.prompt_ids)
    cut = encode_pair(triplet(), encoder, prompt + 4, prompt, RESPONSES)
    assert [len(cut.responses[name]) for name in RESPONSES] == [3, 4, 4]
    pair = encode_pair(triplet(), encoder, prompt + 4, prompt)  # without the third nothing is cut
    assert list(pair.responses) == ["chosen", "rejected"] and pair.rejected_ids == whole.rejected_ids
    sampled = encode_pair(triplet(initial_token_ids=[5, 6]), encoder, 64, 32, RESPONSES)
    assert sampled.responses["initial"] == [5, 6]
    with pytest.raises(InputError, match="chosen and initial have different prompts"):
        encode_pair(triplet(initial=[{"role": "user", "content": "?"}] * 2), encoder, 64, 32, RESPONSES)


def test_encoded_rows_carry_the_responses_that_the_loss_reads():
    config = DataConfig(dataset_mixer={"x": 1.0}, max_length=64, max_prompt_length=32)
    encoder, rows = ChatEncoder(char_tokenizer()), Dataset.from_list([triplet()])
    encoded, _ = encode_split(rows, encoder, config, "tspin")
    assert set(encoded.column_names) == {"prompt_ids", "chosen_ids", "rejected_ids", "initial_ids"}
    assert largest({"train": encoded})[0] == len(encoded[0]["prompt_ids"]) + 5
    assert set(encode_split(rows, encoder, config)[0].column_names) == {"prompt_ids", "chosen_ids", "rejected_ids"}
    with pytest.raises(
        InputError, match=r"reads a response 'initial' besides chosen and rejected, .* in d do not have"
    ):
        encode_split(rows.remove_columns("initial"), encoder, config, "tspin")
    weighted = Dataset.from_list([triplet(chosen_weights=[1.0] * 3, rejected_weights=[1.0] * 4)])
    with pytest.raises(InputError, match="chosen_weights and rejected_weights but no initial_weights"):
        encode_split(weighted, encoder, config, "tspin")
