"""The approximate rank k* of many attention matrices at once, without a singular value decomposition of each.

    python -c "import torch, plumbing.fast_rank as f; print(f.fast_rank(torch.eye(8)[None, None]))"
    python -m pytest tests/test_fast_rank.py    # equal to k_star in analyze_attention.py, matrix by matrix

analyze_attention.py:k_star is the definition. This computes the same number from the Gram matrix G = AᵀA,
whose eigenvalues λ_1 >= λ_2 >= ... are the squared singular values. B sequences, H heads, T positions.
"""

import torch

TIE = 1e-6  # a share that misses tau by less, relative to tau, counts as tau: float32 cannot separate them


def fast_rank(attention_BHTT: torch.Tensor, tau: float = 0.90) -> torch.Tensor:
    """k*(tau) of finite matrices (B, H, T, T), computed in float32: integers (B, H) from 1 to T."""
    A = attention_BHTT.flatten(0, 1).float()  # (N, T, T), N = B·H
    mass = A.square().sum(-2).double()  # of each column: the diagonal of G (N, T)
    # λ_1 >= G_jj, so a column that holds tau of the squared mass proves rank one. The margin covers rounding.
    rank = (mass.amax(-1) > tau * (1 + 1e-5) * mass.sum(-1)).long()  # (N,), 0: not known yet
    unknown = rank == 0
    gram = A[unknown].mT @ A[unknown]
    energy = torch.linalg.eigvalsh(gram).flip(-1).double().clamp(min=0)  # λ, largest first (n, T)
    held = energy.cumsum(-1)  # by the first k = 1, ..., T
    rank[unknown] = (held < tau * (1 - TIE) * held[:, -1:]).sum(-1) + 1
    return rank.unflatten(0, attention_BHTT.shape[:2])
