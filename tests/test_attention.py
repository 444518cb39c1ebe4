"""attention.py: matrices whose rank is known, a plain SVD beside it, what a subspace proves, transformers' models."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import approximate_rank, column_count, sink


def svd_rank(matrix: torch.Tensor, tau: float) -> int:
    """The definition, word for word."""
    energy = torch.linalg.svdvals(matrix.double()).square()
    return int((energy.cumsum(0) < tau * energy.sum() * (1 - 1e-6)).sum()) + 1


def plain_columns(matrix: torch.Tensor, tau: float) -> int:
    """The definition, word for word."""
    mass = sorted((column @ column for column in matrix.double().numpy().T), reverse=True)
    return next(c for c in range(1, len(mass) + 1) if sum(mass[:c]) >= tau * sum(mass) * (1 - 1e-6))


def random_attention(T: int, sharpness: float, seed: int, heads: int = 3) -> torch.Tensor:
    logits = sharpness * torch.randn(1, heads, T, T, generator=torch.Generator().manual_seed(seed))
    return logits.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)  # (1, H, T, T)


def of(matrix: torch.Tensor, measure, *arguments) -> float:
    return measure(matrix[None, None], *arguments).item()


@pytest.mark.parametrize("T", [8, 64, 128])
def test_matrices_of_known_rank(T):
    one_column = torch.zeros(T, T)
    one_column[:, 0] = 1
    assert of(one_column, approximate_rank) == of(one_column, column_count) == 1 and of(one_column, sink) == 1
    assert of(torch.full((T, T), 1 / T), approximate_rank) == 1
    assert of(torch.full((T, T), 1 / T), column_count) == math.ceil(0.9 * T)
    assert of(torch.eye(T), approximate_rank) == of(torch.eye(T), column_count) == math.ceil(0.9 * T)
    assert of(torch.eye(T), sink) == pytest.approx(1 / T)
    uniform = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    assert of(uniform, approximate_rank) == svd_rank(uniform, 0.9) < of(uniform, column_count)
    assert of(uniform, sink) == pytest.approx(sum(1 / t for t in range(1, T + 1)) / T, rel=1e-5)


@pytest.mark.parametrize("r", [1, 3, 10])
def test_planted_directions_are_counted(r):
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(r)))[0]
    matrix = basis[:, :r] @ basis[:, -r:].T  # r equal singular values
    assert of(matrix, approximate_rank, 0.999) == r
    assert of(matrix, approximate_rank, 0.5) == math.ceil(r / 2)


@settings(max_examples=60)
@given(T=st.integers(2, 48), sharpness=st.floats(0, 12), seed=st.integers(0, 10**6), tau=st.floats(0.05, 1.0))
def test_rank_equals_the_plain_svd_and_never_exceeds_the_columns(T, sharpness, seed, tau):
    attention = random_attention(T, sharpness, seed)
    rank, columns = approximate_rank(attention, tau), column_count(attention, tau)
    if tau < 0.999:  # beyond, float32 cannot tell the smallest energies from rounding
        assert rank[0].tolist() == [svd_rank(matrix, tau) for matrix in attention[0]]
        assert (rank <= columns).all()
    assert (rank >= 1).all() and (columns <= T).all()
    assert tau >= 0.999 or columns[0].tolist() == [plain_columns(matrix, tau) for matrix in attention[0]]


def test_the_order_of_heads_and_sequences_does_not_matter():
    attention = torch.cat([random_attention(32, s, s) for s in (1, 4, 9)])  # (3, 3, T, T)
    for measure in (approximate_rank, column_count, sink):
        assert torch.equal(measure(attention).flip(0, 1), measure(attention.flip(0, 1)))
        assert torch.equal(measure(attention)[1:2], measure(attention[1:2]))


@settings(max_examples=20)
@given(sharpness=st.floats(0, 8), seed=st.integers(0, 10**6))
def test_one_thread_or_two_find_the_same(sharpness, seed):
    attention, found = random_attention(40, sharpness, seed), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append([measure(attention).tolist() for measure in (approximate_rank, column_count)])
    torch.set_num_threads(1)
    assert found[0] == found[1]


def test_half_precision_is_measured_in_float32():
    attention = random_attention(32, 3, 0).bfloat16()
    assert torch.equal(approximate_rank(attention), approximate_rank(attention.float()))
    assert torch.equal(column_count(attention), column_count(attention.float()))
