"""Turn text into token files: train.bin, val.bin and meta.json (data.py describes the format).

    python prepare_data.py python --out=data/python        # Python's own library: no download
    python prepare_data.py files novels/ --sample_by=paragraph --tokenizer=gpt2 --out=data/novels
    python prepare_data.py openwebtext                     # the paper's corpus: 9.0 B tokens
    python prepare_data.py fineweb-edu --data_files='sample/10BT/00[01]*.parquet'  # 1.4 B tokens

The documents are shuffled with a fixed seed and the first ones are the validation split, as nanoGPT
splits OpenWebText. Each is encoded as ordinary text (it cannot forge a special token), and one
end-of-text follows. The bytes do not depend on --workers. An interrupted preparation starts again
from the beginning, but what `datasets` has downloaded stays in its cache (HF_HOME). Memory does not
grow with the corpus.
"""

from plumbing import configurator  # isort: skip  # before the slow imports: a quiet Ctrl-C

import errno
import functools
import glob
import json
import math
import os
import platform
import re
import sys
import sysconfig
import tokenize
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

import data
from plumbing import storage, tokenizers
from plumbing.configurator import UserError

# (repository, revision), tried in this order. Skylion007's main was a loading script for years,
# which `datasets` no longer runs; the other two are complete copies in parquet.
SKYLION = "Skylion007/openwebtext"
HUB = {
    "openwebtext": [(SKYLION, "main"), (SKYLION, "refs/pr/19"), ("dvruette/openwebtext", "main")],
    "fineweb-edu": [("HuggingFaceFW/fineweb-edu", "main")],
}
# OpenWebText's tokens, as nanoGPT's prepare.py states them, and the settings that give them
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
    repository: str | None = None  # hub: a different copy of the corpus, or a directory like one
    config_name: str | None = None  # hub: part of the repository; sample-10BT for fineweb-edu
    data_files: str | None = None  # hub: only some files of it, as sample/10BT/00[01]*.parquet
    site_packages: bool = False  # python: add the source of every installed package
    sample_by: Literal["document", "paragraph", "line"] = "document"  # what .txt and .md hold
    text_column: str = "text"  # column of a table, or key of a JSON object, that holds the text
    val_fraction: float | None = None  # of the documents; default 0.005, for the hub 0.0005
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
    """Split -> its documents, in the order they are written; nanoGPT's train_test_split."""
    order = np.random.default_rng(seed).permutation(n_documents)
    n_val = math.ceil(n_documents * val_fraction)
    return {"val": order[:n_val], "train": order[n_val:]}  # val first: mistakes show in seconds


# ---- sources: each gives items, read(item) -> the text of a document, and its origin


def from_python(config: PrepareConfig, _):
    """The source of Python's library, without its tests."""
    paths, skip = sysconfig.get_paths(), {"test", "tests", "idle_test"}
    folders = [paths["stdlib"]] + [paths["purelib"], paths["platlib"]] * config.site_packages
    skip |= set() if config.site_packages else {"site-packages", "dist-packages"}
    files = {path for folder in folders for path in Path(folder).rglob("*.py")}

    def read(path: Path) -> str:
        try:
            with tokenize.open(path) as file:  # decodes as Python would
                return file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):  # some packages carry broken files
            return ""

    name = f"Python {platform.python_version()} library"
    name += " and installed packages" * config.site_packages
    return sorted(path for path in files if skip.isdisjoint(path.parts)), read, {"source": name}


def load(column: str, path: str, name: str | None = None, **options):
    """A column of what `datasets` loads, memory-mapped, and its revision. Raises UserError.

    It gets no num_proc: its pool of processes waits for ever if one of them is killed.
    """
    import datasets  # imported here: `python` does without it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it also raises its errors
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # the cache knows a directory by its name alone, so the copy is made anew
    anew = {"download_mode": "force_redownload", "verification_mode": "no_checks"}
    try:
        builder = datasets.load_dataset_builder(path, name, **options)
        builder.download_and_prepare(**anew if os.path.isdir(path) else {})
        table = builder.as_dataset(split="train").select_columns([column])
    except Exception as error:  # also those of pyarrow, pandas, fsspec and the HTTP library
        cause = error.__cause__ or error
        if getattr(cause, "errno", None) in (errno.EROFS, errno.EACCES, errno.ENOSPC):  # HF_HOME, no input
            raise OSError(cause.errno, cause.strerror, f"{cause.filename} (set HF_HOME)") from None
        raise UserError(f"{type(cause).__name__} {' '.join(str(cause).split())[:300]}") from None
    return table.data.column(0), builder.hash


def ending(path: str | Path) -> str:
    return Path(str(path).lower().removesuffix(".gz")).suffix


def find_files(names: tuple[str, ...], out: Path) -> list[Path]:
    """The files that paths, folders and globs name: none empty, none in `out`. UserError."""
    found = []
    for name in map(os.path.expanduser, names):
        pattern = glob.escape(name) if os.path.exists(name) else name
        if os.path.isdir(name):
            pattern += "/**"
        matches = sorted(glob.glob(pattern, recursive=True))
        matches = [Path(path) for path in matches if ending(path) in ENDINGS and not os.path.isdir(path)]
        if not matches:
            raise UserError(f"{name}: found no file of {' '.join(ENDINGS)}, or .gz; check the path")
        found += [p for p in matches if p.stat().st_size and out not in p.resolve().parents]
    kinds = sorted({ending(path) for path in found})
    repeated = len(found) - len({path.resolve() for path in found})  # would be in both splits
    if names and (repeated or len(kinds) != 1):
        raise UserError(
            f"files: found kinds {' '.join(kinds) or 'none'}, {repeated} named more than once; "
            "expected files of one kind, each once, for example 'folder/*.txt'"
        )
    return found


def from_files(config: PrepareConfig, paths: list[Path]):
    """Files, read by the builders of `datasets`. Raises UserError naming the file at fault."""
    column, suffix = config.text_column, ending(paths[0])
    sample_by = "line" if suffix == ".jsonl" else config.sample_by  # read() parses the lines
    builder, stored, options = {
        ".json": ("json", column, {}),
        ".csv": ("csv", column, {"usecols": [column], "converters": {column: str}}),
        ".parquet": ("parquet", column, {"columns": [column], "batch_size": 1000}),
    }.get(suffix, ("text", "text", {"sample_by": sample_by, "encoding": "utf-8-sig"}))
    files = [glob.escape(str(path.absolute())) for path in paths]
    try:
        items, _ = load(stored, builder, data_files=files, **options)
    except UserError as error:
        for path in paths[: len(paths) - 1]:
            from_files(config, [path])  # raises for the file at fault, unless it is the last one
        problem = f"{paths[-1]}: not read as {suffix} with {column!r}: {error}"
        raise UserError(f"{problem}; fix it, or set --text_column") from None

    def read(item) -> str | None:
        if suffix != ".jsonl":
            text = item.as_py()
            return text.decode() if isinstance(text, bytes) else text
        line = item.as_py().strip()
        text = json.loads(line)[column] if line else ""
        # JSON can hold half of a surrogate pair, which no encoding can: it becomes U+FFFD
        return text and text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    return items, read, {"source": f"files {' '.join(config.paths)}"}


def from_hub(config: PrepareConfig, _):
    """A corpus of the hub, from the first place that has it. Raises UserError."""
    places = [(config.repository, "main")] if config.repository else HUB[config.source]
    column, part, reasons = config.text_column, config.config_name, []
    for repository, revision in places:
        print(f"looking for {config.source} in {repository} at {revision}")
        try:
            items, commit = load(column, repository, part, revision=revision, data_files=config.data_files)
        except UserError as error:
            reasons.append(f"{repository} at {revision}: {error}")
            continue
        origin = {"repository": repository, "config_name": part, "revision": commit}
        return items, lambda item: item.as_py(), {"source": config.source} | origin
    raise UserError(
        f"{config.source} could not be loaded ({'; '.join(reasons)}); check --repository, "
        "--config_name and --data_files, or set HF_HOME to a folder that has it"
    )


# ---- encoding and writing


def encode(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """Token ids of a text, as encode_ordinary gives them. Raises ValueError if tiktoken cannot."""
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError:  # a million spaces overflow the stack of its regex: cut before a space
        pieces = re.findall(rf"(?s).{{1,{PIECE}}}(?=\s|\Z)|.{{1,{PIECE}}}", text)
        return np.concatenate([encoding.encode_to_numpy(p, disallowed_special=()) for p in pieces])


def encode_document(item, read, encoding: tiktoken.Encoding, dtype: str) -> np.ndarray:
    """Token ids of a document and an end-of-text; none of an empty one. Raises UserError."""
    begin = np.array(getattr(encoding, "begin", []), np.int64)  # [bos] of models trained with one
    try:
        text = read(item)
        ids = [begin, encode(text, encoding), [encoding.eot_token]] if text else [begin[:0]]
        return np.concatenate(ids).astype(dtype, casting="same_value")  # never wraps
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"document {str(item)[:60]!r}: {type(error).__name__}: {error}"
        raise UserError(f"{problem}; fix it, or set --text_column") from None


def in_order(items, order: np.ndarray, encode_item, workers: int):
    """Yield the token ids of each document, encoded by threads. Few are in memory at a time."""
    with ThreadPoolExecutor(workers) as pool:
        for begin in range(0, len(order), 1000):
            some = [items[int(i)] for i in order[begin : begin + 1000]]
            yield from pool.map(encode_item, some)


def write_split(path: Path, documents, n_documents: int, max_tokens: int | None) -> dict:
    """Write documents to a token file, up to max_tokens. Returns its entry of meta.json."""
    entry = {"tokens": 0, "documents": 0, "max_id": 0}
    with open(path, "wb") as file:
        for ids in tqdm(documents, path.name, n_documents, unit=" documents", disable=None):
            if max_tokens is not None and entry["tokens"] + len(ids) > max_tokens:
                break
            file.write(ids)
            entry["tokens"] += len(ids)
            entry["documents"] += len(ids) > 0
            entry["max_id"] = max(entry["max_id"], int(ids.max(initial=0)))
    return entry


def write(config: PrepareConfig, directory: Path, source, encoding, arguments: dict):
    """Write the files of a data directory but for its manifest. Raises UserError."""
    items, read, origin = source
    dtype = "<u2" if encoding.n_vocab <= 2**16 else "<u4"
    encode_item = functools.partial(encode_document, read=read, encoding=encoding, dtype=dtype)
    splits = {}
    for name, order in split(len(items), config.val_fraction, config.seed).items():
        path = directory / f"{name}.bin"
        limit = config.max_tokens if name == "train" else None  # val.bin does not depend on it
        documents = in_order(items, order, encode_item, config.workers)
        entry = splits[name] = write_split(path, documents, len(order), limit)
        is_nanogpt = NANOGPT.items() <= arguments.items() and limit is None
        expected = N_TOKENS[name] if is_nanogpt else entry["tokens"] or "some"
        if entry["tokens"] != expected:
            found = f"{entry['tokens']} tokens in {len(order)} of {len(items)} documents"
            remedy = "add documents, or change --sample_by, --val_fraction or --max_tokens"
            raise UserError(f"{name}: found {found}, expected {expected}; {remedy}")
        start = encoding.decode(np.fromfile(path, dtype, 60).tolist())  # shows a wrong column
        configurator.say(f"{name}: {entry['tokens']:,} tokens, {entry['documents']:,} documents: {start!r}")

    tokenizers.write_files(encoding, directory)
    meta = origin | {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token}
    meta["begin"] = getattr(encoding, "begin", [])  # the tokens before each document
    meta |= {"dtype": dtype, "splits": splits, "arguments": arguments}
    storage.write_json(directory / "meta.json", meta)


def prepare(config: PrepareConfig, out: Path):
    """Make the data directory `out`, unless it is there and up to date. Raises UserError."""
    files = find_files(config.paths, out.resolve())
    arguments = asdict(config)
    del arguments["out"], arguments["workers"]  # neither changes a byte
    stats = [(path.resolve(), path.stat()) for path in files]
    arguments["paths"] = [[str(path), found.st_size, found.st_mtime_ns] for path, found in stats]
    arguments["python"] = platform.python_version() if config.source == "python" else None
    if storage.is_free(out):
        with storage.lock(out.absolute().with_name(f".lock-{out.absolute().name}")):
            encoding = tokenizers.tokenizer(config.tokenizer)  # before anything long
            read_source = {"python": from_python, "files": from_files}.get(config.source, from_hub)
            source = read_source(config, files)
            with storage.publish(out) as directory:
                return write(config, directory, source, encoding, arguments)
    made_with = data.read_meta(out, content=True)["arguments"]
    if changed := [key for key in arguments if arguments[key] != made_with.get(key)]:
        problem = f"{out} was prepared with different {', '.join(changed)}"
        raise UserError(f"{problem}; choose a different --out or remove it")
    print(f"{out} is up to date")


def main():
    config = configurator.load(PrepareConfig)
    if bool(config.paths) != (config.source == "files") or (config.data_files and config.source not in HUB):
        found = f"{config.source} with paths {config.paths}, data_files {config.data_files}"
        raise UserError(f"found {found}; only files has paths, only hub corpora have data_files")
    if config.workers < 1 or not 0 < config.val_fraction < 1:
        found = f"workers {config.workers}, val_fraction {config.val_fraction}"
        raise UserError(f"{found}; expected workers >= 1, 0 < val_fraction < 1")
    prepare(config, Path(config.out).expanduser())


if __name__ == "__main__":
    configurator.run(main)
