"""The attention of a decoding step against plain arithmetic: rows of unlike length, grouped heads, windows, soft caps."""

from __future__ import annotations

import pytest
import torch

from spin.alignment.generation.transformers import decode_attention as own
from spin.alignment.generation.transformers.decode_attention import RaggedRows, decode_attention

PADDING = [0, 3, 3, 19, 18, 0, 7, 11]


def plain(query, key, value, visible, scaling, softcap):
    """Every head by itself, in double precision: softmax over the columns a row sees."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.double().repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def states(columns: int, heads: int = 4, shared: int = 2):
    torch.manual_seed(columns)
    rows, size = len(PADDING), 8
    buffers = [torch.randn(rows, shared, columns + 9, size) for _ in range(2)]
    key, value = (buffer[:, :, 4 : 4 + columns] for buffer in buffers)
    return torch.randn(rows, heads, 1, size), key, value


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("held", [20, 12])
@pytest.mark.parametrize("worth", [0, 6, 10_000])
def test_rows_see_their_own_columns_only(monkeypatch, worth, held, shared, softcap):
    """20 columns in all, of which a windowed layer holds the last 12."""
    width = 20
    monkeypatch.setattr(own, "_BYTES_PER_CALL", worth)
    query, key, value = states(held, shared=shared)
    padding = [min(columns, width - 1) for columns in PADDING]
    rows = RaggedRows(padding, query.device, column_bytes=1)
    rows.begin(width)
    mixed, _ = decode_attention(
        torch.nn.Module(), query, key, value, None, scaling=0.7, softcap=softcap, ragged_rows=rows
    )
    visible = torch.arange(width - held, width) >= torch.tensor(padding)[:, None, None, None]
    torch.testing.assert_close(mixed.double(), plain(query, key, value, visible, 0.7, softcap), atol=1e-5, rtol=1e-5)
    masked, _ = decode_attention(torch.nn.Module(), query, key, value, visible, scaling=0.7, softcap=softcap)
    torch.testing.assert_close(mixed, masked)


def test_neighbours_are_joined_where_a_call_costs_more():
    """Worth 5: behind a row of 0, two of 3 read 6 columns for nothing, too many; behind 18, the one of 19 reads one."""
    joined = own._join_neighbours(PADDING, 5)
    assert joined == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 8)]
    assert own._join_neighbours(PADDING, 1e9) == [(0, 8)]
    assert own._join_neighbours([4, 4, 4], 0) == [(0, 3)]


def test_a_capped_prefill_is_causal_and_a_padding_query_stays_finite():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    mixed, _ = decode_attention(torch.nn.Module(), query, key, value, None, scaling=0.5, softcap=1.5)
    torch.testing.assert_close(mixed.double(), plain(query, key, value, causal, 0.5, 1.5), atol=1e-5, rtol=1e-5)
    padded = causal & (torch.arange(6) >= torch.tensor([0, 2])[:, None, None, None])
    mixed, _ = decode_attention(torch.nn.Module(), query, key, value, padded, scaling=0.5, softcap=1.5)
    expected = plain(query, key, value, padded, 0.5, 1.5)
    assert mixed.isfinite().all()
    torch.testing.assert_close(mixed[1, 2:].double(), expected[1, 2:], atol=1e-5, rtol=1e-5)
