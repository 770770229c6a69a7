"""The output of a stage's programs: logged line by line, and what they say themselves shown on the terminal."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from types import TracebackType

from spin.alignment.core.console import MARK, escape_controls, say_error, write_out
from spin.alignment.core.files import explained_os_errors

_BAD_INPUT = (b"error: ", b"[rank0]:error: ")
_LAST_LINES = 30


class StageOutput:
    """Context manager: copies the output of a stage's programs to its log, which is appended to, and to the terminal.

    With ``only_marked``, the terminal gets the lines that a program marked as its own (:data:`MARK`): those of libraries, which
    a user cannot act on, are only in the log, where each line has its time. A log that can no longer be written (a full disk)
    is reported once; the run goes on without it.

    Raises:
        InputError: the log cannot be created.
    """

    def __init__(self, log_path: Path, prefix: str, only_marked: bool = False) -> None:
        """``prefix`` starts each line on the terminal."""
        self.path, self.prefix, self.only_marked = log_path, prefix, only_marked
        self.last_line = ""
        self.named_bad_input = False
        self._hidden: deque[str] = deque(maxlen=_LAST_LINES)
        self._pending = b""
        self._is_logging = True

    def __enter__(self) -> StageOutput:
        with explained_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def activity(self) -> str:
        """What the program does, as far as its output tells: a progress bar that it is drawing, else its last line."""
        bar = self._pending.rstrip(b"\r").rpartition(b"\r")[2]
        text = bar.decode(errors="replace").replace(MARK, "").strip() if b"\r" in self._pending else ""
        return escape_controls(text or self.last_line)

    def write(self, chunk: bytes) -> None:
        """Log and show the lines that a chunk completes; of a progress bar (carriage returns), its last state."""
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        for line in lines:
            self._tell(line.rstrip(b"\r").rpartition(b"\r")[2])
        if len(self._pending) > _LAST_LINES * 1024 and b"\r" in self._pending:  # a bar that is drawn for hours
            self._pending = b"\r" + self._pending.rpartition(b"\r")[2]

    def finish(self) -> None:
        """Log and show a last line without an end."""
        if self._pending:
            self._tell(self._pending.rstrip(b"\r").rpartition(b"\r")[2])
        self._pending = b""

    def say(self, sentence: str) -> None:
        """Log and show a sentence of the run itself."""
        self._tell(f"{MARK}{sentence}".encode())

    def log(self, text: bytes) -> None:
        """Append lines to the log only, each with its time."""
        if not self._is_logging:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S ").encode()
        try:
            self._file.write(b"".join(stamp + line for line in text.splitlines(keepends=True)))
        except OSError as error:
            self._is_logging = False
            say_error(f"warning: cannot write {self.path} ({error.strerror}): the run goes on without this log")

    def show_last_lines(self) -> None:
        """Show the last lines that only the log has so far, after a failure that they may explain."""
        for text in self._hidden:
            write_out(f"{self.prefix}{text}\n")
        self._hidden.clear()

    def _tell(self, line: bytes) -> None:
        is_own, line = MARK.encode() in line, line.replace(MARK.encode(), b"")
        self.log(line + b"\n")
        self.named_bad_input = self.named_bad_input or line.startswith(_BAD_INPUT)
        text = line.decode(errors="replace")
        self.last_line = text.strip() or self.last_line
        if is_own or not self.only_marked:
            write_out(f"{self.prefix}{text}\n")
        else:
            self._hidden.append(text)
