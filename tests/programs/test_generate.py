"""generate.py as its users run it: fractions, restarts, several processes, bad input."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from spin.alignment.core.cards import CARD_FILE, read_card
from spin.alignment.core.parquet import read_skipped
from spin.alignment.core.provenance import read_provenance
from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
from spin.alignment.pipeline.validate import validate
from spin.generate import main
from tests.helpers import REPOSITORY, char_tokenizer, program_environment, run_command, run_main, tiny_llama

NUM_PROMPTS = 24


def make_row(number: int) -> dict[str, str]:
    question = f"What is {number}+{number}?" + " Explain." * (number % 4)
    return {"prompt_id": f"q{number}", "prompt": question, "response": f"{2 * number}"}


def write_data(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "train.jsonl", [make_row(n) for n in range(NUM_PROMPTS)])


def arguments(model: Path, data: Path, output: Path, /, **flags: object) -> list[str]:
    settings = {"model": model, "input_dir": data, "output_dir": output, "max_new_tokens": 16, **flags}
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def generate(model: Path, data: Path, output: Path, /, *extra: str, **flags: object) -> tuple[int, str, str]:
    return run_main(main, *arguments(model, data, output, **flags), *extra)


def rows_of(folder: Path, name: str = "train-00000.parquet") -> list[dict]:
    return pq.read_table(folder / name).to_pylist()


@pytest.fixture(scope="module")
def whole(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("whole")
    assert generate(tiny_model, data, output, flush_every=4, batch_size=4)[0] == 0
    return output


def test_rows_hold_the_contract(whole, tiny_model):
    encoder = ChatEncoder(load_tokenizer(tiny_model))
    rows = rows_of(whole)
    assert {row["prompt_id"] for row in rows} == {f"q{number}" for number in range(NUM_PROMPTS)}
    for row in rows:
        ids, stopped = row["rejected_token_ids"], row["rejected_finish_reason"] == "stop"
        assert row["chosen"][:-1] == row["rejected"][:-1] and row["sample_index"] == 0
        assert row["rejected"][-1] == {"role": "assistant", "content": encoder.decode(ids)}
        assert sum(token in encoder.stop_ids for token in ids) == stopped and (ids[-1] in encoder.stop_ids) == stopped
    found = read_provenance(pq.read_schema(whole / "train-00000.parquet"), "")
    assert (found.kind, found.num_prompts, found.tokenizer_hash) == ("generated", NUM_PROMPTS, encoder.tokenizer_hash)
    assert found.sampling["temperature"] == 1.0 and found.weights_hash and found.versions["torch"]


def test_responses_do_not_depend_on_fractions_or_batches(whole, tiny_model, data, tmp_path):
    pieces = []
    for number in range(3):
        assert generate(tiny_model, data, tmp_path, data_frac=number, frac_len=10, batch_size=3)[0] == 0
        pieces.append(rows_of(tmp_path, f"train-{number:05d}.parquet"))
    assert [len(piece) for piece in pieces] == [10, 10, 4]
    by_id = {row["prompt_id"]: row for piece in pieces for row in piece}
    assert by_id == {row["prompt_id"]: row for row in rows_of(whole)}


def test_several_samples_of_a_prompt_differ_and_stand_together(tiny_model, data, tmp_path):
    assert generate(tiny_model, data, tmp_path, num_samples=3)[0] == 0
    rows = rows_of(tmp_path)
    assert [row["sample_index"] for row in rows] == [0, 1, 2] * NUM_PROMPTS
    for start in range(0, len(rows), 3):
        group = rows[start : start + 3]
        assert len({row["prompt_id"] for row in group}) == 1
        assert len({tuple(row["rejected_token_ids"]) for row in group}) > 1


def test_prompts_without_an_answer_are_answered_and_the_truth_is_null(tiny_model, tmp_path):
    rows = [make_row(0), {"prompt_id": "alone", "prompt": "What is 7+7?"}, make_row(2)]
    assert generate(tiny_model, write_data(tmp_path / "train.jsonl", rows), tmp_path / "out", max_new_tokens=4)[0] == 0
    found = {row["prompt_id"]: row for row in rows_of(tmp_path / "out")}
    assert found["alone"]["chosen"] is None and found["q0"]["chosen"][-1]["content"] == "0"
    assert found["alone"]["rejected"][0] == {"role": "user", "content": "What is 7+7?"}
    assert [turn["role"] for turn in found["alone"]["rejected"]] == ["user", "assistant"]
    assert validate(tmp_path / "out", None)[1] == []


def test_finished_fraction_is_recognised_without_a_model(whole, tiny_model, data, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("the tokenizer was loaded")

    monkeypatch.setattr("spin.alignment.data.chat_encoder.load_tokenizer", fail)
    before = (whole / "train-00000.parquet").stat()
    code, output, _ = generate(tiny_model, data, whole)
    assert code == 0 and "already complete" in output
    assert (whole / "train-00000.parquet").stat().st_mtime_ns == before.st_mtime_ns


def test_same_rows_in_another_file_are_recognised_too(whole, tiny_model, data, tmp_path):
    rows = [make_row(number) for number in range(NUM_PROMPTS)]
    same = tmp_path / "train.json"
    same.write_text(json.dumps(rows))
    code, output, _ = generate(tiny_model, same, whole)
    assert code == 0 and "already complete" in output


def test_fraction_of_another_run_is_refused_by_name_then_replaced_on_request(tiny_model, data, tmp_path):
    assert generate(tiny_model, data, tmp_path)[0] == 0
    code, _, error = generate(tiny_model, data, tmp_path, seed=1)
    assert code == 2 and "sampling.seed: 1 != 42" in error and "--overwrite" in error
    assert generate(tiny_model, data, tmp_path, "--overwrite", seed=1)[0] == 0
    assert read_provenance(pq.read_schema(tmp_path / "train-00000.parquet"), "").sampling["seed"] == 1


def test_prompts_that_do_not_fit_are_named_and_the_others_go_on(tiny_model, tmp_path):
    long = {"prompt_id": "long", "prompt": "x" * 600, "response": "y"}
    control = {"prompt_id": "control", "prompt": "a <|im_end|> b", "response": "y"}
    data = write_data(tmp_path / "train.jsonl", [make_row(0), long, control, make_row(1)])
    code, _, error = generate(tiny_model, data, tmp_path / "out")
    assert code == 0 and {row["prompt_id"] for row in rows_of(tmp_path / "out")} == {"q0", "q1"}
    skipped = {item["prompt_id"]: item["reason"] for item in read_skipped(tmp_path / "out" / "train-00000.parquet")}
    assert set(skipped) == {"long", "control"} and "tokens" in skipped["long"] and "<|im_end|>" in skipped["control"]
    assert all(f"skipped prompt {name}" in error for name in skipped)


def save(folder: Path, tokenizer: Any) -> Path:
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def no_system_model(tmp_path: Path, data: Path) -> dict[str, object]:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    rows = tmp_path / "train.jsonl"
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    return {"model": save(tmp_path / "model", char_tokenizer(template=template)), "input_dir": rows}


def write_file(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


BAD_INPUT = {
    "missing model": (lambda tmp, data: {"model": tmp / "none"}, "does not exist"),
    "model without config": (lambda tmp, data: {"model": data.parent}, "no config.json"),
    "unreachable hub model": (
        lambda tmp, data: {"model": "no-such-org/none"},
        "a Hub model that can be read (it is not in the Hub cache, and HF_HUB_OFFLINE is set): check the name, give a folder",
    ),
    "no chat template": (
        lambda tmp, data: {"model": save(tmp / "model", char_tokenizer(template=None))},
        "has no chat template",
    ),
    "no system role": (no_system_model, "--system fold"),
    "missing data": (lambda tmp, data: {"input_dir": tmp / "none.jsonl"}, "does not exist"),
    "empty data": (lambda tmp, data: {"input_dir": write_file(tmp, "train.jsonl", "")}, "no rows"),
    "torn parquet": (lambda tmp, data: {"input_dir": write_file(tmp, "train.parquet", "PAR1x")}, "not a readable"),
    "missing split": (lambda tmp, data: {"input_dir": data.parent, "split": "test"}, "no file of the split 'test'"),
    "fraction out of range": (lambda tmp, data: {"data_frac": 3, "frac_len": 10}, "fractions 0 to 2"),
    "negative fraction": (lambda tmp, data: {"data_frac": -1}, "data_frac is -1"),
    "negative frac_len": (lambda tmp, data: {"frac_len": -5}, "frac_len is -5"),
    "batch_size zero": (lambda tmp, data: {"batch_size": 0}, "batch_size is 0"),
    "flush_every zero": (lambda tmp, data: {"flush_every": 0}, "flush_every is 0"),
    "fraction by name": (
        lambda tmp, data: {"data_frac": "all"},
        "data_frac is 'all', which is not a whole number or 'auto'",
    ),
    "lease_timeout": (lambda tmp, data: {"lease_timeout": 0}, "lease_timeout is 0.0"),
    "min_p": (lambda tmp, data: {"min_p": 1}, "min_p is 1.0"),
    "repetition_penalty": (lambda tmp, data: {"repetition_penalty": 0}, "repetition_penalty is 0.0"),
    "empty stop": (lambda tmp, data: {"stop": ""}, "stop contains an empty text"),
    "server without backend": (
        lambda tmp, data: {"base_url": "http://x/v1"},
        "base_url and --backend openai require each other",
    ),
    "backend without server": (
        lambda tmp, data: {"backend": "openai"},
        "base_url and --backend openai require each other",
    ),
    "no adapter": (lambda tmp, data: {"adapter": tmp / "none"}, "lacks adapter_config.json"),
    "temperature": (lambda tmp, data: {"temperature": -1}, "temperature is -1.0"),
    "unknown backend": (lambda tmp, data: {"backend": "hf"}, "choose one of openai, transformers, vllm"),
    "tensor parallel": (lambda tmp, data: {"tensor_parallel_size": 2}, "tensor_parallel_size is for vllm"),
    "unknown flag": (lambda tmp, data: {"temprature": 1}, "did you mean '--temperature'"),
    "no tokens for a prompt": (lambda tmp, data: {"max_new_tokens": 512}, "leaves no tokens for a prompt"),
    "nothing fits": (lambda tmp, data: {"max_prompt_length": 2}, "no prompt of fraction 0 fits"),
    "half precision on a CPU": (lambda tmp, data: {"dtype": "float16"}, "float16 needs a GPU"),
    "output is a file": (lambda tmp, data: {"output_dir": data}, "is a file: choose a folder"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_ends_in_one_sentence(flags, message, tiny_model, data, tmp_path):
    output = tmp_path / "out"
    chosen = flags(tmp_path, data)
    if chosen.get("dtype") == "float16" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where float16 is fine")
    code, _, error = run_main(main, *arguments(tiny_model, data, output, **chosen))
    assert code == 2 and message in error and "Traceback" not in error
    assert not list(output.glob("*.parquet"))


def start(model: Path, data: Path, output: Path, **flags: object) -> subprocess.Popen[bytes]:
    """Start the program as a shell's background job, which ignores SIGINT."""
    command = [sys.executable, "spin/generate.py", *arguments(model, data, output, **flags)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ignore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    return subprocess.Popen(command, cwd=REPOSITORY, env=program_environment(), preexec_fn=ignore, **pipes)


def stop_after_first_part(process: subprocess.Popen[bytes], output: Path, how: signal.Signals) -> int:
    deadline = time.monotonic() + 120
    while not list(output.glob(".parts/*/part-*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before a part was written"
        time.sleep(0.01)
    process.send_signal(how)
    return process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again_it_writes_the_same_file(how, tiny_model, data, tmp_path):
    flags = {"flush_every": 2, "batch_size": 2, "max_new_tokens": 100}
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    code = stop_after_first_part(start(tiny_model, data, killed, **flags), killed, how)
    assert code == (130 if how == signal.SIGTERM else -signal.SIGKILL)
    assert not list(killed.glob("*.parquet")) and list(killed.glob(".parts/*/part-*.parquet"))
    for output in (killed, undisturbed):
        assert generate(tiny_model, data, output, **flags)[0] == 0
    again, once = (folder / "train-00000.parquet" for folder in (killed, undisturbed))
    assert again.read_bytes() == once.read_bytes() and not list(killed.glob(".parts/*/"))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(whole, tiny_model, data, tmp_path):
    launch = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--main_process_port=0"]
    flags = arguments(tiny_model, data, tmp_path, flush_every=4, batch_size=4)
    ran = run_command([*command, "spin/generate.py", *flags])
    assert ran.returncode == 0, ran.stderr
    assert "rank 0" in ran.stderr or "rank 1" in ran.stderr  # one that starts late may find everything done
    for name in ("train-00000.parquet", CARD_FILE):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_a_card_appears_with_the_last_fraction(tiny_model, data, tmp_path):
    from datasets import load_dataset

    flags = {"frac_len": NUM_PROMPTS // 2, "max_new_tokens": 2, "num_samples": 2}
    assert generate(tiny_model, data, tmp_path, data_frac=0, **flags)[0] == 0
    assert read_card(tmp_path) is None
    assert generate(tiny_model, data, tmp_path, data_frac="auto", **flags)[0] == 0
    card = read_card(tmp_path)
    assert card is not None and f"| train | {-(-NUM_PROMPTS // flags['frac_len'])} | {2 * NUM_PROMPTS} |" in card
    assert "the model's response" in card and str(tiny_model.parent) not in card
    assert len(load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))) == 2 * NUM_PROMPTS


def test_schema_is_the_row_format(whole):
    schema = pq.read_schema(whole / "train-00000.parquet")
    assert schema.field("sample_index").type == pa.int32()
    assert schema.field("rejected_token_ids").type == pa.list_(pa.int32())
    assert schema.field("chosen").type == schema.field("rejected").type


def run_shell(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_command(["bash", f"scripts/{script}", *arguments], PYTHON=sys.executable, **environment)


@pytest.mark.slow
def test_the_shell_script_runs_engines_side_by_side_and_gathers(tiny_model, data, tmp_path):
    folders = {"OUTPUT_DIR": str(tmp_path / "generated"), "PAIRS_DIR": str(tmp_path / "pairs")}
    settings = {"MODEL": str(tiny_model), "INPUT_DIR": str(data), "SPLITS": "train", "ENGINES": "2", "FRAC_LEN": "10"}
    done = run_shell("generate.sh", 3, "--max_new_tokens", 8, GATHER="0", **settings, **folders)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "generated").iterdir()) == [
        CARD_FILE,
        *(f"train-{number:05d}.parquet" for number in range(3)),
    ]
    again = run_shell("generate.sh", 3, "--max_new_tokens", 8, **settings, **folders)
    assert again.returncode == 0 and again.stdout.count("already complete") == 2
    (pairs,) = (tmp_path / "pairs").glob("train_prefs-*.parquet")
    assert pq.read_metadata(pairs).num_rows == NUM_PROMPTS
    assert read_provenance(pq.read_schema(pairs), "").iteration == 3
    other = run_shell("generate.sh", 3, "--max_new_tokens", 9, **settings, **folders)
    assert other.returncode == 2 and "every engine of train failed" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [((), {"MODEL": "m"}, "iteration number"), ((1,), {}, "set MODEL"), (("x",), {"MODEL": "m"}, "iteration number")],
)
def test_the_shell_script_says_what_is_missing(arguments, environment, message):
    done = run_shell("generate.sh", *arguments, **environment)
    assert done.returncode == 2 and message in done.stderr
