"""What every program shares: one-sentence argument errors and the exit codes 0, 1, 2 and 130."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from spin.alignment.core.console import say, say_error
from spin.alignment.core.errors import InputError, suggestion

EXIT_DONE, EXIT_INTERNAL_ERROR, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence and whose flags are never abbreviated."""

    def __init__(self, **settings: object) -> None:
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        unrecognized = message.removeprefix("unrecognized arguments: ")
        if unrecognized != message:
            flag = unrecognized.split()[0].split("=")[0]
            message = f"unknown argument {flag}{suggestion(flag, self._option_string_actions)}"
        raise InputError(f"{message} (see --help)")


def is_help(arguments: Sequence[str], usage: str) -> bool:
    """Print the usage of a program that takes a configuration file, where it is asked for or nothing is given.

    Raises:
        InputError: no configuration file is given.
    """
    if arguments and arguments[0] not in ("-h", "--help"):
        return False
    say(usage)
    if not arguments:
        raise InputError("the configuration file is missing: give it as the first argument")
    return True


def interrupt_on_sigterm() -> None:
    """Let SIGTERM (launchers, schedulers) end the program as Ctrl-C does.

    Raised here and not sent on as SIGINT, which a shell's background jobs ignore.
    """

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def run_program(main: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``main(arguments)`` and exit: 0 done, 2 bad input, 130 interrupted, 1 a fault of ours."""
    try:
        code = main(sys.argv[1:] if arguments is None else arguments)
    except InputError as error:
        say_error(f"error: {error}")
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        say_error("interrupted; run the same command again to go on")
        sys.exit(EXIT_INTERRUPTED)
    except Exception:
        traceback.print_exc()
        sys.exit(EXIT_INTERNAL_ERROR)
    sys.exit(code or EXIT_DONE)
