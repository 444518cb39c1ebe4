"""plumbing/fast_rank.py equals the definition, k_star, and proves low ranks without a spectrum."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analyze_attention import k_star
from plumbing import fast_rank as module
from plumbing.fast_rank import fast_rank, proven_rank


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


@settings(max_examples=60)
@given(
    energies=st.lists(st.floats(0, 1), min_size=70, max_size=70),
    seed=st.integers(0, 99),
    tau=st.floats(0.05, 0.99),
)
def test_what_a_subspace_proves_is_the_rank_whatever_the_spectrum(energies, seed, tau):
    """The bounds hold for any orthonormal Q, so a proof is never wrong; a hard spectrum only leaves it unproven."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(70, 70, generator=generator)).Q for _ in range(2))
    matrix = left * torch.tensor([9.0, *energies[1:]]).sqrt() @ right
    found = proven_rank((matrix.mT @ matrix)[None], tau).item()
    assert found in (0, k_star(matrix, tau).item())


def test_collapsed_heads_are_proven_without_their_spectrum(monkeypatch):
    attention = torch.cat(
        [random_attention(100, 1, seed, sink=3 + seed / 2) for seed in range(5)]
    )  # (5, 3, 100, 100)
    expected = k_star(attention)
    batches, eigvalsh = [], torch.linalg.eigvalsh
    monkeypatch.setattr(
        torch.linalg, "eigvalsh", lambda G: batches.append((len(G), G.shape[-1])) or eigvalsh(G)
    )
    assert torch.equal(fast_rank(attention), expected) and 1 < expected.max() <= 8
    tried, whole = (sum(n for n, size in batches if size == T) for T in (module.WIDTH, 100))
    assert whole < tried < 15  # some need not even a subspace, most of the others no spectrum


def test_the_order_of_heads_and_sequences_does_not_matter():
    attention = torch.cat([random_attention(100, s, s) for s in (1, 4, 9)])
    assert torch.equal(fast_rank(attention).flip(0, 1), fast_rank(attention.flip(0, 1)))
    assert torch.equal(fast_rank(attention)[1:2], fast_rank(attention[1:2]))


def test_half_precision_is_measured_in_float32():
    attention = random_attention(32, 3, 0).bfloat16()
    assert torch.equal(fast_rank(attention), fast_rank(attention.float()))
