"""Turn text into token files: train.bin, val.bin and meta.json (the format is data.py's).

    python prepare_data.py python --out=data/python                  # Python's own library, no download, seconds
    python prepare_data.py python --site-packages --tokenizer=gpt2   # and every installed package: hundreds of MB
    python prepare_data.py files novels/*.txt web.jsonl --tokenizer=gpt2 --out=data/mine

Documents are put in a fixed random order and the first ones become the validation split, exactly as nanoGPT
splits OpenWebText. Each document is encoded as plain text (it cannot forge a special token) and followed by one
end-of-text. The bytes written do not depend on the number of workers.
"""

import contextlib
import glob
import hashlib
import math
import os
import platform
import signal
import sysconfig
import tokenize
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

import configurator
import data
import storage
from configurator import UserError
from data import FORMAT, tokenizer

CHUNK = 64  # documents a worker encodes at a time


@dataclass
class PrepareConfig:
    """Tokenize a corpus into train.bin, val.bin and meta.json."""

    source: tyro.conf.Positional[Literal["python", "files"]]  # python: Python's own library; files: your own
    paths: tyro.conf.Positional[tuple[str, ...]] = ()  # for files: .txt, .jsonl or .parquet
    out: str = "data/python"  # directory to write
    tokenizer: str = "bytes"  # bytes, gpt2, or another name that tiktoken knows
    site_packages: bool = False  # python: add the source of every installed package
    sample_by: Literal["document", "paragraph", "line"] = "document"  # files: what of a .txt file is one document
    text_column: str = "text"  # files: the column of .jsonl and .parquet files that holds the text
    val_fraction: float = 0.005  # share of the documents for validation
    seed: int = 2357  # of the split; nanoGPT's for OpenWebText
    workers: int = os.cpu_count() or 1  # processes


# ----------------------------------------------------------------------------------------------------------
# Sources: each a sequence of documents, read one at a time


class PythonFiles(Sequence):
    """The .py files below some folders, sorted; an undecodable one is an empty document, which is skipped."""

    def __init__(self, folders: list[str], skip: set[str]):
        found = {path for folder in folders for path in Path(folder).rglob("*.py")}
        self.paths = sorted(p for p in found if not any(part in skip for part in p.parts))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            with tokenize.open(self.paths[i]) as file:  # decodes as Python would
                return file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            return ""


class Column(Sequence):
    """One text column of a `datasets` table."""

    def __init__(self, table, name: str):
        self.table, self.name = table, name

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i):
        return self.table[i][self.name]


def documents(config: PrepareConfig) -> tuple[Sequence, str]:
    """The documents of the configured source, and its name for meta.json. Raises UserError."""
    if config.source == "python":
        paths = sysconfig.get_paths()
        skip = {"test", "tests", "idle_test", "__pycache__"}
        if config.site_packages:
            folders = [paths["stdlib"], paths["purelib"], paths["platlib"]]
        else:
            folders, skip = [paths["stdlib"]], skip | {"site-packages", "dist-packages"}
        name = f"Python {platform.python_version()} library" + (" and installed packages" * config.site_packages)
        return PythonFiles(folders, skip), name

    readers = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
    suffixes = {Path(path).suffix for path in config.paths}
    if len(suffixes) != 1 or not suffixes <= set(readers):
        found = ", ".join(sorted(suffixes)) or "no path"
        raise UserError(f"files: found {found}, expected paths that all end in one of {', '.join(readers)}")
    for path in config.paths:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")

    import datasets  # only here: the embedded corpus does not need it

    reader = readers[suffixes.pop()]
    column = "text" if reader == "text" else config.text_column
    options = {"sample_by": config.sample_by} if reader == "text" else {}
    try:
        table = datasets.load_dataset(
            reader, data_files=[glob.escape(path) for path in config.paths], split="train", **options
        )
    except (datasets.exceptions.DatasetsError, StopIteration, ValueError, OSError) as error:
        raise UserError(f"files: not readable as {reader}: {' '.join(str(error.__cause__ or error).split())}") from None
    if column not in table.column_names:
        raise UserError(f"files: no column {column!r}; found {', '.join(table.column_names)}; set --text_column")
    return Column(table, column), f"files {' '.join(Path(path).name for path in config.paths)}"


def split(n_documents: int, val_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of the documents of each split, in the order they are written.

    The permutation and the rounding are those of `datasets`' train_test_split, which nanoGPT uses.
    """
    order = np.random.default_rng(seed).permutation(n_documents)
    n_val = math.ceil(n_documents * val_fraction)
    return {"train": order[n_val:], "val": order[:n_val]}


# ----------------------------------------------------------------------------------------------------------
# Encoding, in a pool of processes


def start_worker(texts: Sequence, tokenizer_name: str, dtype: str):
    """What each process of the pool keeps."""
    global worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one sees to it
    worker = texts, tokenizer(tokenizer_name), np.dtype(dtype)


def encode(indices: np.ndarray) -> tuple[np.ndarray, int]:
    """Token ids of some documents, an end-of-text after each, and how many documents were not empty."""
    texts, encoding, dtype = worker
    ids, n_documents = [], 0
    for i in indices.tolist():
        text = texts[i]
        if not isinstance(text, str | None):
            raise UserError(f"document {i}: found {type(text).__name__}, expected text")
        if text:
            ids += encoding.encode_ordinary(text)
            ids.append(encoding.eot_token)
            n_documents += 1
    return np.array(ids, dtype=dtype), n_documents


def stamp(path: str) -> list[int]:
    """Size and time of last change of a file, by which an edited corpus is told from the one that was prepared."""
    return [os.stat(path).st_size, os.stat(path).st_mtime_ns] if os.path.exists(path) else []


def write_split(path: Path, pool, indices: np.ndarray) -> dict:
    """Encode documents into one token file; return its entry in meta.json."""
    chunks = [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
    entry, sha256 = {"tokens": 0, "documents": 0, "max_id": 0}, hashlib.sha256()
    progress = tqdm(total=len(indices), desc=path.name, unit=" documents", disable=None)
    with open(path, "wb") as file, progress:
        for chunk, (ids, n_documents) in zip(chunks, pool.map(encode, chunks), strict=True):
            file.write(ids.tobytes())
            sha256.update(ids.tobytes())
            entry["tokens"] += len(ids)
            entry["documents"] += n_documents
            entry["max_id"] = max(entry["max_id"], int(ids.max(initial=0)))
            progress.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    return entry | {"sha256": sha256.hexdigest()}


def main():
    config = configurator.load(PrepareConfig)
    out = Path(config.out)
    arguments = {key: value for key, value in asdict(config).items() if key not in ("out", "workers")}
    arguments["paths"] = [[path, *stamp(path)] for path in config.paths]
    arguments["python"] = platform.python_version() if config.source == "python" else None
    changed = []
    if not 0 < config.val_fraction < 1 or config.workers < 1 or config.seed < 0:
        raise UserError(
            f"val_fraction is {config.val_fraction}, workers {config.workers}, seed {config.seed}; "
            "expected 0 < val_fraction < 1, workers >= 1, seed >= 0"
        )
    with contextlib.suppress(UserError):  # what is damaged or unfinished is made again
        found = data.verify(out).get("arguments", {})
        changed = [key for key in arguments if arguments[key] != found.get(key)]
        if not changed:
            print(f"{out} is up to date")
            return
    if changed:
        raise UserError(
            f"{out} was prepared with another {', '.join(changed)}; choose another --out, or remove it first"
        )

    encoding = tokenizer(config.tokenizer)
    dtype = "<u2" if encoding.n_vocab <= 2**16 else "<u4"
    texts, source = documents(config)
    indices = split(len(texts), config.val_fraction, config.seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}") from None
    pool = ProcessPoolExecutor(config.workers, initializer=start_worker, initargs=(texts, config.tokenizer, dtype))
    try:
        (out / "meta.json").unlink(missing_ok=True)
        splits = {name: write_split(out / f"{name}.bin", pool, indices[name]) for name in ("train", "val")}
    except BrokenProcessPool:
        raise UserError("a worker was killed, perhaps for want of memory; use fewer --workers", exit_code=1) from None
    except OSError as error:
        raise UserError(f"{out} was not written: {error.strerror}", exit_code=1) from None
    finally:
        pool.shutdown(cancel_futures=True)  # what is not encoded yet is not wanted any more
    if not all(entry["tokens"] for entry in splits.values()):
        counts = ", ".join(f"{name} {entry['documents']}" for name, entry in splits.items())
        raise UserError(
            f"{source}: documents with text: {counts}; expected at least 1 each; "
            "add documents, raise --val_fraction, or cut a .txt file with --sample_by=paragraph"
        )

    meta = {
        "format": FORMAT, "source": source, "tokenizer": encoding.name, "vocab_size": encoding.n_vocab,
        "eot": encoding.eot_token, "dtype": dtype, "splits": splits,
        "split_rule": "default_rng(seed).permutation(documents); the first ceil(val_fraction * documents) are val",
        "arguments": arguments,
    }  # fmt: skip
    storage.replace_json(out / "meta.json", meta)  # last: its presence says that all of it is done
    for name, entry in splits.items():
        print(f"{out / name}.bin: {entry['tokens']:,} tokens of {entry['documents']:,} documents")


if __name__ == "__main__":
    configurator.run(main)
