"""What `spin run` shows: a live display on a terminal, lines with the time elsewhere, and the time that the run still takes."""

from __future__ import annotations

import io
import os
import sys
from types import SimpleNamespace

import pytest

from spin.alignment.core.console import MARK, MARK_VARIABLE, marked, say
from spin.alignment.pipeline import run_view
from spin.alignment.pipeline.run_view import RunView, run_seconds_left
from spin.alignment.pipeline.stage_output import StageOutput
from spin.alignment.pipeline.stages.base import StageKind


class Steps(StageKind):
    """A kind whose stages are always at step 3."""

    def progress(self, stage):
        return "step 3 of 9, loss 0.5"

    def seconds_left(self, stage):
        return 60.0


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


STEPS, OTHER = Steps(), StageKind()


def stages_of(*names: str, kind: StageKind = STEPS) -> list:
    return [SimpleNamespace(name=name, kind=kind) for name in names]


def manifest_of(**seconds: float):
    records = {name.replace("__", "/"): SimpleNamespace(state="done", seconds=value) for name, value in seconds.items()}
    return SimpleNamespace(stages=records)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(run_view.time, "monotonic", lambda: now[0])
    return now


def test_lines_now_and_then_without_control_characters(capsys, clock):
    stages = stages_of("iter0/train", "iter1/train")
    with RunView(stages, manifest_of()) as view, view.stage(stages[0], "starting"):
        for _ in range(40):
            clock[0] += 1
            view.look("iter0/train", "a line of the program")
    out = capsys.readouterr().out
    first, second = out.splitlines()
    assert first[8:] == " ==> iter0/train: starting (stage 1 of 2)" and first[2] == first[5] == ":"
    assert second.endswith("==> iter0/train: step 3 of 9, loss 0.5; 30.0 s so far; run: over 1 min 00 s left")
    assert all(char == "\n" or char.isprintable() for char in out)


def test_a_terminal_shows_the_stage_and_keeps_the_lines_of_programs(monkeypatch, clock):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    stages = stages_of("iter0/train", "iter1/train")
    with RunView(stages, manifest_of()) as view, view.stage(stages[0], "starting"):
        clock[0] += 5
        view.look("iter0/train", "")
        say("a line of the program [/INST]")
        clock[0] += 5
        view.look("iter0/train", "")
    shown = terminal.getvalue()
    assert "==> iter0/train: starting (stage 1 of 2)" in shown and "a line of the program [/INST]" in shown
    assert "stage 1 of 2" in shown and "step 3 of 9, loss 0.5" in shown and "10.0 s so far, 1 min 00 s left" in shown
    assert sys.stdout is terminal and shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is back


def test_a_terminal_that_goes_away_does_not_end_the_run(monkeypatch, clock, tmp_path):
    descriptor = os.open(tmp_path / "terminal", os.O_WRONLY | os.O_CREAT)

    class Gone(Terminal):
        def fileno(self):
            return descriptor

        def write(self, text):
            if self.tell() > 200:
                raise OSError(5, "Input/output error")
            return super().write(text)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Gone())
    stages = stages_of("iter0/train")
    with RunView(stages, manifest_of()) as view, view.stage(stages[0], "starting"):
        for _ in range(9):
            clock[0] += 5
            view.look("iter0/train", "")


def test_the_time_left_of_a_run_is_that_of_the_same_stages_of_earlier_iterations():
    stages = [*stages_of("iter0/generate", kind=OTHER), *stages_of("iter0/train")]
    stages += [*stages_of("iter1/generate", kind=OTHER), *stages_of("iter1/train", "iter2/train")]
    done = {"iter0__generate": 30.0, "iter0__train": 100.0}
    assert run_seconds_left(stages, manifest_of(**done), {}, {}) == (230.0, True)
    running = {"iter1/generate": None}
    assert run_seconds_left(stages, manifest_of(**done), running, {"iter1/generate": 10.0}) == (220.0, True)
    assert run_seconds_left(stages, manifest_of(**done), running, {"iter1/generate": 99.0}) == (200.0, True)
    assert run_seconds_left(stages, manifest_of(), {"iter0/generate": 7.0}, {"iter0/generate": 1.0}) == (7.0, False)


def test_lines_of_libraries_are_only_logged_until_a_failure(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(MARK_VARIABLE, "1")
    own = marked("error: a sentence\n\nof its own\n")
    assert own == f"{MARK}error: a sentence\n{MARK}\n{MARK}of its own\n"
    monkeypatch.delenv(MARK_VARIABLE)
    assert marked("x\n") == "x\n"
    with StageOutput(tmp_path / "a.log", "", only_marked=True) as output:
        output.write(f"UserWarning: noise\n{own}{{'loss': 1}}\n\rmap: 40%".encode())
        assert output.activity == "map: 40%" and output.named_bad_input
        output.write(b"\rmap: 50%")
        assert output.activity == "map: 50%"
        assert capsys.readouterr().out == "error: a sentence\n\nof its own\n"
        output.finish()
        output.show_last_lines()
    assert capsys.readouterr().out == "UserWarning: noise\n{'loss': 1}\nmap: 50%\n"
    log = (tmp_path / "a.log").read_text()
    assert MARK not in log and [line[20:] for line in log.splitlines()][:2] == [
        "UserWarning: noise",
        "error: a sentence",
    ]
