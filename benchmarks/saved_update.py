"""How much of what was learned survives saving: the margin gained before and after, by the precision of the saved model.

A tiny model with bfloat16 weights is trained with ``bf16: true`` (float32 copies of the weights) at the learning rates of SPIN's
iterations, saved with ``save_dtype`` float32 and bfloat16, and loaded again::

    python benchmarks/saved_update.py --out benchmarks/results/saved-update-cpu.json    # about two minutes on one CPU core

``margin`` is the mean over the pairs of ``[log pi(y) - log pi_0(y)] - [log pi(y') - log pi_0(y')]`` (nats), computed in float32,
where ``pi_0`` is the initial model.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LEARNING_RATES = (5e-7, 1e-7)
SAVE_DTYPES = ("float32", "bfloat16")
VOCABULARY = 256


def pairs_of(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Return pairs of random ids: prompts of 12 tokens, responses of 16; chosen and rejected differ in their distribution."""
    draw = random.Random(seed)

    def ids(length: int, low: int, high: int) -> list[int]:
        return [draw.randrange(low, high) for _ in range(length)]

    half = VOCABULARY // 2
    return [
        {
            "prompt_ids": ids(12, 3, VOCABULARY),
            "chosen_ids": ids(16, 3, half + 40),
            "rejected_ids": ids(16, half - 40, VOCABULARY),
        }
        for _ in range(count)
    ]


def initial_model(seed: int) -> Any:
    """Return a Llama of two layers with random weights that bfloat16 represents exactly."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    for weight in model.parameters():  # not the buffers: the frequencies of the positions stay in float32
        weight.data = weight.data.bfloat16()
    return model


def sequence_logps(model: Any, pairs: list[dict[str, list[int]]]) -> Any:
    """Return the log-probs of all responses (nats), computed in float32 and summed in float64: shape ``(2, pairs)``."""
    import torch

    model = model.float().eval()
    found = []
    for side in ("chosen", "rejected"):
        rows = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"] for pair in pairs])
        start = len(pairs[0]["prompt_ids"])
        with torch.no_grad():
            logps = model(rows).logits.log_softmax(dim=-1)[:, start - 1 : -1]  # (pairs, R, V)
        found.append(logps.gather(2, rows[:, start:, None]).double().sum(dim=(1, 2)))
    return torch.stack(found)


def margin(model: Any, start: Any, pairs: list[dict[str, list[int]]]) -> float:
    """Return the mean margin (nats) over the log-probs ``start`` of the initial model."""
    gained = sequence_logps(model, pairs) - start
    return float((gained[0] - gained[1]).mean())


def measure(learning_rate: float, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train at a constant learning rate; return the margin in memory, and after saving in each precision and loading again."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from spin.alignment.logprobs.batch import PairDataset
    from spin.alignment.models.precision import compute_name
    from spin.alignment.models.saving import save_checkpoint
    from spin.alignment.training.trainer import SPINConfig, SPINTrainer
    from tests.helpers import char_tokenizer

    pairs = pairs_of(options.pairs, options.seed)
    start = sequence_logps(initial_model(options.seed), pairs)
    arguments = SPINConfig(
        output_dir=str(folder),
        bf16=True,
        use_cpu=True,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        save_strategy="no",
        logging_steps=options.steps,
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )
    tokenizer = char_tokenizer()
    trainer = SPINTrainer(
        initial_model(options.seed), arguments, PairDataset(Dataset.from_list(pairs)), None, tokenizer, "initial"
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    found: dict[str, Any] = {}
    for name in SAVE_DTYPES:
        dtype = getattr(torch, name)
        saved = save_checkpoint(model, tokenizer, folder / name, dict(state), dtype, compute_name(arguments))
        loaded = AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
        size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
        found[name] = {"margin": margin(loaded, start, pairs), "bytes": size}
    plain = initial_model(options.seed).float()
    plain.load_state_dict(state)
    before = margin(plain, start, pairs)
    for entry in found.values():
        entry["share_kept"] = entry["margin"] / before
    return {"learning_rate": learning_rate, "margin_trained": before, "saved": found}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    rows = []
    for rate in LEARNING_RATES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(rate, options, Path(folder)))
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    # Without these instructions a CPU computes bfloat16 in software: slower, with the same rounding.
    cpu = Path("/proc/cpuinfo")
    settings["avx512_bf16"] = cpu.exists() and "avx512_bf16" in cpu.read_text()
    text = json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n"
    sys.stdout.write(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
