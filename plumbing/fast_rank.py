"""The approximate rank k* of many attention matrices, without a singular value decomposition of each.

    python -c "import torch, plumbing.fast_rank as f; print(f.fast_rank(torch.eye(8)[None, None]))"
    python -m pytest tests/test_fast_rank.py    # equal to k_star in analyze_attention.py, matrix by matrix

analyze_attention.py:k_star is the definition. This computes the same number from the Gram matrix G = AᵀA,
whose eigenvalues λ_1 >= λ_2 >= ... are σ². It tries the cheapest proof first: a single column, then a small
subspace, then the whole spectrum.

Suffixes: B sequences, H heads, T positions, N = B·H matrices.
"""

import torch
import torch.nn.functional as F

WIDTH = 16  # directions of the subspace
TIE = 1e-6  # a share that misses tau by less, relative to tau, counts as tau: float32 cannot separate them


def fast_rank(attention_BHTT: torch.Tensor, tau: float = 0.90) -> torch.Tensor:
    """k*(tau) of finite matrices (B, H, T, T), computed in float32: integers (B, H) from 1 to T."""
    A = attention_BHTT.flatten(0, 1).float()  # (N, T, T)
    mass = A.square().sum(-2).double()  # of each column, G_jj (N, T)
    # λ_1 >= G_jj: a column that holds tau of the squared mass proves rank one
    rank = (mass.amax(-1) > tau * (1 + rounding(A)) * mass.sum(-1)).long()  # (N,), 0: not known yet
    if (unknown := rank == 0).any():
        A = A if unknown.all() else A[unknown]
        gram = A.mT @ A
        proven = proven_rank(gram, tau)
        if (rest := proven == 0).any():
            spectrum = torch.linalg.eigvalsh(gram if rest.all() else gram[rest])  # smallest first
            proven[rest] = least_count(spectrum.flip(-1), tau)
        rank[unknown] = proven
    return rank.unflatten(0, attention_BHTT.shape[:2])


def rounding(matrices: torch.Tensor) -> float:
    """Bound on the relative rounding error of a dot product of T terms in true float32 (not TF32)."""
    return matrices.shape[-1] * torch.finfo(matrices.dtype).eps / 2


def least_count(energy: torch.Tensor, tau: float) -> torch.Tensor:
    """How many leading entries of energy (N, T), largest first, hold tau of its sum, up to TIE."""
    held = energy.double().clamp(min=0).cumsum(-1)
    return (held < tau * (1 - TIE) * held[..., -1:]).sum(-1) + 1


def proven_rank(gram: torch.Tensor, tau: float) -> torch.Tensor:
    """k* of Gram matrices (N, T, T) where a subspace of WIDTH directions proves it, else 0: (N,).

    The Ritz values θ_1 >= θ_2 >= ... are the eigenvalues of QᵀGQ for an orthonormal Q (T, WIDTH). θ_i <= λ_i
    (Cauchy's interlacing: Parlett, The Symmetric Eigenvalue Problem, 10.1), so S_k = λ_1 + ... + λ_k lies

        between θ_1 + ... + θ_k and θ_1 + ... + θ_k + excess, where the excess is at most either of
            trace G - Σ θ_i             since all λ add up to the trace,
            (‖G‖² - Σ θ_i²) / (2 θ_k)   since ‖G‖² = Σ λ_i² >= Σ θ_i² + 2 θ_k Σ_{i<=k} (λ_i - θ_i).

    S_k >= tau · trace and S_{k-1} < tau · trace prove k* = k. Q decides only how many stay unproven.
    """
    T, trace = gram.shape[-1], gram.diagonal(dim1=-2, dim2=-1).double().sum(-1)  # (N,)
    squares = gram.double().square().sum((-2, -1))  # ‖G‖² (N,)
    # S_k <= sqrt(k)·‖G‖ (Cauchy-Schwarz), so k* >= (tau · trace)² / ‖G‖². It is often two to four times that.
    tried = (tau * trace).square() / squares <= WIDTH / 4  # (N,)
    rank = torch.zeros_like(trace, dtype=torch.long)
    if WIDTH * 4 > T or not tried.any():
        return rank
    gram, trace, squares = gram[tried], trace[tried], squares[tried]
    slack = rounding(gram) * trace[:, None]  # for float32 products: seven times the largest error seen
    start = torch.randn(T, WIDTH, generator=torch.Generator().manual_seed(0)).to(gram)
    Q = torch.linalg.qr(gram @ (gram @ start)).Q  # two products turn Q to leading eigenvectors
    ritz = torch.linalg.eigvalsh((Q.mT @ (gram @ Q)).double()).flip(-1).clamp(min=0)  # (N, WIDTH)
    below = ritz.cumsum(-1)
    by_squares = squares - ritz.square().sum(-1) + 2 * slack[:, 0] * ritz[:, 0]
    above = below + torch.minimum(trace[:, None] - below[:, -1:], by_squares[:, None] / (2 * ritz))
    enough = tau * (1 - TIE) * trace[:, None]
    k = (below - slack < enough).sum(-1) + 1  # WIDTH + 1 where these directions do not hold enough
    one_less = F.pad(above + slack, (1, 0)).gather(-1, k[:, None] - 1)[:, 0]  # at least S_{k-1}; S_0 = 0
    rank[tried] = torch.where((k <= WIDTH) & (one_less < enough[:, 0]), k, 0)
    return rank
