"""Is the rank exact, and how much faster is it than a singular value decomposition of every head?

    python train.py config/demo.toml --out_dir=out/t128
    python train.py config/demo.toml --out_dir=out/t256 --block_size=256 --n_layer=4 --n_embd=64 --micro_batch=16
    python train.py config/demo.toml --out_dir=out/t1024 --block_size=1024 --n_layer=4 --n_embd=64 --micro_batch=4
    python tests/attention_speed.py exact out/t128 out/t256 --data_dir=data/demo --matrices=1000
    python tests/attention_speed.py speed out/t128 --data_dir=data/demo --repeats=5

exact: matrices of each run's model, and of random ones of its shape, against svdvals in float64; T = its block_size.
speed: measure() against a loop of torch.linalg.svdvals over sequences and heads, as in the notebook of the paper's
authors; same model, tokens and process, in turns. Loading and drawing, the same for both, are left out; columns and
sink are computed by the same functions. Beside the runs it takes 8-layer models that are built here.
"""

import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import tyro

import attention
import checkpoint
import configurator
import data
from attention import column_count, measure, sink
from machine import versions
from model import GPT, GPTConfig

TAU, MICRO_BATCH = 0.90, 4


@dataclass
class SpeedConfig:
    what: tyro.conf.Positional[Literal["exact", "speed"]]
    runs: tyro.conf.Positional[tuple[str, ...]]  # of train.py
    data_dir: str = "data/demo"
    matrices: int = 1000  # exact: how many for each run, half of its model, half of random ones
    sequences: int = 4  # speed: how many
    lengths: tuple[int, ...] = (128, 256, 1024)  # speed: T of the models that are built here
    repeats: int = 3  # speed: the median of so many turns


def tokens(model: GPT, data_dir: str, S: int) -> torch.Tensor:
    """S validation windows, spread evenly: (S, T)."""
    T = model.config.block_size
    stored = data.open_tokens(data_dir, "val", T, model.config.vocab_size)
    starts = data.val_starts(len(stored), T)
    return data.windows(stored, starts[np.linspace(0, len(starts) - 1, S).astype(int)], T)[0]


def sharpened(config: GPTConfig, factor: float) -> GPT:
    """A random model whose queries are `factor` times as long, so that its attention is that much sharper."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[: config.n_embd] *= factor
    return model


def collapsed(config: GPTConfig) -> GPT:
    """A random model with an attention sink in every layer, of the kind that trained models have: position 0 has a
    huge embedding, which every layer sees, and the queries of each head a bias towards the key of that position."""
    model = sharpened(replace(config, bias=True), 10)
    C, wpe = config.n_embd, model.transformer.wpe.weight
    with torch.no_grad():
        wpe[0] = 10 * torch.randn(C)
        seen = torch.nn.functional.layer_norm(wpe[0], (C,))
        for block in model.transformer.h:
            key = (block.attn.c_attn.weight[C : 2 * C] @ seen).view(config.n_head, -1)  # (nh, hs)
            logits = math.log(config.block_size) * torch.linspace(0.3, 1, config.n_head)[:, None]  # at position 0
            query = key * logits / (key.square().sum(-1, keepdim=True) * block.attn.scale)
            block.attn.c_attn.bias[:C] = query.flatten()
    return model


# ----------------------------------------------------------------------------------------------------------
# Exact


def proven(matrices: torch.Tensor) -> int:
    """For how many of the matrices (N, T, T) a subspace proved the rank."""
    proofs, original = [], attention.proven_rank

    def counted(*arguments):
        proofs.append((found := original(*arguments)).count_nonzero().item())
        return found

    attention.proven_rank = counted
    try:
        attention.approximate_rank(matrices[None], TAU)
    finally:
        attention.proven_rank = original
    return sum(proofs)


def verdicts(found: torch.Tensor, energy: torch.Tensor) -> list[int]:
    """How many counts (N,) are those of energies (N, T) in float64, how many are ties, how many are wrong.

    A tie: between the count found and the expected one every share is within 1e-5 of tau, which float32 cannot tell.
    """
    share = energy.cumsum(-1) / energy.sum(-1, keepdim=True)
    expected = (share < TAU).sum(-1) + 1
    verdict = []
    for k, k_expected, row in zip(found.tolist(), expected.tolist(), share, strict=True):
        between = row[min(k, k_expected) - 1 : max(k, k_expected) - 1]  # the shares that one reached tau with
        verdict.append("equal" if k == k_expected else "tie" if (between - TAU).abs().max() < 1e-5 else "wrong")
    return [verdict.count(kind) for kind in ("equal", "tie", "wrong")]


def exact(config: SpeedConfig):
    print("T     model               matrices  k* quartiles      proven   k*: equal  tie wrong   c*: equal  tie wrong")
    rows = []
    for run in config.runs:
        trained = checkpoint.load_model(run)
        shape, half = trained.config, config.matrices // 2
        models = {"trained": (trained, half)}
        models |= {f"random, queries x {f}": (sharpened(shape, f), half // 4) for f in (1, 10, 40, 100)}
        for name, (model, n) in models.items():
            each = -(-n // shape.n_layer)  # matrices of each layer
            ranks, row = [], np.zeros(8, dtype=int)
            idx = tokens(model, config.data_dir, -(-each // shape.n_head))
            for A in model.attention_matrices(idx):
                A = A.flatten(0, 1)[:each]  # (N, T, T)
                ranks.append(attention.approximate_rank(A[None], TAU)[0])
                k = verdicts(ranks[-1], torch.stack([torch.linalg.svdvals(a.double()).square() for a in A]))
                mass = torch.stack([a.double().square().sum(0).sort(descending=True).values for a in A])
                row += [len(A), proven(A), *k, *verdicts(column_count(A[None], TAU)[0], mass)]
            rows.append(row)
            quartiles = " ".join(f"{q:.0f}" for q in np.percentile(torch.cat(ranks), [0, 25, 50, 75, 100]))
            print_exact(f"{shape.block_size:<5d} {name:21s}", quartiles, rows[-1])
    print_exact("all", "", np.sum(rows, axis=0))


def print_exact(name: str, quartiles: str, row):
    n, by_subspace, *counts = row
    k, c = (f"{equal:9d} {tie:4d} {wrong:5d}" for equal, tie, wrong in (counts[:3], counts[3:]))
    print(f"{name:27s} {n:6d}  {quartiles:16s} {by_subspace:7d}  {k}    {c}", flush=True)


# ----------------------------------------------------------------------------------------------------------
# Speed


def loop(model: GPT, idx: torch.Tensor) -> np.ndarray:
    """The ranks (L, H, S), a singular value decomposition for each; columns and sink as in `measure`."""
    ranks = np.zeros((model.config.n_layer, model.config.n_head, len(idx)))
    for begin in range(0, len(idx), MICRO_BATCH):
        for layer, A in enumerate(model.attention_matrices(idx[begin : begin + MICRO_BATCH])):
            column_count(A, TAU), sink(A)
            for b in range(len(A)):
                for head in range(A.shape[1]):
                    energy = torch.linalg.svdvals(A[b, head]).square()
                    share = torch.cumsum(energy / energy.sum(), dim=0)
                    ranks[layer, head, begin + b] = (share < TAU).sum().item() + 1
    return ranks


def speed(config: SpeedConfig):
    shape = GPTConfig(n_layer=8, n_head=4, n_embd=128, vocab_size=257)  # the demo's
    models = {f"trained, {run}": checkpoint.load_model(run) for run in config.runs}
    for T in config.lengths:
        at_T = replace(shape, block_size=T)
        models |= {f"untrained, T {T}": sharpened(at_T, 1), f"sharp, T {T}": sharpened(at_T, 40)}
        models |= {f"collapsed, T {T}": collapsed(at_T)}
    print("model                      heads  k* quartiles     k*<=4    loop, s  measure, s  ratio   CPU time's  agree")
    for name, model in models.items():
        idx, ratios, cpu_ratios, seconds = tokens(model, config.data_dir, config.sequences), [], [], []
        for _ in range(config.repeats + 1):
            clocks = [(time.perf_counter(), time.process_time())]
            theirs = loop(model, idx)
            clocks.append((time.perf_counter(), time.process_time()))
            ours = measure(model, idx, TAU, MICRO_BATCH)
            clocks.append((time.perf_counter(), time.process_time()))
            (wall, cpu), (our_wall, our_cpu) = np.diff(clocks, axis=0)
            ratios.append(wall / our_wall), cpu_ratios.append(cpu / our_cpu), seconds.append((wall, our_wall))
        ranks = np.stack([ours[layer]["rank"] for layer in sorted(ours)])  # (L, H, S)
        quartiles = " ".join(f"{q:.0f}" for q in np.percentile(ranks, [0, 25, 50, 75, 100]))
        wall, our_wall = np.median(seconds[1:], axis=0)  # the first turn warms up
        print(
            f"{name:26s} {ranks.size:5d}  {quartiles:16s} {(ranks <= 4).mean():5.0%} {wall:10.2f} {our_wall:11.2f} "
            f"{np.median(ratios[1:]):6.1f} {np.median(cpu_ratios[1:]):12.1f}  {(ranks == theirs).mean():5.1%}",
            flush=True,
        )


def main():
    config = configurator.load(SpeedConfig)
    for key, value in versions(torch.device("cpu")).items():
        print(f"{key}: {value}")
    print(f"threads: {torch.get_num_threads()}; load before: {os.getloadavg()[0]:.1f}")
    {"exact": exact, "speed": speed}[config.what](config)
    print(f"load after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    configurator.run(main)
