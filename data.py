"""Token files: their format, the order of training batches, the fixed validation windows.

    python prepare_data.py python --out=data/python        # makes a data directory
    python -m data data/python                             # verifies and describes one

A data directory holds train.bin and val.bin (little-endian uint16, or uint32 for a vocabulary that needs it)
and meta.json, which is written last: where it is, the preparation was finished.

The order of the training data is a pure function of (seed, step). Nothing is stored to resume it, a rank or a
micro-batch only takes its slice of it, and all models of a comparison see the same tokens in the same order.
"""

import functools
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import tiktoken

from configurator import UserError, run

FORMAT = 1
END_OF_TEXT = "<|endoftext|>"


def tokenizer(name: str) -> tiktoken.Encoding:
    """`bytes`: 256 bytes and end-of-text, made here. Any other name is tiktoken's. Raises UserError."""
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        # the pattern only cuts the text into short pieces for speed: there is nothing to merge
        return tiktoken.Encoding(
            "bytes", pat_str=r"(?s).{1,64}", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256}
        )
    try:
        return tiktoken.get_encoding(name)
    except ValueError:
        names = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        raise UserError(f"unknown tokenizer {name!r}; known: {names}") from None
    except OSError as error:  # requests' errors are OSErrors
        raise UserError(
            f"tokenizer {name!r} could not be downloaded ({type(error).__name__}); connect once, set "
            "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bytes"
        ) from None


def read_meta(data_dir: str | Path) -> dict:
    """The checked meta.json of a data directory. Raises UserError where the files are not what it says."""
    data_dir = Path(data_dir)
    prepare = (
        f"prepare it with: python prepare_data.py SOURCE --out={data_dir} (SOURCE: python, files, openwebtext, ...)"
    )
    if not data_dir.is_dir():
        raise UserError(f"data directory {data_dir} does not exist; {prepare}")
    try:
        meta = json.loads((data_dir / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({error})"
        raise UserError(f"{data_dir}/meta.json is {reason}, so the preparation did not finish; {prepare}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or "splits" not in meta:
        raise UserError(f"{data_dir}/meta.json is not of format {FORMAT}; {prepare}")
    try:
        entries = {
            split: (meta["splits"][split]["tokens"], meta["splits"][split]["sha256"]) for split in ("train", "val")
        }
        itemsize = np.dtype(meta["dtype"]).itemsize
        numbers = [
            meta["eot"],
            *(meta["splits"][split][key] for split in entries for key in ("tokens", "documents", "max_id")),
        ]
        if not all(isinstance(number, int) for number in numbers) or not isinstance(meta["tokenizer"], str):
            raise TypeError
    except (KeyError, TypeError):
        raise UserError(f"{data_dir}/meta.json is damaged; {prepare}") from None
    for split, (tokens, _) in entries.items():
        path, expected = data_dir / f"{split}.bin", tokens * itemsize
        found = path.stat().st_size if path.is_file() else "no file"
        if found != expected:
            raise UserError(f"{path}: found {found}, expected {expected} bytes; {prepare}")
    return meta


def verify(data_dir: str | Path) -> dict:
    """read_meta, after the sha256 of each file was compared too: seconds for ten gigabytes. Raises UserError."""
    meta = read_meta(data_dir)
    for split in ("train", "val"):
        with open(Path(data_dir) / f"{split}.bin", "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != meta["splits"][split]["sha256"]:
                raise UserError(f"{data_dir}/{split}.bin: sha256 mismatch; the file is damaged, prepare it again")
    return meta


def fingerprint(meta: dict) -> dict[str, str]:
    """What tells the tokens of one data directory from another's."""
    return {split: entry["sha256"] for split, entry in meta["splits"].items()}


def open_tokens(data_dir: str | Path, split: str, block_size: int, vocab_size: int) -> np.ndarray:
    """The token ids of "train" or "val", memory-mapped and read-only, checked against the model they are for."""
    meta = read_meta(data_dir)
    path, entry = Path(data_dir) / f"{split}.bin", meta["splits"][split]
    if entry["max_id"] >= vocab_size:
        raise UserError(f"{path}: largest token id {entry['max_id']} >= vocab_size {vocab_size}; raise vocab_size")
    if entry["tokens"] < block_size + 1:
        raise UserError(
            f"{path} has {entry['tokens']} tokens, block_size {block_size} needs at least {block_size + 1}; "
            "prepare more text or lower block_size"
        )
    return np.memmap(path, dtype=meta["dtype"], mode="r")


# ----------------------------------------------------------------------------------------------------------
# The order of training, and validation


def n_train_windows(n_tokens: int, block_size: int) -> int:
    """Windows of an epoch: the same number in each, whatever its offset."""
    return max(1, (n_tokens - 1) // block_size - 1)


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_starts(n_tokens: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """Where the windows of one epoch start: from a random offset cut into windows of T, in random order."""
    # RandomState, not default_rng: NumPy promises (NEP 19) that its stream never changes, which resuming relies on
    random = np.random.RandomState([seed, epoch])
    n_windows = n_train_windows(n_tokens, block_size)
    offset = random.randint(min(block_size, n_tokens - n_windows * block_size))
    return offset + block_size * random.permutation(n_windows)


def train_starts(n_tokens: int, block_size: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Where the batch_size windows of update `step` start: f(seed, step), each window once an epoch."""
    n_windows = n_train_windows(n_tokens, block_size)
    positions = range(step * batch_size, (step + 1) * batch_size)  # in the endless sequence of windows
    return np.array([epoch_starts(n_tokens, block_size, seed, p // n_windows)[p % n_windows] for p in positions])


def accumulation(tokens_per_step: int, micro_batch: int, block_size: int, processes: int) -> int:
    """How many micro-batches each process adds up to a step. Raises UserError if they do not make up a step."""
    micro_tokens = micro_batch * block_size * processes
    if tokens_per_step % micro_tokens:
        fitting = [b for b in range(micro_batch, 0, -1) if tokens_per_step % (b * block_size * processes) == 0]
        remedy = f"--micro_batch={fitting[0]} divides it" if fitting else "change tokens_per_step"
        raise UserError(
            f"tokens_per_step {tokens_per_step} is not divisible by micro_batch {micro_batch} x "
            f"block_size {block_size} x {processes} process(es) = {micro_tokens}; {remedy}"
        )
    return tokens_per_step // micro_tokens


def val_starts(n_tokens: int, block_size: int) -> np.ndarray:
    """Where the validation windows start: always all of them, in order; a tail shorter than T is left out."""
    return np.arange((n_tokens - 1) // block_size) * block_size


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of independent values and its standard error, which is 0 for a single one."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


def windows(tokens: np.ndarray, starts: np.ndarray, block_size: int):
    """Inputs and targets (the inputs one later) of the windows at `starts`: two int64 tensors (B, T)."""
    import torch  # not above: prepare_data.py does without it and starts in half the time

    window = torch.from_numpy(tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))  # (B, T + 1)
    return window[:, :-1], window[:, 1:]


def main():
    if len(sys.argv) != 2:
        raise UserError("usage: python -m data DIR")
    meta = verify(sys.argv[1])
    origin = " ".join(str(meta[key]) for key in ("source", "repository", "config_name", "revision") if meta.get(key))
    print(f"{sys.argv[1]}: {origin}, tokenizer {meta['tokenizer']}, {meta['dtype']}; sizes and hashes are right")
    for split, entry in meta["splits"].items():
        print(f"  {split:5s} {entry['tokens']:>14,} tokens {entry['documents']:>10,} documents  {entry['sha256'][:12]}")
    encoding = tokenizer(meta["tokenizer"])
    for split in meta["splits"]:  # the first documents of each: what a wrong encoding or a wrong column looks like
        tokens = np.memmap(Path(sys.argv[1]) / f"{split}.bin", dtype=meta["dtype"], mode="r")[:100_000]
        for document in np.split(tokens, np.flatnonzero(tokens == meta["eot"]) + 1)[:2]:
            print(f"  {split:5s} {encoding.decode(document[:50].tolist())[:100]!r} ...")


if __name__ == "__main__":
    run(main)
