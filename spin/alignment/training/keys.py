"""The keys of training configurations beside those of transformers' TrainingArguments, with their sentences.

They stand apart from the classes that are passed to a Trainer (``config.py``, ``sft.py``) so that ``--help`` and the docs need
neither transformers nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from spin.alignment.core.settings import check_settings, setting


@dataclass(frozen=True)
class OutputConfig:
    """Where a training program writes, and what it does with what is there."""

    output_dir: str = setting(help="folder of the new model", group="output", set_by_run=True, recorded=False)
    overwrite_output_dir: bool = setting(False, "replace another training in it", set_by_run=True, recorded=False)
    resume_from_checkpoint: str | bool | None = setting(
        None,
        "a checkpoint folder, or false to start anew",
        unset="the last complete one",
        set_by_run=True,
        recorded=False,
    )
    push_to_hub: bool = setting(
        False, "upload the finished model and its metrics, not the checkpoints on the way", recorded=False
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class SPINKeys:
    """The keys of preference training; defaults follow the paper's iteration 0."""

    loss_type: str = setting(
        "sigmoid",
        "what a pair costs: sigmoid, hinge, ipo, sppo, sppo_single, sppo_hard, sppo_reward, space or tspin, or module:function "
        "(docs/training.md)",
        group="method",
    )
    beta: float = setting(0.1, "strength of the implicit KL constraint (lambda in the paper)", gt=0)
    loss_settings: dict[str, Any] = setting(
        {}, "settings that this loss alone has, by name; beta, eta and the others are keys themselves"
    )
    eta: float | None = setting(None, "step of SPPO's targets", unset="1 / beta; sppo_reward: 1", gt=0)
    noise_ratio: float = setting(1.0, "generated responses per real one (space)", gt=0)
    alpha: float = setting(
        0.0, "weight of the weighted sequence-KL term taken off the margin (sigmoid, hinge, ipo)", ge=0
    )
    reverse: bool = setting(
        False, "train on the reversed pairs: chosen and rejected, with their weights and labels, change places"
    )
    label_smoothing: float = setting(0.0, "probability that a preference is wrong (sigmoid)", ge=0, lt=0.5)
    length_normalize: bool = setting(False, "average token log-ratios instead of summing them")
    nll_weight: float = setting(
        0.0, "weight of the chosen response's negative log-likelihood (nats per token) added to the loss", ge=0
    )
    reference_dir: str | None = setting(
        None,
        "where the reference log-probs are stored; may be shared by runs",
        unset="output_dir/reference",
        recorded=False,
    )

    per_device_train_batch_size: int = setting(
        8,
        "times gradient_accumulation_steps: pairs that a process gives to an optimiser step",
        group="batches",
        ge=1,
    )
    gradient_accumulation_steps: int = setting(1, "see per_device_train_batch_size", ge=1)
    batching: Literal["packed", "padded"] = setting(
        "packed",
        "packed: no padding, the prompt once per pair; padded: two rows per pair, per_device_train_batch_size pairs at a time",
    )
    max_tokens_per_batch: int | None = setting(
        None,
        "tokens (prompt + chosen + rejected) of a packed micro-batch; changes memory and speed, never the result",
        unset="what the memory allows",
        ge=1,
        recorded=False,
    )
    share_prompts: bool = setting(True, "pack a prompt once for both responses; false: before each response")
    fused_head: bool = setting(
        True, "take the head's gradient while its logits exist; false: make the logits again in the backward pass"
    )
    packed_attention: str = setting(
        "auto",
        "kernel of packed rows: auto, varlen (GPU, 16 bits), flex (GPU) or sdpa; attn_implementation then only serves the "
        "padded rows they are checked against",
    )

    learning_rate: float = setting(5e-7, "highest learning rate", group="optimiser", gt=0)
    lr_scheduler_type: str = setting("linear", "how the learning rate falls: any name of transformers")
    warmup_steps: float = setting(0.1, "steps of warm-up; below 1: a share of all steps", ge=0)
    weight_decay: float = setting(0.0, "decay of the weights", ge=0)
    optim: str = setting(
        "rmsprop", "any name of transformers; rmsprop is corrected for its start (docs/training.md#optimisers)"
    )
    optim_args: str | None = setting(
        None, "settings of the optimiser; rmsprop: alpha=0.99,eps=1e-8,bias_correction=true"
    )

    seed: int = setting(42, "seed of the data order and of everything random", group="course", ge=0, set_by_run=True)
    logging_steps: float = setting(10, "steps between two log lines", recorded=False)
    save_strategy: str = setting("epoch", "when a checkpoint is saved: no, steps, epoch", recorded=False)


@dataclass
class SFTKeys:
    """The keys of SFT whose defaults differ from TRL's: nothing is switched on unasked."""

    learning_rate: float = setting(2e-5, "highest learning rate", group="optimiser", gt=0)
    bf16: bool = setting(False, "mixed precision in bfloat16", group="course")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, slower")
    seed: int = setting(42, "seed of the data order and of everything random", ge=0, set_by_run=True)
    logging_steps: float = setting(10, "steps between two log lines", recorded=False)
    save_strategy: str = setting("epoch", "when a checkpoint is saved: no, steps, epoch", recorded=False)
