"""One process per contender of the generation benchmark: the program that runs it, and the parent's end of it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from zlib import crc32

from benchmarks.generation_data import MAX_NEW_TOKENS, PROMPT_TOKENS, Prompt, read_prompts
from benchmarks.harness import REPOSITORY, TUNED_ALLOCATOR, Worker, WorkerError
from spin.alignment.core.program import run_program
from spin.alignment.models.config import Dtype

if TYPE_CHECKING:
    from benchmarks.generation_contenders import Contender
    from spin.alignment.data.chat_encoder import ChatEncoder

END_SECONDS = 30.0
# Otherwise vLLM would bind its threads to cores of its choice, and two engines to the same cores.
VLLM_SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}


@dataclass(frozen=True)
class Task:
    """Everything a process needs to know. Turn 0 is a warm-up, turns 1 to ``reps`` are measured."""

    contender: str
    folder: str
    model_folder: str
    data_folder: str
    prompts: int
    reps: int
    seed: int
    threads: int
    allocator: str
    dtype: Dtype = "float32"
    max_new_tokens: int = MAX_NEW_TOKENS
    max_model_len: int = PROMPT_TOKENS[1] + MAX_NEW_TOKENS

    def encoder(self) -> ChatEncoder:
        """Return the encoder of the model's tokenizer."""
        from spin.alignment.data.chat_encoder import load_encoder

        return load_encoder(self.model_folder)

    def turn_prompts(self, turn: int, encoder: ChatEncoder) -> list[Prompt]:
        return read_prompts(self.turn_data(turn), encoder)

    def turn_data(self, turn: int) -> Path:
        """The same prompts as a data set."""
        return Path(self.data_folder) / f"turn-{turn}"


class Player(Worker):
    """The parent's end: starts a process, gives it turns, reads what it measured."""

    def __init__(self, task: Task) -> None:
        """Start the process and wait until its model is loaded.

        Raises:
            WorkerError: it ended instead.
        """
        self.name = task.contender
        folder = Path(task.folder)
        folder.mkdir(parents=True)
        self._log = folder / "log.txt"
        environment = {name: value for name, value in os.environ.items() if name not in TUNED_ALLOCATOR}
        environment |= {"OMP_NUM_THREADS": str(task.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= VLLM_SETTINGS | (TUNED_ALLOCATOR if task.allocator == "tuned" else {})
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.generation_process", json.dumps(asdict(task))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=REPOSITORY,
                env=environment,
                start_new_session=True,
            )
        try:
            self.facts = self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the process and any engine it started end; kill them if they do not."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()


class Seat:
    """One contender's part in the benchmark: what it measured, or the error that ended it, so that the others continue."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.facts: dict[str, Any] = {}
        self.turns: list[dict[str, Any]] = []
        self.error: str | None = None
        self._player: Player | None = None

    def start(self) -> None:
        try:
            self._player = Player(self.task)
            self.facts = self._player.facts
        except WorkerError as error:
            self.error = str(error)

    def take_turn(self) -> None:
        if self._player is None:
            return
        try:
            self.turns.append(self._player.turn())
        except WorkerError as error:
            self.error = str(error)
            self.close()

    def close(self) -> None:
        if self._player is not None:
            self._player.close()
            self._player = None


def processor_seconds() -> float:
    """Return the time on the CPU of this process and of its living children: an engine may run in its own process."""
    import psutil

    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def measure(contender: Contender, turn: int) -> dict[str, Any]:
    """Let a contender answer the prompts of a turn.

    Returns:
        seconds of both clocks, number of sampled tokens (including stop ids), a checksum of each prompt id's response, and the
        lengths in tokens of the prompts and, in the same order, of their responses.
    """
    contender.prepare(turn)
    gc.collect()
    started, processor = time.perf_counter(), processor_seconds()
    contender.work()
    seconds = {"wall_seconds": time.perf_counter() - started, "processor_seconds": processor_seconds() - processor}
    responses = contender.responses()
    sums = {prompt_id: crc32(json.dumps(ids).encode()) for prompt_id, ids in responses.items()}
    lengths = {
        "prompt_lengths": [len(prompt.token_ids) for prompt in contender.prompts],
        "response_lengths": [len(responses[prompt.prompt_id]) for prompt in contender.prompts],
    }
    return {**seconds, **lengths, "tokens": sum(lengths["response_lengths"]), "checksums": sums}


def play(task: Task, orders: IO[str], answers: IO[str]) -> None:
    """Load the contender of a task, then take a turn for every line of ``orders``."""
    from benchmarks.generation_contenders import CONTENDERS

    def send(facts: dict[str, Any]) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    started = time.perf_counter()
    contender = CONTENDERS[task.contender].start(task)
    try:
        send({"start_seconds": time.perf_counter() - started})
        for turn in range(task.reps + 1):
            if not orders.readline():
                return
            send(measure(contender, turn))
        orders.readline()
    finally:
        contender.close()


def main(arguments: Sequence[str]) -> None:
    task = Task(**json.loads(arguments[0]))
    # Libraries may print: their output goes to the log, the answers to a separate pipe.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    play(task, sys.stdin, answers)


if __name__ == "__main__":
    run_program(main)
