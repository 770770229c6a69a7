"""One whole iteration of SPIN (self-play fine-tuning, arXiv 2401.01335) on one page of torch and transformers.

    python recipes/spin_minimal.py MODEL DATA.jsonl OUT

MODEL is a chat model (folder or Hub name) that was fine-tuned on DATA.jsonl, lines of {"prompt": "...", "response": "..."}.
The model answers its own training prompts, then learns to prefer the human answer over its own. OUT is the result, and
the MODEL of the next iteration: run the page again with it.

The programs in spin/ compute the same pairs and the same losses (tests/programs/test_recipe.py holds them against this page).
They add what a run of some size needs: many servers, vLLM, truncation, prompts shared in packed rows, LoRA, sharded
training, resuming after a crash, and other pairings, token weights and losses.

Shapes: N pairs in all, B pairs in a batch, P tokens of the longest prompt, R of the longest response, T of the longest
prompt + response, V entries of the vocabulary. Log-probs are in nats.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

# -----------------------------------------------------------------------------
# Settings: the defaults are those of the paper's first iteration, with a smaller batch
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("model", help="chat model to start from: it is the opponent, and becomes the policy")
parser.add_argument("data", help="the data it was fine-tuned on: a jsonl file of prompt and response")
parser.add_argument("out", help="folder of the trained model and of pairs.jsonl")
parser.add_argument("--temperature", type=float, default=1.0, help="of the opponent's responses; 0 is greedy")
parser.add_argument("--max_new_tokens", type=int, default=256, help="longest response of the opponent")
parser.add_argument("--beta", type=float, default=0.1, help="how strongly the policy is held to its opponent")
parser.add_argument("--learning_rate", type=float, default=5e-7)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch_size", type=int, default=8, help="pairs in an update, prompts in a batch of generation")
parser.add_argument("--seed", type=int, default=42)
options = parser.parse_args()
torch.manual_seed(options.seed)
device = "cuda" if torch.cuda.is_available() else "cpu"

# -----------------------------------------------------------------------------
# Model and data: the chat template makes token ids of every prompt and human answer
tokenizer = AutoTokenizer.from_pretrained(options.model)
# float32, because 16 bits would round such small updates away. eval() turns dropout off, here and in training:
# before the first update the policy has to be its opponent exactly.
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device).eval()
end_id = tokenizer.eos_token_id
pad_id = end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # fills tensors, is never learned

with Path(options.data).open(encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
prompts, chosen = [], []  # N lists of token ids each
for row in rows:
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    if whole[: len(prompt)] != prompt or end_id not in whole[len(prompt) :]:
        raise SystemExit(
            "this page needs a chat template that puts the response behind the prompt and ends it with EOS"
        )
    prompts.append(prompt)
    chosen.append(whole[len(prompt) : whole.index(end_id, len(prompt)) + 1])  # EOS included, what follows it is not
batches = torch.arange(len(prompts)).split(options.batch_size)  # row numbers, (B,) each


def pad(rows: list[list[int]], filling: int, side: str = "right") -> torch.Tensor:
    """Return rows of different lengths as one tensor."""
    return pad_sequence([torch.tensor(row) for row in rows], True, filling, side).to(device)


# -----------------------------------------------------------------------------
# Generate: the opponent answers every prompt
def generate(prompt_ids: list[list[int]]) -> list[list[int]]:
    """Return the ids of one response to each of B prompts, EOS included where the response came to its end."""
    # Padded on the left, all prompts end in column P and all responses begin in the next one.
    input_ids = pad(prompt_ids, pad_id, "left")  # (B, P)
    mask = pad([[1] * len(ids) for ids in prompt_ids], 0, "left")  # (B, P), 0: padding
    sampled = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    outputs = model.generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=options.max_new_tokens,
        eos_token_id=end_id,
        pad_token_id=pad_id,
        **(sampled if options.temperature > 0 else {"do_sample": False}),
    )  # (B, P + R)
    responses = outputs[:, input_ids.shape[1] :].tolist()
    # A response that was cut at max_new_tokens has no EOS and is given none: the model did not say it.
    return [ids[: ids.index(end_id) + 1] if end_id in ids else ids for ids in responses]


rejected = [response for numbers in batches for response in generate([prompts[i] for i in numbers])]

# -----------------------------------------------------------------------------
# Pair: the human answer is chosen, the model's own is rejected. The ids that were sampled are the ids that are trained
# on: decoding and encoding them again could give others.
Path(options.out).mkdir(parents=True, exist_ok=True)
with (Path(options.out) / "pairs.jsonl").open("w", encoding="utf-8") as file:
    for prompt_ids, chosen_ids, rejected_ids in zip(prompts, chosen, rejected, strict=True):
        pair = {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
        file.write(json.dumps(pair | {"rejected": tokenizer.decode(rejected_ids)}) + "\n")


# -----------------------------------------------------------------------------
# Reference: the log-probs of all responses under the opponent. They never change, so they are computed once, before the
# first update, and no second model is ever in memory.
def pair_logps(numbers: torch.Tensor) -> torch.Tensor:
    """Return the log-prob of each chosen (row 0) and rejected (row 1) response of B pairs, of shape (2, B)."""
    rows = [(prompts[i], responses[i]) for responses in (chosen, rejected) for i in numbers]  # 2B
    input_ids = pad([p + r for p, r in rows], pad_id)  # (2B, T)
    mask = pad([[1] * len(p + r) for p, r in rows], 0)  # (2B, T), 0: padding
    is_response = pad([[0] * len(p) + [1] * len(r) for p, r in rows], 0)  # (2B, T)
    logits = model(input_ids, attention_mask=mask).logits  # (2B, T, V)
    # The logits at position t are about the token at t + 1.
    logps = logits[:, :-1].log_softmax(dim=-1).gather(2, input_ids[:, 1:, None]).squeeze(2)  # (2B, T - 1)
    return (logps * is_response[:, 1:]).sum(dim=1).view(2, -1)


with torch.no_grad():
    reference = torch.cat([pair_logps(numbers) for numbers in batches], dim=1)  # (2, N)

# -----------------------------------------------------------------------------
# Loss and update: raise the human answer over the own one, relative to the opponent
optimizer = torch.optim.RMSprop(model.parameters(), alpha=0.99)
steps, step = options.epochs * len(batches), 0
for _ in range(options.epochs):
    for numbers in torch.randperm(len(prompts)).split(options.batch_size):  # (B,)
        logratios = pair_logps(numbers) - reference[:, numbers]  # (2, B): log of policy / opponent
        margins = options.beta * (logratios[0] - logratios[1])  # (B,)
        loss = -logsigmoid(margins).mean()  # ln 2 before the first update
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # The rate falls to 0 in a line. RMSprop's mean of squares starts at 0: without Adam's correction of that bias
        # its first step would be 1 / sqrt(1 - alpha) = 10 times as large as the rate says.
        correction = (1 - 0.99 ** (step + 1)) ** 0.5
        rate = options.learning_rate * (1 - step / steps)
        optimizer.param_groups[0].update(lr=rate * correction, eps=1e-8 * correction)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        right = (margins > 0).float().mean().item()
        print(f"step {step} of {steps}: loss {loss.item():.6f}, margin {margins.mean().item():.4f}, right {right:.2f}")

# -----------------------------------------------------------------------------
# Save: the policy is the opponent of the next iteration
model.save_pretrained(options.out)
tokenizer.save_pretrained(options.out)
