"""Turn text into token files: train.bin, val.bin and meta.json (data.py describes the format).

    python prepare_data.py python --out=data/python                  # Python's own library: no download, seconds
    python prepare_data.py python --site_packages --tokenizer=gpt2   # and every installed package: hundreds of MB
    python prepare_data.py files novels/ notes/*.md --sample_by=paragraph --tokenizer=gpt2 --out=data/mine
    python prepare_data.py openwebtext                               # the paper's corpus, nanoGPT's split: 9.0 B tokens
    python prepare_data.py fineweb-edu --config_name=sample-100BT --max_tokens=20_000_000_000

The documents are shuffled with a fixed seed and the first ones become the validation split, exactly as nanoGPT splits
OpenWebText. Each document is encoded as ordinary text (it cannot forge a special token), and one end-of-text follows it.
The bytes do not depend on --workers. An interrupted preparation starts again from the beginning; what `datasets` has
downloaded or converted stays in its cache (HF_HOME). Memory does not grow with the corpus.
"""

import glob
import hashlib
import json
import math
import os
import platform
import re
import sys
import sysconfig
import time
import tokenize
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

import data
from plumbing import configurator, storage
from plumbing.configurator import UserError
from plumbing.tokenizers import tokenizer

JOB_DOCUMENTS = 16  # encoded at a time by one worker
PIECE = 100_000  # characters; tiktoken's regex overflows its stack on a run of about a million spaces

# Where a corpus of the hub is found: (repository, revision), tried in this order. Skylion007's main was a loading
# script for years, which `datasets` no longer runs; the other two are complete copies in parquet.
HUB = {
    "openwebtext": [("Skylion007/openwebtext", r) for r in ("main", "refs/pr/19")] + [("dvruette/openwebtext", "main")],
    "fineweb-edu": [("HuggingFaceFW/fineweb-edu", "main")],
}
OPENWEBTEXT_DOCUMENTS = 8_013_769
NANOGPT_TOKENS = {"val": 4_434_897, "train": 9_035_582_198}  # as nanoGPT's data/openwebtext/prepare.py states them
OTHER_TEXT = "try --repository=dvruette/openwebtext, or prepare it as it is: python prepare_data.py files *.parquet"


@dataclass
class PrepareConfig:
    """Tokenize a corpus into train.bin, val.bin and meta.json."""

    source: tyro.conf.Positional[Literal["python", "files", "openwebtext", "fineweb-edu"]]  # python: its own library
    paths: tyro.conf.Positional[tuple[str, ...]] = ()  # files: .txt .md .json .jsonl .csv .parquet, folders, globs
    out: str | None = None  # directory to write; default data/SOURCE
    tokenizer: str | None = None  # bytes, gpt2 or any tiktoken name; default gpt2 for a corpus of the hub, else bytes
    max_tokens: int | None = None  # end train.bin with the last complete document within this; val.bin stays the same
    repository: str | None = None  # hub: a different copy of the corpus, or a local directory laid out like one
    revision: str | None = None  # hub: branch, tag or commit; meta.json records the commit
    config_name: str | None = None  # hub: which part of the repository; default sample-10BT for fineweb-edu
    site_packages: bool = False  # python: add the source of every installed package
    sample_by: Literal["document", "paragraph", "line"] = "document"  # files: what is one document in .txt and .md
    text_column: str = "text"  # column of a table, or key of a JSON object, that holds the text
    val_fraction: float | None = None  # share of the documents for validation; default 0.005, hub nanoGPT's 0.0005
    seed: int = 2357  # of the split; nanoGPT's
    workers: int = os.cpu_count() or 1  # threads; tiktoken encodes outside Python's global lock

    def __post_init__(self):
        hub = self.source in HUB
        self.out = self.out or f"data/{self.source}"
        self.tokenizer = self.tokenizer or ("gpt2" if hub else "bytes")
        self.val_fraction = self.val_fraction or (0.0005 if hub else 0.005)
        if self.source == "fineweb-edu":
            self.config_name = self.config_name or "sample-10BT"


def split(n_documents: int, val_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Split -> indices of its documents in the order they are written, as nanoGPT's train_test_split has them."""
    order = np.arange(n_documents, dtype=np.uint32)
    np.random.default_rng(seed).shuffle(order)  # the same order as .permutation, in half the memory
    n_val = math.ceil(n_documents * val_fraction)
    return {"val": order[:n_val], "train": order[n_val:]}  # val first: it is short, so a mistake shows soon


# ---- documents, read one at a time


class Documents:
    """The documents of several parts (name, items, read), where read(item) is the text of one, or empty."""

    def __init__(self, parts: list):
        self.parts, self.ends = parts, np.cumsum([len(items) for _, items, _ in parts])

    def __len__(self):
        return int(self.ends[-1]) if self.parts else 0

    def text(self, i: int) -> tuple[str | None, str]:
        """The text of document i, and what to call it. Raises UserError."""
        part = int(np.searchsorted(self.ends, i, "right"))
        name, items, read = self.parts[part]
        row = int(i) - int(self.ends[part]) + len(items)
        try:
            text = read(items[row])
            if not isinstance(text, str | None):
                raise TypeError(f"found {type(text).__name__}, expected text")
        except (ValueError, LookupError, TypeError) as error:
            reason = f"no column {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{name}, document {row + 1}: {reason}; fix it or set --text_column") from None
        return text, f"{name}, document {row + 1}"


def read_python(path: Path) -> str:
    """A file's source, decoded as Python would; empty if it cannot be."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return ""


def python_files(site_packages: bool) -> list[Path]:
    """The sorted .py files of Python's library, without its tests, and of the installed packages."""
    paths, skip = sysconfig.get_paths(), {"test", "tests", "idle_test", "__pycache__"}
    folders = [paths["stdlib"], *[paths["purelib"], paths["platlib"]] * site_packages]
    if not site_packages:
        skip |= {"site-packages", "dist-packages"}
    found = {path for folder in folders for path in Path(folder).rglob("*.py")}
    return sorted(path for path in found if skip.isdisjoint(path.parts))


def builders(config: PrepareConfig) -> dict[str, tuple[str, dict]]:
    """Ending of a file -> the builder of `datasets` that reads it, and its options. All of them read .gz too."""
    column, text = config.text_column, {"encoding": "utf-8-sig"}  # -sig: without Windows' byte order mark
    only = {"features": features(column)}
    return {
        ".txt": ("text", text | {"sample_by": config.sample_by}),
        ".md": ("text", text | {"sample_by": config.sample_by}),
        ".jsonl": ("text", text | {"sample_by": "line"}),  # parsed line by line: other keys may come and go
        ".json": ("json", {}),
        ".csv": ("csv", only | {"usecols": [column], "keep_default_na": False}),
        ".parquet": ("parquet", only | {"columns": [column]}),
    }


def features(column: str):
    import datasets  # imported here: the source `python` does without it

    return datasets.Features({column: datasets.Value("string")})
