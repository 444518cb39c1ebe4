"""Turn text into token files: train.bin, val.bin and meta.json (data.py describes the format).

    python prepare_data.py python --out=data/python               # Python's own library: no download, seconds
    python prepare_data.py files novels/ --sample_by=paragraph --tokenizer=gpt2 --out=data/novels
    python prepare_data.py openwebtext                            # the paper's corpus: 9.0 B tokens
    python prepare_data.py fineweb-edu --config_name=sample-100BT --max_tokens=20_000_000_000

The documents are shuffled with a fixed seed and the first ones are the validation split, as nanoGPT splits
OpenWebText. Each is encoded as ordinary text (it cannot forge a special token), and one end-of-text follows.
The bytes do not depend on --workers. An interrupted preparation starts again from the beginning, but what
`datasets` has downloaded stays in its cache (HF_HOME). Memory does not grow with the corpus.
"""

import functools
import glob
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

import data
from plumbing import configurator, storage, tokenizers
from plumbing.configurator import UserError

# (repository, revision), tried in this order. Skylion007's main was a loading script for years, which
# `datasets` no longer runs; the other two are complete copies in parquet.
SKYLION = "Skylion007/openwebtext"
HUB = {
    "openwebtext": [(SKYLION, "main"), (SKYLION, "refs/pr/19"), ("dvruette/openwebtext", "main")],
    "fineweb-edu": [("HuggingFaceFW/fineweb-edu", "main")],
}
N_DOCUMENTS = {"openwebtext": 8_013_769}
# OpenWebText's tokens, as nanoGPT's data/openwebtext/prepare.py states them; and the settings that give them
N_TOKENS = {"val": 4_434_897, "train": 9_035_582_198}
NANOGPT = {"source": "openwebtext", "tokenizer": "gpt2", "val_fraction": 0.0005, "seed": 2357}
ENDINGS = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet")  # each also with .gz
PIECE = 100_000  # characters of a document that tiktoken cannot encode at once


@dataclass
class PrepareConfig:
    """Tokenize a corpus into train.bin, val.bin and meta.json."""

    source: tyro.conf.Positional[Literal["python", "files", "openwebtext", "fineweb-edu"]]
    paths: tyro.conf.Positional[tuple[str, ...]] = ()  # files: paths, folders and globs
    out: str | None = None  # directory to write; default data/SOURCE
    tokenizer: str | None = None  # bytes, a name of tiktoken, a model's directory or hub name
    max_tokens: int | None = None  # end train.bin with the last complete document within this
    repository: str | None = None  # hub: a different copy of the corpus, or a directory laid out like one
    revision: str | None = None  # hub: branch, tag or commit; meta.json records the commit
    config_name: str | None = None  # hub: part of the repository; default sample-10BT for fineweb-edu
    site_packages: bool = False  # python: add the source of every installed package
    sample_by: Literal["document", "paragraph", "line"] = "document"  # what a document is in .txt and .md
    text_column: str = "text"  # column of a table, or key of a JSON object, that holds the text
    val_fraction: float | None = None  # of the documents; default 0.005, for the hub nanoGPT's 0.0005
    seed: int = 2357  # of the split; nanoGPT's
    workers: int = os.cpu_count() or 1  # threads; tiktoken encodes outside Python's global lock

    def __post_init__(self):
        hub = self.source in HUB
        self.out = self.out or f"data/{self.source}"
        self.tokenizer = self.tokenizer or ("gpt2" if hub else "bytes")  # bytes needs no download
        if self.val_fraction is None:
            self.val_fraction = 0.0005 if hub else 0.005
        if self.source == "fineweb-edu":
            self.config_name = self.config_name or "sample-10BT"


def split(n_documents: int, val_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Split -> its documents, in the order they are written; equal to nanoGPT's train_test_split."""
    order = np.random.default_rng(seed).permutation(n_documents)
    n_val = math.ceil(n_documents * val_fraction)
    return {"val": order[:n_val], "train": order[n_val:]}  # val first: it is short, so a mistake shows soon


# ---- sources: each gives items, read(item) -> the text of a document, and its origin for meta.json


def from_python(config: PrepareConfig, _):
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
    """A column of what `datasets` loads, memory-mapped from its cache, and its revision. Raises UserError."""
    import datasets  # imported here: `python` does without it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error it also raises
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if path in ("csv", "parquet"):  # they can leave the other columns unread
        options["features"] = datasets.Features({column: datasets.Value("string")})
    # the cache knows a directory by its last name alone, whatever it holds: its copy is always made anew
    anew = (
        {"download_mode": "force_redownload", "verification_mode": "no_checks"} if os.path.isdir(path) else {}
    )
    try:
        builder = datasets.load_dataset_builder(path, name, **options)
        builder.download_and_prepare(num_proc=num_proc, **anew)
        if not builder.info.splits["train"].num_examples:
            return [], builder.hash
        return builder.as_dataset(split="train").select_columns([column]).data.column(0), builder.hash
    except Exception as error:  # also those of pyarrow, pandas, fsspec and the HTTP library
        cause = error.__cause__ or error
        raise UserError(f"{type(cause).__name__} {' '.join(str(cause).split())[:300]}") from None


def ending(path: str | Path) -> str:
    return Path(str(path).removesuffix(".gz")).suffix


def find_files(names: tuple[str, ...]) -> list[Path]:
    """The files, but for empty ones, that paths, folders and globs name. Raises UserError."""
    found = []
    for name in map(os.path.expanduser, names):
        pattern = glob.escape(name) + "/**" * os.path.isdir(name) if os.path.exists(name) else name
        matches = sorted(path for path in glob.glob(pattern, recursive=True) if ending(path) in ENDINGS)
        if not matches:
            raise UserError(f"{name}: found no file, expected {' '.join(ENDINGS)}, or .gz; check the path")
        found += [Path(path) for path in matches if os.path.getsize(path)]
    endings = " ".join(sorted({ending(path) for path in found})) or "none"
    repeated = len(found) - len({path.resolve() for path in found})  # these would be in both splits
    if names and (repeated or endings not in ENDINGS):
        raise UserError(
            f"files: found kinds {endings}, {repeated} named more than once; expected files of one kind, not "
            "empty, each once; change the paths, for example to 'folder/*.txt'"
        )
    return found


def from_files(config: PrepareConfig, paths: list[Path]):
    """Files, read by the builders of `datasets`. Raises UserError naming the file at fault."""
    column, suffix, text = config.text_column, ending(paths[0]), {"encoding": "utf-8-sig"}  # skips a BOM
    builder, options = {
        ".jsonl": ("text", text | {"sample_by": "line"}),  # parsed by read(): keys may vary
        ".json": ("json", {}),
        ".csv": ("csv", {"usecols": [column], "keep_default_na": False}),  # a text may be "NA"
        ".parquet": ("parquet", {"columns": [column], "batch_size": 1000}),
    }.get(suffix, ("text", text | {"sample_by": config.sample_by}))
    files = [glob.escape(str(path.absolute())) for path in paths]
    try:
        items, _ = load("text" if builder == "text" else column, builder, data_files=files, **options)
    except UserError as error:
        for path in paths if len(paths) > 1 else ():
            from_files(config, [path])  # raises for the file at fault
        remedy = "fix it, set --text_column, or set HF_HOME if that disk is full or read-only"
        raise UserError(f"{paths[0]}: not read as {suffix} with {column!r}: {error}; {remedy}") from None

    def read(item) -> str | None:
        text = item.as_py()
        return text.strip() and json.loads(text)[column] if suffix == ".jsonl" else text

    return items, read, {"source": f"files {' '.join(config.paths)}"}


def from_hub(config: PrepareConfig, _):
    """A corpus of the hub, from the first place that has all of it. Raises UserError."""
    places, reasons = HUB[config.source], []
    if config.repository or config.revision:
        places = [(config.repository or places[0][0], config.revision or "main")]
    for repository, revision in places:
        print(f"looking for {config.source} in {repository} at {revision}")
        options = {} if os.path.isdir(repository) else {"revision": revision}
        try:
            column, part = config.text_column, config.config_name
            items, revision = load(column, repository, part, config.workers, **options)
            if len(items) == N_DOCUMENTS.get(config.source, len(items)):
                origin = {"repository": repository, "config_name": part, "revision": revision}
                return items, lambda item: item.as_py(), {"source": config.source} | origin
            error = f"{len(items):,} documents, expected {N_DOCUMENTS[config.source]:,}"
        except UserError as failure:
            error = failure
        reasons.append(f"{repository} at {revision}: {error}")
    raise UserError(
        f"{config.source} could not be loaded ({'; '.join(reasons)}); check --repository, --revision and "
        "--config_name, set HF_HOME to a folder that has it, or prepare a copy: prepare_data.py files"
    )


# ---- encoding and writing


def encode(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """Token ids of a text, as encode_ordinary gives them, uint32. Raises ValueError where tiktoken cannot."""
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # a lone surrogate becomes U+FFFD
        return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), encoding)
    except ValueError:  # a million spaces overflow the stack of its regex: cut, if possible before a space
        pieces = re.findall(rf"(?s).{{1,{PIECE}}}(?=\s|\Z)|.{{1,{PIECE}}}", text)
        if len(pieces) == 1:
            raise
        return np.concatenate([encode(piece, encoding) for piece in pieces])


def encode_document(item, read, encoding: tiktoken.Encoding, dtype: str) -> np.ndarray:
    """Token ids of a document and an end-of-text; none of an empty one. Raises UserError naming it."""
    try:
        text = read(item)
        begin = np.array(getattr(encoding, "begin", []), np.int64)  # [bos] of models trained with one
        ids = np.concatenate([begin, encode(text, encoding), [encoding.eot_token]]) if text else begin[:0]
    except (ValueError, LookupError, TypeError) as error:
        start, cause = str(item)[:60], f"{type(error).__name__}: {error}"
        raise UserError(f"document {start!r}: {cause}; fix it, or set --text_column") from None
    assert ids.max(initial=0) <= np.iinfo(dtype).max, f"token id {ids.max()} does not fit {dtype}"
    return ids.astype(dtype)


def in_order(items, order: np.ndarray, encode_item, workers: int):
    """Yield the token ids of each document, encoded by threads. Few are ahead, so memory is bounded."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for begin in range(0, len(order), 16):  # in jobs of 16 documents, worth a thread's while
            job = [items[int(i)] for i in order[begin : begin + 16]]
            waiting.append(pool.submit(lambda job: [encode_item(item) for item in job], job))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def write_split(path: Path, documents, n_documents: int, max_tokens: float) -> dict:
    """Write documents to a token file, up to max_tokens. Returns the entry of this split in meta.json."""
    entry = {"tokens": 0, "documents": 0, "max_id": 0}
    with open(path, "wb") as file:
        for ids in tqdm(documents, path.name, n_documents, unit=" documents", disable=None):
            if entry["tokens"] + len(ids) > max_tokens:
                break
            file.write(ids)
            entry["tokens"] += len(ids)
            entry["documents"] += len(ids) > 0
            entry["max_id"] = max(entry["max_id"], int(ids.max(initial=0)))
    storage.fsync(path)
    return entry | {"sha256": storage.sha256_of(path)}


def write(config: PrepareConfig, out: Path, source, arguments: dict):
    """Write both splits under temporary names, rename them, then write meta.json. Raises UserError."""
    items, read, origin = source
    encoding = tokenizers.tokenizer(config.tokenizer)
    dtype = "<u2" if encoding.n_vocab <= 2**16 else "<u4"
    splits, is_nanogpt = {}, NANOGPT.items() <= arguments.items()
    for name, order in split(len(items), config.val_fraction, config.seed).items():
        begun, path = time.perf_counter(), out / f"{name}.partial"
        limit = config.max_tokens if name == "train" else None  # val.bin does not depend on it
        encode_item = functools.partial(encode_document, read=read, encoding=encoding, dtype=dtype)
        documents = in_order(items, order, encode_item, config.workers)
        entry = splits[name] = write_split(path, documents, len(order), limit or math.inf)
        expected = N_TOKENS[name] if is_nanogpt and not limit else entry["tokens"] or "some"
        if entry["tokens"] != expected:
            found = f"{entry['tokens']} tokens in {len(order)} of {len(items)} documents"
            remedy = "add documents (--sample_by=paragraph), or change --val_fraction or --max_tokens"
            raise UserError(f"{name}: found {found}, expected {expected}; {remedy}")
        start = encoding.decode(np.fromfile(path, dtype, 60).tolist())  # shows a wrong column or encoding
        speed = entry["tokens"] / (time.perf_counter() - begun)
        print(f"{name}: {entry['tokens']:,} tokens, {entry['documents']:,} documents, {speed:,.0f} tokens/s")
        print(f"  {start!r} ...")

    (out / "meta.json").unlink(missing_ok=True)
    tokenizers.write_files(encoding, out)
    for name in splits:
        os.replace(out / f"{name}.partial", out / f"{name}.bin")
    storage.fsync(out)
    meta = {
        "format": data.FORMAT,
        **origin,
        "tokenizer": encoding.name,
        "vocab_size": encoding.n_vocab,
        "eot": encoding.eot_token,
        "begin": getattr(encoding, "begin", []),  # the tokens before each document
        "dtype": dtype,
        "splits": {name: splits[name] for name in ("train", "val")},
        "arguments": arguments,
    }
    storage.write_json(out / "meta.json", meta)  # last: if it exists, the directory is complete


def prepare(config: PrepareConfig, out: Path):
    """Fill the data directory `out`, unless it is up to date. Raises UserError."""
    files = [path for path in find_files(config.paths) if out.resolve() not in path.resolve().parents]
    arguments = {key: value for key, value in asdict(config).items() if key not in ("out", "workers")}
    stats = [(path.resolve(), path.stat()) for path in files]
    arguments["paths"] = [[str(path), found.st_size, found.st_mtime_ns] for path, found in stats]
    arguments["python"] = platform.python_version() if config.source == "python" else None
    try:
        made_with = data.verify(out).get("arguments", {})
    except UserError:  # absent or damaged: made anew
        made_with = None
    if made_with == arguments:
        if not (out / "tokenizer.json").exists():  # made before these files were
            tokenizers.write_files(tokenizers.tokenizer(config.tokenizer), out)
        print(f"{out} is up to date")
        return
    if made_with is not None:
        changed = ", ".join(key for key in arguments if arguments[key] != made_with.get(key))
        raise UserError(f"{out} was prepared with different {changed}; choose a different --out or remove it")
    read_source = {"python": from_python, "files": from_files}.get(config.source, from_hub)
    try:
        write(config, out, read_source(config, files), arguments)
    except OSError as error:
        raise UserError(f"{out} was not written: {error}; fix this and rerun", exit_code=1) from None
    finally:
        for path in out.glob("*.partial"):
            path.unlink()


def main():
    config = configurator.load(PrepareConfig)
    least = min(config.workers, 1 if config.max_tokens is None else config.max_tokens)
    if bool(config.paths) != (config.source == "files") or not 0 < config.val_fraction < 1 or least < 1:
        raise UserError(
            f"found {config.source} with paths {config.paths}, val_fraction {config.val_fraction}, workers "
            f"{config.workers}, max_tokens {config.max_tokens}; expected paths for files and only for these, "
            "0 < val_fraction < 1, workers and max_tokens >= 1"
        )
    out = Path(config.out).expanduser()
    with storage.lock(out):  # before looking at what it holds
        prepare(config, out)


if __name__ == "__main__":
    configurator.run(main)
