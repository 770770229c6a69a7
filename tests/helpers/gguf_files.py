"""Writes tiny GGUF files as llama.cpp's converter writes them: a random two-layer Llama with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers import CHATML, tiny_llama

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADS, KV_HEADS = 4, 2
# transformers' name of a weight -> GGUF's.
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def vocabulary() -> list[str]:
    """The special tokens, one token per byte, and two line feeds as one token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*SPECIAL, *bytes_to_unicode().values(), "ĊĊ"]


def tiny_gguf_model() -> Any:
    """The model that :func:`write_gguf` writes."""
    return tiny_llama(len(vocabulary()), hidden_size=64, tie_word_embeddings=True, rope_theta=10_000.0).eval()


def gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{_NAMES[rest]}.weight"
    return f"{_NAMES[name]}.weight"


def permuted(weight: Any, heads: int) -> Any:
    """The rows of a query or key projection in llama.cpp's order of rotary pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: Any = None, drop: tuple[str, ...] = (), **metadata: Any) -> Path:
    """Write ``model`` (default: the tiny one) in float32; ``metadata`` replaces or adds keys (``__`` for a dot), ``drop``
    leaves parts out: ``tokenizer``, ``template`` or the name of a tensor."""
    from gguf import GGUFWriter

    model = model or tiny_gguf_model()
    config = model.config
    values = {
        "general.name": "Tiny test model",
        "general.license": "apache-2.0",
        "general.file_type": 0,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.rope.dimension_count": config.hidden_size // HEADS,
        "llama.rope.freq_base": 10_000.0,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.vocab_size": config.vocab_size,
        **({} if "tokenizer" in drop else tokenizer_values()),
        **({} if "template" in drop else {"tokenizer.chat_template": CHATML}),
        **{name.replace("__", "."): value for name, value in metadata.items()},
    }
    writer = GGUFWriter(path, values.pop("general.architecture", "llama"))
    for name, value in values.items():
        add_value(writer, name, value)
    for name, weight in model.state_dict().items():
        array = weight.float().numpy()
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        if gguf_name(name) not in (*drop, "output.weight"):
            writer.add_tensor(gguf_name(name), permuted(array, heads) if heads else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_values() -> dict[str, Any]:
    tokens = vocabulary()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": ["Ċ Ċ"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
    }


def add_value(writer: Any, name: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(name, value)
