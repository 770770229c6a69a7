"""The real chat model that some tests use: SmolLM2-135M-Instruct, as ``scripts/fetch_smollm2.sh`` writes it.

The variable SPIN_TEST_SMOLLM2 names its folder; ``0`` skips the tests that need it. Without the variable it is
``models/SmolLM2-135M-Instruct`` of the checkout, and those tests are skipped if that folder does not exist.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

VARIABLE, FOLDER = "SPIN_TEST_SMOLLM2", REPOSITORY / "models" / "SmolLM2-135M-Instruct"


def smollm2_folder() -> Path:
    """Return the folder of SmolLM2. Skips the test without one; fails if the folder that was named contains no model."""
    named = os.environ.get(VARIABLE, "")
    if named == "0":
        pytest.skip(f"{VARIABLE}=0 skips the tests that need SmolLM2")
    folder = REPOSITORY / named if named else FOLDER  # an absolute path stays as it is
    if (folder / "config.json").is_file():
        return folder
    how = f"bash scripts/fetch_smollm2.sh {folder}"
    if named:
        pytest.fail(f"{VARIABLE} names {folder}, which contains no model: run {how}")
    pytest.skip(f"no SmolLM2 at {folder}: run {how}, or set {VARIABLE} to its folder")
