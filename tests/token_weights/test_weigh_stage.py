"""The section ``weigh`` of ``spin run``: its plan, its bad configurations, and one whole run."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from spin import cli
from spin.alignment.core.parquet import read_rows
from spin.alignment.evaluation.responses import read_responses
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.lineage import lineage
from spin.alignment.pipeline.manifest import RunManifest
from spin.alignment.pipeline.program_settings import train_values, weights_config
from spin.alignment.pipeline.stages import make_stages
from spin.alignment.report.verdicts import verdicts
from tests.helpers import REPOSITORY, run_command, run_main
from tests.helpers.evaluations import share, write_evaluation
from tests.helpers.runs import TRAINING, tiny_run, write_config

REVERSE = {"weighting": "reverse_dpo", "transform": "exponential", "transform_params": {"mu": 0.5}}


def make_config(tmp_path, **changes):
    return load_run_config(write_config(tmp_path / "config.yaml", tiny_run(tmp_path, **changes)))


def flag(command: list[str], name: str) -> list[str]:
    """The values of a flag in a command."""
    return [item.partition("=")[2] for item in command if item.startswith(f"--{name}=")]


def test_plan_of_reverse_dpo(tmp_path):
    config = make_config(tmp_path, weigh={**REVERSE, "train": {"max_steps": 3}}, train={**TRAINING, "alpha": 0.5})
    stages = {stage.name: stage for stage in make_stages(config)}
    steps = ["generate", "convert", "forward", "reverse", "forward/evaluate", "weigh", "train", "evaluate"]
    assert [name for name in stages if name.startswith("iter0/")] == [f"iter0/{step}" for step in steps]
    forward, reverse, train = (stages[f"iter1/{name}"].configs[0] for name in ("forward", "reverse", "train"))
    assert forward["max_steps"] == reverse["max_steps"] == 3 and train["max_steps"] == 10
    assert reverse["reverse"] is True and "reverse" not in forward and "alpha" not in forward and train["alpha"] == 0.5
    # all start from the opponent; the scorers read the pairs, the policy reads the weights, of this iteration and the last
    opponent = str(tmp_path / "run" / "iter0" / "checkpoint")
    assert {item["model_name_or_path"] for item in (forward, reverse, train)} == {opponent}
    run_dir = str(tmp_path / "run")
    assert list(forward["dataset_mixer"]) == [f"{run_dir}/iter1/pairs", f"{run_dir}/iter0/pairs"]
    assert list(train["dataset_mixer"]) == [f"{run_dir}/iter1/weights", f"{run_dir}/iter0/weights"]
    (command,) = stages["iter1/weigh"].commands
    assert flag(command, "model_plus") == [f"{run_dir}/iter1/forward/checkpoint"]
    assert flag(command, "model_minus") == [f"{run_dir}/iter1/reverse/checkpoint"]
    assert flag(command, "transform_params") == ["mu=0.5"] and flag(command, "max_length") == ["64"]
    assert flag(command, "page") == [f"{run_dir}/iter1/weights.html"]
    assert ("iter0/reverse/checkpoint", str(tmp_path / "model"), str(tmp_path / "model"), "iter0/pairs (reversed)") in [
        tuple(row) for row in lineage(config)
    ]


def test_plan_of_a_teacher_and_of_drift(tmp_path):
    config = make_config(tmp_path, weigh={"weighting": "teacher", "model_plus": "big"})
    stages = {stage.name: stage for stage in make_stages(config)}
    assert "iter1/forward" not in stages
    (command,) = stages["iter1/weigh"].commands
    assert flag(command, "model_plus") == ["big"]
    assert flag(command, "model_minus") == [str(tmp_path / "run" / "iter0" / "checkpoint")]
    config = make_config(tmp_path, weigh={"weighting": "drift"})
    (command,) = next(stage for stage in make_stages(config) if stage.name == "iter0/weigh").commands
    assert flag(command, "tokenizer") == [str(tmp_path / "model")] and flag(command, "model_plus") == []


def test_without_the_section_nothing_changes(tmp_path):
    config = make_config(tmp_path)
    assert config.train_folders(1) == config.pair_folders(1)
    assert not any("weigh" in stage.name for stage in make_stages(config))


def test_verdict_against_spin_without_weights(tmp_path):
    def row(name, role, iteration, exact):
        identity = {"model": name, "role": role, "iteration": iteration}
        return {**identity, "greedy_exact": exact, "nll": 0.5, "exact_at": {}}

    rows = [row("sft", "start", None, 0.5), row("iter0_spin", "unweighted", 0, 0.6), row("iter0", "policy", 0, 0.7)]
    rows.append(row("iter1", "policy", 1, 0.8))
    for item in rows:
        scores = {0.0: share(100, round(100 * item["greedy_exact"]))}
        write_evaluation(tmp_path / item["model"], scores, [1.0] * 100, [2] * 100)
    responses = {item["model"]: read_responses(tmp_path / item["model"] / "eval.parquet") for item in rows}
    lines = verdicts(rows, responses)
    assert not any(line.startswith("iter1 against SPIN") for line in lines)
    found = [line for line in lines if line.startswith("iter0 against SPIN without weights (iter0_spin)")]
    (line,) = [line for line in found if "greedy" in line]
    assert "greedy exact match 0.600 -> 0.700, difference +0.100" in line and line.endswith("p = 0.002 (better)")


@pytest.mark.parametrize(
    ("weigh", "sentence"),
    [
        ({"transform": "binary"}, "the section 'weigh' lacks the key 'weighting'"),
        ({"weighting": "attention"}, "unknown weighting 'attention': choose one of drift"),
        ({**REVERSE, "transform": "exp"}, "unknown transform 'exp'"),
        ({**REVERSE, "transform_params": {"nu": 1}}, "contains 'nu', which transform exponential does not take"),
        (
            {**REVERSE, "transfrom": "binary"},
            "unknown key 'transfrom' in the section 'weigh'; did you mean 'transform'",
        ),
        ({**REVERSE, "model_plus": "x"}, "weigh.model_plus is for teacher"),
        ({**REVERSE, "output_dir": "x"}, "'output_dir' in the section 'weigh' is set by the pipeline itself"),
        ({**REVERSE, "train": {"reverse": True}}, "'reverse' in weigh.train is set by the pipeline itself"),
        ({**REVERSE, "train": {"betta": 1}}, "unknown key 'betta'.*weigh.train.*forward"),
        ({**REVERSE, "train": 3}, "weigh.train is not a mapping"),
        (
            {"weighting": "drift", "train": {"beta": 1}},
            "weigh.train is for weightings whose models the run trains .reverse_dpo.",
        ),
        ({"weighting": "drift", "transform": "binary"}, "drift does not use --transform"),
        ({"weighting": "teacher"}, "compares two models: pass --model_plus"),
        ({"weighting": "teacher", "model_plus": "./none"}, "./none does not exist"),
    ],
)
def test_bad_sections_are_one_sentence(tmp_path, weigh, sentence):
    path = write_config(tmp_path / "config.yaml", tiny_run(tmp_path, weigh=weigh))
    code, _, err = run_main(cli.main, "run", path)
    assert code == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1
    assert re.search(sentence, err), err
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_removed_with_null(tmp_path):
    """--weigh.weighting=reverse_dpo --weigh.model_plus=null takes a configuration with a teacher to one without."""
    path = write_config(tmp_path / "config.yaml", tiny_run(tmp_path, weigh={**REVERSE, "model_plus": "x"}))
    assert load_run_config(path, ["--weigh.model_plus=null"]).trains_scorers


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One iteration weighed by a forward and a reverse model, undisturbed."""
    root = tmp_path_factory.mktemp("weigh")
    train = {**TRAINING, "max_steps": 4, "save_strategy": "no", "learning_rate": 1e-3}
    config = write_config(root / "config.yaml", tiny_run(root, iterations=1, overrides={}, train=train, weigh=REVERSE))
    done = run_command([sys.executable, "-m", "spin", "run", config], timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root


@pytest.mark.slow
def test_a_whole_run_with_weights(finished):
    run_dir = finished / "run"
    weights = [row for path in (run_dir / "iter0" / "weights").glob("*.parquet") for row in read_rows(path)]
    assert len(weights) == 24 and len({round(value, 4) for row in weights for value in row["rejected_weights"]}) > 20
    assert "<h1>Token weights</h1>" in (run_dir / "iter0" / "weights.html").read_text()
    rows = json.loads((run_dir / "summary.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["sft", "iter0_spin", "iter0"]
    assert all("greedy_exact" in row and row["train_seconds"] for row in rows[1:])
    # what the forward model was trained to say, the reverse model was trained not to
    chosen = [
        json.loads((run_dir / "iter0" / name / "metrics.json").read_text())["final"]["logps/chosen"]
        for name in ("forward", "reverse")
    ]
    assert chosen[0] > chosen[1]
    code, out, _ = run_main(cli.main, "validate", run_dir)
    assert (code, out.strip()) == (0, "9 stages checked, 0 problems")


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do_and_a_change_is_noticed(finished):
    config, run_dir = finished / "config.yaml", finished / "run"
    manifest = RunManifest(run_dir)
    assert all(manifest.is_done(name) for name in manifest.stages) and len(manifest.stages) == 9
    code, _, err = run_main(cli.main, "run", config, "--weigh.transform_params.mu=0.7")
    assert code == 2 and "iter0/weigh" in err and "mu=0.5" in err and "mu=0.7" in err
    code, out, _ = run_main(cli.main, "status", run_dir)
    assert code == 0 and out.count("done") == 9
    (run_dir / "iter0" / "weights.html").write_text("spoilt")
    assert RunManifest(run_dir).damaged_outputs("iter0/weigh") == ["iter0/weights.html"]


def test_help_of_the_run_is_light():
    code = "import sys, spin.alignment.pipeline.config; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_shipped_runs_differ_in_the_weights_alone(monkeypatch):
    from spin.alignment.training.settings import read_settings
    from spin.alignment.training.trainer import SPINConfig

    monkeypatch.chdir(REPOSITORY)
    plain, weighted = (load_run_config(f"configs/{name}_qwen1.5_1.8b.yaml") for name in ("spin", "wspin"))
    names = [[stage.name for stage in make_stages(config)] for config in (plain, weighted)]
    assert set(names[1]) - set(names[0]) == {f"iter{t}/weigh" for t in range(4)}
    for iteration in range(4):
        settings = [train_values(config, iteration) for config in (plain, weighted)]
        here = {"bf16": False, "use_cpu": True, "model_name_or_path": "opponent"}
        for values in settings:  # the published settings
            arguments = read_settings(values | here, "the configuration", SPINConfig).arguments
            assert (arguments.beta, arguments.learning_rate, arguments.optim) == (0.1, 5e-7, "rmsprop")
            assert (arguments.warmup_steps, arguments.max_grad_norm) == (150, 10.0)
            assert (values["max_length"], values["max_prompt_length"]) == (512, 256)
        places = ("dataset_mixer", "output_dir", "model_name_or_path")
        same = [{key: item for key, item in values.items() if key not in places} for values in settings]
        assert same[0] == same[1]
        assert len(settings[1]["dataset_mixer"]) == min(2, iteration + 1)
    weights = weights_config(weighted, 1)
    assert weights.transform_name == "exponential"
    assert weights.transform_settings == {"k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5}
    assert (weights.max_length, weights.max_prompt_length) == (512, 256)
