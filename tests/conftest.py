"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Encoded rows of tests do not belong in the user's cache.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="spin-test-cache-")
# Under nohup or in the background of a script, these signals are ignored, here and in every program that a test starts.
for number, default in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, default)

from tests.helpers import SHARED_DATA, save_tiny_model
from tests.helpers.openai_backend import connect, server  # noqa: F401  (fixtures of several files)
from tests.helpers.smollm2 import smollm2_folder
from tests.helpers.training import pairs, reference_run  # noqa: F401  (fixtures of several files)
from tests.helpers.weights import scoring_models, weighed  # noqa: F401  (fixtures of several files)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama with a ChatML character tokenizer. Read only."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """The GSM8K folder of the shared test data."""
    folder = SHARED_DATA / "gsm8k"
    if not folder.is_dir():
        pytest.skip(f"no GSM8K at {folder}: set SPIN_TEST_DATA to a folder that holds gsm8k/train.jsonl and test.jsonl")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, a real chat model of 135 million parameters. Read only."""
    return smollm2_folder()
