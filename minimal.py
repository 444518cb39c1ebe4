"""The whole paper in one file (Inheritune, arXiv 2404.08634): train, measure, inherit, train, compare.

    python minimal.py                # two minutes on 2 CPU cores; no download
    python minimal.py --steps=20     # half a minute, to see that it works

In the later layers of a trained GPT, attention often degenerates to rank 1: those layers have become "lazy".
Inheritune starts a smaller model from the first layers of a trained one, trains it, and grows it until it
matches. Here the models are tiny and read Python's source byte by byte. At that scale no layer becomes lazy.

B batch   T time   nh heads   N sequences
"""

import argparse
import math
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from model import GPT, GPTConfig

B, T = 8, 128  # windows a step, bytes a window
CONFIG = GPTConfig(n_layer=8, n_head=4, n_embd=64, block_size=T, vocab_size=256)  # the reference
LR, LR_END = 4e-3, 1e-5  # a peak that suits this width; the paper's cosine ends at 1e-5 too
SEED = 1337
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
cpu_features = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may lack it
BF16 = DEVICE == "cuda" or any("bf16" in name and found for name, found in cpu_features.items())

# ---- Data: the Python files of the standard library, one long array of bytes
stdlib = Path(sysconfig.get_path("stdlib"))
skip = {"test", "tests", "idle_test", "site-packages"}
files = [path for path in sorted(stdlib.rglob("*.py")) if not skip & set(path.relative_to(stdlib).parts)]
data = np.frombuffer(b"\n".join(path.read_bytes() for path in files), dtype=np.uint8)
train_data, val_data = np.split(data, [len(data) * 19 // 20])  # validation: the last 5%


def windows(source, starts, length=T):
    """`length` bytes from each start, and for each byte the one that follows it: x and y, (B, length)."""
    tokens = torch.from_numpy(source[starts[:, None] + np.arange(length + 1)]).long().to(DEVICE)
    return tokens[:, :-1], tokens[:, 1:]


# ---- Training and evaluation


def learning_rate(step, steps):
    """Linear warm-up over a twentieth of the steps, then a cosine from LR to LR_END."""
    if step < (warmup := steps // 20 + 1):
        return LR * (step + 1) / warmup
    return LR_END + (LR - LR_END) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(model, steps, name):
    """AdamW as in the paper, appendix F. Every call draws the same batches, whatever the model."""
    rng = np.random.default_rng(SEED)
    optimizer = torch.optim.AdamW(model.param_groups(weight_decay=0.1), betas=(0.9, 0.95), fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        x, y = windows(train_data, rng.integers(len(train_data) - T, size=B))  # (B, T) each
        with torch.autocast(DEVICE, torch.bfloat16, enabled=BF16):
            loss = model(x, y)  # mean cross-entropy, nats per byte
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // 4) == 0:
            print(f"{name:<20} step {step + 1:4} of {steps}   training loss {loss.item():.3f}", flush=True)
    return model


@torch.no_grad()
def evaluate(model, n=16):
    """Mean loss in nats per byte, over the same n batches of validation windows for every model."""
    batches = np.linspace(0, len(val_data) - T - 1, n * 32).astype(int).reshape(n, 32)  # where windows start
    return sum(model(*windows(val_data, starts)).item() for starts in batches) / n


# ---- The paper's measurement and its method


def max_rank(model, tau=0.90, N=100, length=100):
    """MaxRank of each layer (paper, section 2), at T = length. A layer with 1.0 is lazy."""
    starts = np.random.default_rng(SEED).integers(len(val_data) - length, size=N)
    ranks = []
    for A in model.attention_matrices(windows(val_data, starts, length)[0]):  # (N, nh, T, T), layer by layer
        energy = torch.linalg.svdvals(A).square()  # (N, nh, T), largest first
        share = energy.cumsum(-1) / energy.sum(-1, keepdim=True)  # (N, nh, T), of the first 1, 2, ... values
        k = (share < tau).sum(-1) + 1  # (N, nh), definition G.1: the least k whose share reaches tau
        ranks.append(k.double().mean(0).max().item())  # mean over sequences, then max over heads
    return ranks


def inherit(reference, k):
    """Inheritune step 1 (inherit): the reference's embeddings, first k blocks, final norm and head."""
    target = GPT(replace(reference.config, n_layer=k)).to(DEVICE)
    weights = reference.state_dict()  # the same names in both; the head is the token embedding
    target.load_state_dict({name: weights[name] for name in target.state_dict()})
    return target


def main(steps):
    torch.manual_seed(SEED)
    reference = GPT(CONFIG).to(DEVICE)
    ranks = {"untrained": max_rank(reference)}
    train(reference, steps, "reference")
    reference_loss, total = evaluate(reference), steps
    for k in range(CONFIG.n_layer // 2, CONFIG.n_layer + 1, 2):  # Inheritune step 3 (expand): 2 more layers
        target = train(inherit(reference, k), steps, f"inherited, {k} layers")  # Inheritune step 2 (train)
        total += steps
        if evaluate(target) <= reference_loss:  # it matches
            break
    random = train(GPT(target.config).to(DEVICE), steps, f"random, {k} layers")

    for name, values in (ranks | {"reference": max_rank(reference), "target": max_rank(target)}).items():
        print(f"MaxRank by layer, {name:<9}", *(f"{rank:5.1f}" for rank in values))
    print("\nmodel         layers  parameters  steps          steps in all  validation loss, nats per byte")
    rows = ("reference", reference, steps), ("inherited", target, total), ("random", random, steps)
    for name, model, spent in rows:
        shape = f"{model.config.n_layer:>6}  {model.config.num_params():>10,}"
        print(f"{name:<12}  {shape}  {steps:>5}  {spent:>20}  {evaluate(model):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The whole paper in one file.")
    parser.add_argument("--steps", type=int, default=600, help="training steps of each model")
    main(parser.parse_args().steps)
