"""Turn text into token files: train.bin, val.bin and meta.json (data.py describes the format).

    python prepare_data.py python --out=data/python                # Python's own library: no download, seconds
    python prepare_data.py files novels/ --sample_by=paragraph --tokenizer=gpt2 --out=data/novels
    python prepare_data.py openwebtext                             # the paper's corpus: 9.0 B tokens
    python prepare_data.py fineweb-edu --config_name=sample-100BT --max_tokens=20_000_000_000

The documents are shuffled with a fixed seed, and the first ones become the validation split, exactly as nanoGPT
splits OpenWebText. Each is encoded as ordinary text (it cannot forge a special token), then one end-of-text follows.
The bytes do not depend on --workers. An interrupted preparation starts again from the beginning; what `datasets`
has downloaded and converted stays in its cache (HF_HOME). The memory needed does not grow with the corpus.
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
from collections import deque
from collections.abc import Iterator
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

# (repository, revision), tried in this order. Skylion007's main was a loading script for years, which `datasets` no
# longer runs; the other two are complete copies in parquet.
HUB = {
    "openwebtext": [
        ("Skylion007/openwebtext", "main"),
        ("Skylion007/openwebtext", "refs/pr/19"),
        ("dvruette/openwebtext", "main"),
    ],
    "fineweb-edu": [("HuggingFaceFW/fineweb-edu", "main")],
}
N_DOCUMENTS = {"openwebtext": 8_013_769}
N_TOKENS = {"val": 4_434_897, "train": 9_035_582_198}  # of OpenWebText, from nanoGPT's data/openwebtext/prepare.py
NANOGPT = ("openwebtext", "gpt2", 0.0005, 2357)  # source, tokenizer, val_fraction, seed
PIECE = 100_000  # characters


@dataclass
class PrepareConfig:
    """Tokenize a corpus into train.bin, val.bin and meta.json."""

    source: tyro.conf.Positional[Literal["python", "files", "openwebtext", "fineweb-edu"]]
    paths: tyro.conf.Positional[tuple[str, ...]] = ()  # files: .txt .md .jsonl .json .csv .parquet, folders, globs
    out: str | None = None  # directory to write; default data/SOURCE
    tokenizer: str | None = None  # bytes, gpt2 or any name of tiktoken's; default gpt2 for the hub, else bytes
    max_tokens: int | None = None  # end train.bin with the last complete document within this; val.bin is unchanged
    repository: str | None = None  # hub: a different copy of the corpus, or a local directory laid out like one
    revision: str | None = None  # hub: branch, tag or commit; meta.json records the commit
    config_name: str | None = None  # hub: part of the repository; default sample-10BT for fineweb-edu
    site_packages: bool = False  # python: add the source of every installed package
    sample_by: Literal["document", "paragraph", "line"] = "document"  # files: what one document is in .txt and .md
    text_column: str = "text"  # column of a table, or key of a JSON object, that holds the text
    val_fraction: float | None = None  # of the documents; default 0.005, for the hub nanoGPT's 0.0005
    seed: int = 2357  # of the split; nanoGPT's
    workers: int = os.cpu_count() or 1  # threads; tiktoken encodes outside Python's global lock

    def __post_init__(self):
        hub = self.source in HUB
        self.out = self.out or f"data/{self.source}"
        self.tokenizer = self.tokenizer or ("gpt2" if hub else "bytes")
        self.val_fraction = (0.0005 if hub else 0.005) if self.val_fraction is None else self.val_fraction
        self.config_name = self.config_name or ("sample-10BT" if self.source == "fineweb-edu" else None)


def split(n_documents: int, val_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Split -> indices of its documents, in the order they are written: nanoGPT's call of train_test_split."""
    order = np.random.default_rng(seed).permutation(n_documents)
    n_val = math.ceil(n_documents * val_fraction)
    return {"val": order[:n_val], "train": order[n_val:]}  # val first: it is short, so a mistake shows soon


# ---- sources: each gives items, read(item) -> the text of one document, and where they come from, for meta.json


def from_python(config: PrepareConfig):
    """The source of Python's library, without its tests."""
    paths, skip = sysconfig.get_paths(), {"test", "tests", "idle_test", "__pycache__"}
    folders = [paths["stdlib"]] + [paths["purelib"], paths["platlib"]] * config.site_packages
    skip |= set() if config.site_packages else {"site-packages", "dist-packages"}
    found = {path for folder in folders for path in Path(folder).rglob("*.py") if skip.isdisjoint(path.parts)}

    def read(path: Path) -> str:
        try:
            with tokenize.open(path) as file:  # decodes as Python would
                return file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            return ""

    name = f"Python {platform.python_version()} library" + " and installed packages" * config.site_packages
    return sorted(found), read, {"source": name}


def load(column: str, path: str, name: str | None = None, num_proc: int = 1, **options):
    """A column of what `datasets` loads, mapped from its cache: any row is read at once. And its revision."""
    import datasets  # imported here: `python` does without it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error it also raises
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if path in ("csv", "parquet"):  # they can leave the other columns unread
        options["features"] = datasets.Features({column: datasets.Value("string")})
    builder = datasets.load_dataset_builder(path, name, **options)
    # the cache knows a directory by its last name alone, whatever it holds, so its copy is always made anew
    mode = "force_redownload" if os.path.isdir(path) else None
    builder.download_and_prepare(num_proc=num_proc, download_mode=mode)
    if not builder.info.splits["train"].num_examples:
        return [], builder.hash
    return builder.as_dataset(split="train").select_columns([column]).data.column(0), builder.hash


def reason(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__  # `datasets` wraps errors


def kind(path: str | Path) -> str:
    return Path(str(path).removesuffix(".gz")).suffix


def find_files(names: tuple[str, ...]) -> list[Path]:
    """The files, but for empty ones, that paths, folders and globs name. Raises UserError."""
    found = []
    for name in names:
        pattern = os.path.expanduser(name)
        if os.path.exists(pattern):
            pattern = os.path.join(glob.escape(pattern), "**") if os.path.isdir(pattern) else glob.escape(pattern)
        known = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet")
        matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if kind(match) in known]
        if not matches:
            raise UserError(f"{name}: found no file, expected {' '.join(known)} or .gz of these; check the path")
        found += [path for path in matches if path.stat().st_size]
    repeated = len(found) - len({path.resolve() for path in found})
    kinds = {kind(path).replace(".md", ".txt") for path in found}
    if repeated or len(kinds) > 1:  # a repeated file would be in both splits
        raise UserError(
            f"files: found {', '.join(sorted(kinds))} and {repeated} files named again; expected files of one kind, "
            "each once; change the paths or use a glob such as 'folder/*.txt'"
        )
    return found


def from_files(config: PrepareConfig, paths: list[Path]):
    """Text, JSON, CSV or parquet, through the builders of `datasets`. Raises UserError naming the file at fault."""
    if not paths:
        raise UserError("files: found only empty files, expected text; choose different paths")
    column, ending = config.text_column, kind(paths[0])
    text = {"encoding": "utf-8-sig"}  # -sig: without the byte order mark of Windows
    builder, options = {
        ".jsonl": ("text", text | {"sample_by": "line"}),  # parsed by read(): each line may have other keys
        ".json": ("json", {}),
        ".csv": ("csv", {"usecols": [column], "keep_default_na": False}),  # the text may be "NA"
        ".parquet": ("parquet", {"columns": [column], "batch_size": 1000}),
    }.get(ending, ("text", text | {"sample_by": config.sample_by}))
    files = [glob.escape(str(path.absolute())) for path in paths]
    try:
        items, _ = load("text" if builder == "text" else column, builder, data_files=files, **options)
    except Exception as error:  # those of pyarrow, pandas and fsspec too
        for path in paths[: len(paths) - 1]:
            from_files(config, [path])  # raises for the file at fault
        raise UserError(
            f"{paths[-1]}: not readable as {ending} with text in {column!r}: {reason(error)}; fix it or set "
            "--text_column, or HF_HOME if that disk is full or read-only"
        ) from None

    def read(item) -> str | None:
        line = item.as_py()
        return json.loads(line)[column] if ending == ".jsonl" and line.strip() else line

    return items, read, {"source": f"files {' '.join(config.paths)}"}


def from_hub(config: PrepareConfig):
    """A corpus of the hub, from the first place that has it. Raises UserError."""
    places, reasons = HUB[config.source], []
    if config.repository or config.revision:
        places = [(config.repository or places[0][0], config.revision or "main")]
    for repository, revision in places:
        print(f"looking for {config.source} in {repository} at {revision}")
        options = {} if os.path.isdir(repository) else {"revision": revision}
        try:
            items, found = load(config.text_column, repository, config.config_name, config.workers, **options)
        except Exception as error:  # those of the HTTP library too
            reasons.append(f"{repository} at {revision}: {reason(error)}")
            continue
        if (expected := N_DOCUMENTS.get(config.source, len(items))) != len(items):
            raise UserError(
                f"{repository} at {found} has {len(items):,} documents, expected {expected:,}; try "
                "--repository=dvruette/openwebtext, or prepare it as it is: python prepare_data.py files *.parquet"
            )
        origin = {"repository": repository, "config_name": config.config_name, "revision": found}
        return items, lambda item: item.as_py(), {"source": config.source} | origin
    raise UserError(
        f"{config.source} could not be loaded ({'; '.join(reasons)}); check --repository, --revision and "
        "--config_name, or set HF_HOME to a folder that has it"
    )


# ---- encoding and writing


def encode(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """Token ids of a text, as encode_ordinary gives them, uint32. Raises ValueError where tiktoken cannot."""
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # a lone surrogate becomes U+FFFD
        return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), encoding)
    except ValueError:  # a million spaces overflow the stack of its regex: cut, before white space if there is any
        pieces = re.findall(rf"(?s).{{1,{PIECE}}}(?=\s|\Z)|.{{1,{PIECE}}}", text)
        if len(pieces) == 1:
            raise
        return np.concatenate([encode(piece, encoding) for piece in pieces])


def encode_document(item, read, encoding: tiktoken.Encoding, dtype: str) -> np.ndarray:
    """Token ids of a document and its end-of-text; none for an empty one. Raises UserError naming the document."""
    try:
        text = read(item)
        ids = np.append(encode(text, encoding), encoding.eot_token) if text else np.empty(0, np.int64)
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"document {str(item)[:60]!r}: {type(error).__name__}: {error}; fix it, or set --text_column"
        ) from None
    assert ids.max(initial=0) <= np.iinfo(dtype).max, f"token id {ids.max()} does not fit {dtype}"
    return ids.astype(dtype)


def encoded(items, order: np.ndarray, encode_item, workers: int) -> Iterator[np.ndarray]:
    """The ids of each document, in order, encoded by threads. Few jobs are ahead, so memory stays bounded."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for begin in range(0, len(order), 16):
            job = [items[int(i)] for i in order[begin : begin + 16]]
            waiting.append(pool.submit(lambda job: [encode_item(item) for item in job], job))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def write_split(path: Path, documents: Iterator[np.ndarray], n_documents: int, max_tokens: float) -> dict:
    """Write documents to a token file, up to max_tokens. Returns the entry of this split in meta.json."""
    entry, sha256 = {"tokens": 0, "documents": 0, "max_id": 0}, hashlib.sha256()
    bar = tqdm(documents, desc=path.name, total=n_documents, unit=" documents", disable=None)
    with open(path, "wb") as file, bar:
        for ids in bar:
            if entry["tokens"] + len(ids) > max_tokens:
                break
            file.write(ids)
            sha256.update(ids)
            entry["tokens"] += len(ids)
            entry["documents"] += len(ids) > 0
            entry["max_id"] = max(entry["max_id"], int(ids.max(initial=0)))
        file.flush()
        os.fsync(file.fileno())
    return entry | {"sha256": sha256.hexdigest()}


def prepare(config: PrepareConfig, out: Path):
    """Fill the data directory `out`, unless it is up to date. Raises UserError."""
    files = find_files(config.paths)
    arguments = {key: value for key, value in asdict(config).items() if key not in ("out", "workers")}
    arguments["paths"] = [[str(path.resolve()), path.stat().st_size] for path in files]
    arguments["python"] = platform.python_version() if config.source == "python" else None
    try:
        made_with = data.verify(out)["arguments"]
    except UserError:  # absent or damaged
        made_with = None
    if made_with == arguments:
        print(f"{out} is up to date")
        return
    if made_with:
        changed = ", ".join(key for key in arguments if arguments[key] != made_with.get(key))
        raise UserError(f"{out} was prepared with different {changed}; choose a different --out or remove it")
