"""The generation benchmark: its arithmetic by hand, its data and model, and one small run from end to end without vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.generation_contenders import real_tokens
from benchmarks.generation_data import (
    MEAN_TOKENS,
    PROMPT_TOKENS,
    make_prompts,
    read_questions,
    save_model,
    save_prompts,
)
from benchmarks.generation_limit import Machine, Work, limit_seconds, work_of
from benchmarks.generation_process import Seat, Task
from benchmarks.generation_report import add_goals, add_ratios, add_scale, same_responses, summarize, table
from benchmarks.generation_scale import GROUND_TRUTH_CHARACTERS, PROMPT_CHARACTERS, save_many
from benchmarks.shapes import EOS_ID
from spin.alignment.core.errors import InputError
from tests.helpers import run_command


def turn(tokens: int, wall: float, processor: float, **checksums: int) -> dict[str, Any]:
    return {"tokens": tokens, "wall_seconds": wall, "processor_seconds": processor, "checksums": checksums}


def contender(*speeds: float) -> dict[str, Any]:
    return summarize("name", [turn(int(speed), 1.0, 2.0, a=1) for speed in speeds], "wall_seconds")


def test_rates_are_of_the_clock_that_was_asked_for() -> None:
    turns = [turn(100, 2.0, 4.0, a=1, b=2), turn(300, 1.0, 5.0, a=1, b=2), turn(200, 1.0, 2.0, a=1, b=2)]
    assert summarize("name", turns, "wall_seconds")["reps"]["tokens_per_second"] == [50, 300, 200]
    facts = summarize("name", turns, "processor_seconds")
    assert facts["reps"]["tokens_per_second"] == [25, 60, 100] and facts["tokens_per_second"] == 60
    assert facts["tokens_per_response"] == 100


def test_ratios_are_formed_turn_by_turn_and_left_out_where_a_contender_failed() -> None:
    failed = {"label": "name", "error": "vLLM is not installed"}
    result: dict[str, Any] = {
        "contenders": {
            "bare_vllm": failed,
            "vllm": contender(90, 90, 90),
            "transformers": contender(90, 20, 80),
            "original": contender(30, 10, 20),
        }
    }
    add_ratios(result)
    assert "vllm_vs_bare" not in result and result["ratio_spread"] == {"transformers_vs_original": [2, 4]}
    assert result["transformers_vs_original"] == 3
    add_goals(result)
    assert result["goals"] == {"transformers_vs_original": {"goal": 2.0, "reached": 3, "met": True}}
    assert "failed: vLLM is not installed" in table(result)


def test_scale_reports_rates_per_core_and_what_more_rows_cost() -> None:
    def steps(rate: float, mib: int) -> dict[str, dict[str, float]]:
        facts = {"rows_per_second": 1.0, "rows_per_core_second": rate, "peak_bytes": 0}
        return {step: facts | {"peak_anonymous_bytes": mib * 2**20} for step in ("generate", "gather")}

    result: dict[str, Any] = {"contenders": {}, "ratio_spread": {}}
    add_scale(result, {100: steps(9e4, 300), 1000: steps(1.5e4, 450)})
    add_goals(result)
    assert result["gather_rows_per_s"] == 1.5e4 and not result["goals"]["gather_rows_per_s"]["met"]
    assert result["gather_memory_growth_bytes"] == 150 * 2**20
    assert not result["goals"]["generate_memory_growth_bytes"]["met"]


def test_share_of_the_same_responses() -> None:
    ours = [turn(1, 1, 1, a=1, b=2), turn(1, 1, 1, c=3, d=4)]
    assert same_responses(ours, ours) == 1
    assert same_responses(ours, [turn(1, 1, 1, a=1, b=9), turn(1, 1, 1, d=4)]) == 0.5


def test_padding_behind_the_stop_id_is_no_sampled_token() -> None:
    assert real_tokens([7, 0, EOS_ID, 0, 0], [EOS_ID]) == [7, 0, EOS_ID]
    assert real_tokens([7, 0, 8], [EOS_ID]) == [7, 0, 8]


def test_limit_by_hand() -> None:
    """Prompts of 10 and 20 tokens, responses of 3 and 1: 2 and 0 decoding steps, the longest row decides how often weights are
    read. Prefill: 2 * (100 * 30 + 40 * 2) = 6160 operations. Decoding: 2 * 140 * 2 = 560 operations, and (140 * 2 weights + 8 *
    (11 + 12) keys and values) * 2 bytes = 928 bytes."""
    work = Work(trunk=100, head=40, kv=8, bytes_per_number=2)
    assert limit_seconds(work, Machine(1000.0, 100.0), [10, 20], [3, 1]) == pytest.approx(6.16 + 9.28)
    assert limit_seconds(work, Machine(1000.0, 1e9), [10, 20], [3, 1]) == pytest.approx(6.16 + 0.56)


def test_work_of_a_model_is_that_of_its_weights() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=60, num_hidden_layers=3, **sizes)
    model, work = LlamaForCausalLM(config), work_of(config, "float32")
    matrices = [weight.numel() for name, weight in model.model.layers.named_parameters() if weight.dim() == 2]
    assert (work.trunk, work.head) == (sum(matrices), model.lm_head.weight.numel())
    assert (work.kv, work.bytes_per_number) == (3 * 2 * 2 * 8, 4)


def test_questions_are_read_and_too_few_are_told(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    with pytest.raises(InputError, match=r"the file of questions .*test.jsonl does not exist"):
        read_questions(file, 2)
    file.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "2+2?"}\n{"text": "3+3?"}\n')
    assert read_questions(file, 2) == ["1+1?", "2+2?"]
    with pytest.raises(InputError, match="line 3, has no key 'question'"):
        read_questions(file, 3)
    file.write_text('{"question": "1+1?"}\n')
    with pytest.raises(InputError, match="has 1 questions, but 2 are needed"):
        read_questions(file, 2)


def test_prompts_differ_by_turn_and_their_text_becomes_their_ids(tmp_path: Path) -> None:
    from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
    from spin.alignment.data.rows import stream_prompts

    save_model(tmp_path / "model", seed=0)
    encoder = ChatEncoder(load_tokenizer(tmp_path / "model"))
    prompts = make_prompts(20, 1, seed=0)
    assert prompts == make_prompts(20, 1, seed=0) and prompts[0].token_ids != make_prompts(20, 2, seed=0)[0].token_ids
    save_prompts(tmp_path / "data", prompts)
    rows = list(stream_prompts(str(tmp_path / "data"), "train"))
    assert [row["prompt_id"] for row in rows] == [prompt.prompt_id for prompt in prompts]
    assert [encoder.prompt_ids(row["chosen"][:-1]) for row in rows] == [prompt.token_ids for prompt in prompts]
    assert all(PROMPT_TOKENS[0] <= len(prompt.token_ids) <= PROMPT_TOKENS[1] for prompt in prompts)
    assert encoder.stop_ids == [EOS_ID]


def test_model_draws_the_stop_id_once_in_mean_tokens(tmp_path: Path) -> None:
    import torch

    from benchmarks.shapes import load_model

    assert save_model(tmp_path / "model", seed=3) == pytest.approx(4.3e6, rel=0.01)
    model = load_model(str(tmp_path / "model")).eval()
    ids = torch.tensor([prompt.token_ids[:16] for prompt in make_prompts(32, 5, seed=1)])
    with torch.no_grad():
        likely = model(ids).logits.softmax(dim=-1)[..., EOS_ID]
    assert likely.mean().item() == pytest.approx(1 / MEAN_TOKENS, rel=0.1)
    assert likely.std() < 0.5 * likely.mean()  # lengths are about geometric


def test_synthetic_rows_have_the_length_they_should(tmp_path: Path) -> None:
    from spin.alignment.data.rows import stream_prompts

    save_many(tmp_path / "data", 300)
    rows = list(stream_prompts(str(tmp_path / "data"), "train"))
    assert len({row["prompt_id"] for row in rows}) == 300
    for place, characters in ((0, PROMPT_CHARACTERS), (1, GROUND_TRUTH_CHARACTERS)):
        lengths = [len(row["chosen"][place]["content"]) for row in rows]
        assert characters - 8 <= min(lengths) and max(lengths) <= characters


def test_contender_that_fails_says_why_and_lets_the_others_go_on(tmp_path: Path) -> None:
    folders = (str(tmp_path / "transformers"), str(tmp_path / "nowhere"), str(tmp_path))
    seat = Seat(Task("transformers", *folders, prompts=1, reps=1, seed=0, threads=1, allocator="stock"))
    seat.start()
    seat.take_turn()
    assert seat.error is not None and seat.turns == []
    assert seat.error.splitlines()[-1].startswith(f"error: model folder {tmp_path / 'nowhere'} does not exist")


def run_benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_command([sys.executable, "benchmarks/generate.py", *arguments], timeout=400)


def test_bad_flags_are_refused_in_one_sentence(tmp_path: Path) -> None:
    for flags, words in (
        (["--contenders", "sglang"], "unknown contender 'sglang'"),
        (["--contenders", "vllm", "vllm"], "names one twice"),
        (["--reps", 0], "reps is 0"),
        (["--contenders", "--gather_rows", 0], "nothing to measure"),
        (["--model", tmp_path], "model and questions require each other"),
        (["--model", tmp_path, "--questions", tmp_path], "set gather_rows to 0"),
    ):
        done = run_benchmark(*flags, "--out", tmp_path / "out.json")
        assert done.returncode == 2 and words in done.stderr, done.stderr


@pytest.mark.slow
def test_small_run_from_end_to_end(tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    contenders = ("--contenders", "transformers", "original", "--prompts", 4, "--reps", 1)
    done = run_benchmark(*contenders, "--gather_rows", 1000, "--clock", "processor", "--out", out, "--plot", plot)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["transformers_vs_original"] > 0 and "vllm_vs_bare" not in result
    for facts in result["contenders"].values():
        (measured,) = facts["turns"]
        assert 0 < measured["tokens"] <= 4 * 192 and measured["processor_seconds"] > 0
    assert set(result["scale"]) == {"100", "1000"}
    for step in ("generate", "gather"):
        facts = result["scale"]["1000"][step]
        assert result[f"{step}_rows_per_s"] == pytest.approx(1000 / facts["processor_seconds"])
        assert 0 < facts["peak_anonymous_bytes"] <= facts["peak_bytes"]
    assert "original loop on transformers" in done.stdout and plot.read_bytes().startswith(b"\x89PNG")
