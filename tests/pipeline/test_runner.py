"""The runner of `spin run`, with programs that take no time."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.program import Interrupts
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.runner import Pipeline, explain
from spin.alignment.pipeline.stage_runner import StageFailed
from spin.alignment.pipeline.stages import Source, Stage, StageKind
from tests.helpers.runs import tiny_run, write_config


def make_config(tmp_path, **changes):
    return load_run_config(write_config(tmp_path / "config.yaml", tiny_run(tmp_path, **changes)))


class Script(StageKind):
    """A kind whose stages run Python code, given its output file as ``sys.argv[1]``."""

    def __init__(self, can_run_beside: bool = False) -> None:
        self.can_run_beside = can_run_beside

    def command(self, stage, config):
        return [sys.executable, "-c", config["code"], config["output"]]


def stage(
    run_dir: Path, name: str, code: str, beside: bool = False, needs: tuple[str, ...] = (), **settings: object
) -> Stage:
    """A stage that runs ``code`` and reads input.txt."""
    output = run_dir / name.replace("/", "-") / "out.parquet"
    output.parent.mkdir(parents=True, exist_ok=True)
    return Stage(
        kind=Script(beside),
        name=name,
        configs=[{"code": code, "output": str(output)}],
        settings=settings,
        sources=[Source("input", lambda: [run_dir.parent / "input.txt"])],
        outputs=lambda: [output],
        folder=output.parent,
        needs=needs,
    )


WRITE = "import sys; from pathlib import Path; path = Path(sys.argv[1]); path.parent.mkdir(exist_ok=True); "
WRITE += "path.write_text('rows'); Path(sys.argv[1] + '.count').open('a').write('x')"


@pytest.fixture
def runner(tmp_path):
    """Returns a function that makes a Pipeline of stages in tmp_path/run."""
    (tmp_path / "input.txt").write_text("data")
    config = make_config(tmp_path)

    def make(*stages: Stage, rerun_changed: bool = False, parallel: bool = False) -> Pipeline:
        launch = dataclasses.replace(config.launch, parallel=parallel)
        return Pipeline(dataclasses.replace(config, launch=launch), list(stages), rerun_changed)

    return make


def count(run_dir: Path, name: str) -> int:
    return len((run_dir / name.replace("/", "-") / "out.parquet.count").read_text())


def test_second_run_skips_what_is_done(tmp_path, runner, capfd):
    step = stage(tmp_path / "run", "a/b", WRITE)
    runner(step).run()
    runner(step).run()
    assert count(tmp_path / "run", "a/b") == 1
    assert "a/b: already complete" in capfd.readouterr().out


def test_changed_settings_are_refused_with_their_names_and_done_again_on_request(tmp_path, runner):
    run_dir = tmp_path / "run"
    runner(stage(run_dir, "a/b", WRITE, beta=0.1)).run()
    changed = stage(run_dir, "a/b", WRITE, beta=0.5)
    with pytest.raises(InputError, match=r"a/b: beta: 0\.1 -> 0\.5.*--rerun_changed"):
        runner(changed).refuse_changes()
    again = runner(changed, rerun_changed=True)
    again.refuse_changes()
    again.run()
    kept = list((run_dir / "replaced").glob("*/a-b/out.parquet"))
    assert len(kept) == 1 and (run_dir / "a-b" / "out.parquet").read_text() == "rows"


def test_changed_input_file_is_refused_as_well(tmp_path, runner):
    runner(stage(tmp_path / "run", "a/b", WRITE)).run()
    (tmp_path / "input.txt").write_text("other data")
    with pytest.raises(InputError, match="content of input"):
        runner(stage(tmp_path / "run", "a/b", WRITE)).refuse_changes()


def test_damaged_output_is_moved_aside_and_made_again(tmp_path, runner):
    step = stage(tmp_path / "run", "a/b", WRITE)
    runner(step).run()
    (tmp_path / "run" / "a-b" / "out.parquet").write_text("spoilt")
    runner(step).run()
    (kept,) = (tmp_path / "run" / "replaced").glob("*/a-b/out.parquet")
    assert kept.read_text() == "spoilt" and count(tmp_path / "run", "a/b") == 2


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (130, 130), (1, 1), (77, 1)])
def test_exit_codes_of_programs_come_through(tmp_path, runner, capfd, code, expected):
    line = runner(stage(tmp_path / "run", "a/b", f"print('error: no such row'); raise SystemExit({code})"))
    if code not in (2, 130):
        line = runner(stage(tmp_path / "run", "a/b", f"raise SystemExit({code})"))
    with pytest.raises(StageFailed) as failure:
        line.run()
    assert explain(failure.value) == expected
    captured = capfd.readouterr()
    assert "a/b stopped" in captured.err and str(failure.value.log) in captured.err
    assert code != 2 or "error: no such row" in captured.out
    # The record of an interrupted stage is that of a killed one.
    assert line.manifest.stages["a/b"].state == ("running" if code == 130 else "failed")


def test_sentence_of_a_program_under_accelerate_decides_its_exit_code(tmp_path, runner):
    """accelerate launch ends with 1 whatever its processes end with."""
    line = runner(stage(tmp_path / "run", "a/b", "print('error: bad row'); raise SystemExit(1)"))
    with pytest.raises(StageFailed) as failure:
        line.run()
    assert failure.value.code == 2


def test_program_that_ends_well_without_output_is_not_recorded_as_done(tmp_path, runner):
    line = runner(stage(tmp_path / "run", "a/b", "pass"))
    with pytest.raises(RuntimeError, match="did not write"):
        line.run()
    assert not line.manifest.is_done("a/b")


def test_output_is_logged(tmp_path, runner):
    runner(stage(tmp_path / "run", "a/b", "print('half\\rwhole'); " + WRITE)).run()
    log = (tmp_path / "run" / "logs" / "a-b.log").read_text().splitlines()
    assert log[0][20:].startswith("$ ") and [line[20:] for line in log[1:]] == ["whole"]
    assert time.strptime(log[0][:19], "%Y-%m-%d %H:%M:%S")


def test_scoring_runs_beside_self_play_and_waits_for_its_model(tmp_path, runner):
    run_dir = tmp_path / "run"
    slow = "import time; time.sleep(0.5); "
    wait = "import sys; from pathlib import Path; assert Path(sys.argv[1]).parent.with_name('iter0-train')"
    wait += ".joinpath('out.parquet').exists(); "
    line = runner(
        stage(run_dir, "iter0/train", slow + WRITE),
        stage(run_dir, "iter0/evaluate", wait + WRITE, beside=True, needs=("iter0/train",)),
        stage(run_dir, "iter1/generate", WRITE),
        parallel=True,
    )
    line.run()
    assert all(line.manifest.is_done(item.name) for item in line.stages)


def test_failure_beside_stops_the_other_chain(tmp_path, runner):
    run_dir = tmp_path / "run"
    line = runner(
        stage(run_dir, "iter0/train", "import time; time.sleep(60)"),
        stage(run_dir, "control/train", "raise SystemExit(2)", beside=True),
        parallel=True,
    )
    started = time.monotonic()
    with pytest.raises(StageFailed):
        line.run()
    assert time.monotonic() - started < 30


@pytest.fixture
def interrupts():
    """The signal handlers of `spin run`, until the end of the test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    handlers = Interrupts(exits_when_repeated=False)
    handlers.install()
    yield handlers
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_termination_ends_the_children(tmp_path, runner, interrupts, number):
    """The signal reaches `spin run` as a KeyboardInterrupt; the program it runs ends, and the stage is not done."""
    marker = tmp_path / "started"
    code = f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    line = runner(stage(tmp_path / "run", "a/b", code))

    def terminate() -> None:
        while not (marker.exists() and marker.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=terminate).start()
    with pytest.raises(KeyboardInterrupt):
        line.run()
    line.interrupt()
    # The record of an interrupted stage is that of a killed one.
    assert line.manifest.stages["a/b"].state == "running"
    assert not Path("/proc", marker.read_text()).exists()
