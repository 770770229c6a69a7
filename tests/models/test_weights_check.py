"""Tests that a folder whose files do not make up the model in its config.json is refused in one sentence by every loader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spin.alignment.core.errors import InputError
from spin.alignment.models.adapters import check_adapter
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.folder import check_model_path
from spin.alignment.models.loading import load_model
from spin.alignment.models.weights_check import check_model
from spin.alignment.pipeline.data_checks import model_problems
from tests.helpers import char_tokenizer, save_tiny_model, tiny_llama
from tests.helpers.scoring import save_decoder

Damage = Callable[[Path], None]


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content) and None


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shard_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def shard_of_another_model(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = {"model.layers.7.weight": "model-00001-of-00001.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def index_damaged(folder: Path) -> None:
    shard_missing(folder)
    (folder / "model.safetensors.index.json").write_text("[]")


DAMAGED: dict[str, tuple[Damage, str]] = {
    "a layer's weights are missing": (
        weights(lambda stored: [stored.pop(name) for name in list(stored) if "layers.1." in name]),
        "lacks 9 weights that its config.json describes (model.layers.1.input_layernorm.weight",
    ),
    "a weight too many": (
        weights(lambda stored: stored.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2, 2)})),
        "contains 1 weights that its config.json does not describe (model.layers.2.mlp.up_proj.weight)",
    ),
    "a weight of another shape": (
        weights(lambda stored: stored.update({"model.norm.weight": torch.zeros(5)})),
        "the weight model.norm.weight in",
    ),
    "weights of 8 bits": (
        weights(lambda stored: stored.update({name: item.to(torch.int8) for name, item in stored.items()})),
        "is int8, but its config.json has no quantization_config",
    ),
    "fewer layers in the config": (config(num_hidden_layers=1), "contains 9 weights"),
    "more layers in the config": (config(num_hidden_layers=3), "lacks 9 weights"),
    "another known model type": (config(model_type="qwen2"), "self_attn.k_proj.bias"),
    "another family": (config(model_type="gpt_neox"), "lacks 23 weights"),
    "a larger vocabulary in the config": (config(vocab_size=4000), "lm_head.weight"),
    "an unknown model type": (config(model_type="nonsense"), "does not recognize this architecture"),
    "vocab_size as text": (config(vocab_size="many"), "vocab_size"),
    "a negative vocab_size": (config(vocab_size=-4), "it must be a number above 0"),
    "heads that do not divide the width": (config(num_attention_heads=5, head_dim=None), "attention heads"),
    "no heads": (config(num_attention_heads=0), "config.json"),
    "key-value heads that do not divide the heads": (config(num_key_value_heads=3), "3 key-value heads"),
    "no positions": (config(max_position_embeddings=0), "max_position_embeddings in"),
    "a window as text": (config(sliding_window="wide"), "sliding_window in"),
    "an unknown activation": (config(hidden_act="no"), "cannot be built"),
    "an unknown rope": (config(rope_parameters={"rope_type": "x"}), "config.json"),
    "an unknown dtype": (config(dtype="float99"), "float99"),
    "an empty config": (text("config.json", "{}"), "does not name a model_type"),
    "a config that is a list": (text("config.json", "[]"), "does not name a model_type"),
    "a torn config": (text("config.json", '{"model_type":'), "cannot read"),
    "an empty weight file": (text("model.safetensors", ""), "model.safetensors is damaged"),
    "a truncated weight file": (cut, "model.safetensors is damaged"),
    "a missing shard": (shard_missing, "names model-00002-of-00002.safetensors, which is missing"),
    "a shard of another model": (shard_of_another_model, "names weights that its files do not contain"),
    "an index without a map": (
        index_damaged,
        "has no weight_map",
    ),
    "a weight file of another name": (
        lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors") and None,
        "has neither model.safetensors nor",
    ),
    "an adapter beside the model": (text("adapter_config.json", "{}"), "a model and an adapter"),
    "a generation config that is a list": (text("generation_config.json", "[]"), "generation_config.json is not"),
    "a torn generation config": (text("generation_config.json", '{"a":'), "generation_config.json is not"),
    "a temperature as text": (
        text("generation_config.json", '{"temperature": "hot"}'),
        "temperature in",
    ),
    "an end token as text": (text("generation_config.json", '{"eos_token_id": "x"}'), "eos_token_id 'x'"),
}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_model_folder_is_refused_in_one_sentence(model: Path, name: str) -> None:
    damage, sentence = DAMAGED[name]
    damage(model)
    with pytest.raises(InputError) as refusal:
        check_model(model)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert any(sentence in problem for problem in model_problems(model))


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"tokenizer_class": 3}', '{"added_tokens_decoder": {"x": 1}}', '{"chat_template": 7}']
)
def test_a_damaged_tokenizer_is_refused_in_one_sentence(model: Path, content: str) -> None:
    (model / "tokenizer_config.json").write_text(content)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    problems = model_problems(model)
    assert problems
    assert all("\n" not in problem for problem in problems)


def test_loading_refuses_what_the_check_refuses(model: Path) -> None:
    """The loader is the last to see the weights: a Python user calls it without the check of the programs."""
    DAMAGED["a layer's weights are missing"][0](model)
    with pytest.raises(InputError, match="lacks 9 weights"):
        load_model(ModelConfig(model_name_or_path=str(model)))


@pytest.mark.parametrize(
    "settings",
    [{"quant_method": "nonsense"}, {"quant_method": "aqlm"}, {"bits": 4}],
    ids=["unknown", "package", "none"],
)
def test_a_quantisation_that_cannot_be_loaded_here_is_one_sentence(model: Path, settings: dict) -> None:
    config(quantization_config=settings)(model)
    with pytest.raises(InputError, match=r"quantised weights of .* cannot be loaded here"):
        load_model(ModelConfig(model_name_or_path=str(model)))


def test_loading_refuses_a_weight_of_another_shape(model: Path) -> None:
    DAMAGED["a weight of another shape"][0](model)
    with pytest.raises(InputError, match=r"has the shape \(5,\), but its config.json describes \(32,\)"):
        load_model(ModelConfig(model_name_or_path=str(model)))


def test_models_as_people_save_them_pass(tmp_path: Path) -> None:
    """Tied weights, a second copy of them, buffers of old versions, and shards are no differences."""
    tied = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    check_model(tied)
    weights(lambda stored: stored.update({"lm_head.weight": stored["model.embed_tokens.weight"].clone()}))(tied)
    check_model(tied)
    weights(lambda stored: stored.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))(tied)
    check_model(tied)
    tiny_llama(len(char_tokenizer())).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    check_model(tmp_path / "shards")


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "qwen3_moe", "gemma3_text", "phi3", "opt", "bloom"])
def test_other_families_pass_and_are_checked(tmp_path: Path, family: str) -> None:
    """Their files name weights otherwise than the model in memory: fused experts, a missing prefix, tied heads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 40, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 8, "pad_token_id": 0}
    sizes = small | heads | {"num_local_experts": 2, "num_experts": 2, "word_embed_proj_dim": 16, "ffn_dim": 16}
    made = AutoConfig.for_model(family, **sizes)
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    check_model(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored.pop(next(name for name in sorted(stored) if ".1." in name))
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights|do not fit its config.json|has the shape"):
        check_model(tmp_path)


def test_a_classifier_is_checked_but_may_come_with_another_head(tmp_path: Path) -> None:
    """A scorer that was made from a language model may still have its head; missing layers and scores are refused."""
    folder = save_decoder(tmp_path / "scorer")
    weights(lambda stored: stored.update({"lm_head.weight": torch.zeros(104, 32)}))(folder)
    check_model(folder, "classifier")
    with pytest.raises(InputError, match=r"score\.weight"):
        check_model(folder, "causal")
    assert model_problems(folder) == []
    weights(lambda stored: stored.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}))(folder)
    with pytest.raises(InputError, match=r"does not describe \(model\.layers\.9\.mlp\.up_proj\.weight\)"):
        check_model(folder, "classifier")
    weights(lambda stored: [stored.pop("score.weight"), stored.pop("model.layers.9.mlp.up_proj.weight")])(folder)
    with pytest.raises(InputError, match=r"lacks 1 weights that its config.json describes \(score\.weight\)"):
        check_model(folder, "classifier")


def test_an_adapter_without_some_of_its_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """peft applies what it finds and warns: the responses would be those of another model."""
    from peft import LoraConfig, get_peft_model

    base = load_model(ModelConfig(model_name_or_path=str(tiny_model)))
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(tmp_path)
    model_config = check_model(tiny_model)
    check_adapter(tmp_path, tiny_model, model_config)
    path = tmp_path / "adapter_model.safetensors"
    whole, stored = path.read_bytes(), load_file(path)
    name = next(name for name in stored if "layers.1.mlp" in name)
    for changed in (
        {key: weight for key, weight in stored.items() if key != name},
        stored | {name: torch.zeros(3, 3)},
        stored | {name.replace("layers.1", "layers.5"): stored[name].clone()},
    ):
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"does not fit the model \(base_model\.model\.model\.layers\.[15]\.mlp"):
            check_adapter(tmp_path, tiny_model, model_config)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is damaged"):
        check_adapter(tmp_path, tiny_model, model_config)
    path.write_bytes(whole)
    for content in ("[]", '{"peft_type": "PREFIX_TUNING"}'):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(InputError, match="only LORA is supported"):
            check_adapter(tmp_path, tiny_model, model_config)
    with pytest.raises(InputError, match="contains an adapter and no model"):
        check_model_path(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_without_its_file_is_named(model: Path, name: str) -> None:
    """A snapshot of the Hub's cache that was copied without the blobs."""
    (model / name).unlink()
    (model / name).symlink_to("../../blobs/0123")
    with pytest.raises(
        InputError, match=rf"{name} in .* is a link to a file that does not exist: copy the folder again"
    ):
        check_model_path(str(model))


@pytest.mark.parametrize("names", [None, [], [3], "LlamaForCausalLM", ["NoSuchModel"]])
def test_a_model_type_decides_whatever_the_architectures_are(model: Path, names: object) -> None:
    config(architectures=names)(model)
    check_model(model)


def test_a_link_that_is_not_of_the_model_does_not_matter(model: Path) -> None:
    (model / "notes").symlink_to("nowhere")
    check_model_path(str(model))
