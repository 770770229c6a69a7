"""Output whose reader goes away, whose disk is full, or whose encoding lacks a character; text that looks like markup."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from rich.table import Table

from spin.alignment.core import console
from spin.alignment.core.errors import InputError
from tests.helpers import REPOSITORY


def run_piped(code: str, reader: str = "true", **environment: str) -> tuple[int, str]:
    """Run Python code with its output in a pipe to a command; return its exit code and what it wrote to standard error."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    script = f'"{sys.executable}" -c "$CODE" | {reader}; exit ${{PIPESTATUS[0]}}'
    ended = subprocess.run(
        ["bash", "-c", script],
        env={**environment, "CODE": code},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.returncode, ended.stderr


SAY = "import time, sys\nfrom spin.alignment.core.program import run_program\nfrom spin.alignment.core.console import say\n"


def test_work_goes_on_after_the_reader_has_gone(tmp_path):
    done = tmp_path / "done"
    main = f"def main(arguments):\n    for i in range(50):\n        say(str(i)); time.sleep(0.01)\n    open({str(done)!r}, 'w')\n"
    assert run_piped(SAY + main + "run_program(main)", "head -1") == (0, "")
    assert done.exists()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["status", "--help"], ["init", "--help"]])
def test_help_for_a_reader_that_has_gone(arguments):
    code = f"import sys, time; time.sleep(0.5); sys.argv[1:] = {arguments}; from spin.cli import entry_point; entry_point()"
    assert run_piped(code) == (0, "")


def test_a_library_that_prints_itself_ends_the_program_with_a_sentence():
    main = "def main(arguments):\n    time.sleep(0.5)\n    print('x' * 100_000, flush=True)\n"
    code, said = run_piped(SAY + main + "run_program(main)")
    assert (
        code == 130
        and said == "interrupted: the reader of the output has ended; run the same command again to resume\n"
    )


def test_a_full_disk_under_the_output_is_one_sentence(monkeypatch):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(InputError, match=r"cannot write to standard output \(No space left on device\)"):
            console.say("results")
        console.say("and then nothing more")


def test_closed_streams_are_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    console.say("nobody listens")


def test_characters_that_the_encoding_lacks_are_escaped():
    code = SAY + "def main(arguments):\n    say('\u2013 \\udcff')\nrun_program(main)"
    for encoding in ("ascii", "utf-8"):
        code_, said = run_piped(code, "cat >&2", PYTHONIOENCODING=encoding)
        assert (code_, said) == (0, ("\\u2013" if encoding == "ascii" else "\u2013") + " \\udcff\n")


def test_text_is_shown_as_it_is(capsys):
    table = Table("[/INST]", title="[bold]:warning:[/x]")
    table.add_row("[INST] [/INST] :smile: [link=x]")
    console.show(table, width=60)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[bold]:warning:[/x]", "┃ [/INST]", "[INST] [/INST] :smile: [link=x]"))


def test_control_characters_do_not_act_on_the_terminal():
    assert (
        console.escape_controls("a\x1b[31mb\x07\r\n\tc\u2028\ud800\x9b") == "a\\x1b[31mb\\x07\\r\n\tc\u2028\\ud800\\x9b"
    )


def test_reader_has_ended(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert not console.reader_has_ended()
        os.close(reading)
        time.sleep(0.01)
        assert console.reader_has_ended()
