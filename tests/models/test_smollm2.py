"""SmolLM2-135M-Instruct, a real chat model: its tokenizer, template and weights survive the way through GGUF."""

from __future__ import annotations

import json

import torch

from spin.alignment.data.chat_encoder import load_encoder
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.loading import load_model
from spin.alignment.models.weights_check import check_model

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTION = "What is the capital of France? Answer in one sentence."


def test_prompts_follow_the_models_own_template(smollm2):
    encoder = load_encoder(smollm2)
    ids = encoder.prompt_ids([{"role": "user", "content": QUESTION}])
    assert encoder.tokenizer.decode(ids) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encoder.stop_ids == [2] and encoder.tokenizer.decode([2]) == "<|im_end|>"
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_text_is_split_as_the_model_was_trained(smollm2):
    tokenizer = load_encoder(smollm2).tokenizer
    # Every digit alone, and two line feeds before a digit are one token, as before a letter of the vocabulary's own split.
    assert tokenizer.tokenize("a\n\n1. 2024") == ["a", "ĊĊ", "1", ".", "Ġ", "2", "0", "2", "4"]


def test_the_model_answers_a_question(smollm2):
    """The greedy continuation of a forced beginning, so that one forward pass decides."""
    encoder = load_encoder(smollm2)
    ids = encoder.prompt_ids([{"role": "user", "content": QUESTION}])
    ids += encoder.tokenizer("The capital of France is")["input_ids"]
    model = load_model(ModelConfig(model_name_or_path=str(smollm2), dtype="bfloat16"))
    with torch.inference_mode():
        best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    assert encoder.tokenizer.decode([best]) == " Paris"


def test_the_folder_passes_the_checks_of_every_program(smollm2):
    config = check_model(smollm2)
    assert (config.model_type, config.num_hidden_layers, config.vocab_size) == ("llama", 30, 49152)
