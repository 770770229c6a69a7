"""Models on disk: what is loaded, what is saved, what is refused before loading."""

import json
import math
import shutil
import subprocess

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_weights
from spin.alignment.models.adapters import add_adapters
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.folder import check_config_fits, check_fits, context_length, is_complete_checkpoint
from spin.alignment.models.loading import disable_dropout, load_model
from spin.alignment.models.positions import fixed_positions
from spin.alignment.models.precision import generation_dtype
from spin.alignment.models.saving import save_checkpoint
from tests.helpers import char_tokenizer, flipped, save_tiny_model, tiny_llama


def test_a_generation_config_that_transformers_would_not_save(tiny_model, tmp_path):
    start = shutil.copytree(tiny_model, tmp_path / "start")
    settings = json.loads((start / "generation_config.json").read_text())
    (start / "generation_config.json").write_text(json.dumps(settings | {"do_sample": False, "temperature": 0.6}))
    save_checkpoint(load_model(ModelConfig(model_name_or_path=str(start))), char_tokenizer(), tmp_path / "out")
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (saved.do_sample, saved.temperature) == (True, 0.6)


def test_loading_shows_no_progress_bar_and_leaves_the_setting_as_it_was(tiny_model, capfd):
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        load_model(ModelConfig(model_name_or_path=str(tiny_model)))
        assert logging.is_progress_bar_enabled()
        assert "Loading weights" not in capfd.readouterr().err
        AutoModelForCausalLM.from_pretrained(tiny_model)
        assert "Loading weights" in capfd.readouterr().err
    finally:
        if not was:
            logging.disable_progress_bar()


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    model = tiny_llama(20)
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="weight is not finite"):
        save_checkpoint(model, char_tokenizer(), tmp_path / "out")
    assert not is_complete_checkpoint(tmp_path / "out")


def test_weights_are_saved_in_the_precision_in_memory_or_in_the_wanted_one(tmp_path, capsys):
    model = tiny_llama(20)
    save_checkpoint(model, char_tokenizer(), tmp_path / "as they are", trained_in="bfloat16")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "as they are", dtype="auto")
    assert kept.dtype == torch.float32 and torch.equal(kept.lm_head.weight, model.lm_head.weight)
    assert generation_dtype(str(tmp_path / "as they are"), "auto") == "bfloat16"
    assert "was saved in float32 after training in bfloat16: it is used in bfloat16" in capsys.readouterr().err
    assert generation_dtype(str(tmp_path / "as they are"), "float32") == "float32"
    assert capsys.readouterr().err == ""
    # Its next iteration, trained without mixed precision, does not inherit the record.
    save_checkpoint(kept, char_tokenizer(), tmp_path / "next")
    assert generation_dtype(str(tmp_path / "next"), "auto") == "auto"
    save_checkpoint(model, char_tokenizer(), tmp_path / "half", dtype=torch.bfloat16, trained_in="bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.lm_head.weight, model.lm_head.weight.bfloat16())
    assert "trained_in_dtype" not in json.loads((tmp_path / "half" / "config.json").read_text())


def test_weights_carry_their_sha_256_and_changed_ones_are_refused(tmp_path):
    save_checkpoint(tiny_llama(40), char_tokenizer(), tmp_path)
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=False).returncode == 0
    before, content = hash_weights(tmp_path), (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(flipped(content, 8 * len(content) - 9))
    with pytest.raises(InputError, match=r"model\.safetensors is damaged: .* or remove SHA256SUMS if it was changed"):
        hash_weights(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    assert hash_weights(tmp_path) != before


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_damaged_or_missing_text_file_of_a_model_is_refused(tmp_path, name):
    """A changed template or end token would train on other ids without a word."""
    save_checkpoint(tiny_llama(40), char_tokenizer(), tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(flipped(content, 4 * len(content)))
    with pytest.raises(InputError, match=rf"{name} is damaged: it is not the file that was saved"):
        hash_weights(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is missing: it was saved here"):
        hash_weights(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert hash_weights(tmp_path)


def test_every_flipped_bit_of_the_sums_is_noticed(tmp_path):
    save_checkpoint(tiny_llama(40), char_tokenizer(), tmp_path)
    sums = tmp_path / "SHA256SUMS"
    content = sums.read_bytes()
    for bit in range(0, 8 * len(content), 3):
        sums.write_bytes(flipped(content, bit))
        if sums.read_bytes().count(b" *"):
            continue  # a star in place of the second space means the same
        with pytest.raises(InputError):
            hash_weights(tmp_path)


def test_a_download_may_lack_files_that_its_sums_name(tmp_path):
    """The sums of a repository on the Hub, in the form of ``sha256sum --binary``, name files that were not asked for."""
    folder = tmp_path / "snapshots" / "1234"
    save_checkpoint(tiny_llama(40), char_tokenizer(), folder)
    sums = (folder / "SHA256SUMS").read_text().replace("  ", " *")
    (folder / "SHA256SUMS").write_text("# of all files\n" + sums + "0" * 64 + " *model-q4.gguf\n")
    assert hash_weights(folder)
    (folder / "chat_template.jinja").write_text("other")
    with pytest.raises(InputError, match=r"chat_template\.jinja is damaged"):
        hash_weights(folder)


def test_a_tokenizer_with_several_templates_is_saved_twice(tmp_path):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template + "{# tools #}"}
    for _ in range(2):  # the second time over the first
        save_checkpoint(tiny_llama(40), tokenizer, tmp_path)
        found = AutoTokenizer.from_pretrained(tmp_path).chat_template
        assert found == tokenizer.chat_template
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("other")
    with pytest.raises(InputError, match=r"additional_chat_templates/tool_use\.jinja is damaged"):
        hash_weights(tmp_path)


def test_a_weight_that_16_bits_cannot_hold_is_named(tmp_path):
    model = tiny_llama(20)
    model.model.norm.weight.data[3] = 1e5
    with pytest.raises(FloatingPointError, match=r"model\.norm\.weight is too large for save_dtype torch\.float16"):
        save_checkpoint(model, char_tokenizer(), tmp_path / "out", dtype=torch.float16)
    assert not is_complete_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16)),
        OPTForCausalLM(
            OPTConfig(
                hidden_size=16,
                ffn_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=20,
                word_embed_proj_dim=16,
                max_position_embeddings=16,
                attention_dropout=0.5,
                layerdrop=0.5,
            )
        ),
    ],
    ids=["GPT-2", "OPT"],
)
def test_no_dropout_is_left(model):
    ids = torch.arange(10)[None]
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def quantised_gradients(folder, evaluates_first: bool) -> dict[str, torch.Tensor]:
    """The gradients of random adapters on a 4-bit base, by name."""
    config = ModelConfig(model_name_or_path=str(folder), use_peft=True, lora_r=4, load_in_4bit=True)
    model = add_adapters(load_model(config), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    ids = torch.arange(5, 25)[None]
    if evaluates_first:
        with torch.no_grad():
            model.eval()(ids)
    model.train()(ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("width", [32, 64], ids=["narrower than a block", "a block wide"])
@pytest.mark.parametrize("avx512_bf16", [True, False])
def test_an_evaluation_leaves_the_gradients_through_a_quantised_base_as_they_are(
    tmp_path, monkeypatch, width, avx512_bf16
):
    """On a CPU with AVX-512 bf16 bitsandbytes would switch to a kernel without a backward pass, for wide layers only."""
    modules = pytest.importorskip("bitsandbytes.nn.modules", reason="needs bitsandbytes: pip install -e '.[qlora]'")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: avx512_bf16)
    folder = save_tiny_model(tmp_path / "model", hidden_size=width, intermediate_size=2 * width)
    before, after = (quantised_gradients(folder, evaluates_first) for evaluates_first in (False, True))
    assert len(before) == 2 * 7 * 2  # two adapter matrices on each of seven layers of both blocks
    for name, gradient in before.items():
        assert gradient.abs().max() > 0 and torch.equal(gradient, after[name]), name


@pytest.mark.parametrize(
    "length, token, message",
    [(513, 1, "can attend to 512 tokens: lower max_length"), (5, 10_000, "the data contains token id 10000")],
)
def test_data_that_does_not_fit_the_model(tiny_model, length, token, message):
    with pytest.raises(InputError, match=message):
        check_fits(tiny_model, length, token)


@pytest.mark.parametrize(
    "config",
    [
        {"n_positions": 64},  # GPT-2
        {"max_seq_len": 64},  # MPT
        {"text_config": None, "max_position_embeddings": 64},
        {"max_position_embeddings": 512, "text_config": {"max_position_embeddings": 64}},  # multimodal
        {
            "text_config": {
                "max_position_embeddings": 512,
                "rope_scaling": {"type": "longrope"},
                "original_max_position_embeddings": 64,
            }
        },
    ],
)
def test_the_context_is_found_wherever_a_configuration_has_it(config):
    check_config_fits(config, "the model", 64, 1)
    with pytest.raises(InputError, match=r"has 65 tokens, but .* 64"):
        check_config_fits(config, "the model", 65, 1)


def test_the_context_of_a_configuration_object():
    assert context_length(GPT2Config(n_positions=48)) == 48


LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (
            {"rope_scaling": {"type": "longrope", **LONGROPE}, "original_max_position_embeddings": 64},
            64,
        ),  # Phi-3's files
        ({"rope_scaling": {"type": "su", **LONGROPE}, "original_max_position_embeddings": 64}, 64),  # its first ones
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 128}}, 128),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 32}}},
            32,
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 512),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, None),
        ({"rope_scaling": None}, None),
        ({}, None),
    ],
)
def test_positions_that_depend_on_the_batch_are_used_up_to_where_they_do_not(tiny_model, tmp_path, config, limit):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    found = json.loads((folder / "config.json").read_text())
    found.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(found | config))
    assert fixed_positions(found | config) == limit
    check_fits(folder, limit or 512, 1)
    if limit is not None and limit < 512:
        with pytest.raises(InputError, match=rf"above {limit} tokens the positions of .* lower max_length to {limit}"):
            check_fits(folder, limit + 1, 1)
