"""Programs started from the start server behave as programs started plainly, also when somebody is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spin.alignment.pipeline import start_programs
from spin.alignment.pipeline.lock import run_lock
from spin.alignment.pipeline.processes import RUN_VARIABLE, ChildPrograms, orphans
from spin.alignment.pipeline.start_programs import ProgramStarter, ServedProgram
from tests.helpers import REPOSITORY, program_environment, run_command, shared_starter
from tests.helpers.starts import LIGHT_SERVER

# The modules of spin/ that end as programs do; `spin` itself starts the server.
PROGRAM_NAMES = sorted(
    path.name
    for path in (REPOSITORY / "spin").glob("*.py")
    if "\n    run_program(main)" in path.read_text() and path.stem != "cli"
)

FACTS = """
import json, os, random, signal, sys, threading
import numpy, torch
facts = {
    "environment": dict(os.environ),
    "cwd": os.getcwd(),
    "argv": sys.argv,
    "path": sys.path,
    "name": __name__,
    "file": __file__,
    "main": sys.modules["__main__"].__dict__ is globals(),
    "stdin": sys.stdin.read(),
    "leads": [os.getpid() == os.getsid(0), os.getpid() == os.getpgid(0)],
    "descriptors": sorted(os.listdir("/proc/self/fd"))[:3] + [len(os.listdir("/proc/self/fd"))],
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)],
    "wakeup": signal.set_wakeup_fd(-1),
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "threads": [len(os.listdir("/proc/self/task")), threading.active_count(), torch.get_num_threads()],
    "cuda": [torch.cuda.is_initialized(), torch.cuda.is_available() and torch.cuda._is_in_bad_fork()],
    "flags": str(sys.flags),
    "streams": [str(sys.stdout.encoding), sys.stdout.line_buffering, sys.stdout.isatty()],
}
chance = [random.random(), numpy.random.rand(), torch.rand(()).item()]
print(json.dumps([facts, chance]))
"""
LEAVE_STATE = """
import json, os, random, signal, sys, numpy, torch
json.left_behind = numpy.left_behind = 1
os.environ["LEFT_BEHIND"] = "1"
sys.path.insert(0, "/left_behind")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
torch.manual_seed(1)
os.chdir("/")
torch.set_num_threads(3)
"""
SLEEP = "import sys, time\nprint('asleep', flush=True)\ntime.sleep(60)\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder that stands for the folder of programs."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(autouse=True)
def programs(folder, monkeypatch):
    monkeypatch.setattr(start_programs, "PROGRAMS", folder)


@pytest.fixture(scope="module")
def plain() -> ProgramStarter:
    starter = ProgramStarter(program_environment())
    starter.problem = "asked for"
    return starter


@pytest.fixture
def served() -> ProgramStarter:
    starter = shared_starter()
    assert starter.environment == program_environment()
    return starter


def write(folder: Path, code: str) -> list[str]:
    """Write a program; return its command."""
    path = folder / f"program_{abs(hash(code))}.py"
    path.write_text(code)
    return [sys.executable, str(path), "--word", "a b"]


def run(starter: ProgramStarter, command: list[str], cwd: Path) -> tuple[int, str, str]:
    """Run a command; return its exit code, standard output and standard error."""
    with (cwd / "out").open("w+") as out, (cwd / "err").open("w+") as err:
        program = starter.start(command, out.fileno(), err.fileno(), cwd)
        code = program.wait(60)
        assert isinstance(program, ServedProgram) == (starter.problem is None)
        out.seek(0), err.seek(0)
        return code, out.read(), err.read()


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- the same as a plain start ----------------------------------------------------------------------------------------


def test_a_program_finds_what_it_finds_after_a_plain_start(folder, served, plain, tmp_path):
    command = write(folder, FACTS)
    (code, out, _), (plain_code, plain_out, _) = run(served, command, tmp_path), run(plain, command, tmp_path)
    assert code == plain_code == 0
    (facts, chance), (plain_facts, plain_chance) = json.loads(out), json.loads(plain_out)
    assert facts == plain_facts
    again = json.loads(run(served, command, tmp_path)[1])[1]
    assert len({*chance, *plain_chance, *again}) == 9  # random states are nobody else's


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", 0),
        ("raise SystemExit(2)", 2),
        ("raise SystemExit(130)", 130),
        ("raise SystemExit(300)", 44),
        ("raise SystemExit('error: a sentence')", 1),
        ("1 / 0", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; os._exit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        (
            "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('last'))).start(); print('x')",
            0,
        ),
        ("import atexit; atexit.register(print, 'at exit'); print('x', end='')", 0),
        ("import sys; sys.stdout.write('x'); sys.stdout = None", 0),
    ],
)
def test_exit_codes_and_last_words(folder, served, plain, tmp_path, code, expected):
    command = write(folder, code)
    mine, theirs = run(served, command, tmp_path), run(plain, command, tmp_path)
    assert mine[0] == theirs[0] == expected
    assert mine[1] == theirs[1]
    assert mine[2].splitlines()[-1:] == theirs[2].splitlines()[-1:]


def test_nothing_is_left_for_the_next_program(folder, served, tmp_path):
    look = "import json, numpy; print(hasattr(json, 'left_behind'), hasattr(numpy, 'left_behind'))\n"
    before = json.loads(run(served, write(folder, FACTS), tmp_path)[1])[0]
    assert run(served, write(folder, LEAVE_STATE), tmp_path)[0] == 0
    assert run(served, write(folder, look), tmp_path)[1].split() == ["False", "False"]
    assert json.loads(run(served, write(folder, FACTS), tmp_path)[1])[0] == before


def test_all_programs_are_tried():
    assert {"reformat.py", "generate.py", "run_sft.py", "run_spin.py", "evaluate_model.py"} < set(PROGRAM_NAMES)


@pytest.mark.parametrize("name", PROGRAM_NAMES)
def test_every_program_starts_either_way(name, served, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(start_programs, "PROGRAMS", REPOSITORY / "spin")
    command = [sys.executable, str(REPOSITORY / "spin" / name)]
    assert run(served, [*command, "--help"], tmp_path) == run(plain, [*command, "--help"], tmp_path)
    code, out, err = run(served, [*command, "--no_such_flag", "x"], tmp_path)
    assert (code, out, err) == run(plain, [*command, "--no_such_flag", "x"], tmp_path)
    assert code == 2 and err.startswith("error: ")


def test_the_helpers_of_the_tests_use_the_server(served, monkeypatch):
    monkeypatch.setattr(start_programs, "PROGRAMS", REPOSITORY / "spin")
    done = run_command([sys.executable, "spin/run_sft.py", "--help"])
    assert done.returncode == 0 and served.server_pid is not None and served.problem is None
    other = run_command([sys.executable, "spin/run_sft.py", "--help"], SOME_OTHER="1")
    assert other.stdout == done.stdout


# --- signals ----------------------------------------------------------------------------------------------------------


def start_asleep(starter: ProgramStarter, folder: Path, code: str = SLEEP):
    """Start a program that sleeps; return it once it does."""
    output = folder / "asleep"
    with output.open("wb") as file:
        program = starter.start(write(folder, code), file.fileno(), file.fileno(), folder)
    wait_until(lambda: output.read_text() == "asleep\n")
    return program


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_death_by_a_signal_is_reported(folder, served, number):
    program = start_asleep(served, folder)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.05)
    os.kill(program.pid, number)
    assert program.wait(30) == program.wait() == -number


def test_a_program_that_handles_sigterm_ends_its_own_way(folder, served):
    code = "from spin.alignment.core.program import interrupt_on_signals, run_program\nimport time\n"
    code += "def main(arguments):\n    interrupt_on_signals()\n    print('asleep', flush=True)\n    time.sleep(60)\n"
    program = start_asleep(served, folder, code + "run_program(main)\n")
    os.kill(program.pid, signal.SIGTERM)
    assert program.wait(30) == 130


def test_a_killed_server_takes_no_program_for_done_and_later_starts_are_plain(folder, monkeypatch):
    monkeypatch.setattr(start_programs, "_SERVER", LIGHT_SERVER)
    starter = ProgramStarter(program_environment())
    program = start_asleep(starter, folder)
    os.kill(starter.server_pid, signal.SIGKILL)
    assert program.wait(30) == -signal.SIGKILL
    wait_until(lambda: not is_running(program.pid))
    later = start_asleep(starter, folder)
    assert isinstance(later, subprocess.Popen) and "start server" in starter.problem
    later.kill()
    assert later.wait(30) == -signal.SIGKILL


def test_children_of_a_killed_run_are_found_and_its_server_ends(folder, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    command = write(folder, SLEEP)
    code = (
        "import json, sys\nfrom pathlib import Path\n"
        "from spin.alignment.pipeline import start_programs\n"
        "from spin.alignment.pipeline.processes import ChildPrograms\n"
        "start_programs.PROGRAMS = Path(sys.argv[1])\n"
        "start_programs._SERVER = sys.argv[4]\n"
        "children = ChildPrograms(Path(sys.argv[2]), one_thread=True, prefix=False)\n"
        "children.starter.prepare(json.loads(sys.argv[3]))\n"
        "assert children.starter.problem is None\n"
        "print(children.starter.server_pid, flush=True)\n"
        "children.run('a/b', json.loads(sys.argv[3]))\n"
    )
    words = [sys.executable, "-c", code, str(folder), str(run_dir), json.dumps(command), LIGHT_SERVER]
    parent = subprocess.Popen(words, env=program_environment(PYTHONPATH=str(REPOSITORY)), stdout=subprocess.PIPE)
    server = int(parent.stdout.readline())
    assert parent.stdout.readline() == b"asleep\n"
    assert server in orphans(run_dir) and len(orphans(run_dir)) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not is_running(server))
    (program,) = orphans(run_dir)
    with run_lock(run_dir):
        assert not is_running(program) and orphans(run_dir) == []


# --- through ChildPrograms ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def children(tmp_path_factory, folder) -> ChildPrograms:
    children = ChildPrograms(tmp_path_factory.mktemp("runs"), one_thread=True, prefix=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start_programs, "PROGRAMS", folder)
        patch.setattr(start_programs, "_SERVER", LIGHT_SERVER)
        children.starter.prepare(write(folder, "pass"))
    return children


def logged(children, name: str) -> list[str]:
    """Return what a stage has written to its log, without the time at the start of every line."""
    stamped = [
        re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)", line)
        for line in children.log_path(name).read_text().splitlines()[1:]
    ]
    assert all(stamped)
    return [line[1] for line in stamped]


def test_stages_have_the_mark_of_the_run_and_one_thread(folder, children):
    show = (
        f"import os; print(os.environ[{RUN_VARIABLE!r}], os.environ['OMP_NUM_THREADS'], os.environ['PYTHONUNBUFFERED'])"
    )
    assert children.run("show", write(folder, show)) == 0
    assert logged(children, "show") == [f"{children.run_dir} 1 1"]
    assert children.starter.problem is None


def test_much_output_comes_in_order(folder, children, capfd):
    talk = "import sys\nfor i in range(4000):\n    (sys.stdout, sys.stderr)[i % 2].write(f'{i:050d}\\n')\n"
    assert children.run("talk", write(folder, talk)) == 0
    lines = logged(children, "talk")
    assert lines == [f"{i:050d}" for i in range(4000)]
    assert capfd.readouterr().out.splitlines() == [f"[talk] {line}" for line in lines]


def test_bad_input_and_faults_of_stages(folder, children):
    assert children.run("bad", write(folder, "import sys; sys.exit('error: no such row')")) == 2
    assert children.run("fault", write(folder, "1 / 0")) == 1
    assert (
        children.run("killed", write(folder, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
        == -signal.SIGKILL
    )


def test_two_stages_run_beside_each_other(folder, children, tmp_path):
    """Each of them ends only when it has seen the other."""
    meet = (
        "import sys, time\nfrom pathlib import Path\n"
        f"Path({str(tmp_path)!r}, sys.argv[-1]).touch()\n"
        f"while len(list(Path({str(tmp_path)!r}).iterdir())) < 2: time.sleep(0.01)\n"
    )
    codes = {}

    def go(name: str) -> None:
        codes[name] = children.run(name, [*write(folder, meet), name])

    threads = [threading.Thread(target=go, args=(name,)) for name in ("left", "right")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert codes == {"left": 0, "right": 0} and children.starter.problem is None


def test_stop_ends_a_stage_with_its_own_children(folder, children, tmp_path):
    """The last test that starts stages here: nothing is started after a stop."""
    pids = tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time\nfrom pathlib import Path\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"Path({str(pids)!r}).write_text(f'{{os.getpid()}} {{child.pid}}')\ntime.sleep(60)\n"
    )
    result: list[int] = []
    command = write(folder, code)
    thread = threading.Thread(target=lambda: result.append(children.run("parent", command)))
    thread.start()
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    server = children.starter.server_pid
    children.stop()
    thread.join(30)
    assert result == [130]
    assert not any(is_running(int(pid)) for pid in pids.read_text().split())
    assert children.run("later", command) == 130
    wait_until(lambda: not is_running(server))
