"""The collator's tensors, spelled out, and log-probs against a naive float64 computation."""

import pytest
import torch
from datasets import Dataset

from spin.alignment.core.errors import InputError
from spin.alignment.logprobs.batch import PairDataset
from spin.alignment.logprobs.collators import PackedCollator, PairCollator
from spin.alignment.logprobs.forward import response_logps, token_logps
from spin.alignment.logprobs.pair_forward import PairForward
from spin.alignment.logprobs.reference import compute_reference
from spin.alignment.logprobs.reference_store import ReferenceKey, ReferenceLogps, store_path
from tests.helpers import tiny_llama

PAIRS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]},
    {"prompt_ids": [6], "chosen_ids": [7, 8], "rejected_ids": [9]},
]


def test_tensors_row_by_row():
    batch = PairCollator(pad_id=0)(PAIRS)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 0],  # chosen of pair 0
        [0, 6, 7, 8],  # chosen of pair 1
        [1, 2, 4, 5],  # rejected of pair 0
        [0, 6, 9, 0],  # rejected of pair 1
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2], [0, 0, 1, 2], [0, 1, 2, 3], [0, 0, 1, 1]]
    assert batch["completion_mask"].tolist() == [[1, 0], [1, 1], [1, 1], [1, 0]]
    assert "reference_logps" not in batch and "weights" not in batch


def test_streams_follow_their_responses():
    streams = [
        {
            "chosen_reference": [-0.5],
            "rejected_reference": [-1.0, -2.0],
            "chosen_weights": [1.0],
            "rejected_weights": [0.5, 2.0],
        },
        {
            "chosen_reference": [-3.0, -4.0],
            "rejected_reference": [-5.0],
            "chosen_weights": [0.0, 1.0],
            "rejected_weights": [1.0],
        },
    ]
    batch = PairCollator(pad_id=0)([pair | stream for pair, stream in zip(PAIRS, streams, strict=True)])
    assert batch["reference_logps"].tolist() == [[-0.5, 0.0], [-3.0, -4.0], [-1.0, -2.0], [-5.0, 0.0]]
    assert batch["weights"].tolist() == [[1.0, 0.0], [0.0, 1.0], [0.5, 2.0], [1.0, 0.0]]


def test_labels_stand_in_the_order_of_the_responses():
    labels = [
        {"chosen_win_prob": 0.75, "rejected_win_prob": 0.25, "chosen_reward": 1.5, "rejected_reward": -0.5},
        {"chosen_win_prob": 0.9, "rejected_win_prob": 0.2, "chosen_reward": 0.1, "rejected_reward": 2.0},
    ]
    features = [pair | label for pair, label in zip(PAIRS, labels, strict=True)]
    (group,) = PackedCollator()(features).to(torch.device("cpu")).groups
    padded = PairCollator(pad_id=0)(features)
    for labels in (group.labels, {name: padded[f"label/{name}"] for name in ("win_prob", "reward")}):
        win_probs, rewards = labels["win_prob"], labels["reward"]
        assert win_probs.tolist() == [0.75, 0.9, 0.25, 0.2] and win_probs.dtype == torch.float64
        assert rewards.tolist() == [1.5, 0.1, -0.5, 2.0]
    assert not [name for name in PairCollator(pad_id=0)(PAIRS) if name.startswith("label/")]


def test_a_pad_id_that_is_a_real_token_is_not_masked():
    batch = PairCollator(pad_id=3)(PAIRS)  # 3 is also the chosen token of pair 0
    assert batch["completion_mask"].tolist() == [[1, 0], [1, 1], [1, 1], [1, 0]]


def test_a_stream_of_the_wrong_length_is_refused():
    pair = PAIRS[0] | {"chosen_weights": [1.0, 1.0], "rejected_weights": [1.0, 1.0]}
    with pytest.raises(ValueError, match="2 values does not fit a response of 1 tokens"):
        PairCollator(pad_id=0)([pair])


def naive_logps(model, prompt, response):
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids).logits.double().log_softmax(dim=-1)
    return [logits[0, len(prompt) + step - 1, token].item() for step, token in enumerate(response)]


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}])
def test_logps_equal_a_naive_unpadded_computation(settings):
    model = tiny_llama(20, **settings).eval()
    with torch.no_grad():
        logps = response_logps(model, PairCollator(pad_id=0)(PAIRS))
        for row, (pair, half) in enumerate((pair, half) for half in ("chosen", "rejected") for pair in PAIRS):
            expected = naive_logps(model, pair["prompt_ids"], pair[f"{half}_ids"])
            assert logps[row, : len(expected)].tolist() == pytest.approx(expected, abs=2e-6)
            assert logps[row, len(expected) :].eq(0).all()


def test_a_long_block_is_never_held_in_float32():
    logits = torch.randn(4, 80, 100_000, dtype=torch.bfloat16, requires_grad=True)  # two pieces
    labels, saved = torch.randint(100_000, (4, 80)), []

    def remember(tensor):
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        logps = token_logps(logits, labels, torch.ones(4, 80))
    assert sum(saved) < 1.1 * logits.numel() * logits.element_size()
    logps.sum().backward()
    expected = logits.detach()[0].float().requires_grad_()
    expected.log_softmax(dim=-1).gather(-1, labels[0][:, None]).sum().backward()
    assert torch.allclose(logits.grad[0].float(), expected.grad, atol=1e-2)


@pytest.fixture
def store(tmp_path):
    from accelerate import Accelerator

    dataset, key = PairDataset(Dataset.from_list(PAIRS * 3)), ReferenceKey("w", "t", "float32")
    path = store_path(tmp_path, "train", key)
    model = tiny_llama(20)
    forward = PairForward.of(model, 0, torch.device("cpu"), torch.float32, pairs_per_batch=4)
    compute_reference(forward, dataset, path, key, Accelerator(cpu=True), lambda done, total: None)
    return dataset, key, path, model


def test_stored_logps_equal_the_live_ones(store):
    dataset, key, path, model = store
    reference = ReferenceLogps(path, key, dataset.rows)
    for index in range(6):
        pair = PAIRS[index % 2]
        for half, stored in reference[index].items():
            assert stored.tolist() == pytest.approx(
                naive_logps(model, pair["prompt_ids"], pair[f"{half}_ids"]), abs=2e-6
            )


@pytest.mark.parametrize("field", ["weights", "tokens", "precision"])
def test_a_foreign_store_is_refused_by_name(store, field):
    dataset, key, path, _ = store
    other = ReferenceKey(**{**vars(key), field: "other"})
    with pytest.raises(InputError, match=f"{field} differs"):
        ReferenceLogps(path, other, dataset.rows)


def test_a_torn_store_is_refused(store):
    dataset, key, path, _ = store
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="damaged"):
        ReferenceLogps(path, key, dataset.rows)
