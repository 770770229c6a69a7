"""The one-page iteration (recipes/spin_minimal.py) is the oracle of the programs: the same pairs, the same losses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from spin import convert_data
from spin.generate import main as generate
from tests.helpers import REPOSITORY, run_main, run_script, save_tiny_model
from tests.helpers.runs import write_sums
from tests.helpers.training import difference, metrics, train, write_config

pytestmark = pytest.mark.slow

RECIPE = "recipes/spin_minimal.py"
PROMPTS, NEW_TOKENS, RATE, BETA = 12, 16, 1e-3, 0.5


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A model and its data; this seed's greedy responses to the 12 prompts end after 5 to 12 tokens, and 2 are cut."""
    folder = tmp_path_factory.mktemp("start")
    save_tiny_model(folder / "model", seed=7, initializer_range=0.2)
    write_sums(folder / "data", PROMPTS)
    return folder


@pytest.fixture(scope="module")
def recipe(start) -> tuple[Path, str]:
    """The output folder of the recipe after three updates on all pairs at once, and what it printed."""
    done = run_script(
        RECIPE, start / "model", start / "data" / "train.jsonl", start / "recipe", f"--max_new_tokens={NEW_TOKENS}",
        "--temperature=0", f"--batch_size={PROMPTS}", f"--learning_rate={RATE}", f"--beta={BETA}", "--epochs=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return start / "recipe", done.stdout


@pytest.fixture(scope="module")
def converted(start) -> Path:
    """The preference files that generate.py and convert_data.py make of the same model and data."""
    source = ("--model", start / "model", "--input_dir", start / "data", "--output_dir", start / "generated")
    flags = ("--temperature", 0, "--max_new_tokens", NEW_TOKENS)
    for main, arguments in (
        (generate, (*source, *flags)),
        (convert_data.main, ("--input_dir", start / "generated", "--output_dir", start / "pairs")),
    ):
        code, _, errors = run_main(main, *arguments)
        assert code == 0, errors
    return start / "pairs"


def test_the_page_stays_a_page_without_the_library():
    text = (REPOSITORY / RECIPE).read_text()
    assert text.count("\n") <= 150
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)) == {
        "argparse", "json", "pathlib", "torch", "transformers",
    }  # fmt: skip


def test_the_same_pairs(start, recipe, converted):
    from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
    from spin.alignment.data.encode_pairs import encode_pair
    from spin.alignment.data.preferences import load_preferences

    encoder = ChatEncoder(load_tokenizer(start / "model"))
    encoded = [encode_pair(row, encoder, 128, 64) for row in load_preferences(converted, "train")]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    page = [json.loads(line) for line in (recipe[0] / "pairs.jsonl").read_text().splitlines()]
    ours = [[pair.prompt_ids, pair.responses["chosen"], pair.responses["rejected"]] for pair in encoded]
    assert sorted([pair[name] for name in names] for pair in page) == sorted(ours)
    ended = [pair["rejected_ids"][-1] == encoder.end_id for pair in page]
    assert len(page) == PROMPTS and any(ended) and not all(ended)


def test_the_same_losses(start, recipe, converted, tmp_path):
    config = write_config(
        tmp_path / "config.yaml", start / "model", converted, beta=BETA, learning_rate=RATE, num_train_epochs=3,
        per_device_train_batch_size=PROMPTS, warmup_steps=0, optim="rmsprop",
    )  # fmt: skip
    train(config)
    ours = [entry["loss"] for entry in metrics(tmp_path / "out")["history"] if "loss" in entry]
    page = [float(loss) for loss in re.findall(r"loss ([\d.]+)", recipe[1])]
    assert page == pytest.approx(ours, abs=1e-5)
    assert len(page) == 3 and page[0] == pytest.approx(0.693147, abs=1e-6) and page[2] < 0.5  # ln 2, and far from it
    # RMSprop turns a gradient of nearly 0 into a whole step, so single weights may differ between machines.
    assert difference(recipe[0], tmp_path / "out") < difference(recipe[0], start / "model")
