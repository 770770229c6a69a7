"""Tiny models, tokenizers and program runners shared by the tests. Nothing here is downloaded."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spin.alignment.pipeline.start_programs import ProgramStarter, ServedProgram

REPOSITORY = Path(__file__).resolve().parents[2]
_ENVIRONMENT = dict(os.environ)
SHARED_DATA = Path(os.environ.get("SPIN_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def char_tokenizer(
    special: Sequence[str] = ("<|im_start|>", "<|im_end|>"), template: str | None = CHATML, **settings: Any
):
    """A character-level tokenizer with ``special`` tokens; EOS is the last of them unless ``eos_token`` is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<unk>", *special, *sorted(string.printable)]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": special[-1], **settings}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def tiny_llama(vocab_size: int, seed: int = 0, **settings: Any):
    """A random two-layer Llama in fp32, about 30k parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(**{"vocab_size": vocab_size, "max_position_embeddings": 512, **shape, **settings})
    )


def save_tiny_model(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Save a tiny random Llama with its tokenizer as a model folder; return the folder."""
    tokenizer = char_tokenizer()
    model = tiny_llama(
        len(tokenizer), seed, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **settings
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def flipped(content: bytes, place: int) -> bytes:
    """Return bytes with one bit flipped, counted from the start: what a bad disk or memory does to a file."""
    changed = bytearray(content)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def run_main(main: Callable[[Sequence[str]], int | None], *arguments: object) -> tuple[int, str, str]:
    """Run a program's ``main`` in this process as its entry point would; return (exit code, stdout, stderr)."""
    from spin.alignment.core.program import run_program

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_program(main, [str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def program_environment(**extra: str) -> dict[str, str]:
    """The environment of a child program: offline, one thread, this interpreter as ``python``, the same in every test.

    Variables that programs run in this process have set since (accelerate's, vLLM's) are not passed on.
    """
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    inherited = {name: value for name, value in _ENVIRONMENT.items() if name != "PYTEST_CURRENT_TEST"}
    # Shell scripts start `python` and `accelerate`: those of the environment under test, even if it is not activated.
    search_path = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
    return {**inherited, "PATH": search_path, **offline, **extra}


@functools.cache
def shared_starter() -> ProgramStarter:
    """The start server of this pytest process: programs in the environment of tests start as they do in ``spin run``."""
    from spin.alignment.pipeline.start_programs import ProgramStarter

    return ProgramStarter(program_environment())


def start_program(
    words: Sequence[str], environment: dict[str, str], stdout: IO[Any], stderr: IO[Any]
) -> subprocess.Popen[bytes] | ServedProgram:
    """Start a program from the repository root in a session of its own: from the server where that is the same."""
    starter = shared_starter()
    if environment == starter.environment:
        return starter.start(words, stdout.fileno(), stderr.fileno(), REPOSITORY)
    return subprocess.Popen(
        words, cwd=REPOSITORY, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
    )


def hear_ctrl_c() -> None:
    """For ``preexec_fn``: the tests themselves may run as a shell's background job, whose children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_command(
    command: Sequence[object], timeout: float = 600.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program from the repository root; kill it with all its children when it hangs.

    Raises:
        AssertionError: it did not end in ``timeout`` seconds; the message ends with what it had said.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # Files, not pipes: a grandchild that outlives the program would keep a pipe open.
        process = start_program(words, program_environment(**environment), out, err)
        try:
            code = process.wait(timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            err.seek(0)
            if isinstance(error, subprocess.TimeoutExpired):
                raise AssertionError(f"{words} still runs after {timeout} s: {err.read()[-4000:]}") from None
            raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


def run_script(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python SCRIPT arguments`` from the repository root in a process of its own."""
    return run_command([sys.executable, script, *arguments], **environment)
