"""The evidence studies: every arm's configuration is valid, a stopped study continues, and the tables are right by hand."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest

from benchmarks.evidence import data, measures, plan, results, runner, tables
from benchmarks.evidence.plan import BENCHMARKS, CONFIGS, STUDIES, arms_of, config_path
from benchmarks.evidence.plots import study_plot
from benchmarks.evidence.scorers import chrf
from spin.alignment.core.config import load_config
from spin.alignment.core.errors import InputError
from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.evaluation.statistics import Estimate
from tests.helpers import SHARED_DATA
from tests.helpers.evaluations import share, write_evaluation

TRAINED = [(study, name, arm) for study, item in STUDIES.items() for name, arm in item.arms.items() if arm.program]


@pytest.mark.parametrize(("study", "name", "arm"), TRAINED, ids=[f"{study}-{name}" for study, name, _ in TRAINED])
def test_every_arm_has_a_configuration_that_its_program_accepts(study, name, arm, monkeypatch):
    from spin.alignment.training.check_settings import checked_settings
    from spin.alignment.training.online.run import OnlineTraining
    from spin.alignment.training.preference import PreferenceTraining
    from spin.alignment.training.sft import SFTTraining

    monkeypatch.chdir(plan.REPOSITORY)
    path = config_path(study, name)
    other = {"model_name_or_path": "opponent"}  # a model of an earlier arm is not there
    if arm.program == "spin run":
        from spin.alignment.pipeline.config import load_run_config
        from spin.alignment.pipeline.stages import make_stages

        config = load_run_config(path)
        folder, start = Path(config.run_dir), Path(config.model)
        trainings = [stage for stage in make_stages(config) if stage.makes is not None]
        made = {str(stage.makes.folder / "checkpoint") for stage in trainings}
        assert {str(folder / model) for model in arm.models.values()} <= made
        programs = {"run_spin.py": PreferenceTraining, "run_online.py": OnlineTraining, "run_sft.py": SFTTraining}
        for stage in trainings:
            checked_settings(programs[stage.kind.program](), {**stage.configs[0], **other}, str(path))
    else:
        values = load_config(path)
        start = Path(values["model_name_or_path"])
        settings = checked_settings(SFTTraining(), {**values, **other}, str(path))
        folder = Path(settings.output.output_dir).parent
    assert arm.config or folder == plan.run_folder(study, name, 1)
    assert start == runner.Runner().start_of(study, arm)


def test_every_configuration_is_an_arm_and_every_benchmark_is_valid():
    configs = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("*/*.yaml")}
    assert configs == {f"{study}/{name}" for study, name, arm in TRAINED if not arm.config}
    for benchmark in BENCHMARKS.values():
        values = {key: str(value) if isinstance(value, Path) else value for key, value in benchmark.flags.items()}
        EvaluateConfig(model="m", output_file="o.json", **values)
    for item in STUDIES.values():
        assert {name for arm in item.arms.values() for name in (*arm.benchmarks, *item.benchmarks)} <= set(BENCHMARKS)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (("z", None, None), "unknown study 'z'"),
        (("b", "spinn", None), "unknown arm of study b 'spinn'"),
        (("b", "tspin", 7), "seed 7 is not in the plan of study b: choose one of 1"),
    ],
)
def test_an_unknown_arm_is_named(wanted, sentence):
    with pytest.raises(InputError, match=sentence):
        arms_of(*wanted)


@pytest.mark.skipif(not (SHARED_DATA / "ifeval").is_dir(), reason="the public data sets are not there")
def test_parts_of_the_data_are_disjoint(tmp_path, monkeypatch):
    from spin.alignment.data.rows import load_prompts

    monkeypatch.setattr(data, "DATA", tmp_path)
    data.prepare(SHARED_DATA)

    def ids(name, split="train"):
        return set(load_prompts(str(tmp_path / name), split, ground_truth_required=False)["prompt_id"])

    trained, stopping, held_out = ids("alpaca_sft"), ids("alpaca_sft", "test"), ids("alpaca", "test")
    assert (len(trained), len(stopping), len(held_out)) == (699, 86, 200)
    assert all(not one & other for one, other in itertools.combinations((trained, stopping, held_out), 2))
    assert len(ids("alpaca_spin")) == 448 and ids("alpaca_spin") < trained
    assert len(ids("gsm8k_sft")) == 1000 and not ids("gsm8k_sft") & ids("gsm8k", "test")
    assert len(ids("ifeval", "test")) >= 540
    with pytest.raises(InputError, match=r"alpaca_demo does not exist: put the public data set there, or pass --data"):
        data.prepare(tmp_path / "nowhere")


@pytest.fixture
def small_study(tmp_path, monkeypatch, tiny_model):
    """A study of a start and one trained arm on one benchmark, whose programs only write what they would."""
    study = plan.Study(
        "small",
        ("gsm8k", "alpaca"),
        {
            "sft": plan.Arm({"final": "checkpoint"}, "run_sft.py"),
            "spin": plan.Arm({"iter0": "iter0/checkpoint"}, "spin run", "sft", seeds=(1, 2)),
        },
    )
    monkeypatch.setitem(STUDIES, "b", study)
    monkeypatch.setattr(plan, "WORK", tmp_path / "runs")
    monkeypatch.setattr(results, "CONFIGS", tmp_path / "results")
    monkeypatch.setattr(runner, "REPOSITORY", tmp_path)
    monkeypatch.setattr(measures, "cached", results.read_kept)
    started: list[str] = []

    def start(words, folder, name):
        started.append(f"{folder.name} {name}")
        if name == "train":
            arm = study.arms[folder.name.partition("-")[0]]
            for model in arm.models.values():
                if not (folder / model).is_dir():
                    shutil.copytree(tiny_model, folder / model)
                final = {"rewards/margins": 1.5, "drift/chosen": -0.25} if "spin" in folder.name else {"loss": 1.0}
                (folder / model / "metrics.json").write_text(json.dumps({"first_loss": 0.69, "final": final}))
        else:
            output = Path(words[words.index("--output_file") + 1])
            right = {"sft-seed1": 40, "spin-seed1": 60, "spin-seed2": 50}[folder.name]
            write_evaluation(output.parent, {0.0: share(100, right)}, [1.0] * 100, [2] * 100)
            output.with_name("eval.parquet").rename(output.with_suffix(".parquet"))
            weights = results.hash_weights(tiny_model)
            found = json.loads(output.with_name("eval.json").read_text())
            output.write_text(json.dumps(found | {"weights_hash": weights, "model": "m", "input_dir": "d"}))
        return {"seconds": 1.0, "processor_seconds": 1.0}

    monkeypatch.setattr(runner, "start_program", start)
    return runner.Runner(tiny_model), started


def test_a_stopped_study_continues(small_study):
    run, started = small_study
    with pytest.raises(
        InputError, match=r"spin starts from .*sft-seed1/checkpoint, which is not complete: run the arm sft"
    ):
        run.run("b", "spin", 1)
    run.run("b", "sft")
    run.run("b", "spin", 1)
    measured = ["{} train", "{} {}-gsm8k", "{} {}-alpaca"]
    assert started == [
        text.format(folder, model)
        for folder, model in (("sft-seed1", "final"), ("spin-seed1", "iter0"))
        for text in measured
    ]


def test_a_result_is_kept_until_its_settings_change(small_study, monkeypatch):
    run, started = small_study
    run.run("b", "sft")
    path = results.result_path("b", "sft", 1, "final", "gsm8k")
    found = json.loads(path.read_text())
    assert found["cost"] == {"seconds": 1.0, "processor_seconds": 1.0} and "model" not in found
    assert found["flags"]["metric"] == "math_answer" and "backend" not in found["flags"]
    # Responses: "<0>", one of several words, then one number each: no word or pair of words occurs twice.
    assert found["temperatures"]["0"]["distinct_1"] == 1.0 and found["temperatures"]["0"]["distinct_2"] == 1.0
    rows = results.read_kept(path)[1].by_temperature["0"]
    assert len(rows) == 100 and rows["p0"]["length"] == 10 and "response" not in rows["p0"]
    del started[:]
    run.evaluate("b", "sft", STUDIES["b"].arms["sft"], 1, "final", "checkpoint", "gsm8k", 1)
    assert started == []
    changed = plan.Benchmark(BENCHMARKS["gsm8k"].flags | {"limit": 10})
    monkeypatch.setitem(BENCHMARKS, "gsm8k", changed)
    run.evaluate("b", "sft", STUDIES["b"].arms["sft"], 1, "final", "checkpoint", "gsm8k", 1)
    assert started == ["sft-seed1 final-gsm8k"]


def test_tables_compare_on_the_same_prompts(small_study, monkeypatch):
    run, _ = small_study
    monkeypatch.setattr(tables, "MAIN", {"b": ("gsm8k", "nll", "chrf")})
    monkeypatch.setitem(tables.CONTROLS, "b", tables.REFERENCES["b"])
    monkeypatch.setattr(tables, "IMAGES", Path("/nonexistent"))
    assert tables.evidence_tables("b") == "No result yet."
    for arm in ("sft", "spin"):
        run.run("b", arm)
    lines = tables.evidence_tables("b").splitlines()
    # Wilson: 40 of 100 is 0.309 to 0.498; 50 and 60 have halves of 0.0962 and 0.0943.
    assert any(line.startswith("| sft | 1 | 0.400 ±0.094 |") for line in lines)
    assert any("| spin iter0 | 2 | 0.550 ±0.067 (0.500 to 0.600) |" in line for line in lines)
    assert [line for line in lines if line.startswith("| spin iter0 | 1 | –")] == [
        "| spin iter0 | 1 | – | 1.50 | -0.25 | – | – |"
    ]
    (compared,) = [line for line in lines if line.startswith("| spin iter0 | sft | GSM8K")]
    assert "| +0.150 (" in compared and "| +0.200, +0.100 |" in compared and "| better |" in compared
    # All nats are equal, so the difference and its error are 0.
    (same,) = [line for line in lines if line.startswith("| spin iter0 | sft | NLL")]
    assert "| +0.000 (+0.000 to +0.000) |" in same and "| no clear change |" in same
    assert any(line.startswith("| spin iter0 | sft | 0.575 ±") for line in lines)  # the win rate: 0.6 and 0.55
    assert study_plot("b", tables.models_of("b")).startswith(b"\x89PNG")


def test_win_rates_by_hand(small_study):
    run, _ = small_study
    for arm in ("sft", "spin"):
        run.run("b", arm)
    (column,) = [column for column in measures.COLUMNS if column.measure.key == "gsm8k"]
    sft, spin = measures.Trained("b", "sft", "final"), measures.Trained("b", "spin", "iter0")
    # Seed 1 is right on 20 prompts more, seed 2 on 10 more, of 100; all others tie.
    assert [item.value for item in measures.win_rates(spin, sft, column)] == pytest.approx([0.6, 0.55])
    assert [item.value for item in measures.win_rates(sft, spin, column)] == pytest.approx([0.4])


def test_best_of_n_by_hand(monkeypatch):
    samples = {1: {"a": 1.0, "b": 0.0, "c": 0.0}, 2: {"a": 0.0, "b": 0.0, "c": 1.0}}
    monkeypatch.setitem(BENCHMARKS, "gsm8k_sampled", plan.Benchmark({}, seeds=(1, 2)))
    monkeypatch.setattr(Path, "is_file", lambda path: True)

    def stored(path):
        number = 2 if "sample2" in path.name else 1
        rows = {name: {"score": score} for name, score in samples[number].items()}
        return {}, measures.HeldOutResponses({"1": rows})

    monkeypatch.setattr(measures, "cached", stored)
    single, best = measures.best_of(measures.Trained("c", "sft", "final"), "gsm8k_sampled")
    assert single.value == pytest.approx(1 / 3) and best.value == pytest.approx(2 / 3)


def test_cells_add_errors_of_seeds():
    assert measures.cell([], "{:.2f}") == "–"
    assert measures.cell([Estimate(0.5, None, None)], "{:.2f}") == "0.50"
    both = [Estimate(0.4, 0.1, (0.1, 0.7)), Estimate(0.6, 0.1, (0.2, 1.0))]
    assert measures.cell(both, "{:.2f}") == f"0.50 ±{math.hypot(0.3, 0.4) / 2:.2f} (0.40 to 0.60)"


def test_chrf_needs_no_data():
    pytest.importorskip("nltk")
    assert chrf("", "the same text", "the same text") == 1.0
    assert chrf("", " ", "text") == 0.0 and 0.0 < chrf("", "the other text", "the same text") < 1.0
