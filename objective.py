"""What an update aims at: its learning rate, the loss with a teacher, and the loss over the validation windows.

    python train.py config/demo.toml --schedule=wsd --decay_fraction=0.6 --out_dir=out/wsd
    python train.py config/demo.toml --teacher=out/demo/reference --n_layer=4 --out_dir=out/distilled
    python train.py --init_from=out/demo/reference --data_dir=data/demo --eval_only

What the loop of train.py calls, and nothing that it does not.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

import checkpoint
import data
import machine
import storage
from configurator import UserError
from model import GPT, GPTConfig


def stable_steps(config) -> int:
    """The updates that a "wsd" schedule makes before its rate begins to fall."""
    return config.max_steps - round(config.decay_fraction * config.max_steps)


def learning_rate(config, step: int) -> float:
    """Rate of update `step`, counted from 0: a linear warm-up to lr, then the schedule down to min_lr.

    "cosine": half a cosine. "wsd": warm-up, stable, decay, the last linearly (arXiv 2405.18392); whatever length the
    run has, it is the same run until it decays, so that its last stable checkpoint can be gone on from.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    start = stable_steps(config) if config.schedule == "wsd" else config.warmup_steps
    progress = max(0, step - start) / max(1, config.max_steps - 1 - start)
    falling = 1 - progress if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * falling


def distillation_loss(logits, targets, teacher_logits, alpha: float, tau: float):
    """alpha · cross-entropy + (1 - alpha) · tau² · KL(teacher, student), the mean over tokens in nats: a scalar.

    logits and teacher_logits (B, T, V), targets (B, T). The KL is between the distributions at temperature tau; tau²
    keeps its gradient as large as at temperature 1 (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    wide = torch.promote_types(logits.dtype, torch.float32)  # never a loss in half precision
    logits, teacher_logits = (t.to(wide).flatten(0, 1) for t in (logits, teacher_logits))  # (B·T, V)
    cross_entropy = F.cross_entropy(logits, targets.flatten())
    student, teacher = (F.log_softmax(t / tau, dim=-1) for t in (logits, teacher_logits))
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return alpha * cross_entropy + (1 - alpha) * tau**2 * divergence


def load_teacher(name: str, meta: dict, student: GPTConfig, dtype: torch.dtype) -> tuple[GPT, dict]:
    """The model to distil, on the CPU, and where it comes from. Raises UserError if it reads other sequences."""
    path = storage.resolve(name)
    checkpoint.check_tokenizer(path, meta)
    teacher = checkpoint.load_model(path, dtype).requires_grad_(False)
    for key in ("vocab_size", "block_size"):
        theirs, ours = getattr(teacher.config, key), getattr(student, key)
        if theirs != ours:
            raise UserError(f"teacher {path} has {key} {theirs}, the student {ours}; they must be equal")
    return teacher, checkpoint.provenance(path)


@torch.no_grad()
def evaluate(model: GPT, tokens: np.ndarray, micro_batch: int, device, autocast, may_stop=False) -> np.ndarray | None:
    """Loss of every validation window, in nats a token: float64 (windows,), to rounding the same for any batch.

    Each process takes its share of the windows, each gets all results. None if it may_stop and a signal asks to.
    """
    rank, world_size = machine.rank_and_world_size()
    T = model.config.block_size
    starts = data.val_starts(len(tokens), T)
    losses = torch.zeros(len(starts), dtype=torch.float64)
    mine = np.arange(rank, len(starts), world_size)
    model.eval()
    for i in range(0, -(-len(starts) // world_size), micro_batch):  # as many turns on each process
        if may_stop and machine.stop_requested():
            return None
        batch = mine[i : i + micro_batch]
        if len(batch) == 0:
            continue
        x, y = data.windows(tokens, starts[batch], T)
        with autocast:
            loss = model(x.to(device), y.to(device), reduction="none")  # (B, T)
        losses[batch] = loss.cpu().double().mean(1)
    model.train()
    if world_size > 1:  # each window is zero on all processes but one
        dist.all_reduce(losses)
    return losses.numpy()
