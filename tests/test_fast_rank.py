"""plumbing/fast_rank.py equals the definition, k_star,."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analyze_attention import k_star
from plumbing.fast_rank import fast_rank


def random_attention(T: int, sharpness: float, seed: int, heads: int = 3, sink: float = 0.0) -> torch.Tensor:
    logits = sharpness * torch.randn(1, heads, T, T, generator=torch.Generator().manual_seed(seed))
    logits[..., 0] += sink
    return logits.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)  # (1, H, T, T)


@pytest.mark.parametrize("T", [8, 64, 100])
def test_matrices_of_known_rank(T):
    one_column, even = torch.zeros(T, T), torch.full((T, T), 1 / T)
    one_column[:, 0] = 1
    for matrix, rank in ((one_column, 1), (even, 1), (torch.eye(T), math.ceil(0.9 * T))):
        assert fast_rank(matrix[None, None]).item() == k_star(matrix).item() == rank


@pytest.mark.parametrize("r", [1, 3, 10])
def test_planted_directions_are_counted(r):
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(r)))[0]
    matrix = basis[:, :r] @ basis[:, -r:].T  # r equal singular values
    assert fast_rank(matrix[None, None], 0.999).item() == r
    assert fast_rank(matrix[None, None], 0.45).item() == math.ceil(0.45 * r)


@settings(max_examples=60)
@given(
    T=st.integers(2, 100), sharpness=st.floats(0, 12), sink=st.floats(0, 9), seed=st.integers(0, 10**6),
    tau=st.floats(0.05, 0.99),
)  # fmt: skip
def test_fast_rank_equals_the_definition(T, sharpness, sink, seed, tau):
    attention = random_attention(T, sharpness, seed, sink=sink)
    assert torch.equal(fast_rank(attention, tau), k_star(attention, tau))


def test_heads_collapsed_to_one_column_need_no_spectrum(monkeypatch):
    attention = torch.cat([random_attention(100, 1, 0, sink=12), random_attention(100, 1, 1)])  # (2, 3, 100, 100)
    batches, eigvalsh = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda G: batches.append(len(G)) or eigvalsh(G))
    assert torch.equal(fast_rank(attention), k_star(attention)) and batches == [3]


def test_the_order_of_heads_and_sequences_does_not_matter():
    attention = torch.cat([random_attention(100, s, s) for s in (1, 4, 9)])
    assert torch.equal(fast_rank(attention).flip(0, 1), fast_rank(attention.flip(0, 1)))
    assert torch.equal(fast_rank(attention)[1:2], fast_rank(attention[1:2]))


def test_half_precision_is_measured_in_float32():
    attention = random_attention(32, 3, 0).bfloat16()
    assert torch.equal(fast_rank(attention), fast_rank(attention.float()))
