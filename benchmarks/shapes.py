"""What is measured: models of known size with random weights, pairs of known lengths, and the number of operations they need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAD_ID, EOS_ID, FIRST_WORD_ID = 0, 1, 2
VERIFY_TOKENS = 24  # longest prompt and longest response of the short batch that all contenders must agree on
# transformers' LengthGroupedSampler sorts this many batches at a time.
MEGA_BATCH = 50

Pair = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids; responses end with EOS


@dataclass(frozen=True)
class Shape:
    """Log-normal lengths in tokens, all with the same spread (the standard deviation of their logarithm)."""

    prompt: int
    chosen: int
    rejected: int
    spread: float
    batch_size: int
    max_length: int


# The spreads reproduce the ratio of padded to distinct tokens in shuffled batches of such data: about 2.2 and 1.95.
SHAPES = {
    "uc": Shape(prompt=153, chosen=252, rejected=256, spread=0.5, batch_size=8, max_length=1024),
    "lp": Shape(prompt=701, chosen=150, rejected=149, spread=0.15, batch_size=4, max_length=1536),
}


@dataclass(frozen=True)
class ModelShape:
    """The transformers architecture and the sizes of a model."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool = True


MODELS = {
    "tiny": ModelShape("llama", 512, 64, 2, 4, 2, 128),
    "28m": ModelShape("llama", 32_000, 512, 4, 8, 8, 1376),
    "135m": ModelShape("llama", 49_152, 576, 30, 9, 3, 1536),  # SmolLM2-135M
    "0.5b": ModelShape("qwen2", 151_936, 896, 24, 14, 2, 4864),
    "1.5b": ModelShape("qwen2", 151_936, 1536, 28, 12, 2, 8960),
    "7b": ModelShape("mistral", 32_000, 4096, 32, 32, 8, 14_336, tie_word_embeddings=False),
}


def make_model(shape: ModelShape, max_length: int, seed: int, device: str = "cpu", dtype: str = "float32") -> Any:
    """Return a model of this shape with random weights, drawn on the device: 7B weights take minutes on a CPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {name: value for name, value in vars(shape).items() if name != "architecture"}
    config = AutoConfig.for_model(
        shape.architecture,
        **sizes,
        max_position_embeddings=max_length,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
    )
    if shape.architecture == "mistral":
        config.sliding_window = None
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def load_model(folder: str, dtype: str = "float32") -> Any:
    """Return a saved model in a precision, with PyTorch's attention."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")


def make_tokenizer(vocab_size: int) -> Any:
    """Return a tokenizer of one word per id, so that text becomes exactly the ids it was written from."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD_ID, "</s>": EOS_ID} | {f"w{number}": number for number in range(FIRST_WORD_ID, vocab_size)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def as_text(ids: Sequence[int]) -> str:
    """Return the text of ids, each word preceded by a space, so that texts can be concatenated."""
    return "".join(" </s>" if number == EOS_ID else f" w{number}" for number in ids)


def draw_lengths(shape: Shape, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return lengths of prompt, chosen and rejected in tokens, int64 of shape ``(count, 3)``.

    Prompt plus response are truncated to the shape's max_length, the prompt to two thirds of it.
    """
    medians = np.array([shape.prompt, shape.chosen, shape.rejected], dtype=float)
    lengths = np.exp(np.log(medians) + shape.spread * rng.standard_normal((count, 3))).astype(np.int64)
    lengths = lengths.clip(min=8)
    lengths[:, 0] = lengths[:, 0].clip(max=shape.max_length * 2 // 3)
    lengths[:, 1:] = np.minimum(lengths[:, 1:], shape.max_length - lengths[:, :1])
    return lengths


def make_pairs(lengths: NDArray[np.int64], vocab_size: int, rng: np.random.Generator) -> list[Pair]:
    """Return pairs of random ids with these lengths; responses end with EOS, which their length counts."""

    def words(length: int) -> list[int]:
        return rng.integers(FIRST_WORD_ID, vocab_size, length).tolist()

    return [
        {
            "prompt_ids": words(prompt),
            "chosen_ids": [*words(chosen - 1), EOS_ID],
            "rejected_ids": [*words(rejected - 1), EOS_ID],
        }
        for prompt, chosen, rejected in lengths.tolist()
    ]


@dataclass(frozen=True)
class Plan:
    """The pairs of a run, batch by batch: as shuffling forms batches, and as transformers' LengthGroupedSampler does.

    Both begin with the same pairs: the short batch that is verified, twice, and the warm-up batches.
    """

    shuffled: list[Pair]
    grouped: list[Pair]

    def pairs(self, grouped: bool) -> list[Pair]:
        return self.grouped if grouped else self.shuffled


def make_plan(shape: Shape, batch_size: int, warmup: int, measured: int, vocab_size: int, seed: int) -> Plan:
    """Return the pairs of ``warmup`` and ``measured`` batches of both kinds.

    Shuffled batches are drawn at random. Grouped batches are selected evenly, from the longest to the shortest, from those that
    the sampler forms of complete mega-batches, so that they are grouped as well as in a real run.
    """
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    rng = np.random.default_rng(seed)
    first = [rng.integers(8, VERIFY_TOKENS + 1, (batch_size, 3)), draw_lengths(shape, warmup * batch_size, rng)]
    head = make_pairs(np.concatenate(first), vocab_size, rng)
    shuffled = make_pairs(draw_lengths(shape, measured * batch_size, rng), vocab_size, rng)
    pool = draw_lengths(shape, MEGA_BATCH * -(-measured // MEGA_BATCH) * batch_size, rng)
    longest = (pool[:, 0] + pool[:, 1:].max(axis=1)).tolist()
    generator = torch.Generator().manual_seed(seed)
    indices = get_length_grouped_indices(longest, batch_size, mega_batch_mult=MEGA_BATCH, generator=generator)
    batches = np.array(indices).reshape(-1, batch_size)
    batches = batches[((np.arange(measured) + 0.5) / measured * len(batches)).astype(int)]
    grouped = make_pairs(pool[rng.permutation(batches).ravel()], vocab_size, rng)
    head = head[:batch_size] + head
    return Plan(head + shuffled, head + grouped)


def distinct_tokens(pair: Pair) -> int:
    """Return P + C + R: the tokens that any method must read at least once."""
    return sum(map(len, pair.values()))


def padded_tokens(pairs: Sequence[Pair]) -> int:
    """Return the size of the padded block of the pairs as one batch of ``2B`` rows."""
    widths = [len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs]
    return 2 * len(pairs) * max(widths)


@dataclass(frozen=True)
class ModelSize:
    """The sizes that decide the number of operations: weights of trunk and head, layers, total width of the attention heads."""

    trunk: int
    head: int
    layers: int
    attention_width: int

    @classmethod
    def of(cls, model: Any) -> ModelSize:
        config, head = model.config, model.get_output_embeddings().weight
        outside = {id(head), id(model.get_input_embeddings().weight)}
        trunk = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2 and id(weight) not in outside)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(trunk, head.numel(), config.num_hidden_layers, config.num_attention_heads * width)


def flops_per_pair(size: ModelSize, lengths: Sequence[int], epochs: float) -> float:
    """Return the floating-point operations that a pair needs per epoch, regardless of the method that trains on it.

    ``lengths`` are the lengths of prompt, chosen and rejected in tokens.

    ``(6 + 2/E) (N D + H T) + (3 + 1/E) A`` with N trunk and H head weights, D = P + C + R and T = C + R tokens and the forward
    pass of attention A: a training step costs three forward passes, the reference one in E epochs. The prompt is read
    once: causal attention over P + C, and R over P and itself, 4 operations per layer, query, key and unit of width.
    """
    prompt, chosen, rejected = lengths
    tokens, targets = prompt + chosen + rejected, chosen + rejected
    first = prompt + chosen
    seen = first * (first + 1) / 2 + rejected * prompt + rejected * (rejected + 1) / 2
    attention = 4 * size.layers * size.attention_width * seen
    return (6 + 2 / epochs) * (size.trunk * tokens + size.head * targets) + (3 + 1 / epochs) * attention


def mean_flops(size: ModelSize, pairs: Sequence[Pair], epochs: float) -> float:
    """Return the mean of ``flops_per_pair`` over pairs."""
    lengths = [[len(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")] for pair in pairs]
    return math.fsum(flops_per_pair(size, each, epochs) for each in lengths) / len(pairs)
