"""The memory estimate against what tensors and processes really take; the token budget, and advice when it was too much."""

import json
import mmap
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from spin.alignment.core.errors import InputError
from spin.alignment.logprobs.collators import PackedCollator
from spin.alignment.logprobs.forward import batch_loss, install_packed_forward
from spin.alignment.methods.losses import LOSSES
from spin.alignment.training.memory import estimate as memory
from spin.alignment.training.memory.estimate import (
    MemoryEstimate,
    Sharding,
    StepSettings,
    automatic_budget,
    estimate_memory,
)
from spin.alignment.training.memory.probe import ActivationCost, Growth, ModelStats, measure_activations, saved_bytes
from spin.alignment.training.optimizers import RMSprop
from tests.helpers import run_script, tiny_llama

VOCAB, PAIR = 2000, 128


def packed(tokens, pair=PAIR, vocab=VOCAB):
    """Equal pairs, two fifths of their tokens the prompt's, with the opponent's log-probs."""
    response = 3 * pair // 10
    feature = {
        "prompt_ids": list(range(pair - 2 * response)),
        "chosen_ids": list(range(response)),
        "rejected_ids": list(range(5, 5 + response)),
        "chosen_reference": np.zeros(response, np.float32),
        "rejected_reference": np.zeros(response, np.float32),
    }
    return PackedCollator("sdpa", vocab)([feature] * (tokens // pair))


def training_model(vocab=VOCAB, checkpointing=False, fused_head=True, **shape):
    model = tiny_llama(vocab, max_position_embeddings=4096, **shape).train()
    install_packed_forward(model, fused_head)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def mean_loss(inputs):
    return LOSSES["sigmoid"](inputs, beta=0.1).losses.mean()


def estimate(model, tokens, pair=PAIR, vocab=VOCAB, bf16=False, accumulates=False, fused_head=True):
    def forward(count):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(packed=packed(count, count, vocab))

    settings = StepSettings("rmsprop", "cpu", 2 if bf16 else 4, pair, 6 * pair // 10, 0.6, fused_head)
    return estimate_memory(ModelStats.of(model), measure_activations(model, forward), settings, tokens, accumulates)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist, and the most that ever did."""

    def __init__(self):
        super().__init__()
        self.alive, self.total, self.peak = {}, 0, 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.total += storage.nbytes()
            self.peak = max(self.peak, self.total)
            weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, address):
        self.total -= self.alive.pop(address)

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        result = function(*arguments, **(settings or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result


def measured(model, batch, bf16, accumulates):
    """The most bytes of tensors in a step that is not the first, so that the optimiser has its states."""
    optimizer = RMSprop(model.parameters(), lr=1e-6)
    with LiveBytes() as live:
        for parameter in model.parameters():
            live.add(parameter)
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if not accumulates:
            optimizer.zero_grad()
        live.peak = 0
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = batch_loss(model, batch, mean_loss)
        loss.backward()
        optimizer.step()
    return live.peak


@pytest.mark.parametrize(
    "moment, tokens, vocab, choices",
    [
        ("head", 1024, VOCAB, {}),
        ("head", 1024, VOCAB, {"tied": True, "accumulates": True}),
        ("head", 1024, VOCAB, {"accumulates": True, "bf16": True}),
        ("head", 1024, VOCAB, {"checkpointing": True, "bf16": True, "tied": True}),
        ("head", 1024, VOCAB, {"fused_head": False}),
        ("head", 1024, VOCAB, {"fused_head": False, "checkpointing": True, "bf16": True}),
        ("start of the backward pass", 1024, 128, {}),
        ("start of the backward pass", 1024, 128, {"checkpointing": True, "accumulates": True}),
        ("gradient of the embedding", 128, 20_000, {"hidden_size": 128, "tied": True}),
        ("gradient of the embedding", 128, 20_000, {"hidden_size": 128, "tied": True, "accumulates": True}),
        ("end of the backward pass", 128, VOCAB, {"hidden_size": 128, "checkpointing": True}),
        ("optimiser step", 128, 20_000, {"hidden_size": 128}),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else None,
)
def test_the_estimate_is_what_the_tensors_of_a_step_take(moment, tokens, vocab, choices):
    bf16, accumulates = choices.get("bf16", False), choices.get("accumulates", False)
    fused_head = choices.get("fused_head", True)
    model = training_model(
        vocab,
        choices.get("checkpointing", False),
        fused_head,
        tie_word_embeddings=choices.get("tied", False),
        hidden_size=choices.get("hidden_size", 64),
        intermediate_size=176,
        num_hidden_layers=4,
    )
    found = estimate(model, tokens, vocab=vocab, bf16=bf16, accumulates=accumulates, fused_head=fused_head)
    assert found.moment == moment
    assert found.total == pytest.approx(measured(model, packed(tokens, vocab=vocab), bf16, accumulates), rel=0.1)


_PEAK = """
import ctypes, gc, json, sys, torch
from tests.training.test_memory import estimate, mean_loss, packed, training_model
from spin.alignment.logprobs.forward import batch_loss
from spin.alignment.training.optimizers import RMSprop

def resident(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def peak(model, batch):
    optimizer = RMSprop(model.parameters(), lr=1e-6)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    batch_loss(model, batch, mean_loss).backward()
    optimizer.step()
    return resident("VmHWM")

shape = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8)
for checkpointing in (False, True):  # libraries are loaded, kernels compiled
    peak(training_model(checkpointing=checkpointing), packed(256))
for tokens, checkpointing in json.loads(sys.argv[1]):
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    model = training_model(32_000, checkpointing, tie_word_embeddings=True, **shape)
    taken = peak(model, packed(tokens, 256, 32_000)) - before
    print(json.dumps([tokens, checkpointing, taken, estimate(model, tokens, 256, 32_000).total]), flush=True)
    del model
"""


@pytest.mark.slow
def test_the_estimate_is_what_a_process_takes():
    cases = [(1024, False), (4096, True)]
    # Memory is given back when a tensor goes; by default glibc keeps up to half as much again.
    done = run_script("-c", _PEAK, json.dumps(cases), MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(tokens, checkpointing) for tokens, checkpointing, *_ in results] == cases
    for tokens, checkpointing, taken, expected in results:
        assert expected == pytest.approx(taken, rel=0.2), (tokens, checkpointing)


def test_saved_bytes_count_each_storage_once_and_no_weights():
    layer = torch.nn.Linear(8, 16, bias=False)

    def forward(count):
        hidden = torch.tanh(layer(torch.ones(count, 8)))  # saves the input, and its own result
        return (hidden * hidden).sum() + (hidden[:2] ** 2).sum()  # the result again, whole and in part

    assert saved_bytes(layer, forward, 10) == 10 * (8 + 16) * 4


def test_copies_under_autocast_are_a_fixed_cost():
    model = training_model()
    linear = sum(weight.numel() for name, weight in model.named_parameters() if "_proj" in name)
    plain, mixed = (measure_activations(model, lambda count, on=on: _forward(model, count, on)) for on in (False, True))
    assert plain.kept.fixed == pytest.approx(0, abs=10)
    assert mixed.kept.fixed == pytest.approx(linear * 2, rel=0.05)
    assert mixed.kept.linear < plain.kept.linear


def _forward(model, count, bf16=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(packed=packed(count, count))


def test_checkpointing_is_measured_both_ways_and_left_on():
    shape = {"num_hidden_layers": 6}
    plain, checkpointed = training_model(**shape), training_model(checkpointing=True, **shape)
    expected, found = (
        measure_activations(model, lambda count, model=model: _forward(model, count)) for model in (plain, checkpointed)
    )
    assert found.plain.linear == pytest.approx(expected.kept.linear, rel=0.01)
    assert found.kept.linear < 0.2 * expected.kept.linear
    assert (found.layers, found.checkpointed, expected.checkpointed) == (6, True, False)
    assert saved_bytes(checkpointed, lambda count: _forward(checkpointed, count), 128) < 0.2 * saved_bytes(
        plain, lambda count: _forward(plain, count), 128
    )


def test_scores_that_attention_keeps_grow_with_the_square_of_a_pair():
    cost = Growth.fit((10, 20, 30), [7 + 3 * n + 2 * n * n for n in (10, 20, 30)])
    assert (cost.fixed, cost.linear, cost.square) == pytest.approx((7, 3, 2))
    assert cost.growing(1000, 50) == pytest.approx(1000 * (3 + 2 * 50))


def test_weights_are_counted():
    model = training_model(100, tie_word_embeddings=True)
    stats = ModelStats.of(model)
    number = sum(weight.numel() for weight in model.parameters())
    assert (stats.weight_bytes, stats.trained, stats.trained_bytes) == (4 * number, number, 4 * number)
    assert (stats.vocab_size, stats.hidden_size, stats.tied) == (100, 32, True)
    assert stats.embedding_bytes == 100 * 32 * 4
    assert stats.layer_weights == sum(weight.numel() for weight in model.model.layers[0].parameters())


def test_adapters_have_gradients_and_states_and_the_base_has_none():
    peft = pytest.importorskip("peft")
    model = tiny_llama(100)
    base = sum(weight.numel() for weight in model.parameters())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    stats = ModelStats.of(adapted)
    assert stats.weight_bytes == 4 * (base + stats.trained)
    assert (stats.embedding_weights, stats.head_trained, stats.tied) == (0, False, False)
    adapters = sum(weight.numel() for name, weight in adapted.named_parameters() if "lora_" in name)
    assert stats.trained == adapters
    found = estimate_memory(stats, NOTHING, settings(), 10, accumulates=True)
    assert (found.weights, found.gradients, found.optimizer) == (stats.weight_bytes, 4 * adapters, 4 * adapters)


NOTHING = ActivationCost(Growth(0, 0, 0), Growth(0, 0, 0), layers=1, checkpointed=False)
MILLION = ModelStats(
    weight_bytes=4_000_000,
    trained=1_000_000,
    trained_bytes=4_000_000,
    largest=0,
    layer_weights=10_000,
    embedding_weights=0,
    embedding_bytes=0,
    vocab_size=100,
    hidden_size=10,
    head_itemsize=4,
    head_trained=True,
    tied=False,
    transforms_logits=False,
)


def settings(optim="rmsprop", **values):
    return StepSettings(optim, "cpu", 4, pair_tokens=8, response_tokens=5, response_share=0.6, **values)


@pytest.mark.parametrize(
    "sharding, weights, gradients, optimizer",
    [
        (Sharding(), 4_000_000, 4_000_000, 4_000_000),
        (Sharding(reduction_buffers=True), 4_000_000, 8_000_000, 4_000_000),
        # Two layers and the head are whole at a time: (2 * 10,000 + 100 * 10) * 4 bytes.
        (Sharding(4, 4, 4), 1_084_000, 1_000_000, 1_000_000),
        (Sharding(1, 4, 4, master_weights=True), 5_000_000, 1_000_000, 1_000_000),
    ],
)
def test_what_processes_share(sharding, weights, gradients, optimizer):
    found = estimate_memory(MILLION, NOTHING, settings(sharding=sharding), 10, accumulates=True)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)


@pytest.mark.parametrize(
    "optim, bytes_per_weight",
    [
        ("rmsprop", 4),
        ("adamw_torch", 8),
        ("sgd", 0),
        ("adamw_8bit", 2 + 2 * 4 / 256),
        ("rmsprop_bnb_8bit", 1 + 4 / 256),
        ("paged_adamw_8bit", 0),
        ("something_new", 8),
    ],
)
def test_bytes_of_optimiser_states(optim, bytes_per_weight):
    found = estimate_memory(MILLION, NOTHING, settings(optim), 10, accumulates=True)
    assert found.optimizer == round(bytes_per_weight * 1_000_000)


def test_eight_bit_states_are_those_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.zeros(256, 256))
    optimizer = bitsandbytes.optim.AdamW8bit([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = [value for name, value in optimizer.state[weight].items() if name.startswith(("state", "absmax"))]
    taken = sum(value.nbytes for value in states)
    assert taken / weight.numel() == 2 + 2 * 4 / 256


def test_lines_for_people():
    found = MemoryEstimate("head", 2**30, 2**29, 2**29, head=2**28)
    assert found.total == 2**31 + 2**28
    assert found.lines() == [
        "peak memory of a process (head): 2.25 GiB",
        "of which weights 1.00, gradients 0.50, optimiser states 0.50, logits and head 0.25",
    ]
    assert MemoryEstimate("head", 2**30, 0, 0, resident=2**29).lines() == [
        "peak memory of a process (head): 1.50 GiB",
        "of which weights 1.00, interpreter, libraries and data 0.50",
    ]


def test_on_a_cpu_the_estimate_contains_what_the_process_already_holds():
    held = memory.resident_bytes(torch.device("cpu"), 0)
    # Mapped, as the allocator may have memory left over from other tests.
    buffer = torch.frombuffer(mmap.mmap(-1, 2**28), dtype=torch.uint8).fill_(1)  # 256 MiB
    grown = memory.resident_bytes(torch.device("cpu"), 0) - held
    assert grown == pytest.approx(buffer.nbytes, rel=0.1)
    # Weights are counted by themselves; a GPU holds neither interpreter nor libraries.
    assert memory.resident_bytes(torch.device("cpu"), buffer.nbytes) == pytest.approx(held, rel=0.1)
    assert memory.resident_bytes(torch.device("cuda"), 0) == 0
    plain, whole = (
        estimate_memory(MILLION, NOTHING, settings(resident=size), 10, accumulates=True) for size in (0, held)
    )
    assert whole.total - plain.total == held


def test_the_budget_is_the_most_that_fits():
    def needed(tokens):
        return 1000 + 10 * tokens

    usable, pays = memory._USABLE["cuda"], memory._LARGEST_BUDGET["cpu"]
    assert automatic_budget(needed, round(6000 / usable), 100, 10**6, "cuda") == 500
    assert automatic_budget(needed, 10**9, 100, 700, "cuda") == 700  # no more than a step holds
    assert automatic_budget(needed, 10**12, 100, 10**9, "cpu") == pays  # no more than pays
    assert automatic_budget(needed, 10**12, pays + 1, 10**9, "cpu") == pays + 1  # and a pair is never cut
    assert automatic_budget(needed, round(2000 / usable), 100, 10**6, "cuda") == 100
    with pytest.raises(InputError, match=r"the longest row has 101 tokens .* set gradient_checkpointing: true"):
        automatic_budget(needed, round(2000 / usable), 101, 10**6, "cuda")
