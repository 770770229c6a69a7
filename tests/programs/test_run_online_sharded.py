"""Online training of a sharded policy (FSDP2, ZeRO-3) in two processes: the weights of one process, also after a kill."""

from __future__ import annotations

import json
import sys

import pytest

from spin import run_online
from tests.helpers import run_command, run_main
from tests.helpers.online import write_online, write_prompts
from tests.helpers.training import difference, metrics

# One prompt in six gives a pair, and there is one held-out prompt: one of the processes has neither.
SETTINGS = {
    "max_steps": 6,
    "ref_update_freq": 3,
    "updates_per_batch": 2,
    "scorer": "tests.helpers.online:letters_of_some",
    "eval_strategy": "steps",
    "eval_steps": 3,
    "eval_limit": 1,
}
# The KL term reads the full distributions of the policy of step 3, in the second update of a step too.
ALPHA = {"alpha": 2.0, "eval_strategy": "no", "eval_limit": 0, "eval_steps": None, "eval_prompts": None}
WITH_KL = {"all": ALPHA, "adapters": ALPHA | {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    prompts = write_prompts(tmp_path_factory.mktemp("prompts"))
    return {"prompts": prompts, "eval_prompts": str(prompts), **SETTINGS}


def train_alone(folder, model, settings):
    code, _, error = run_main(run_online.main, write_online(folder, model, **settings))
    assert code == 0, error
    return folder / "out"


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model, settings):
    return train_alone(tmp_path_factory.mktemp("alone"), tiny_model, settings)


@pytest.fixture(scope="module")
def alone_with_kl(tmp_path_factory, tiny_model, settings):
    folder = tmp_path_factory.mktemp("kl")
    for name, changes in WITH_KL.items():
        train_alone(folder / name, tiny_model, settings | changes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FSDP2", "ZeRO-3"])
def test_a_sharded_policy_reaches_the_weights_of_one_process(tmp_path, tiny_model, settings, alone, kind):
    two = settings | {"per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 1}
    whole, killed = (str(write_online(tmp_path / name, tiny_model, **two)) for name in ("whole", "killed"))
    # Killed after step 5: the run resumes with the reference of step 3.
    runs = [(kind, whole, 0), (kind, killed, 5), (kind, killed, 0)]
    done = run_command([sys.executable, "-m", "tests.helpers.sharded", "run_online", json.dumps(runs)], timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "resuming from" in done.stdout
    assert difference(tmp_path / "whole/out", tiny_model) > 1e-3
    assert difference(tmp_path / "whole/out", alone) < 1e-4
    assert difference(tmp_path / "whole/out", tmp_path / "killed/out") == 0.0
    first, second = (metrics(folder)["history"] for folder in (alone, tmp_path / "whole/out"))
    for name in ("loss", "rewards/margins", "pairs_per_prompt", "eval_t0_score", "eval_t1_length"):
        values = [[entry[name] for entry in history if name in entry] for history in (first, second)]
        assert len(values[0]) >= 2
        assert values[1] == pytest.approx(values[0], abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FSDP2", "ZeRO-3"])
def test_an_engine_gets_the_weights_or_the_adapter_and_the_reference_its_kl_term(
    tmp_path, tiny_model, settings, alone, alone_with_kl, kind
):
    """An engine beside each process gets whole weights, gathered one at a time, or with LoRA the adapter alone."""
    configs = [
        write_online(
            tmp_path / name, tiny_model, **settings | changes | {"per_device_train_batch_size": 3, "backend": "vllm"}
        )
        for name, changes in WITH_KL.items()
    ]
    runs = json.dumps([(kind, str(config), 0) for config in configs])
    done = run_command([sys.executable, "-m", "tests.helpers.sharded", "run_online", runs], timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert difference(alone_with_kl / "all/out", alone) > 1e-4  # the term does something
    for name in WITH_KL:
        assert difference(tmp_path / name / "out", alone_with_kl / name / "out") < 1e-5, name
