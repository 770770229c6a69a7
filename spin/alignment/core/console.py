"""Terminal output: results on standard output, everything else on standard error. Text of users is shown as it is.

A reader that goes away (`spin run | head -1`, a closed terminal) ends the output, not the work.
"""

from __future__ import annotations

import errno
import os
import re
import select
import sys
import unicodedata
from typing import TYPE_CHECKING, TextIO

from spin.alignment.core.errors import InputError
from spin.alignment.core.text import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# In the environment of the programs of a run: each line that they say themselves starts with the mark, so that `spin run` can
# tell it from what libraries write.
MARK, MARK_VARIABLE = "\x1e", "SPIN_MARK_LINES"
# The reading end of a pipe was closed, or the terminal no longer exists.
_NO_READER = (errno.EPIPE, errno.EIO)


def say(line: str) -> None:
    """Write a line to standard output and flush it, so that it stays in order with the output of child programs.

    Raises:
        InputError: standard output is a file that cannot be written, for example on a full disk.
    """
    write_out(line + "\n")


def say_error(line: str) -> None:
    """Write a line to standard error: errors, warnings and progress, which must not mix with results."""
    _write(sys.stderr, line + "\n")


def write_out(text: str) -> None:
    """Write text to standard output and flush it; raises as :func:`say`."""
    _write(sys.stdout, text)


def marked(text: str) -> str:
    """Return lines of this program for its output: in a program of a run, each starts with :data:`MARK`."""
    return re.sub(r"(?m)^(?=[\s\S])", MARK, text) if os.environ.get(MARK_VARIABLE) else text


def show(renderable: RenderableType, width: int | None = None) -> None:
    """Write a table or text of rich to standard output, without interpreting markup in its texts; raises as :func:`say`."""
    console = plain_console(width)
    with console.capture() as capture:
        console.print(renderable)
    write_out(capture.get())


def plain_console(width: int | None = None, stderr: bool = False) -> Console:
    """Return a console of rich that shows strings as they are: ``[/INST]`` and ``:warning:`` are text, not markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, width=width, stderr=stderr)


def escape_controls(text: str) -> str:
    """Return text of users and models with control characters as escapes, so that they cannot act on the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else ascii(c)[1:-1] for c in text)


def flush_output() -> None:
    """Flush what libraries and argparse have written, as :func:`say` does."""
    _write(sys.stdout, "")
    _write(sys.stderr, "")


def reader_has_ended() -> bool:
    """Return whether standard output is a pipe whose reading end has been closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (AttributeError, OSError, ValueError):  # no descriptor
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # the program was started with a closed descriptor
        return
    try:
        # A terminal may lack characters of the data (LANG=C), and the data may contain half a character.
        stream.write(printable(marked(text), getattr(stream, "encoding", None) or "utf-8"))
        stream.flush()
    except OSError as error:
        _discard(stream)
        if error.errno not in _NO_READER and stream is not sys.stderr:
            raise InputError(f"cannot write to standard output ({error.strerror}): redirect it elsewhere") from error
    except ValueError:  # the stream is closed
        return


def _discard(stream: TextIO) -> None:
    """Send all further output of a stream, including what it still holds, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
