"""Muon for the matrices of the blocks and AdamW for everything else, as one optimizer.

    python train.py config/demo.toml --optimizer=muon --out_dir=out/muon
    python -m pytest tests/test_muon.py    # equals torch.optim.Muon, bit for bit

Muon (Jordan et al., 2024) makes the steps in all directions of a matrix equally long. It is not the
paper's optimizer. torch.optim.Muon always computes in bfloat16. On a CPU that emulates it, that took
nearly half of the demo's time. This one computes in the arithmetic of the run.
"""

import re

import torch


def orthogonal(G: torch.Tensor) -> torch.Tensor:
    """Roughly U·Vᵀ of a matrix G = U·S·Vᵀ: five Newton-Schulz iterations (Jordan et al., 2024)."""
    X = G.mT if G.shape[0] > G.shape[1] else G  # the Gram matrix of the shorter side is smaller
    X = X / X.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(5):  # each moves every singular value s towards 1: 3.4445·s - 4.775·s³ + 2.0315·s⁵
        gram = X @ X.mT
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), X, beta=3.4445)
    return X.mT if G.shape[0] > G.shape[1] else X


class MuonAndAdamW(torch.optim.AdamW):
    """AdamW whose first group, the matrices of the blocks, takes Muon's steps instead."""

    def __init__(self, model, weight_decay: float, bf16: bool, **how):
        in_block = re.compile(r"\.\d+\.").search  # "h.3.attn"
        matrices = {p for name, p in model.named_parameters() if in_block(name) and p.ndim == 2}
        decayed, rest = model.param_groups(weight_decay)
        muon = decayed | {"params": [p for p in decayed["params"] if p in matrices]}
        adamw = decayed | {"params": [p for p in decayed["params"] if p not in matrices]}
        super().__init__([muon, adamw, rest], fused=True, **how)
        self.bf16 = bf16

    @torch.no_grad()
    def step(self):
        """One update. After a non-finite gradient (found_inf, train.py:train_step) there is none."""
        if self.found_inf:  # AdamW's kernel looks by itself; for Muon the CPU waits for the GPU here
            return
        muon = self.param_groups[0]
        for p in (p for p in muon["params"] if p.grad is not None):  # an expert may get no token
            if p not in self.state:  # the first step
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 0.05)  # the mean of some 20 steps
            G = p.grad.lerp(momentum, 0.95)  # Nesterov: one step ahead
            p.mul_(1 - muon["lr"] * muon["weight_decay"])
            length = 0.2 * max(p.shape) ** 0.5  # of AdamW's steps (arXiv 2502.16982), so one lr suits both
            p.add_(orthogonal(G.bfloat16() if self.bf16 else G), alpha=-muon["lr"] * length)
            p.grad = None  # so AdamW leaves it alone
        super().step()
