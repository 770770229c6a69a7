"""The keys of training configurations beyond those of transformers' TrainingArguments, with their descriptions.

They are separate from the classes passed to a Trainer (``config.py``, ``sft.py``) so that ``--help`` and the docs can be built
without importing transformers or torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from spin.alignment.core.settings import check_settings, same_as, setting
from spin.alignment.models.config import Dtype


@dataclass(frozen=True)
class OutputConfig:
    """Where a training program writes, and how it treats existing output."""

    output_dir: str = setting(
        help="folder for the trained model", group="output", path="folder", set_by_run=True, recorded=False
    )
    overwrite_output_dir: bool = setting(
        False, "replace an existing training run in output_dir", set_by_run=True, recorded=False
    )
    resume_from_checkpoint: str | bool | None = setting(
        None,
        "a checkpoint folder, or false to start from scratch",
        unset="the last complete checkpoint",
        set_by_run=True,
        recorded=False,
    )
    save_dtype: Dtype = setting(
        "auto",
        "precision of the saved model; auto: that in which its weights were trained, float32 with mixed precision or LoRA; "
        "float32 takes 4 bytes per weight on disk, 16 bits take 2 but round the update (docs/training.md#precision)",
    )
    license: str | None = setting(
        None,
        "licence of the trained model, named in its card: an identifier of the Hub, such as apache-2.0",
        unset="that of the model that training starts from, or unknown",
        recorded=False,
    )
    push_to_hub: bool = setting(
        False, "upload the final model and its metrics, but no intermediate checkpoints", recorded=False
    )
    tracker_group: str = setting(
        "",
        "name under which the trackers of report_to show this training together with others (docs/trackers.md)",
        set_by_run=True,
        recorded=False,
    )
    tracker_step: int = setting(
        0,
        "added to the steps that the trackers get, so that this training follows another on the same axis",
        ge=0,
        set_by_run=True,
        recorded=False,
    )
    tracker_dir: str | None = setting(
        None,
        "folder for trackers that write locally",
        unset="output_dir/trackers",
        path="folder",
        set_by_run=True,
        recorded=False,
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class SPINKeys:
    """The keys of preference training; defaults follow the paper's iteration 0."""

    loss_type: str = setting(
        "sigmoid",
        "loss function: sigmoid, hinge, ipo, sppo, sppo_single, sppo_hard, sppo_reward, space or tspin, or module:function "
        "(docs/training.md)",
        group="method",
    )
    beta: float = setting(0.1, "strength of the implicit KL constraint (lambda in the paper)", gt=0)
    loss_settings: dict[str, Any] = setting(
        {}, "settings specific to this loss, by name; shared ones such as beta and eta are keys of their own"
    )
    eta: float | None = setting(None, "step size that scales SPPO's targets", unset="1 / beta; sppo_reward: 1", gt=0)
    noise_ratio: float = setting(1.0, "generated responses per ground-truth response (space)", gt=0)
    alpha: float = setting(
        0.0, "coefficient of the weighted sequence-KL term subtracted from the margin (sigmoid, hinge, ipo)", ge=0
    )
    reverse: bool = setting(
        False, "train on reversed pairs: swap chosen and rejected, including their token weights and labels"
    )
    label_smoothing: float = setting(0.0, "probability that a preference is wrong (sigmoid)", ge=0, lt=0.5)
    length_normalize: bool = setting(False, "average token log-ratios instead of summing them")
    nll_weight: float = setting(
        0.0, "coefficient of the chosen response's negative log-likelihood (nats per token) added to the loss", ge=0
    )
    reference_dir: str | None = setting(
        None,
        "folder of the stored reference log-probs; several runs may share it",
        unset="output_dir/reference",
        path="folder",
        recorded=False,
    )

    per_device_train_batch_size: int = setting(
        8,
        "multiplied by gradient_accumulation_steps: pairs per optimiser step and process",
        group="batches",
        ge=1,
    )
    gradient_accumulation_steps: int = setting(1, "see per_device_train_batch_size", ge=1)
    batching: Literal["packed", "padded"] = setting(
        "packed",
        "packed: no padding, one prompt per pair; padded: two rows per pair, per_device_train_batch_size pairs at a time",
    )
    max_tokens_per_batch: int | None = setting(
        None,
        "tokens (prompt + chosen + rejected) per packed micro-batch; affects memory and speed, never the result",
        unset="as many as fit in memory",
        ge=1,
        recorded=False,
    )
    share_prompts: bool = setting(
        True, "pack the prompt once for both responses; false: repeat it before each response"
    )
    fused_head: bool = setting(
        True, "compute the LM head's gradient while its logits exist; false: recompute the logits in the backward pass"
    )
    packed_attention: str = setting(
        "auto",
        "attention kernel for packed rows: auto, varlen (GPU, 16-bit), flex (GPU) or sdpa; attn_implementation is then used only "
        "for the padded rows they are checked against",
    )

    learning_rate: float = setting(5e-7, "peak learning rate", group="optimiser", gt=0)
    lr_scheduler_type: str = setting("linear", "learning-rate schedule: any name known to transformers")
    warmup_steps: float = setting(0.1, "number of warm-up steps; below 1: as a fraction of all steps", ge=0)
    weight_decay: float = setting(0.0, "weight decay", ge=0)
    optim: str = setting(
        "rmsprop", "any name known to transformers; rmsprop has bias correction (docs/training.md#optimisers)"
    )
    optim_args: str | None = setting(
        None, "optimiser settings as key=value,key=value; rmsprop: alpha=0.99,eps=1e-8,bias_correction=true"
    )

    seed: int = setting(
        42, "seed for the data order and all other randomness", group="course", ge=0, lt=2**32, set_by_run=True
    )
    logging_steps: float = setting(10, "number of steps between log lines", gt=0, recorded=False)
    save_strategy: str = setting("epoch", "when to save a checkpoint: no, steps, epoch", recorded=False)
    select: Literal["last", "best"] = setting(
        "last",
        "which checkpoint becomes the model: the last one, or that with the best metric_for_best_model (loss by default) on the "
        "test split, measured whenever one is saved (docs/evaluation.md#selecting-a-checkpoint)",
    )


@dataclass
class SFTKeys:
    """The SFT keys that TRL does not have, and those whose defaults differ from TRL's: no feature is on unless requested."""

    batching: Literal["packed", "padded"] = same_as(
        SPINKeys,
        "batching",
        group="batches",
        help="packed: no padding; padded: per_device_train_batch_size rows at a time, for models whose rows cannot be packed",
    )
    max_tokens_per_batch: int | None = same_as(
        SPINKeys,
        "max_tokens_per_batch",
        recorded=False,
        help="tokens per packed micro-batch; affects memory and speed, never the result",
    )
    packed_attention: str = same_as(SPINKeys, "packed_attention")

    learning_rate: float = setting(2e-5, "peak learning rate", group="optimiser", gt=0)
    bf16: bool = setting(False, "mixed precision in bfloat16", group="course")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, but slower")
    seed: int = setting(42, "seed for the data order and all other randomness", ge=0, lt=2**32, set_by_run=True)
    logging_steps: float = setting(10, "number of steps between log lines", gt=0, recorded=False)
    save_strategy: str = setting("epoch", "when to save a checkpoint: no, steps, epoch", recorded=False)
    select: Literal["last", "best"] = same_as(SPINKeys, "select")
