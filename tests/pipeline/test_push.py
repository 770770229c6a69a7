"""``spin push`` and ``spin export``: which files leave the machine, and what is refused."""

from __future__ import annotations

from fnmatch import fnmatch

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from spin import cli
from spin.alignment.core.provenance import sha256, write_sums
from spin.alignment.models.saving import save_checkpoint
from tests.helpers import char_tokenizer, run_main, save_tiny_model, tiny_llama

PRIVATE = ("optimizer.pt", "training_args.bin", "inputs.json", ".env", "train.log", "events.out.tfevents.1")


@pytest.fixture
def model(tmp_path):
    """A model folder with everything that a training leaves there, and more."""
    folder = save_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    for name in (*PRIVATE, "README.md", "metrics.json"):
        (folder / name).write_text(name)
    for inner in ("checkpoints/checkpoint-2", "reference", "logs"):
        (folder / inner).mkdir(parents=True)
        (folder / inner / "model.safetensors").write_text("x")
    return folder


@pytest.fixture
def uploads(monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, name, **settings):
            calls.append(("create", settings))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, **settings):
            calls.append(("upload", settings))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return calls


def test_only_the_model_and_its_card_are_uploaded(model, uploads):
    code, said, err = run_main(cli.main, "push", model, "--repo", "me/policy", "--private")
    assert code == 0, err
    assert "to the model repository me/policy" in said
    created, upload = dict(uploads)["create"], dict(uploads)["upload"]
    assert created == {"private": True, "repo_type": "model", "exist_ok": True}
    files = [path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()]
    sent = {name for name in files if any(fnmatch(name, pattern) for pattern in upload["allow_patterns"])}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "metrics.json"} <= sent
    assert not sent & set(PRIVATE) and not [name for name in sent if "/" in name]


def test_code_and_named_templates_of_a_model_are_uploaded_with_it(tmp_path, uploads):
    """What SHA256SUMS names belongs to the model, but nothing outside of its folder does."""
    folder = tmp_path / "model"
    tokenizer = char_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    save_checkpoint(tiny_llama(40), tokenizer, folder)
    (folder / "modeling_own.py").write_text("code = 1")
    (tmp_path / "private.txt").write_text("mine")
    write_sums(folder)
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(f"{sha256(tmp_path / 'private.txt')}  ../private.txt\n")
    code, _, err = run_main(cli.main, "push", folder, "--repo", "me/policy")
    assert code == 0, err
    sent = dict(uploads)["upload"]["allow_patterns"]
    assert {"modeling_own.py", "additional_chat_templates/tool_use.jinja"} <= set(sent)
    assert not [name for name in sent if "private" in name]
    code, _, err = run_main(cli.main, "push", folder, "--repo", "me/policy", "--folder", tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").is_file()


def test_offline_and_on_request_the_folder_is_written_instead(model, tmp_path, monkeypatch, uploads):
    out = tmp_path / "out"
    code, said, err = run_main(cli.main, "push", model, "--repo", "me/policy", "--folder", out)
    assert code == 0 and not uploads, err
    assert f"hf upload me/policy {out}" in said
    assert (out / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert not {path.name for path in out.iterdir()} & {*PRIVATE, "checkpoints", "reference", "logs"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    code, said, _ = run_main(cli.main, "push", model, "--repo", "me/policy")
    assert code == 0 and not uploads and "nothing was pushed" in said
    assert sorted(path.name for path in (tmp_path / "policy-push").iterdir()) == sorted(p.name for p in out.iterdir())
    code, _, err = run_main(cli.main, "push", model, "--repo", "me/policy")
    assert code == 2 and "is not empty" in err


def test_pairs_become_a_data_set(tmp_path, uploads):
    for name in ("train_prefs-00000-of-00001.parquet", "train_prefs.counts.json", "README.md", "notes.txt"):
        (tmp_path / name).write_text("x")
    code, _, err = run_main(cli.main, "push", tmp_path, "--repo", "me/pairs")
    assert code == 0, err
    upload = dict(uploads)["upload"]
    assert upload["repo_type"] == "dataset" and "notes.txt" not in upload["allow_patterns"]
    assert len(upload["allow_patterns"]) == 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--repo", "a/b/c"], "which no repository can have"),
        (["--repo", "me/policy", "--model", "iter0"], "is no run"),
    ],
)
def test_what_cannot_be_pushed_is_said(model, uploads, words, sentence):
    code, _, err = run_main(cli.main, "push", model, *words)
    assert code == 2 and sentence in err and err.count("\n") == 1 and not uploads


def test_a_folder_without_a_model_is_refused(tmp_path, uploads):
    code, _, err = run_main(cli.main, "push", tmp_path, "--repo", "me/policy")
    assert code == 2 and "contains no config.json" in err


def test_a_refusal_of_the_hub_is_one_sentence(model, uploads, monkeypatch):
    def refuse(self, name, **settings):
        raise huggingface_hub.errors.LocalTokenNotFoundError("no token")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    code, _, err = run_main(cli.main, "push", model, "--repo", "me/policy")
    assert code == 2 and "set HF_TOKEN" in err and err.count("\n") == 1


def test_an_export_is_the_model_in_16_bits(model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, said, err = run_main(cli.main, "export", model, tmp_path / "out")
    assert code == 0, err
    assert "bfloat16" in said
    ours, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(model / "model.safetensors")
    assert "lm_head.weight" not in ours and ours.keys() == before.keys()
    assert all(torch.equal(ours[name], before[name].bfloat16()) for name in ours)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16 and torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert (tmp_path / "out" / "generation_config.json").is_file() and (tmp_path / "out" / "README.md").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    code, _, err = run_main(cli.main, "export", model, tmp_path / "out")
    assert code == 2 and "is not empty" in err
