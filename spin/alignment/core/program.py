"""What every program shares: one-sentence argument errors and the exit codes 0, 1, 2 and 130."""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from spin.alignment.core.console import escape_controls, flush_output, reader_has_ended, say, say_error
from spin.alignment.core.errors import InputError, suggestion
from spin.alignment.core.files import is_disk_full
from spin.alignment.core.launcher import check_launch_numbers

EXIT_DONE, EXIT_INTERNAL_ERROR, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130
RUN_VARIABLE = "SPIN_RUN_DIRECTORY"  # in the environment of every process that `spin run` starts
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CLEANUP_SECONDS = 3.0


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence and whose flags cannot be abbreviated."""

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
    """Print the usage of a program if its first argument asks for it; return whether it did.

    Raises:
        InputError: no argument is given (the usage is printed too).
    """
    if arguments and arguments[0] not in ("-h", "--help"):
        return False
    say(usage)
    if not arguments:
        raise InputError("the configuration file is missing: give it as the first argument")
    return True


class Interrupts:
    """Lets SIGINT, SIGTERM (launchers, schedulers) and SIGHUP (a closed terminal) raise KeyboardInterrupt, once.

    The handler raises it itself instead of sending SIGINT, which background jobs of a shell ignore. A launcher may pass on a
    signal that the program has received already, so further signals do not disturb the cleanup. A signal that is ignored
    from the start (nohup) stays ignored.
    """

    def __init__(self, exits_when_repeated: bool) -> None:
        """``exits_when_repeated``: a signal more than three seconds after the first ends the process at once."""
        self.exits_when_repeated = exits_when_repeated
        self.is_repeated = False
        self._first: float | None = None

    def install(self) -> None:
        """Replace the handlers of this process; only in its main thread."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._first > _CLEANUP_SECONDS:
            self.is_repeated = True
            if self.exits_when_repeated:
                os._exit(EXIT_INTERRUPTED)  # every file is written atomically, so nothing is half written


def interrupt_on_signals() -> None:
    """Let the first signal that asks a program to end raise KeyboardInterrupt, and a late further one end it at once."""
    Interrupts(exits_when_repeated=True).install()


def follow_run() -> None:
    """In a program that a run started: end with the process that started it, and write stacks on SIGUSR1.

    ``spin run``, its start server or the launcher of several processes may be killed; without this, their programs would continue
    alone. On other systems than Linux they do, until the next ``spin run`` of the directory ends them.
    """
    if RUN_VARIABLE not in os.environ:
        return
    end_with_parent()
    try:
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    except (ValueError, OSError):  # standard error has no descriptor
        return


def end_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when its parent ends (Linux; no effect elsewhere)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def run_program(main: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``main(arguments)`` and exit: 0 done, 1 internal error, 2 bad input, 130 interrupted."""
    follow_run()
    try:
        check_launch_numbers()
        code = main(sys.argv[1:] if arguments is None else arguments)
        flush_output()
    except InputError as error:
        say_error(f"error: {escape_controls(str(error))}")
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        say_error("interrupted; run the same command again to resume")
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit:  # argparse, after it has printed the help
        flush_output()
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_has_ended():  # a library wrote to standard output itself
            flush_output()
            say_error("interrupted: the reader of the output has ended; run the same command again to resume")
            sys.exit(EXIT_INTERRUPTED)
        if is_disk_full(error):
            name = getattr(error, "filename", None)
            where = f" while writing {name}" if name else ""
            say_error(f"error: no space left on the disk{where}: free some and run the same command again")
            sys.exit(EXIT_BAD_INPUT)
        # Only unexpected errors reach this point; the traceback is for a bug report.
        traceback.print_exc()
        sys.exit(EXIT_INTERNAL_ERROR)
    sys.exit(code or EXIT_DONE)
