"""Rows with a third response: packed as one tree of three branches, padded as three rows, the same loss and gradient."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from spin.alignment.core.sides import INITIAL, SIDES
from spin.alignment.logprobs.attention import Tree
from spin.alignment.logprobs.batch import PairDataset
from spin.alignment.logprobs.collators import PackedCollator, PairCollator
from spin.alignment.logprobs.forward import batch_logps, batch_loss, install_packed_forward
from spin.alignment.logprobs.pair_forward import PairForward
from spin.alignment.logprobs.reference import compute_reference
from spin.alignment.logprobs.reference_store import ReferenceKey, ReferenceLogps, hash_tokens, store_path
from spin.alignment.methods.losses import LOSSES
from tests.helpers import tiny_llama

RESPONSES = (*SIDES, INITIAL)
ROWS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "initial_ids": [6]},
    {"prompt_ids": [7], "chosen_ids": [8, 9], "rejected_ids": [10], "initial_ids": [11, 12, 13]},
]


def test_row_by_row():
    batch = PackedCollator(responses=RESPONSES)(ROWS)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 2, 0, 1, 2, 1, 1, 2, 3]]
    assert list(batch.layout.trees) == [Tree(2, (1, 2, 1)), Tree(1, (2, 1, 3))]
    assert batch.targets.tolist() == [3, 8, 9, 4, 5, 10, 6, 11, 12, 13]  # chosen, rejected, initial of both rows
    assert batch.predictors.tolist() == [1, 6, 7, 1, 3, 6, 1, 6, 10, 11]
    (group,) = batch.groups
    assert group.pairs == 2 and group.completion_mask.sum(dim=1).tolist() == [1, 2, 2, 1, 1, 3]
    padded = PairCollator(0, RESPONSES)(ROWS)
    assert padded["input_ids"].tolist() == [
        [1, 2, 3, 0, 0],
        [0, 7, 8, 9, 0],
        [1, 2, 4, 5, 0],
        [0, 7, 10, 0, 0],
        [1, 2, 6, 0, 0],
        [0, 7, 11, 12, 13],
    ]
    sizes = [collator.tokens(ROWS[0]) for collator in (PackedCollator(responses=RESPONSES), PairCollator(0, RESPONSES))]
    assert sizes == [6, 6]
    assert PackedCollator(share_prompts=False, responses=RESPONSES).tokens(ROWS[0]) == 10


@pytest.mark.parametrize("share_prompts", [True, False])
def test_packed_equals_padded(share_prompts):
    """Loss and gradient without a reference, one group of logits for each row and for both."""

    def objective(inputs):
        assert inputs.reference_logps is None and inputs.responses == RESPONSES
        return LOSSES["tspin"](inputs, beta=0.5, historical_weight=2.0).losses.sum()

    found = []
    for collator in (
        PairCollator(0, RESPONSES),
        PackedCollator("sdpa", 20, share_prompts, RESPONSES),
        PackedCollator("sdpa", 2**26, share_prompts, RESPONSES),
    ):
        model = tiny_llama(20).double()
        if isinstance(collator, PackedCollator):
            assert install_packed_forward(model)
        loss = batch_loss(model, collator(ROWS), objective, responses=RESPONSES)
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        with torch.no_grad():
            logps = torch.cat(batch_logps(model, collator(ROWS)))
        found.append((loss.item(), gradient, logps))
    for loss, gradient, logps in found[1:]:
        # padded log-probs are taken in float32
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert torch.allclose(gradient, found[0][1], atol=1e-6) and torch.allclose(logps, found[0][2], atol=1e-6)


def test_reference_log_probs_of_three_responses_are_stored_by_name(tmp_path):
    """A loss may read a third response and a reference: the store has a column for each response."""
    dataset = PairDataset(Dataset.from_list(ROWS))
    key = ReferenceKey("w", hash_tokens(dataset.rows), "float32")
    path, model = store_path(tmp_path, "train", key), tiny_llama(20)
    forward = PairForward.of(model, 0, torch.device("cpu"), torch.float32, pairs_per_batch=1, responses=RESPONSES)
    compute_reference(forward, dataset, path, key, Accelerator(cpu=True), lambda done, total: None)
    dataset.reference = ReferenceLogps(path, key, dataset.rows)
    with torch.no_grad():
        expected = batch_logps(model, PairCollator(0, RESPONSES)(ROWS))
    for index, row in enumerate(ROWS):
        for place, name in enumerate(RESPONSES):
            stored = dataset[index][f"{name}_reference"]
            assert stored.tolist() == pytest.approx(expected[2 * place + index].tolist(), abs=2e-6)
            assert len(stored) == len(row[f"{name}_ids"])
    pair = {name: value for name, value in ROWS[0].items() if name != "initial_ids"}
    assert hash_tokens(Dataset.from_list([ROWS[0]])) != hash_tokens(Dataset.from_list([pair]))
