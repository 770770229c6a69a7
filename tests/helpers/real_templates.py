"""The chat templates that TRL ships, each with a byte-level tokenizer that has the control tokens of its model."""

from __future__ import annotations

from importlib import resources
from typing import Any, NamedTuple


def byte_tokenizer(
    template: str,
    special: tuple[str, ...] = (),
    plain: tuple[str, ...] = (),
    eos: str = "<eos>",
    bos: str | None = None,
) -> Any:
    """A tokenizer of one token per byte. ``special`` tokens are declared special, ``plain`` ones are only added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(["<pad>", *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token=eos, bos_token=bos)
    tokenizer.add_special_tokens({"additional_special_tokens": [text for text in special if text not in (eos, bos)]})
    if plain:
        tokenizer.add_tokens(list(plain))
    tokenizer.chat_template = template
    return tokenizer


class Model(NamedTuple):
    """The control tokens of a model family, and what ends its turns.

    ``ends`` are those of the real model's generation_config.json besides the EOS.
    """

    eos: str
    bos: str | None
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


_THOUGHT = ("<think>", "</think>")
CHATML = Model(
    "<|im_end|>", None, ("<|im_start|>", "<|endoftext|>"), ("<tool_call>", "</tool_call>"), ("<|endoftext|>",)
)
QWEN3 = CHATML._replace(plain=(*CHATML.plain, *_THOUGHT))
LFM = Model("<|im_end|>", "<|startoftext|>", ("<|im_start|>", "<|tool_call_start|>", "<|tool_call_end|>"), _THOUGHT)
LLAMA = Model(
    "<|eot_id|>",
    "<|begin_of_text|>",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|end_of_text|>", "<|python_tag|>"),
    (),
    ("<|eom_id|>", "<|end_of_text|>"),
)
DEEPSEEK = Model("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"), _THOUGHT)
PHI = Model(
    "<|endoftext|>", "<s>", ("<|user|>", "<|assistant|>", "<|end|>", "<|system|>"), (), ("<|end|>", "<|assistant|>")
)
GEMMA = Model("<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>"), ("\n\n", "<h1>"), ("<end_of_turn>",))
_GEMMA_4_TOKENS = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool_call>", "<tool_call|>")
GEMMA_4 = Model("<eos>", "<bos>", (*_GEMMA_4_TOKENS, "<|tool_response>"), (), ("<turn|>", "<|tool_response>"))
_COHERE_TOKENS = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")
COHERE = Model("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", (*_COHERE_TOKENS, "<|START_RESPONSE|>", "<|END_RESPONSE|>"))
GLM = Model(
    "<|endoftext|>",
    None,
    ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    _THOUGHT,
    ("<|user|>", "<|observation|>"),
)
GPT_OSS = Model(
    "<|return|>",
    "<|startoftext|>",
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|endoftext|>"),
    (),
    ("<|endoftext|>", "<|call|>"),
)
MUSE = Model("<|eot|>", None, ("<|start|>", "<|message|>", "<|eom|>", "<|patch|>"))


class Shipped(NamedTuple):
    """What a template does, as TRL ships it.

    Attributes:
        end: the token that ends a turn.
        before: what it writes between the generation prompt and the text of a response without a thought.
        opens: the thought that the generation prompt opens.
        system: what becomes of a system turn: "kept", or "refused" (then ``--system fold``).
        reasoning: whether it renders ``reasoning_content``; where it opens a thought, it is rendered in any case.
        tools: whether it renders tools and tool calls.
        date: whether it writes the date.
    """

    model: Model
    end: str
    before: str = ""
    opens: str = ""
    system: str = "kept"
    reasoning: bool = False
    tools: bool = False
    date: bool = False

    def tokenizer(self, name: str) -> Any:
        model = self.model
        return byte_tokenizer(template_text(name), model.special, model.plain, model.eos, model.bos)


_EMPTY, _CLOSED = "<think>\n\n</think>\n\n", "\n</think>\n\n"
_GEMMA_4 = Shipped(GEMMA_4, "<turn|>", tools=True)
_NEMOTRON = Shipped(QWEN3, "<|im_end|>", "</think>", "<think>\n", reasoning=True, tools=True)
_OPENING_QWEN = Shipped(QWEN3, "<|im_end|>", _CLOSED, "<think>\n", reasoning=True, tools=True)
_OPENING_DEEPSEEK = Shipped(DEEPSEEK, "<｜end▁of▁sentence｜>", _CLOSED, "<think>\n", reasoning=True)
SHIPPED = {
    "cohere": Shipped(COHERE, "<|END_OF_TURN_TOKEN|>"),
    "cohere2": Shipped(COHERE, "<|END_OF_TURN_TOKEN|>"),
    "deepseek_r1_distill": _OPENING_DEEPSEEK,
    "deepseekv3": _OPENING_DEEPSEEK,
    "diffusion_gemma": _GEMMA_4._replace(reasoning=True),
    "gemma": Shipped(GEMMA, "<end_of_turn>", system="refused"),
    "gemma3": Shipped(GEMMA, "<end_of_turn>"),
    "gemma4": _GEMMA_4,
    "gemma4_v5": _GEMMA_4._replace(reasoning=True),
    "glm4moe": Shipped(GLM, "<|endoftext|>", "\n<think></think>\n", reasoning=True, tools=True),
    "gptoss": Shipped(GPT_OSS, "<|return|>", "<|channel|>final<|message|>", reasoning=True, tools=True, date=True),
    "lfm2": Shipped(LFM, "<|im_end|>"),
    "lfm2_2_5": Shipped(LFM, "<|im_end|>", reasoning=True, tools=True),
    "lfm2_2_5_v2": Shipped(LFM, "<|im_end|>", reasoning=True, tools=True),
    "llama3": Shipped(LLAMA, "<|eot_id|>"),
    "llama3_1": Shipped(LLAMA, "<|eot_id|>", tools=True),
    "llama3_2": Shipped(LLAMA, "<|eot_id|>", tools=True, date=True),
    "muse_glimmer": Shipped(MUSE, "<|eot|>", " to=user<|message|>", reasoning=True, tools=True, date=True),
    "nemotron_3_5_lightning": _NEMOTRON,
    "nemotron_3_nano": _NEMOTRON,
    "nemotron_3_super": _NEMOTRON,
    "nemotron_3_ultra": _NEMOTRON,
    "phi3": Shipped(PHI, "<|end|>"),
    "phi3_5": Shipped(PHI, "<|end|>"),
    "qwen2_5": Shipped(CHATML, "<|im_end|>", tools=True),
    "qwen3": Shipped(QWEN3, "<|im_end|>", _EMPTY, reasoning=True, tools=True),
    "qwen3_5_nothink": Shipped(QWEN3, "<|im_end|>", tools=True),
    "qwen3_5_think": _OPENING_QWEN,
    "qwen3_6": _OPENING_QWEN,
    "qwen3_8": _OPENING_QWEN,
    "qwen3_instruct_2507": Shipped(CHATML, "<|im_end|>", tools=True),
    "qwen3_vl": Shipped(CHATML, "<|im_end|>", tools=True),
}


def template_text(name: str) -> str:
    """The text of a template as the installed TRL ships it."""
    return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
