"""Muon for the matrices of the blocks and AdamW for everything else, as one optimizer.

    python train.py config/demo.toml --optimizer=muon --out_dir=out/muon
    python -m pytest tests/test_muon.py

Muon (Jordan et al., 2024) makes the steps in all directions of a matrix equally long. It is not the
paper's optimizer. Its steps are scaled to the length of AdamW's (arXiv 2502.16982): one `lr` for both.
"""

import re
from collections import defaultdict

import torch


class MuonAndAdamW:
    """torch.optim.Muon and torch.optim.AdamW with one state, as train.py uses an optimizer."""

    def __init__(self, model, weight_decay: float, lr: float, betas: tuple[float, float]):
        inside = {p for name, p in model.named_parameters() if re.search(r"\.\d+\.", name) and p.ndim == 2}
        groups = model.param_groups(weight_decay)
        matrices = [p for p in groups[0]["params"] if p in inside]
        groups[0]["params"] = [p for p in groups[0]["params"] if p not in inside]
        settings = {"lr": lr, "weight_decay": weight_decay}
        self.muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings)
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
        self.param_groups = self.muon.param_groups + self.adamw.param_groups
        self.state = self.muon.state = self.adamw.state = defaultdict(dict)  # of different parameters

    def step(self):
        """One update. After a non-finite gradient (found_inf, train.py:train_step) there is none."""
        if not self.found_inf:  # unlike AdamW's kernel, Muon does not look: here the CPU waits for the GPU
            self.muon.step()
            self.adamw.step()

    def zero_grad(self, set_to_none: bool = True):
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)
