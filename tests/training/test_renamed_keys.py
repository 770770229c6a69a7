"""Configuration files of the original code, alignment-handbook, TRL and verl: a key means what it meant, or is refused."""

from __future__ import annotations

import pytest

from spin import run_spin
from spin.alignment.core.errors import InputError
from spin.alignment.training.renamed_keys import AS_HERE, REMOVED, RENAMED, rename_keys
from tests.helpers import run_main
from tests.helpers.training import metrics, write_config

# (what the file says, what it means here)
ACCEPTED = [
    ({"use_flash_attention_2": True}, {"attn_implementation": "flash_attention_2"}),  # uclaml/SPIN, tulu-70B
    ({"use_flash_attention_2": False}, {}),
    ({"use_flash_attention_2": "no"}, {}),
    ({"use_flash_attention_2": "True"}, {"attn_implementation": "flash_attention_2"}),
    ({"torch_dtype": None}, {"dtype": "float32"}),  # uclaml/SPPO, in the transformers of that time
    ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ({"do_eval": "no"}, {"do_eval": False}),  # uclaml/SPPO
    ({"do_eval": True}, {"do_eval": True}),
    ({"evaluation_strategy": "no", "warmup_ratio": 0.1}, {"eval_strategy": "no", "warmup_steps": 0.1}),
    ({"evaluation_strategy": False}, {"eval_strategy": "no"}),
    ({"lora_dropout": 0}, {}),
    ({"lora_dropout": 0.0}, {}),
    ({"lora_modules_to_save": None}, {}),
    ({"chat_template": None, "max_train_samples": None, "max_eval_samples": None}, {}),
    ({"hub_model_revision": "main", "truncation_side": "left", "bnb_4bit_quant_type": "nf4"}, {}),
    ({"max_seq_length": 2048, "dataset_num_proc": 12}, {"max_length": 2048, "preprocessing_num_workers": 12}),
    ({"dataset_kwargs": {"add_special_tokens": False, "append_concat_token": False}}, {}),  # alignment-handbook, SFT
    ({"precompute_ref_log_probs": True, "disable_dropout": True, "sync_ref_model": False}, {}),  # TRL
    ({"f_divergence_type": "reverse_kl", "reference_free": False}, {}),
]
REFUSED = [
    ({"lora_dropout": 0.05}, "set it to 0 or remove it"),  # alignment-handbook, QLoRA
    ({"lora_modules_to_save": ["embed_tokens"]}, "adapters are trained, not whole modules"),
    ({"chat_template": "{{ x }}"}, r"save it as chat_template\.jinja"),
    ({"max_train_samples": 100}, "lower the fraction in dataset_mixer"),
    ({"max_eval_samples": 100}, "make a smaller test split"),
    ({"dataset_name": "org/name"}, r"write it as dataset_mixer: \{NAME: 1\.0\}"),
    ({"ref_model_name_or_path": "org/name"}, "the reference is the model that training starts from"),
    ({"ref_model": "org/name"}, "the reference is the model that training starts from"),
    ({"truncation_mode": "keep_end"}, "a prompt keeps its end"),
    ({"precompute_ref_log_probs": False}, "always computed once and stored"),
    ({"sync_ref_model": True}, r"use run_online\.py with ref_update_freq"),
    ({"rpo_alpha": 1.0}, "use nll_weight"),
    ({"f_divergence_type": "js_divergence"}, "that of the reverse KL"),
    ({"eos_token": "<|im_end|>"}, "set it in the model's tokenizer"),
    ({"actor_rollout_ref": {"model": {"path": "x"}}, "data": {}}, "a configuration of verl"),
    ({"use_lora": True}, "set use_peft to true"),
]


@pytest.mark.parametrize(("written", "meant"), ACCEPTED)
def test_what_a_key_of_others_means(written, meant):
    assert rename_keys(written, "their.yaml") == meant


@pytest.mark.parametrize(("written", "message"), REFUSED)
def test_what_is_refused_by_name(written, message):
    with pytest.raises(
        InputError, match=rf"the key '{next(iter(written))}' in their\.yaml is not supported: .*{message}"
    ):
        rename_keys(written, "their.yaml")


def test_a_translated_key_beside_its_new_name_is_refused():
    with pytest.raises(InputError, match="has both 'use_flash_attention_2' and 'attn_implementation'"):
        rename_keys({"use_flash_attention_2": True, "attn_implementation": "sdpa"}, "x")


def test_the_tables_agree():
    assert AS_HERE.keys() <= REMOVED.keys()
    assert not RENAMED.keys() & REMOVED.keys()


def test_do_eval_false_leaves_out_the_evaluation_at_the_end(tiny_model, pairs, tmp_path):
    splits = {"dataset_splits": ["train_prefs", "test_prefs"], "max_steps": 1}
    code, _, err = run_main(run_spin.main, write_config(tmp_path / "c.yaml", tiny_model, pairs, do_eval="no", **splits))
    assert code == 0, err
    assert "eval_loss" not in metrics(tmp_path / "out")["final"]


@pytest.mark.parametrize("share", [1, 1.0, "1.0", 3])
def test_a_warmup_ratio_that_would_count_steps_is_refused(share):
    """warmup_steps: 1 is one step, but warmup_ratio: 1 meant all of them."""
    with pytest.raises(InputError, match=f"'warmup_ratio' in x is {share}: set it below 1"):
        rename_keys({"warmup_ratio": share}, "x")
