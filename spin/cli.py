"""The ``spin`` command: run, status, report, validate, doctor and diff. Heavy libraries are imported by the command at work."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NoReturn

from spin import __version__
from spin.alignment.errors import InputError, lookup
from spin.programs import Parser, run_program

USAGE = """usage: spin COMMAND ...

  run CONFIG.yaml [--key=value ...]   all iterations of self-play; run again to go on
  status RUN                          where a run stands
  report RUN                          table, plot and page of a run
  validate PATH [--tokenizer MODEL]   check a data set, a model folder or a run against the contract
  doctor                              which packages, devices and backends work here, and why not
  diff RUN_A RUN_B                    how two runs differ: packages, settings, inputs, outputs

`spin COMMAND --help` tells more. Exit codes: 0 done, 2 bad input, 130 interrupted, 1 a fault of ours."""

COMMANDS = {
    "run": "spin.pipeline",
    "status": "spin.alignment.status",
    "report": "spin.cli",
    "validate": "spin.validate_path",
    "doctor": "spin.doctor",
    "diff": "spin.cli",
}


def report(arguments: Sequence[str]) -> None:
    """``spin report RUN``."""
    parser = Parser(prog="spin report", description="Write summary.json, report.png and report.html of a run.")
    parser.add_argument("run_dir", help="folder of a run")
    options = parser.parse_args(arguments)
    from spin.alignment.report import write_report
    from spin.alignment.run_config import open_run

    write_report(open_run(options.run_dir))


def diff(arguments: Sequence[str]) -> None:
    """``spin diff RUN_A RUN_B``."""
    parser = Parser(prog="spin diff", description="Say how two runs differ: packages, settings, inputs and outputs.")
    parser.add_argument("left", help="folder of a run")
    parser.add_argument("right", help="folder of another run")
    options = parser.parse_args(arguments)
    from rich.console import Console
    from rich.table import Table

    from spin.alignment.manifest import RunManifest, differences
    from spin.alignment.run_config import open_run

    for run_dir in (options.left, options.right):
        open_run(run_dir)
    rows = differences(RunManifest(options.left), RunManifest(options.right))
    if not rows:
        print("no difference: packages, settings, inputs and outputs are equal")
        return
    table = Table("where", "what", options.left, options.right)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main(arguments: Sequence[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        if not arguments:
            raise InputError("the command is missing: give one of " + ", ".join(COMMANDS))
        return None
    if arguments[0] == "--version":
        print(__version__)
        return None
    module = lookup(COMMANDS, arguments[0], "command")
    here = {"report": report, "diff": diff}
    command = here.get(arguments[0]) or importlib.import_module(module).main
    return command(arguments[1:])


def entry_point() -> NoReturn:
    """Run the command line and exit."""
    run_program(main)


if __name__ == "__main__":
    entry_point()
