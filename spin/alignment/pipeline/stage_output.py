"""The output of a stage's programs: logged line by line, and shown on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from spin.alignment.core.console import say_error, write_out
from spin.alignment.core.files import explained_os_errors

_BAD_INPUT = (b"error: ", b"[rank0]:error: ")


class StageOutput:
    """Context manager: copies the output of a stage's programs to its log, which is appended to, and to the terminal.

    A log that can no longer be written (a full disk) is reported once; the run goes on without it.

    Raises:
        InputError: the log cannot be created.
    """

    def __init__(self, log_path: Path, mark: str) -> None:
        """``mark`` starts each line on the terminal."""
        self.path, self.mark = log_path, mark
        self.last_line = ""
        self.named_bad_input = False
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

    def write(self, chunk: bytes) -> None:
        """Log and show the lines that a chunk completes. Progress bars (carriage returns) are only shown on a terminal."""
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        for line in lines:
            self._tell(line.rstrip(b"\r").rpartition(b"\r")[2])
        if b"\r" in self._pending and sys.stdout.isatty() and not self.mark:
            write_out("\r" + self._pending.rpartition(b"\r")[2].decode(errors="replace"))

    def finish(self) -> None:
        """Log and show a last line without an end."""
        if self._pending:
            self._tell(self._pending)
        self._pending = b""

    def say(self, sentence: str) -> None:
        """Log and show a sentence of the run itself."""
        self._tell(sentence.encode())

    def log(self, text: bytes) -> None:
        """Append to the log only."""
        if not self._is_logging:
            return
        try:
            self._file.write(text)
        except OSError as error:
            self._is_logging = False
            say_error(f"warning: cannot write {self.path} ({error.strerror}): the run goes on without this log")

    def _tell(self, line: bytes) -> None:
        self.log(line + b"\n")
        self.named_bad_input = self.named_bad_input or line.startswith(_BAD_INPUT)
        text = line.decode(errors="replace")
        self.last_line = text.strip() or self.last_line
        write_out(f"{self.mark}{text}\n")
