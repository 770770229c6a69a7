"""Many workers on one folder: killed, frozen, without space, without their disk; the rows are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest

from spin.alignment.generation import BACKENDS
from spin.alignment.generation.leases import read_worker
from spin.generate import main
from tests.helpers import REPOSITORY, hear_ctrl_c, program_environment, run_command, run_main, save_tiny_model
from tests.helpers.generate_with_fake import FakeBackend

pytestmark = pytest.mark.slow

NUM_PROMPTS, FRAC_LEN = 400, 90


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The flags of all runs here: 400 prompts of mixed lengths in five fractions, two responses each."""
    folder = tmp_path_factory.mktemp("scale")
    rows = [
        {"prompt_id": f"q{number}", "prompt": "Say " + "so " * (number % 23) + str(number), "response": str(number)}
        for number in range(NUM_PROMPTS)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = save_tiny_model(folder / "model")
    return {"model": model, "input_dir": folder / "train.jsonl", "max_new_tokens": 12, "frac_len": FRAC_LEN} | {
        "backend": "fake",
        "num_samples": 2,
        "data_frac": "auto",
        "flush_every": 8,
    }


def flags(setting: dict[str, object], output: Path, **more: object) -> list[str]:
    return [
        text for name, value in {**setting, "output_dir": output, **more}.items() for text in (f"--{name}", str(value))
    ]


def start(setting: dict[str, object], output: Path, delay: float, **more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "tests/helpers/generate_with_fake.py", *flags(setting, output, **more)]
    environment = program_environment(FAKE_DELAY=str(delay), PYTHONPATH=str(REPOSITORY))
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    )


def generate(setting: dict[str, object], output: Path, *extra: str, **more: object) -> tuple[int, str, str]:
    """Run to the end in this process; return exit code, stdout and stderr."""
    with patch.dict(BACKENDS, fake=FakeBackend):
        return run_main(main, *flags(setting, output, **more), *extra)


def storm(setting: dict[str, object], output: Path, delay: float, **settings: int) -> dict:
    arguments = flags(setting, output)
    done = run_command(
        [sys.executable, "tests/helpers/generate_in_processes.py", json.dumps({"arguments": arguments, **settings})],
        FAKE_DELAY=str(delay),
        PYTHONPATH=str(REPOSITORY),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def undisturbed(setting, tmp_path_factory) -> dict[str, bytes]:
    """The files of one process that nobody disturbs, by name."""
    output = tmp_path_factory.mktemp("undisturbed")
    code, _, error = generate(setting, output)
    assert code == 0, error
    return contents(output)


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.parquet")}


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "the worker ended too early"
        time.sleep(0.01)


def test_every_prompt_and_sample_is_there_once(undisturbed, setting, tmp_path):
    assert sorted(undisturbed) == [f"train-{number:05d}.parquet" for number in range(5)]
    found = []
    for name, content in undisturbed.items():
        (tmp_path / name).write_bytes(content)
        found += [(row["prompt_id"], row["sample_index"]) for row in pq.read_table(tmp_path / name).to_pylist()]
    assert sorted(found) == sorted((f"q{number}", sample) for number in range(NUM_PROMPTS) for sample in (0, 1))


@pytest.mark.parametrize("seed", range(2))
def test_fifty_kills_lose_nothing_and_repeat_nothing(setting, undisturbed, tmp_path, seed):
    # Long enough for all of the kills to come while there is work to do.
    outcome = storm(setting, tmp_path, delay=0.1, processes=3, kills=50, seed=seed)
    assert outcome["kills"] >= 50 and set(outcome["codes"]) == {0}
    assert contents(tmp_path) == undisturbed
    assert generate(setting, tmp_path)[0] == 0  # the last kill may have come while the folder was cleared
    assert not (tmp_path / ".parts").exists()


def test_eight_processes_share_the_work_without_doing_any_of_it_twice(setting, undisturbed, tmp_path):
    (tmp_path / ".parts").mkdir()
    (tmp_path / ".parts" / "kept-to-read-the-heartbeats").touch()
    outcome = storm(setting, tmp_path, delay=0.01, processes=8, kills=0, seed=0)
    assert outcome == {"kills": 0, "codes": [0] * 8}
    assert contents(tmp_path) == undisturbed
    workers = [read_worker(path) for path in (tmp_path / ".parts" / "workers").glob("*.json")]
    made = [worker.get("prompts", 0) for worker in workers]
    assert sum(made) == NUM_PROMPTS and sum(count > 0 for count in made) >= 2, made


def test_a_process_that_starts_while_the_last_one_clears_the_folder_has_nothing_to_do(
    setting, undisturbed, tmp_path, monkeypatch
):
    def removed(*_: object) -> None:
        raise FileNotFoundError(f"{tmp_path}/.parts/prompts-train.arrow")

    monkeypatch.setattr("spin.alignment.generation.generate.open_store", removed)
    code, _, error = generate(setting, tmp_path)
    assert code == 1 and "FileNotFoundError" in error  # nothing is complete: not this race

    def merged_by_another(*_: object) -> None:
        for name, content in undisturbed.items():
            (tmp_path / name).write_bytes(content)
        removed()

    monkeypatch.setattr("spin.alignment.generation.generate.open_store", merged_by_another)
    code, _, error = generate(setting, tmp_path)
    assert code == 0, error
    assert contents(tmp_path) == undisturbed and not (tmp_path / ".parts").exists()


def test_a_frozen_server_is_taken_over_and_does_no_harm_when_it_wakes_up(setting, undisturbed, tmp_path):
    frozen = start(setting, tmp_path, delay=0.05)
    wait_for(lambda: any(tmp_path.glob(".parts/*/part-*.parquet")), frozen)
    frozen.send_signal(signal.SIGSTOP)
    try:
        code, _, error = generate(setting, tmp_path, lease_timeout=2)
        assert code == 0, error
        assert contents(tmp_path) == undisturbed
    finally:
        frozen.send_signal(signal.SIGCONT)
    _, said = frozen.communicate(timeout=60)
    assert frozen.returncode == 0, said
    assert contents(tmp_path) == undisturbed


def test_sigterm_finishes_what_is_in_flight(setting, undisturbed, tmp_path):
    worker = start(setting, tmp_path, delay=0.02)
    wait_for(lambda: any(tmp_path.glob(".parts/*/part-*.parquet")), worker)
    worker.send_signal(signal.SIGTERM)
    _, said = worker.communicate(timeout=60)
    assert worker.returncode == 130 and "finishing the responses in flight" in said
    (path,) = (tmp_path / ".parts" / "workers").glob("*.json")
    record = read_worker(path)
    parts = [pq.read_table(part).num_rows for part in tmp_path.glob(".parts/*/part-*.parquet")]
    assert record["state"] == "ended" and sum(parts) == record["rows"] > 0  # nothing that was drawn is lost
    assert generate(setting, tmp_path)[0] == 0
    assert contents(tmp_path) == undisturbed


def test_ctrl_c_ends_at_once_and_keeps_what_is_finished(setting, undisturbed, tmp_path):
    worker = start(setting, tmp_path, delay=0.05, flush_every=1000)  # nothing would be flushed for long
    workers = tmp_path / ".parts" / "workers"
    wait_for(lambda: any((read_worker(path) or {}).get("rows") for path in workers.glob("*.json")), worker)
    worker.send_signal(signal.SIGINT)
    _, said = worker.communicate(timeout=60)
    assert worker.returncode == 130 and "run the same command again" in said
    assert sum(pq.read_table(part).num_rows for part in tmp_path.glob(".parts/*/part-*.parquet")) > 0
    assert generate(setting, tmp_path)[0] == 0
    assert contents(tmp_path) == undisturbed


def test_a_lost_mount_ends_in_one_sentence_and_nothing_is_written_below_it(setting, undisturbed, tmp_path):
    mount, away = tmp_path / "mount", tmp_path / "away"
    worker = start(setting, mount, delay=0.02)
    wait_for(lambda: any(mount.glob(".parts/*/part-*.parquet")), worker)
    mount.rename(away)
    _, said = worker.communicate(timeout=60)
    assert worker.returncode == 2 and "disappeared during generation" in said and "Traceback" not in said
    assert not mount.exists()
    away.rename(mount)
    assert generate(setting, mount)[0] == 0
    assert contents(mount) == undisturbed


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 192 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_in_one_sentence_and_a_rerun_goes_on(setting, undisturbed, small_disk):
    code, _, error = generate(setting, small_disk)
    assert code == 2 and "no space left on the disk" in error and "Traceback" not in error
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    # The worker that could not even say that it ended lives on in this process: soon given up.
    assert generate(setting, small_disk, lease_timeout=1)[0] == 0
    assert contents(small_disk) == undisturbed


def test_a_torn_fraction_is_set_aside_and_made_again(setting, undisturbed, tmp_path):
    assert generate(setting, tmp_path)[0] == 0
    torn = tmp_path / "train-00002.parquet"
    torn.write_bytes(torn.read_bytes()[:-30])
    code, _, error = generate(setting, tmp_path)
    assert code == 0 and "train-00002.torn" in error
    assert contents(tmp_path) == undisturbed


def test_a_fraction_that_another_run_puts_in_the_way_is_kept(setting, undisturbed, tmp_path):
    code, _, error = generate(setting, tmp_path / "other", seed=1, data_frac=0)
    assert code == 0, error
    worker = start(setting, tmp_path, delay=0.03)
    wait_for(lambda: any(tmp_path.glob(".parts/train-00000-*/part-*.parquet")), worker)
    foreign = shutil.copy(tmp_path / "other" / "train-00000.parquet", tmp_path)
    before = Path(foreign).read_bytes()
    _, said = worker.communicate(timeout=60)
    assert worker.returncode == 2 and "created by another run" in said and "Traceback" not in said
    assert Path(foreign).read_bytes() == before
    assert generate(setting, tmp_path, "--overwrite")[0] == 0
    assert contents(tmp_path) == undisturbed


def test_fractions_by_number_in_any_order_any_number_of_times(setting, undisturbed, tmp_path):
    for number in (3, 0, 4, 3, 1, 2, 0):
        assert generate(setting, tmp_path, data_frac=number)[0] == 0
    assert contents(tmp_path) == undisturbed and not (tmp_path / ".parts").exists()


def test_finished_work_is_recognised_in_seconds_without_prompts_or_a_model(setting, undisturbed, tmp_path, monkeypatch):
    for name, content in undisturbed.items():
        (tmp_path / name).write_bytes(content)

    def fail(*_: object) -> None:
        raise AssertionError("it began to work")

    monkeypatch.setattr("spin.alignment.generation.generate.make_job", fail)
    started = time.monotonic()
    code, out, _ = generate(setting, tmp_path)
    assert code == 0 and "already complete" in out and time.monotonic() - started < 10
