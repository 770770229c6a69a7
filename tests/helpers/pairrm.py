"""A tiny random PairRM in both published forms, and its forward pass written out in plain torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

WIDTH, INNER, LAYERS, HEADS, BUCKETS = 128, 64, 2, 2, 16
MARKS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
_PIECES = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "▁",
    "the",
    "▁the",
    "ing",
    "▁a",
    *"abcdefghijklmnopqrstuvwxyz.!?'<|>0123456789",
]


def save_pairrm(
    folder: Path, form: str = "ranker", source: int = 24, candidate: int = 8, seed: int = 0, **changes: Any
) -> Path:
    """Save a checkpoint as ``llm-blender/PairRM`` ("ranker") or ``llm-blender/PairRM-hf`` ("hf") has it.

    Args:
        source, candidate: longest parts in tokens; only the first form names them.
        changes: entries of config.json.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _save_tokenizer(folder, with_marks=form == "hf")
    size = tokenizer.get_vocab_size() + (0 if form == "hf" else len(MARKS))
    save_file(random_weights(size, seed), folder / "model.safetensors", {"format": "pt"})
    ranker = {
        "ranker_type": "pairranker",
        "model_type": "deberta",
        "model_name": "microsoft/deberta-v3-large",
        "cache_dir": None,
        "load_checkpoint": None,
        "source_maxlength": source,
        "candidate_maxlength": candidate,
        "n_tasks": 1,
        "num_pos": 5,
        "num_neg": 5,
        "loss_type": "instructgpt",
        "reduce_type": "linear",
        "inference_mode": "bubble",
        "drop_out": 0.05,
        "fp16": True,
    }
    encoder = {
        "architectures": ["DebertaV2PairRM"],
        "model_type": "deberta-v2",
        "vocab_size": size,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "position_buckets": BUCKETS,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-7,
        "max_position_embeddings": 512,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "relative_attention": True,
        "share_att_key": True,
        "type_vocab_size": 0,
        "n_tasks": 1,
        "drop_out": 0.05,
        **dict(
            zip(
                ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id"),
                range(size - 4, size),
                strict=True,
            )
        ),
    }
    (folder / "config.json").write_text(json.dumps((encoder if form == "hf" else ranker) | changes))
    return folder


def _save_tokenizer(folder: Path, with_marks: bool) -> Any:
    """Save a tokenizer built as DeBERTa-v3's is: unigram pieces, a space before every part, NFKC before them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = [(piece, 0.0 if piece.startswith("[") else -float(5 - min(3, len(piece)))) for piece in _PIECES]
    core = Tokenizer(models.Unigram(pieces, unk_id=3))
    core.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    core.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])
    if with_marks:
        core.add_tokens([AddedToken(mark) for mark in MARKS])
    core.save(str(folder / "tokenizer.json"))
    names = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "bos_token": "[CLS]",
        "eos_token": "[SEP]",
        "unk_token": "[UNK]",
    }
    names |= {"pad_token": "[PAD]", "mask_token": "[MASK]", "tokenizer_class": "DebertaV2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return core


def random_weights(vocabulary: int, seed: int) -> dict[str, Any]:
    """The published names of all weights, with random values large enough for every part of the input to matter."""
    import torch

    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.2) -> Any:
        return torch.randn(shape, generator=draw) * scale

    weights: dict[str, Any] = {}

    def linear(name: str, out: int, width: int) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = normal(out, width, scale=width**-0.5), normal(out)

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + normal(WIDTH), normal(WIDTH)

    weights["pretrained_model.embeddings.word_embeddings.weight"] = normal(vocabulary, WIDTH, scale=1.0)
    norm("pretrained_model.embeddings.LayerNorm")
    for layer in (f"pretrained_model.encoder.layer.{number}" for number in range(LAYERS)):
        for part in ("query_proj", "key_proj", "value_proj"):
            linear(f"{layer}.attention.self.{part}", WIDTH, WIDTH)
        linear(f"{layer}.attention.output.dense", WIDTH, WIDTH)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", INNER, WIDTH)
        linear(f"{layer}.output.dense", WIDTH, INNER)
        norm(f"{layer}.output.LayerNorm")
    weights["pretrained_model.encoder.rel_embeddings.weight"] = normal(2 * BUCKETS, WIDTH, scale=1.0)
    norm("pretrained_model.encoder.LayerNorm")
    linear("head_layer.1", WIDTH, 2 * WIDTH)
    linear("head_layer.4", 1, WIDTH)
    return weights


def plain_logit(weights: dict[str, Any], ids: list[int], marks: tuple[int, int, int]) -> float:
    """The logit of one input without padding: DeBERTa-v3's equations (arXiv 2006.03654, 2111.09543) and PairRM's head."""
    import torch

    get = {name: value.double() for name, value in weights.items()}

    def linear(name: str, x: Any) -> Any:
        return x @ get[f"{name}.weight"].T + get[f"{name}.bias"]

    def norm(name: str, x: Any) -> Any:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-7).sqrt()
        return scaled * get[f"{name}.weight"] + get[f"{name}.bias"]

    x = norm("pretrained_model.embeddings.LayerNorm", get["pretrained_model.embeddings.word_embeddings.weight"][ids])
    relative = norm("pretrained_model.encoder.LayerNorm", get["pretrained_model.encoder.rel_embeddings.weight"])
    distance = torch.tensor([[_bucket(i - j) + BUCKETS for j in range(len(ids))] for i in range(len(ids))])
    distance = distance.clamp(0, 2 * BUCKETS - 1)
    size = WIDTH // HEADS
    for layer in (f"pretrained_model.encoder.layer.{number}" for number in range(LAYERS)):
        own = f"{layer}.attention.self"
        heads = []
        for cut in (slice(head * size, (head + 1) * size) for head in range(HEADS)):
            query, key, value = (linear(f"{own}.{part}_proj", x)[:, cut] for part in ("query", "key", "value"))
            far_query, far_key = (linear(f"{own}.{part}_proj", relative)[:, cut] for part in ("query", "key"))
            to_content = query @ key.T
            to_position = (query @ far_key.T).gather(1, distance)  # content of i, position of j seen from i
            from_position = (key @ far_query.T).gather(1, distance.T).T  # position of i seen from j, content of j
            scores = (to_content + to_position + from_position) / math.sqrt(3 * size)
            heads.append(scores.softmax(-1) @ value)
        x = norm(
            f"{layer}.attention.output.LayerNorm", linear(f"{layer}.attention.output.dense", torch.cat(heads, -1)) + x
        )
        inner = torch.nn.functional.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", inner) + x)
    source, first, second = (x[ids.index(mark)] for mark in marks)
    left, right = (
        linear("head_layer.4", torch.tanh(linear("head_layer.1", torch.cat([source, candidate]))))
        for candidate in (first, second)
    )
    return float((left - right).mean())


def _bucket(distance: int) -> int:
    """Exact for short distances, logarithmic up to 512."""
    middle = BUCKETS // 2
    if abs(distance) <= middle:
        return distance
    steps = math.log(abs(distance) / middle) / math.log(511 / middle) * (middle - 1)
    return int(math.copysign(math.ceil(steps) + middle, distance))
