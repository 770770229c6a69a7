"""The steps of the line as functions of Python: what the programs of the same names do, with their flags as keywords.

They raise :class:`InputError` where the programs print the sentence and exit with code 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from spin.alignment.core.errors import InputError
from spin.alignment.core.program import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERRUPTED

C = TypeVar("C")


def generate(*, model: str | Path, input_dir: str | Path, output_dir: str | Path, **settings: Any) -> Path:
    """Let a model answer the prompts of a data set, as ``spin/generate.py``; return ``output_dir``.

    ``load_preferences(output_dir, split)`` reads the result as pairs: the ground truth is chosen, the model's response rejected.
    :func:`convert` makes other pairs of it.
    Called again, it continues where it was interrupted, and returns at once where everything is there.

    Args:
        model: model folder or Hub name.
        input_dir: prompts with ground truth: folder, file or Hub name.
        output_dir: folder of the fractions; may be shared by several processes.
        settings: the other flags of ``spin/generate.py``, such as ``temperature=0.0`` (docs/generation.md).

    Raises:
        InputError: naming the setting, row or file that is wrong, and the fix.
    """
    from spin.alignment.generation.config import GenerateConfig
    from spin.alignment.generation.generate import generate as generate_fractions

    given = {"model": str(model), "input_dir": str(input_dir), "output_dir": str(output_dir), **settings}
    generate_fractions(_settings(GenerateConfig, given, "spin.generate"))
    return Path(output_dir)


def convert(*, input_dir: str | Path, output_dir: str | Path, **settings: Any) -> Path:
    """Score and pair generated responses, as ``spin/convert_data.py``; return ``output_dir``, for :func:`load_preferences`.

    Args:
        input_dir: folder of the fractions that :func:`generate` made.
        output_dir: folder for the preference files.
        settings: the other flags of ``spin/convert_data.py``, such as ``pairing="best_vs_worst"`` and ``scorer="math_answer"``.

    Raises:
        InputError: naming the setting, row or file that is wrong, and the fix.
    """
    from spin.alignment.pairs.config import ConvertConfig
    from spin.alignment.pairs.convert import convert as convert_fractions

    given = {"input_dir": str(input_dir), "output_dir": str(output_dir), **settings}
    convert_fractions(_settings(ConvertConfig, given, "spin.convert"))
    return Path(output_dir)


def run(config: str | Path | Mapping[str, Any], *, rerun_changed: bool = False, **overrides: Any) -> Path:
    """Run all iterations of self-play, as ``spin run``; return the run directory.

    Called again with the same configuration, it continues where it was interrupted. The stages are processes of their own, so
    that a method registered in this one is not known to them: name it ``module:function``.

    Args:
        config: YAML file of a run (docs/pipeline.md), or its content as a mapping.
        rerun_changed: repeat finished stages whose settings or input files have changed; their old output is kept.
        overrides: settings on top of the configuration; a mapping is merged into its section: ``train={"beta": 0.5}``.

    Raises:
        InputError: a setting, the data or the model is wrong, or a stage found its input wrong.
        RuntimeError: a stage failed; the message names its log.
    """
    from spin.alignment.core.config import load_yaml, merge
    from spin.alignment.pipeline.config import make_run_config
    from spin.alignment.pipeline.preflight import check_before_start, check_run_dir
    from spin.alignment.pipeline.runner import run_stages
    from spin.alignment.report import show_lineage, write_report

    if isinstance(config, Mapping):
        values, source = merge(config, overrides), "the configuration"
    else:
        values, source = merge(load_yaml(config), overrides), str(config)
    checked = make_run_config(values, source)
    check_run_dir(Path(checked.run_dir))
    check_before_start(checked, source)
    code = run_stages(checked, rerun_changed, begin=show_lineage, finish=write_report)
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code != EXIT_DONE:
        kind = InputError if code == EXIT_BAD_INPUT else RuntimeError
        raise kind(
            f"the run in {checked.run_dir} stopped at the stage named above: see its log, and call run again to continue"
        )
    return Path(checked.run_dir)


def evaluate(*, model: str | Path, input_dir: str | Path, output_file: str | Path, **settings: Any) -> dict[str, Any]:
    """Score a model on held-out prompts, as ``spin/evaluate_model.py``; return what it writes into ``output_file``.

    Args:
        model: model folder or Hub name.
        input_dir: prompts with ground truth: folder, file or Hub name.
        output_file: JSON file to write.
        settings: the other flags of ``spin/evaluate_model.py``, such as ``temperatures=[0.0]`` or ``metric="math_answer"``.

    Raises:
        InputError: naming the setting, row or file that is wrong, and the fix.
    """
    from spin.alignment.evaluation.config import EvaluateConfig
    from spin.alignment.evaluation.evaluate import evaluate as evaluate_model

    given = {"model": str(model), "input_dir": str(input_dir), "output_file": str(output_file), **settings}
    return evaluate_model(_settings(EvaluateConfig, given, "spin.evaluate"))


def _settings(config_class: type[C], given: Mapping[str, Any], source: str) -> C:
    """Return the settings of a program, checked as on its command line: outputs that cannot be written are refused too."""
    from spin.alignment.core.config import build
    from spin.alignment.core.settings import check_outputs

    config = build(config_class, given, source)
    check_outputs(config)
    return config
