"""scripts/finetune.sh trains the model that the caller names, and no other."""

from __future__ import annotations

import subprocess

import pytest

from tests.helpers import REPOSITORY, program_environment


@pytest.fixture
def arguments(tmp_path):
    """Run the script with a stand-in for python; return what it passes to run_spin.py, or its message."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "${@:2}"\n')
    stub.chmod(0o755)

    def start(*words: str, **variables: str) -> list[str] | str:
        environment = program_environment(LAUNCH_CONFIG="none", **variables)
        environment["PATH"] = f"{stub.parent}:{environment['PATH']}"
        command = ["bash", str(REPOSITORY / "scripts" / "finetune.sh"), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.stderr if done.returncode else done.stdout.splitlines()

    return start


def test_a_named_model_brings_no_revision_of_another(arguments):
    assert arguments("0", MODEL="m y") == ["configs/config.yaml", "--model_name_or_path='m y'", "--model_revision=null"]
    assert arguments("1", "--beta=1", MODEL="me/mine", REVISION="abc", CHECKPOINT_DIR="o") == [
        *("configs/config_iter1.yaml", "--model_name_or_path='me/mine'", "--model_revision=abc", "--output_dir='o'"),
        "--beta=1",
    ]
    named = "--model_name_or_path=mine"
    assert arguments("0", named) == ["configs/config.yaml", "--model_revision=null", named]


def test_pairs_may_be_in_several_folders(arguments):
    assert arguments("0", MODEL="m", PAIRS_DIR="a b/c")[-1] == "--dataset_mixer={'a': 1.0, 'b/c': 1.0}"


def test_the_papers_model_is_trained_only_if_it_is_named(arguments, tmp_path):
    assert "set MODEL to the model that generated the pairs" in arguments("0")
    own = tmp_path / "own.yaml"
    own.write_text("model_name_or_path: mine\n")
    assert arguments("0", CONFIG=str(own)) == [str(own)]
