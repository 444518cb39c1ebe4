"""The whole paper in one file (Inheritune, arXiv 2404.08634): train, measure, inherit, train, compare.

    python minimal.py                # about two minutes on 2 CPU cores; needs no download
    python minimal.py --steps=20     # a few seconds, to see that it works

Attention in the later layers of a trained GPT degenerates to rank 1: those layers have become "lazy". Inheritune
throws them away. It starts a smaller model from the first layers of a trained one and trains it, growing it until
it matches. Here the models are tiny (1.6 M parameters at most) and read the source code of Python byte by byte.
The model itself is in model.py. train.py, inherit.py and inheritune.py do the same at the paper's scale.

N sequences   B batch   T time   nh heads   L layers
"""

import argparse
import math
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from model import GPT, GPTConfig

B, T = 32, 128  # windows a step, bytes a window
CONFIG = GPTConfig(n_layer=8, n_head=4, n_embd=128, block_size=T, vocab_size=256)  # the reference
LR, LR_END = 3e-3, 1e-5  # the peak suits this width; the paper's cosine also ends at 1e-5
SEED = 1337

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
cpu_features = getattr(torch.cpu, "get_capabilities", dict)()
BF16 = DEVICE == "cuda" or any("bf16" in name and found for name, found in cpu_features.items())

# ---- Data: the Python files of the standard library, one long array of bytes -----------------------------

stdlib = Path(sysconfig.get_path("stdlib"))
skip = {"test", "tests", "idle_test", "site-packages"}
files = [path for path in sorted(stdlib.rglob("*.py")) if not skip & set(path.relative_to(stdlib).parts)]
data = np.frombuffer(b"\n".join(path.read_bytes() for path in files), dtype=np.uint8)
train_data, val_data = np.split(data, [len(data) * 19 // 20])  # validation: the last 5%, files never trained on


def windows(source, starts, length=T):
    """`length` bytes from each start, and the bytes that follow them: x and y, both (B, T)."""
    tokens = torch.from_numpy(source[starts[:, None] + np.arange(length + 1)]).long().to(DEVICE)  # (B, T + 1)
    return tokens[:, :-1], tokens[:, 1:]


# ---- Training and evaluation -----------------------------------------------------------------------------


def learning_rate(step, steps):
    warmup = max(1, steps // 20)
    if step < warmup:
        return LR * (step + 1) / warmup
    return LR_END + (LR - LR_END) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(model, steps, name):
    """AdamW as in the paper, appendix F. Each call draws the same batches, so models differ only in their start."""
    random = np.random.default_rng(SEED)
    optimizer = torch.optim.AdamW(model.param_groups(weight_decay=0.1), betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        x, y = windows(train_data, random.integers(len(train_data) - T, size=B))
        with torch.autocast(DEVICE, torch.bfloat16, enabled=BF16):
            loss = model(x, y)  # mean cross-entropy, nats per byte
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 4) == 0 or step == steps - 1:
            print(f"{name:<24} step {step + 1:4}/{steps}   training loss {loss.item():.3f}", flush=True)
    return model


@torch.no_grad()
def evaluate(model):
    """Mean loss in nats per byte over the same 512 validation windows for every model."""
    batches = np.linspace(0, len(val_data) - T - 1, 512).astype(int).reshape(-1, B)  # (16, B) starts
    return sum(model(*windows(val_data, starts)).item() for starts in batches) / len(batches)


# ---- The paper's measurement and its method --------------------------------------------------------------


def max_rank(model, tau=0.90, N=100, length=100):
    """MaxRank of each layer (paper, definition G.1). 1.0 means lazy: every attention matrix has rank 1."""
    starts = np.random.default_rng(SEED).integers(len(val_data) - length, size=N)
    ranks = []
    for A in model.attention_matrices(windows(val_data, starts, length)[0]):  # (N, nh, T, T), a layer at a time
        energy = torch.linalg.svdvals(A).square()  # (N, nh, T), largest first
        share = energy.cumsum(-1) / energy.sum(-1, keepdim=True)  # (N, nh, T), what the first k hold together
        k = (share < tau).sum(-1) + 1  # (N, nh), the least k that holds tau of the energy
        ranks.append(k.float().mean(0).max().item())  # first the mean over sequences, then the max over heads
    return ranks


def inherit(reference, k):
    """Inheritune step 1 (inherit): a GPT of k layers with the reference's embeddings, first k blocks and head."""
    target = GPT(replace(reference.config, n_layer=k)).to(DEVICE)
    weights = reference.state_dict()  # the same names in both models; the head is the token embedding
    target.load_state_dict({name: weights[name] for name in target.state_dict()})
    return target


def main(steps):
    torch.manual_seed(SEED)
    print(f"{len(data) / 1e6:.1f} MB of Python source, {DEVICE}, {'bfloat16' if BF16 else 'float32'}")
    untrained = GPT(CONFIG).to(DEVICE)
    ranks = {"untrained": max_rank(untrained)}
    reference = train(untrained, steps, "reference")
    ranks["reference"], reference_loss = max_rank(reference), evaluate(reference)

    k = CONFIG.n_layer // 2  # half the layers to begin with, as in the paper
    target = train(inherit(reference, k), steps, f"inherited, {k} layers")  # Inheritune step 2 (train)
    while evaluate(target) > reference_loss and k < CONFIG.n_layer:
        k += 2  # Inheritune step 3 (expand): two layers more, again from the reference, until it matches
        target = train(inherit(reference, k), steps, f"inherited, {k} layers")
    ranks["target"] = max_rank(target)

    rows = [("reference", reference, steps), ("target", target, 2 * steps)]
