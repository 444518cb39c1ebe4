"""Token files: their format, the order of training batches, the fixed validation windows.

    python prepare_data.py python --out=data/python    # makes a data directory, or verifies it

A data directory holds train.bin and val.bin (little-endian uint16, or uint32 for a large
vocabulary), meta.json, the tokenizer, and manifest.json with the size and sha256 of each. It is written
aside and renamed, so it is complete if it is there.

The training order is a pure function of (seed, step), so nothing is stored to resume it. Processes
and micro-batches slice the same batch, and all models of a comparison see the same data.
"""

import functools
import math
from pathlib import Path

import numpy as np

from plumbing import storage
from plumbing.configurator import UserError


def read_meta(data_dir: str | Path, content: bool = False) -> dict:
    """The meta.json of a data directory, its path, and the sha256 of each split's tokens.

    UserError unless it is complete and unchanged. With `content`, the tokens' sha256 is checked too.
    """
    path = Path(data_dir).expanduser()
    try:
        listed = storage.verify(path, unread=() if content else (".bin",))
        meta = storage.read_json(path / "meta.json")
    except UserError as error:
        remedy = "prepare one in a new place: python prepare_data.py SOURCE --out=DIR"
        raise UserError(f"{error}; expected a data directory; {remedy}") from None
    sha256 = {split: listed[f"{split}.bin"][1] for split in meta["splits"]}
    return meta | {"directory": str(path), "sha256": sha256}


def open_tokens(data_dir: str | Path, split: str, block_size: int, vocab_size: int) -> np.ndarray:
    """The token ids of "train" or "val", memory-mapped. UserError if they do not fit the model."""
    meta = read_meta(data_dir)
    path, entry = Path(meta["directory"]) / f"{split}.bin", meta["splits"][split]
    if entry["max_id"] >= vocab_size or entry["tokens"] < block_size + 1:
        raise UserError(
            f"{path}: largest token id {entry['max_id']}, {entry['tokens']} tokens; expected ids "
            f"below vocab_size {vocab_size} and at least {block_size + 1} tokens (block_size + 1)"
        )
    return np.memmap(path, dtype=meta["dtype"], mode="r")


# ---- the order of training


def n_train_windows(n_tokens: int, block_size: int) -> int:
    """Windows of an epoch. The number does not depend on the epoch's offset."""
    return max(1, (n_tokens - 1) // block_size - 1)


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_starts(n_tokens: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """Where the windows of one epoch start: every T from a random offset, in random order."""
    # RandomState, not default_rng: NumPy promises (NEP 19) that its stream never changes
    random = np.random.RandomState([seed, epoch])
    n_windows = n_train_windows(n_tokens, block_size)
    offset = random.randint(min(block_size, n_tokens - n_windows * block_size))
    return offset + block_size * random.permutation(n_windows)


def train_starts(n_tokens: int, block_size: int, seed: int, step: int, batch_size: int):
    """Where the batch_size windows of update `step` start: each window once an epoch."""
    n_windows = n_train_windows(n_tokens, block_size)
    places = (divmod(p, n_windows) for p in range(step * batch_size, (step + 1) * batch_size))
    return np.array([epoch_starts(n_tokens, block_size, seed, epoch)[i] for epoch, i in places])


def accumulation(tokens_per_step: int, micro_batch: int, block_size: int, processes: int) -> int:
    """How many micro-batches of each process make a step. UserError if it is no whole number."""
    micro_tokens = micro_batch * block_size * processes
    if tokens_per_step % micro_tokens:
        windows, rest = divmod(tokens_per_step, block_size * processes)
        remedy = "change tokens_per_step" if rest else f"choose a micro_batch that divides {windows}"
        raise UserError(
            f"tokens_per_step {tokens_per_step} is not divisible by micro_batch {micro_batch} x "
            f"block_size {block_size} x {processes} process(es) = {micro_tokens}; {remedy}"
        )
    return tokens_per_step // micro_tokens


def step_batches(tokens: np.ndarray, config, step: int, rank: int, world_size: int, device):
    """Yield one process's micro-batches (x, y) of a step, each (B, T), and seed their dropout."""
    import torch

    T, on_gpu = config.block_size, device.type == "cuda"
    starts = train_starts(len(tokens), T, config.seed, step, config.tokens_per_step // T)
    of_rank = starts.reshape(-1, world_size, config.micro_batch)[:, rank]
    for micro_step, micro_starts in enumerate(of_rank):
        if config.dropout:  # the same masks whenever this step is made again
            seeds = np.random.SeedSequence([config.seed, step, rank, micro_step])
            torch.manual_seed(int(seeds.generate_state(1)[0]))
        batch = windows(tokens, micro_starts, T)
        # from pinned memory: the CPU does not wait for the copy to a GPU
        yield [(t.pin_memory() if on_gpu else t).to(device, non_blocking=on_gpu) for t in batch]


# ---- validation


def val_starts(n_tokens: int, block_size: int) -> np.ndarray:
    """Where the validation windows start: all of them, in order. A tail below T is left out."""
    return np.arange((n_tokens - 1) // block_size) * block_size


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of independent values and its standard error, which is 0 for a single one."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


def windows(tokens: np.ndarray, starts: np.ndarray, block_size: int):
    """Inputs and targets (the inputs shifted by one) of the windows at `starts`, each (B, T)."""
    import torch  # imported here: prepare_data.py starts in half the time without it

    window = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)  # (B, T + 1)
    window = torch.from_numpy(window)
    return window[:, :-1], window[:, 1:]
