"""The program that weighs tokens, on tiny random models: its numbers, its files, killed and started again, bad input."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin import estimate_weights
from spin.alignment.chat import ChatEncoder
from spin.alignment.data import load_preferences
from spin.alignment.provenance import Provenance, read_provenance
from spin.alignment.shards import read_rows
from tests.helpers import REPOSITORY, char_tokenizer, program_environment, run_main, save_tiny_model, tiny_llama

SIDES = ("chosen", "rejected")
ANSWERS = ["red", "green tea", "7", "eleven!", "a longer answer here", " blue "]


def write_pairs(folder: Path, count: int = 10, files: int = 2, **changes) -> Path:
    """Preference parquet in two files as convert_data.py writes it; every third response was cut by length."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = ChatEncoder(char_tokenizer())
    rows = []
    for number in range(count):
        prompt = [{"role": "user", "content": f"say word {number}"}]
        said, cut = ANSWERS[(number + 1) % 6], number % 3 == 2
        ids = encoder.tokenizer(said, add_special_tokens=False)["input_ids"]
        rows.append(
            {
                "prompt_id": f"p{number}",
                "sample_index": 0,
                "chosen": [*prompt, {"role": "assistant", "content": ANSWERS[number % 6]}],
                "rejected": [*prompt, {"role": "assistant", "content": said}],
                "rejected_token_ids": ids if cut else [*ids, encoder.end_id],
                "rejected_finish_reason": "length" if cut else "stop",
                **changes,
            }
        )
    from spin.alignment.data import PREFERENCE_SCHEMA

    per_file = -(-count // files)
    for number in range(files):
        table = pa.Table.from_pylist(rows[number * per_file : (number + 1) * per_file], PREFERENCE_SCHEMA)
        schema = Provenance(kind="preferences", split="train", iteration=3).attach(table.schema)
        pq.write_table(table.cast(schema), folder / f"train_prefs-{number:05d}-of-{files:05d}.parquet")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Pairs, and four models: two of one tokenizer, a teacher with another one, and one with a word tokenizer."""
    root = tmp_path_factory.mktemp("weights")
    write_pairs(root / "pairs")
    save_tiny_model(root / "plus", seed=1)
    save_tiny_model(root / "minus", seed=2)
    save_teacher(root / "teacher")
    return root


def save_teacher(folder: Path) -> None:
    """A model whose tokenizer cuts into pieces of words, with a template of its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "re",
        "een",
        " te",
        "a ",
        "lo",
        "ng",
        "an",
        "sw",
        "er",
        "el",
        "ev",
        "e",
        "n",
        "!",
        "bl",
        "ue",
        "d",
        "gr",
        "h",
    ]
    letters = sorted({letter for text in [*ANSWERS, "say word 0123456789", "USER:ASSISTANT "] for letter in text})
    tokens = ["<s>", "</s>", "<unk>", *dict.fromkeys([*pieces, *letters])]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(pieces) + "|."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ m['role'] | upper }}:{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    tiny_llama(len(tokenizer), seed=5, bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def weigh(world: Path, output: Path, *arguments: object, pairs: str = "pairs") -> tuple[int, str, str]:
    return run_main(
        estimate_weights.main, "--input_dir", world / pairs, "--output_dir", output, "--dtype", "float32", *arguments
    )


def models(world: Path, plus: str = "plus", minus: str = "minus") -> list[object]:
    return ["--model_plus", world / plus, "--model_minus", world / minus]


def rows_of(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("train_prefs-*.parquet")) for row in read_rows(file)]


def logps_by_hand(folder: Path, prompt: list[int], ids: list[int]) -> np.ndarray:
    """Float64 log-probs through the model's own forward, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, dim=-1)[range(len(ids)), ids].numpy()


@pytest.fixture(scope="module")
def weighed(world, tmp_path_factory) -> Path:
    """The output of reverse_dpo with the default transform."""
    output = tmp_path_factory.mktemp("weighed") / "out"
    code, _, err = weigh(world, output, "--weighting", "reverse_dpo", *models(world), "--page", output / "page.html")
    assert code == 0, err
    return output


def test_weights_are_those_of_the_stored_ids(world, weighed):
    encoder = ChatEncoder(char_tokenizer())
    before, after = rows_of(world / "pairs"), rows_of(weighed)
    assert [row["prompt_id"] for row in after] == [row["prompt_id"] for row in before]
    for row, old in zip(after[:4], before, strict=False):
        assert row["rejected_token_ids"] == old["rejected_token_ids"]
        assert row["chosen_token_ids"] == encoder.response_ids(row["chosen"])
        assert row["chosen_token_ids"][-1] == encoder.end_id and row["chosen_finish_reason"] == "stop"
        prompt = encoder.prompt_ids(row["chosen"][:-1])
        for side, sign in (("chosen", 1), ("rejected", -1)):
            plus, minus = (logps_by_hand(world / name, prompt, row[f"{side}_token_ids"]) for name in ("plus", "minus"))
            expected = np.exp(sign * np.clip(plus - minus, -0.5, 1.5))  # TIS-DPO, eq. 11
            assert row[f"{side}_weights"] == pytest.approx(expected.tolist(), rel=1e-4)


def test_files_keep_names_rows_and_origin_and_say_how_they_were_weighed(world, weighed):
    names = sorted(path.name for path in (world / "pairs").glob("*.parquet"))
    assert sorted(path.name for path in weighed.glob("*.parquet")) == names
    provenance = read_provenance(pq.read_schema(weighed / names[0]), names[0])
    facts = provenance.extra["weights"]
    assert provenance.iteration == 3 and facts["weighting"] == "reverse_dpo" and facts["transform"] == "exponential"
    assert len({facts["model_plus"]["weights_hash"], facts["model_minus"]["weights_hash"]}) == 2
    assert load_preferences(str(weighed), "train_prefs").num_rows == 10
    statistics = json.loads((weighed / "train_prefs.weights.json").read_text())
    assert statistics["rows"] == 10 and statistics["rejected"]["tokens"] == sum(
        len(row["rejected_token_ids"]) for row in rows_of(weighed)
    )


def test_finished_weights_are_left_alone_and_changed_ones_refused(world, weighed):
    stamp = (weighed / "train_prefs-00000-of-00002.parquet").stat().st_mtime_ns
    code, out, _ = weigh(world, weighed, "--weighting", "reverse_dpo", *models(world))
    assert code == 0 and "complete already" in out
    assert (weighed / "train_prefs-00000-of-00002.parquet").stat().st_mtime_ns == stamp
    code, _, err = weigh(world, weighed, "--weighting", "reverse_dpo", *models(world), "--transform", "binary")
    assert code == 2 and "transform differ" in err and "--overwrite" in err
    code, _, err = weigh(world, weighed, "--weighting", "reverse_dpo", *models(world), "--dtype", "bfloat16")
    assert code == 2 and "model_plus, model_minus differ" in err


def test_scores_serve_another_transform_without_loading_a_model(world, weighed, tmp_path, monkeypatch):
    import shutil

    from spin.alignment import token_scores

    shutil.copytree(weighed / ".scores", tmp_path / "out" / ".scores")
    monkeypatch.setattr(token_scores, "load_model", None)
    arguments = ("--weighting", "reverse_dpo", *models(world), "--transform", "rank_based")
    code, _, err = weigh(world, tmp_path / "out", *arguments)
    assert code == 0, err
    weights = [value for row in rows_of(tmp_path / "out") for value in row["chosen_weights"]]
    assert min(weights) == pytest.approx(0.7) and max(weights) == pytest.approx(1.3)


def test_packed_and_padded_rows_give_the_same_weights(world, weighed, tmp_path):
    arguments = ("--weighting", "reverse_dpo", *models(world), "--batching", "padded")
    assert weigh(world, tmp_path / "out", *arguments)[0] == 0
    for ours, theirs in zip(rows_of(tmp_path / "out"), rows_of(weighed), strict=True):
        for side in SIDES:
            assert ours[f"{side}_weights"] == pytest.approx(theirs[f"{side}_weights"], rel=1e-3)


# --- teachers -----------------------------------------------------------------------------------------------------------


def test_teacher_of_another_tokenizer_keeps_the_sum_and_compares_ends(world, tmp_path):
    """The gains of a response add up to the difference of both log-probs of its text, each under its own tokenizer."""
    arguments = ("--weighting", "teacher", *models(world, "teacher"), "--transform", "origin")
    code, out, err = weigh(world, tmp_path / "out", *arguments)
    assert code == 0, err
    assert "are below 0" in out
    from transformers import AutoTokenizer

    teacher = ChatEncoder(AutoTokenizer.from_pretrained(world / "teacher"))
    student = ChatEncoder(char_tokenizer())
    for row in rows_of(tmp_path / "out"):
        for side, sign in (("chosen", 1), ("rejected", -1)):
            conversation, ids = row[side], row[f"{side}_token_ids"]
            ended = ids[-1] == student.end_id
            theirs = teacher.response_ids(conversation) if ended else teacher.response_ids(conversation)[:-1]
            high = logps_by_hand(world / "teacher", teacher.prompt_ids(conversation[:-1]), theirs)
            low = logps_by_hand(world / "minus", student.prompt_ids(conversation[:-1]), ids)
            weights = row[f"{side}_weights"]
            assert sign * sum(weights) == pytest.approx(high.sum() - low.sum(), abs=1e-3)
            if ended:
                assert sign * weights[-1] == pytest.approx(high[-1] - low[-1], abs=1e-4)


def test_teacher_of_the_same_tokenizer_is_compared_by_ids_and_the_character_way_agrees(world, tmp_path, monkeypatch):
    from spin.alignment.provenance import hash_text

    exact = ("--weighting", "teacher", *models(world), "--transform", "origin")
    assert weigh(world, tmp_path / "exact", *exact)[0] == 0
    original = ChatEncoder.tokenizer_hash.func
    monkeypatch.setattr(  # let them look like different tokenizers
        ChatEncoder, "tokenizer_hash", property(lambda self: hash_text(original(self), self.name))
    )
    assert weigh(world, tmp_path / "characters", *exact)[0] == 0
    for ours, theirs in zip(rows_of(tmp_path / "exact"), rows_of(tmp_path / "characters"), strict=True):
        for side in SIDES:
            assert ours[f"{side}_weights"] == pytest.approx(theirs[f"{side}_weights"], abs=1e-5)


# --- without models, and unusual rows ------------------------------------------------------------------------------------


def test_drift_needs_the_tokenizer_alone(world, tmp_path):
    code, _, err = weigh(world, tmp_path / "out", "--weighting", "drift", "--tokenizer", world / "minus")
    assert code == 0, err
    row = rows_of(tmp_path / "out")[0]  # red EOS against "green tea" EOS: r, e and EOS are common
    assert row["chosen_weights"] == [0, 0, 1, 0] and row["rejected_weights"] == [1, 0, 0, 1, 1, 1, 1, 1, 1, 0]


def test_constant_weights_are_warned_of(world, tmp_path):
    arguments = ["--weighting", "reverse_dpo", *models(world), "--transform", "exponential"]
    code, out, _ = weigh(world, tmp_path / "out", *arguments, "--transform_params", "mu=0", "k=2")
    assert code == 0 and "warning: every weight is 2 (transform exponential)" in out
    code, out, _ = weigh(world, tmp_path / "uniform", "--weighting", "uniform", "--tokenizer", world / "minus")
    assert code == 0 and "warning" not in out  # that is what was asked for


def test_tokens_beyond_max_length_have_no_weight_and_that_is_said(world, tmp_path):
    arguments = ["--weighting", "reverse_dpo", *models(world), "--max_length", "24", "--max_prompt_length", "12"]
    code, out, _ = weigh(world, tmp_path / "out", *arguments)
    assert code == 0 and "beyond max_length 24" in out
    rows = rows_of(tmp_path / "out")
    assert all(len(row[f"{side}_weights"]) == len(row[f"{side}_token_ids"]) for row in rows for side in SIDES)
    longest = max(rows, key=lambda row: len(row["chosen_token_ids"]))
    unknown = [math.isnan(weight) for weight in longest["chosen_weights"]]
    assert unknown == [False] * 12 + [True] * (len(unknown) - 12)


def test_a_row_that_training_leaves_out_is_kept_without_weights(world, tmp_path):
    chosen = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x <|im_end|> y"}]
    rejected = [chosen[0], {"role": "assistant", "content": "red"}]
    write_pairs(tmp_path / "pairs", 3, 1)
    rows = rows_of(tmp_path / "pairs")
    ids = rows[1]["rejected_token_ids"]
    rows[0]["rejected_finish_reason"] = "length"  # what is stored is kept, also where it surprises
    rows[1] |= {"chosen": chosen, "rejected": rejected}
    file = tmp_path / "pairs" / "train_prefs-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(file)), file)
    code, out, err = weigh(tmp_path, tmp_path / "out", "--weighting", "drift", "--tokenizer", world / "minus")
    assert code == 0, err
    assert "1 without weights" in out and "control token" in out
    after = rows_of(tmp_path / "out")
    assert [row["chosen_weights"] is None for row in after] == [False, True, False]
    assert after[1]["rejected_token_ids"] == ids and after[1]["chosen_token_ids"] is None
    assert [row["rejected_finish_reason"] for row in after] == ["length", "stop", "length"]


# --- the page -------------------------------------------------------------------------------------------------------------


def test_page_shows_tokens_escaped_with_their_weights(weighed):
    page = (weighed / "page.html").read_text()
    assert page.count('<dl class="pair">') == 8 and "http" not in page
    assert "&lt;|im_end|&gt;" in page and "<|im_end|>" not in page
    row = rows_of(weighed)[0]
    assert f'title="r: {row["chosen_weights"][0]:.3f}">r</span>' in page
    assert "reverse_dpo" in page and 'class="legend"' in page


def test_colours_of_the_page():
    from spin.alignment.report.weights_page import Scale, Token, render_weights_page

    scale = Scale.of([0.5, 1.0, 1.5, math.nan])
    assert (scale.low, scale.middle, scale.high) == (0.5, 1.0, 1.5)
    assert scale.style(1.25) == "background: rgba(var(--more), 0.38)" and "--less), 0.75" in scale.style(0.5)
    page = render_weights_page([("q", {"chosen": [Token("<b>\n", "x", -1.0), Token("", "</s>", math.nan)]})], ["a & b"])
    assert "&lt;b&gt;⏎\n" in page and 'class="t minus"' in page and 'class="t end none"' in page and "a &amp; b" in page
    assert "not scored" in page


# --- killed and resumed, several processes --------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_weights(world, weighed, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "spin/estimate_weights.py", "--input_dir", world / "pairs", "--output_dir", output]
    command += ["--weighting", "reverse_dpo", *models(world), "--dtype", "float32"]
    words = [str(word) for word in command]
    process = subprocess.Popen(
        words, cwd=REPOSITORY, env=program_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((output / ".scores").glob("train-*.arrow")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    from tests.helpers import run_command

    done = run_command(words, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(rows_of(output), rows_of(weighed), strict=True):
        assert all(ours[f"{side}_weights"] == theirs[f"{side}_weights"] for side in SIDES)


@pytest.mark.slow
def test_two_processes_give_the_same_weights(world, weighed, tmp_path):
    from tests.helpers import run_command
    from tests.training_helpers import launcher

    command = [sys.executable, *launcher("cpu.yaml"), "spin/estimate_weights.py", "--input_dir", world / "pairs"]
    command += ["--output_dir", tmp_path / "out", "--weighting", "reverse_dpo", *models(world), "--dtype", "float32"]
    done = run_command(command, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("10 rows weighed") == 1
    for ours, theirs in zip(rows_of(tmp_path / "out"), rows_of(weighed), strict=True):
        for side in SIDES:
            assert ours[f"{side}_weights"] == pytest.approx(theirs[f"{side}_weights"], rel=1e-4)


# --- bad input: one sentence, exit code 2 ----------------------------------------------------------------------------------


BAD = {
    "unknown weighting": (["attention"], "unknown weighting 'attention': choose one of drift, reverse_dpo, teacher"),
    "model missing": (["reverse_dpo", "--model_plus", "W/plus"], "compares two models: give --model_minus"),
    "models unused": (["drift", "--tokenizer", "W/plus", "--model_plus", "W/plus"], "drift does not use --model_plus"),
    "no tokenizer": (["drift"], "needs the data's tokenizer: give --tokenizer"),
    "transform unused": (["uniform", "--tokenizer", "W/plus", "--transform", "binary"], "does not use --transform"),
    "no such model": (["teacher", "--model_plus", "./none", "--model_minus", "W/minus"], "./none does not exist"),
    "one model": (["teacher", "--model_plus", "W/plus", "--model_minus", "W/plus"], "hold the same weights"),
    "other tokenizer": (
        ["reverse_dpo", "--model_plus", "W/teacher", "--model_minus", "W/minus"],
        "have different tokenizers, which reverse_dpo cannot align",
    ),
    "other data": (
        ["reverse_dpo", "--model_plus", "W/teacher", "--model_minus", "W/other"],
        "row 0: rejected_token_ids do not decode to the rejected text",
    ),
    "parameter": (
        ["teacher", *["--model_plus", "W/plus", "--model_minus", "W/minus"], "--transform_params", "mu"],
        "key=value",
    ),
    "own seed": (
        ["teacher", "--model_plus", "W/plus", "--model_minus", "W/minus", "--transform_params", "seed=1"],
        "give --seed",
    ),
    "lengths": (["drift", "--tokenizer", "W/plus", "--max_length", "9"], "max_prompt_length is 512 and max_length 9"),
    "page rows": (["drift", "--tokenizer", "W/plus", "--page_rows", "0"], "page_rows is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(world, tmp_path, name):
    arguments, sentence = BAD[name]
    if "W/other" in arguments:
        save_teacher(world / "other")
        save_other_weights(world / "other")
    words = [str(word).replace("W/", f"{world}/") for word in arguments]
    code, _, err = weigh(world, tmp_path / "out", "--weighting", *words)
    said = err.strip().splitlines()[-1]  # a progress bar may stand above it
    assert code == 2 and said.startswith("error: ") and "Traceback" not in err
    assert sentence in said, err
    assert not (tmp_path / "out").exists()


def save_other_weights(folder: Path) -> None:
    from transformers import AutoTokenizer

    tiny_llama(len(AutoTokenizer.from_pretrained(folder)), seed=9).save_pretrained(folder)


def test_teacher_without_offsets_is_refused_before_a_model_is_loaded(world, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    from spin.alignment import token_scores

    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    monkeypatch.setattr(token_scores, "load_model", None)
    code, _, err = weigh(world, tmp_path / "out", "--weighting", "teacher", *models(world, "teacher"))
    assert code == 2 and "gives no character offsets" in err and "tokenizer.json" in err


def test_folders_are_checked(world, tmp_path):
    code, _, err = weigh(world, world / "pairs", "--weighting", "drift", "--tokenizer", world / "minus")
    assert code == 2 and "output_dir is the input_dir" in err
    (tmp_path / "empty").mkdir()
    arguments = ("--weighting", "drift", "--tokenizer", world / "minus")
    code, _, err = weigh(tmp_path, tmp_path / "out", *arguments, pairs="empty")
    assert code == 2 and "holds no files such as train_prefs" in err


def test_help_is_light():
    code = "import sys, spin.estimate_weights as e; e.make_parser().format_help(); "
    code += "sys.exit(bool({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# --- weights in training ----------------------------------------------------------------------------------------------------


def train_on(tmp_path: Path, world: Path, change) -> tuple[int, str]:
    """Weigh with drift, change the rows, and start a training on them; return its exit code and last sentence."""
    from spin import run_spin
    from tests.training_helpers import write_config

    out = tmp_path / "out-of-weigh"
    assert weigh(world, out, "--weighting", "drift", "--tokenizer", world / "minus")[0] == 0
    for file in out.glob("*.parquet"):
        table = pq.read_table(file)
        rows = table.to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    config = write_config(tmp_path / "c.yaml", world / "minus", out)
    code, _, err = run_main(run_spin.main, config)
    return code, err.strip().splitlines()[-1]


def test_weights_of_the_wrong_length_are_refused(world, tmp_path):
    code, said = train_on(tmp_path, world, lambda rows: rows[3]["chosen_weights"].append(1.0))
    assert code == 2 and "chosen_weights must hold a weight for each token" in said and "(prompt p" in said


def test_weights_that_are_no_numbers_are_refused(world, tmp_path):
    code, said = train_on(tmp_path, world, lambda rows: rows[0]["rejected_weights"].__setitem__(1, math.nan))
    assert code == 2 and "rejected_weights is nan at token 1: weigh it again" in said


def test_rows_without_weights_are_refused(world, tmp_path):
    code, said = train_on(tmp_path, world, lambda rows: rows[2].update(chosen_weights=None))
    assert code == 2 and "but there are none" in said
