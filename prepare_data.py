"""Turn text into token files: train.bin, val.bin and meta.json (the format is data.py's).

    python prepare_data.py python --out=data/python                  # Python's own library, no download, seconds
    python prepare_data.py python --site-packages --tokenizer=gpt2   # and every installed package: hundreds of MB
    python prepare_data.py files novels/*.txt --tokenizer=gpt2 --out=data/mine
    python prepare_data.py openwebtext                               # the paper's corpus, nanoGPT's split: 9.0 B tokens
    python prepare_data.py fineweb-edu --config-name=sample-100BT --max-tokens=20_000_000_000

Documents are put in a fixed random order and the first ones become the validation split, exactly as nanoGPT
splits OpenWebText: the same documents for any --max_tokens, but not for another --config_name. Each document is
encoded as plain text (it cannot forge a special token) and followed by one end-of-text. The bytes written do not
depend on the number of workers.

Stopped in any way, a preparation goes on where it was with the same command: progress.json tells how far the token
files are whole. Memory does not grow with the corpus, but for 12 bytes for each document at most.
"""

import collections
import contextlib
import hashlib
import itertools
import math
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

from plumbing import configurator
import corpus
import data
from plumbing import storage
from plumbing.configurator import UserError
from data import FORMAT, tokenizer

JOB_TOKENS = 2**16  # about what a worker encodes at a time
PART_BYTES = 2**24  # of a token file between two records of progress: what a kill can cost
SAMPLE_DOCUMENTS, SAMPLE_TOKENS = 1000, 2**19  # encoded first, whichever is less, to tell the size of the result


@dataclass
class PrepareConfig:
    """Tokenize a corpus into train.bin, val.bin and meta.json."""

    source: tyro.conf.Positional[Literal["python", "files", "openwebtext", "fineweb-edu"]]  # python: its own library
    paths: tyro.conf.Positional[tuple[str, ...]] = ()  # for files: .txt, .jsonl or .parquet
    out: str | None = None  # directory to write; default data/SOURCE
    tokenizer: str | None = None  # bytes, gpt2, or another name that tiktoken knows; default gpt2 for a hub's corpus
    max_tokens: int | None = None  # end train.bin with the last whole document within this; val.bin stays the same
    repository: str | None = None  # hub: another copy of the corpus, or a directory laid out like one
    revision: str | None = None  # hub: branch, tag or commit; meta.json records the commit that it was
    config_name: str | None = None  # hub: which part of the repository; default sample-10BT for fineweb-edu
    site_packages: bool = False  # python: add the source of every installed package
    sample_by: Literal["document", "paragraph", "line"] = "document"  # files: what of a .txt file is one document
    text_column: str = "text"  # the column of a table, or of a .jsonl file, that holds the text
    val_fraction: float | None = None  # share of the documents for validation; default 0.005, hub nanoGPT's 0.0005
    seed: int = 2357  # of the split; nanoGPT's for OpenWebText
    workers: int = os.cpu_count() or 1  # processes


def split(n_documents: int, val_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of the documents of each split, in the order they are written.

    The permutation and the rounding are those of `datasets`' train_test_split, which nanoGPT uses.
    """
    order = np.arange(n_documents, dtype=np.uint32 if n_documents <= 2**32 else np.uint64)
    np.random.default_rng(seed).shuffle(order)  # what .permutation does, in half its memory
    n_val = math.ceil(n_documents * val_fraction)
    return {"val": order[:n_val], "train": order[n_val:]}  # val first: it is short, so a mistake shows soon


# ----------------------------------------------------------------------------------------------------------
# Encoding, in a pool of processes


def encode(texts: Sequence, encoding: tiktoken.Encoding, dtype: str, indices) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of some documents, an end-of-text after each; and the number of ids of each, 0 for one without text.

    Raises OverflowError for an id that the dtype cannot hold.
    """
    eot, ids, lengths = np.array([encoding.eot_token], np.uint32), [], []
    for i in indices:
        text = texts[i]
        if not text:
            lengths.append(0)
            continue
        try:
            ids += [encoding.encode_to_numpy(text, disallowed_special=()), eot]
        except UnicodeEncodeError:  # a lone surrogate, which only this one replaces
            ids += [np.array(encoding.encode_ordinary(text), np.uint32), eot]
        lengths.append(len(ids[-2]) + 1)
    joined = np.concatenate([np.empty(0, np.uint32), *ids])
    if joined.max(initial=0) > np.iinfo(dtype).max:
        raise OverflowError(f"token id {joined.max()} does not fit {dtype}")
    return joined.astype(dtype), np.array(lengths)


def start_worker(texts: Sequence, tokenizer_name: str, dtype: str):
    """What each process of the pool keeps."""
    global worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one sees to it
    threading.Thread(target=follow_parent, daemon=True).start()
    worker = texts, tokenizer(tokenizer_name), dtype


def follow_parent():
    """End this process when the main one is gone, even if that was killed; else it would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_job(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return encode(*worker, indices)


def encoded(pool: ProcessPoolExecutor, order: np.ndarray, job: int, ahead: int) -> Iterator:
    """The documents of `order`, encoded, `job` at a time and in that order; at most `ahead` jobs are in memory."""
    waiting = collections.deque()
    for begin in range(0, len(order), job):
        waiting.append(pool.submit(encode_job, order[begin : begin + job]))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ----------------------------------------------------------------------------------------------------------
# Writing, in parts


def hash_of_start(path: Path, n_bytes: int):
    """A sha256 fed with the first n_bytes of a file, or with all of a shorter one."""
    sha256 = hashlib.sha256()
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        while n_bytes > 0 and (block := file.read(min(n_bytes, 2**20))):
            sha256.update(block)
            n_bytes -= len(block)
    return sha256


def write_split(out: Path, name: str, progress: dict, order: np.ndarray, encode_rest, max_tokens: float):
    """Append the documents of `order` that are still missing to a token file, and what it holds to `progress`.

    encode_rest(order) yields (ids, lengths) of documents in that order. A start that is not what progress says, as
    after a crash of the system, is written anew.
    """
    path, itemsize = out / f"{name}.bin", np.dtype(progress["dtype"]).itemsize
    fresh = {"read": 0, "tokens": 0, "documents": 0, "max_id": 0, "sha256": hashlib.sha256().hexdigest()}
    entry = progress["splits"].get(name, fresh)
    sha256 = hash_of_start(path, entry["tokens"] * itemsize)
    if sha256.hexdigest() != entry["sha256"]:
        entry, sha256 = fresh, hashlib.sha256()

    def record():
        file.flush()
        os.fsync(file.fileno())
        progress["splits"][name] = entry | {"sha256": sha256.hexdigest()}
        storage.replace_json(out / "progress.json", progress)

    begun, kept = time.perf_counter(), entry["tokens"]
    # The total is what the tokens so far make likely, so that the time left is told in the unit that takes the time.
    bar = tqdm(desc=path.name, initial=kept, unit=" tokens", unit_scale=True, disable=None)
    with open(path, "ab") as file, bar:
        file.truncate(entry["tokens"] * itemsize)
        recorded = kept
        for ids, lengths in encode_rest(order[entry["read"] :]):
            whole = int(np.searchsorted(np.cumsum(lengths), max_tokens - entry["tokens"], "right"))
            ids = ids[: int(lengths[:whole].sum())]
            file.write(ids)
            sha256.update(ids)
            entry["read"] += whole
            entry["tokens"] += len(ids)
            entry["documents"] += int(np.count_nonzero(lengths[:whole]))
            entry["max_id"] = max(entry["max_id"], int(ids.max(initial=0)))
            bar.total = min(max_tokens, round(entry["tokens"] / max(entry["read"], 1) * len(order)))
            bar.update(len(ids))
            if whole < len(lengths):  # the next document is beyond max_tokens
                break
            if (entry["tokens"] - recorded) * itemsize >= PART_BYTES:
                recorded = entry["tokens"]
                record()
        record()
    speed = (entry["tokens"] - kept) / (time.perf_counter() - begun)
    print(f"{path}: {entry['tokens']:,} tokens of {entry['documents']:,} documents, {speed:,.0f} tokens a second")


def expected_size(config: PrepareConfig, texts, encoding, dtype: str, indices: dict) -> tuple[int, int]:
    """Bytes of both token files, from a sample of the documents, and how many of these make a job."""
    sample = n_tokens = 0
    for i in itertools.islice(itertools.chain(indices["train"], indices["val"]), SAMPLE_DOCUMENTS):
        n_tokens += len(encode(texts, encoding, dtype, [i])[0])
        sample += 1
        if n_tokens > SAMPLE_TOKENS:
            break
    tokens = {name: len(order) * n_tokens / sample for name, order in indices.items()}
    size = (tokens["val"] + min(tokens["train"], config.max_tokens or math.inf)) * np.dtype(dtype).itemsize
    return int(size), max(1, min(SAMPLE_DOCUMENTS, JOB_TOKENS * sample // max(n_tokens, 1)))


def check_tokens(config: PrepareConfig, name: str, entry: dict):
    """Raise UserError if a corpus of nanoGPT, split and encoded as it does, has not the tokens that it has there."""
    expected = dict(corpus.HUB[config.source].tokens).get(name) if config.source in corpus.HUB else None
    like_nanogpt = (config.tokenizer, config.val_fraction, config.seed) == ("gpt2", 0.0005, 2357)
    if expected and like_nanogpt and not (name == "train" and config.max_tokens) and entry["tokens"] != expected:
        raise UserError(
            f"{config.source}: {name} has {entry['tokens']:,} tokens, expected {expected:,}: another text than "
            "nanoGPT's; try --repository=dvruette/openwebtext or another --revision, with another --out, or prepare "
            "it as it is: python prepare_data.py files *.parquet"
        )


# ----------------------------------------------------------------------------------------------------------


def checked(config: PrepareConfig) -> PrepareConfig:
    """The settings with what depends on the source filled in. Raises UserError if they make no sense."""
    hub = config.source in corpus.HUB
    config = replace(
        config,
        out=config.out or f"data/{config.source}",
        tokenizer=config.tokenizer or ("gpt2" if hub else "bytes"),
        val_fraction=(0.0005 if hub else 0.005) if config.val_fraction is None else config.val_fraction,
    )
    least = min(config.workers, 1 if config.max_tokens is None else config.max_tokens)
    if not 0 < config.val_fraction < 1 or least < 1 or config.seed < 0:
        raise UserError(
            f"val_fraction is {config.val_fraction}, workers {config.workers}, seed {config.seed}, max_tokens "
            f"{config.max_tokens}; expected 0 < val_fraction < 1, workers >= 1, seed >= 0, max_tokens >= 1"
        )
    if config.paths and config.source != "files":
        raise UserError(f"{config.source}: found a path {config.paths[0]}, expected none; paths are for: files")
    if (config.repository or config.revision or config.config_name) and not hub:
        raise UserError(f"{config.source}: --repository, --revision, --config_name are for: {', '.join(corpus.HUB)}")
    if config.revision and os.path.isdir(config.repository or ""):
        raise UserError(f"--revision={config.revision}: {config.repository} is a directory and has none; leave it out")
    return config


def identity(config: PrepareConfig) -> dict:
    """The arguments that decide what is written, and the size and time of change of each file among them."""
    arguments = {key: value for key, value in asdict(config).items() if key not in ("out", "workers")}
    states = {path: os.stat(path) if os.path.exists(path) else None for path in config.paths}
    arguments["paths"] = [[path, *([s.st_size, s.st_mtime_ns] if s else [])] for path, s in states.items()]
    arguments["python"] = platform.python_version() if config.source == "python" else None
    return arguments


def found(out: Path) -> tuple[dict, bool]:
    """What a directory was prepared from, finished (True) or not: meta.json, progress.json, or nothing."""
    with contextlib.suppress(UserError):  # what is damaged is made again
        return data.verify(out), True
    with contextlib.suppress(UserError):
        begun = storage.read_json(out / "progress.json")
        return (begun, False) if isinstance(begun.get("arguments"), dict) else ({}, False)
    return {}, False


def main():
    config = checked(configurator.load(PrepareConfig))
    out, arguments = Path(config.out), identity(config)
    begun, finished = found(out)
    changed = [key for key in arguments if arguments[key] != begun.get("arguments", {}).get(key)] if begun else []
    if changed:
        raise UserError(
            f"{out} was {'prepared' if finished else 'begun'} with another {', '.join(changed)}; choose another --out, "
            "or remove it first"
        )
    if finished:
        print(f"{out} is up to date")
        return

    encoding = tokenizer(config.tokenizer)
    dtype = "<u2" if encoding.n_vocab <= 2**16 else "<u4"
    texts, origin = corpus.documents(config, begun.get("origin"))
    indices = split(len(texts), config.val_fraction, config.seed)
    counts = ", ".join(f"{name} {len(indices[name])}" for name in ("train", "val"))
    more = "add documents or lower --val_fraction"
    if any(path.endswith(".txt") for path in config.paths) and config.sample_by == "document":
        more += ", or cut the files into more of them with --sample_by=paragraph"
    if not all(map(len, indices.values())):
        raise UserError(f"{config.source}: documents: {counts}; expected at least 1 each; {more}")
    progress = {"arguments": arguments, "origin": origin, "documents": len(texts), "dtype": dtype, "splits": {}}
    if begun and begun.get("documents") != len(texts):
        raise UserError(f"{out} was begun with {begun.get('documents')} documents, found {len(texts)}; remove it first")
    size, job = expected_size(config, texts, encoding, dtype, indices)
    size -= sum(path.stat().st_size for path in out.glob("*.bin"))
    corpus.check_disk("the token files", {config.out: max(size, 0)})

    def encode_rest(order):
        return encoded(pool, order, job, ahead=4 * config.workers)

    with storage.lock(out):
        (out / "meta.json").unlink(missing_ok=True)
        progress["splits"] = begun.get("splits", {})
        pool = ProcessPoolExecutor(config.workers, initializer=start_worker, initargs=(texts, config.tokenizer, dtype))
        try:
            for name, order in indices.items():
                limit = config.max_tokens or math.inf if name == "train" else math.inf
                write_split(out, name, progress, order, encode_rest, limit)
                check_tokens(config, name, progress["splits"][name])
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, perhaps for want of memory; the same command with fewer --workers goes on",
                exit_code=1,
            ) from None
        except OSError as error:
            raise UserError(f"{out} was not written: {error.strerror}; the same command goes on", 1) from None
        finally:
            pool.shutdown(cancel_futures=True)  # what is not encoded yet is not wanted any more

        splits = {name: progress["splits"][name] for name in ("train", "val")}
        if not all(entry["tokens"] for entry in splits.values()):
            (out / "progress.json").unlink()
            counts = ", ".join(f"{name} {entry['documents']}" for name, entry in splits.items())
            more = more if splits["val"]["tokens"] else more.replace("lower", "raise")
            more = f"raise --max_tokens, {more}" if config.max_tokens else more
            raise UserError(f"{config.source}: documents with text: {counts}; expected at least 1 each; {more}")
        meta = {
            "format": FORMAT, **origin,
            "tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token, "dtype": dtype,
            "splits": {name: {k: v for k, v in entry.items() if k != "read"} for name, entry in splits.items()},
            "split_rule": "default_rng(seed).permutation(documents); the first ceil(val_fraction * documents) are val",
            "arguments": arguments,
        }  # fmt: skip
        storage.replace_json(out / "meta.json", meta)  # last: its presence says that all of it is done
        (out / "progress.json").unlink()


if __name__ == "__main__":
    configurator.run(main)
