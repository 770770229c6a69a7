"""The GPU suite: its parts at tiny sizes on a CPU, and what it records of a part that hangs, crashes or does not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu import engines, kernels, packing, process, steps
from benchmarks.gpu.part import Findings, Part
from benchmarks.gpu.parts import PARTS
from spin.alignment.core.errors import InputError
from spin.alignment.generation.base import Response

# A stand-in for the part's program: records a result, then does what its name says.
PROGRAM = """
import json, os, pathlib, signal, subprocess, sys, time
name, tiny, file = sys.argv[1:]
pathlib.Path(file).write_text(json.dumps({"before": name}))
print("about to", name, flush=True)
if name == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path(file).write_text(json.dumps({"child": child.pid}))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if name == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "raise":
    raise RuntimeError("CUDA out of memory")
"""


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    return Findings(tmp_path / "results.json", tiny=True)


def recorded(findings: Findings) -> dict[str, Any]:
    """What the part has written; nothing of it failed."""
    assert not findings.failed
    found: dict[str, Any] = json.loads(findings.file.read_text(encoding="utf-8"))
    return found


def test_kernels_agree_with_naive_attention(findings: Findings) -> None:
    kernels.measure_kernels(findings)
    found = recorded(findings)
    assert set(found) == {f"{heads} {kernel}" for heads in kernels.TINY_HEADS for kernel in ("naive", *kernels.KERNELS)}
    assert all(found[f"{heads} sdpa"]["agrees"] for heads in kernels.TINY_HEADS)
    assert found["tiny sdpa"]["uc"]["both_ms"] > 0 and found["tiny varlen"] == {"skipped": "it needs a GPU"}


def test_a_kernel_with_a_wrong_mask_fails_the_part(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    def sees_everything(query: Any, key: Any, value: Any, layout: Any, call: Any) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2)

    monkeypatch.setitem(kernels.KERNELS, "sdpa", sees_everything)
    monkeypatch.setattr(kernels, "TINY_HEADS", {"tiny": kernels.TINY_HEADS["tiny"]})
    kernels.measure_kernels(findings)
    assert findings.failed == ["tiny sdpa"]


def test_packed_log_probs_are_as_exact_as_padded_ones(findings: Findings) -> None:
    packing.measure_packing(findings)
    found = recorded(findings)
    assert list(found) == ["llama", "qwen2", "gemma2"]
    for family in found.values():
        assert 0 < family["packed"]["error"]["mean"] < 1.5 * family["padded"]["error"]["mean"] < 0.01


def test_steps_report_estimate_and_peak(findings: Findings) -> None:
    steps.measure_memory(findings)
    for case in recorded(findings).values():
        assert case["losses"][0] == pytest.approx(0.6931, abs=1e-3) and case["losses"][1] != case["losses"][0]
        assert case["estimated_bytes"] == sum(case["estimate"].values())
        # The peak is that of this process, in which other tests have run.
        assert 0.0 < case["estimated_to_peak"] < 1.5 and case["micro_batches"] > 1


def test_an_online_turn_updates_the_engine_and_trains_on_its_responses(findings: Findings) -> None:
    case = steps.TINY_CASES["tiny adamw"]
    trainer = steps.StepTrainer(steps.make_model(steps.MODELS["tiny"], 512, 0), case, "cpu")
    calls: list[str] = []

    def respond(prompts: list[Any], sampling: Any) -> list[list[Response]]:
        calls.append(f"respond to {len(prompts)}, {sampling.num_samples} each")
        return [[Response([5, 6, 1], "stop"), Response([7, 1], "stop")] for _ in prompts]

    sampler = SimpleNamespace(refresh=lambda: calls.append("refresh"), respond=respond)
    found = engines.online_turn(sampler, trainer, findings, turn=0)
    assert calls == ["refresh", f"respond to {engines.TINY_PROMPTS}, 2 each"]
    assert found["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert found["generated_tokens_per_second"] == pytest.approx(5 * engines.TINY_PROMPTS / found["generation_seconds"])


def test_an_error_of_one_measurement_is_recorded_and_the_next_follows(findings: Findings) -> None:
    findings.attempt("broken", lambda: 1 / 0)
    findings.attempt("fine", lambda: 3)
    assert json.loads(findings.file.read_text()) == {
        "broken": {"error": "ZeroDivisionError: division by zero"},
        "fine": 3,
    }
    assert findings.failed == ["broken"]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Part]:
    """Parts whose processes run PROGRAM."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    start = process.subprocess.Popen

    def stand_in(command: list[str], **settings: Any) -> Any:
        return start([sys.executable, str(program), *command[3:]], **settings)

    monkeypatch.setattr(process.subprocess, "Popen", stand_in)
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.2)
    parts = {name: Part(name, 20, lambda findings: None) for name in ("fine", "raise", "crash", "late")}
    parts["hang"] = Part("hang", 1.5, lambda findings: None)
    parts["long"] = Part("long", 1000, lambda findings: None)
    parts["absent"] = Part("absent", 20, lambda findings: None, needs=("no_such_package",))
    parts["sleep"] = Part("sleep", 20, lambda findings: None, needs_gpu=True)
    monkeypatch.setattr(gpu_suite, "PARTS", parts)
    return parts


def test_parts_that_fail_are_recorded_and_the_rest_runs(
    stand_ins: dict[str, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "gpu.json", []
    write = gpu_suite.write_json_atomic

    def observed(path: Path, value: Any) -> None:
        write(path, value)
        seen.append({name: entry["status"] for name, entry in json.loads(path.read_text())["parts"].items()})

    monkeypatch.setattr(gpu_suite, "write_json_atomic", observed)
    names = ["fine", "raise", "crash", "hang", "long", "absent", "sleep", "late"]
    assert gpu_suite.main(["--tiny", "--budget", "300", "--parts", *names, "--out", str(out)]) == 1
    parts = json.loads(out.read_text())["parts"]
    wanted = ["done", "failed", "failed", "timed out", "skipped", "skipped", "skipped", "done"]
    assert [parts[name]["status"] for name in names] == wanted
    assert parts["fine"]["results"] == parts["late"]["results"] | {"before": "fine"} == {"before": "fine"}
    assert "code 1" in parts["raise"]["error"] and "CUDA out of memory" in parts["raise"]["error"]
    assert "SIGSEGV" in parts["crash"]["error"] and parts["crash"]["results"] == {"before": "crash"}
    assert "stopped after 2 seconds" in parts["hang"]["error"] and "about to hang" in parts["hang"]["error"]
    child = Path(f"/proc/{parts['hang']['results']['child']}/stat")
    assert not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z"  # its child has ended with it
    assert "1000 seconds do not fit" in parts["long"]["reason"]
    assert parts["absent"]["reason"] == "no_such_package is not installed"
    assert parts["sleep"]["reason"] == "it needs a GPU"
    # The file was complete after each part.
    for number, statuses in enumerate(seen, start=1):
        assert list(statuses.values()) == wanted[:number] + ["waiting"] * (len(names) - number)


def test_the_suite_runs_a_real_part(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu_suite.main(["--tiny", "--parts", "machine", "--out", str(out)]) == 0
    machine = json.loads(out.read_text())["parts"]["machine"]
    assert machine["results"]["versions"]["torch"] == torch.__version__ and machine["status"] == "done"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts", "kernel"], "unknown part 'kernel': choose one of .*kernels"),
        (["--parts", "kernels", "kernels"], "name each once"),
        (["--budget", "0"], "above 0"),
        ([], "finds no GPU"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        gpu_suite.main([*flags, "--out", str(tmp_path / "gpu.json")])
    assert not (tmp_path / "gpu.json").exists()


def test_every_part_fits_the_default_budget_alone() -> None:
    assert all(part.seconds + process.GRACE_SECONDS < gpu_suite.BUDGET for part in PARTS.values())
