"""Turn text into token files: train.bin, val.bin and meta.json (the format is described in data.py).

    python prepare_data.py python --out=data/python                  # Python's own library, no download, seconds
    python prepare_data.py python --site_packages --tokenizer=gpt2   # and every installed package: hundreds of MB
    python prepare_data.py files novels/ --tokenizer=gpt2 --out=data/mine    # .txt .md .json .jsonl .csv .parquet, .gz
    python prepare_data.py openwebtext                               # the paper's corpus, nanoGPT's split: 9.0 B tokens
    python prepare_data.py fineweb-edu --config_name=sample-100BT --max_tokens=20_000_000_000

Documents are put in a fixed random order, and the first ones become the validation split, as nanoGPT splits
OpenWebText: the same documents for any --max_tokens. Each document is encoded as plain text (it cannot forge a special
token) and followed by one end-of-text. The bytes do not depend on the number of workers.

An interrupted preparation starts again with the same command. Downloads are cached by `datasets` (HF_HOME).
"""

import collections
import glob
import hashlib
import itertools
import math
import os
import platform
import sysconfig
import tokenize
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

BUILDERS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
HUB = {  # places tried in order: the first was a loading script for years, the others are complete copies in parquet
    "openwebtext": (("Skylion007/openwebtext", "main"), ("Skylion007/openwebtext", "refs/pr/19"),
                    ("dvruette/openwebtext", "main")),
    "fineweb-edu": (("HuggingFaceFW/fineweb-edu", "main"),),
}
JOB = 64  # documents that a thread reads and encodes at a time
OPENWEBTEXT = {"documents": 8_013_769, "val": 4_434_897, "train": 9_035_582_198}  # nanoGPT's data/openwebtext


@dataclass
class PrepareConfig:
    """Tokenize a corpus into train.bin, val.bin and meta.json."""

    source: tyro.conf.Positional[Literal["python", "files", "openwebtext", "fineweb-edu"]]  # python: its own library
    paths: tyro.conf.Positional[tuple[str, ...]] = ()  # for files: files, folders, or patterns such as "*.txt"
    out: str = ""  # directory to write; default data/SOURCE
    tokenizer: str = ""  # bytes, gpt2, or another name that tiktoken knows; default gpt2 for a corpus of the hub
    max_tokens: int | None = None  # end train.bin with the last complete document within this
    repository: str = ""  # hub: a different copy of the corpus, or a directory laid out like one
    revision: str = "main"  # hub: branch, tag or commit of --repository
    config_name: str = ""  # hub: which part of the repository; default sample-10BT for fineweb-edu
    site_packages: bool = False  # python: add the source of every installed package
    sample_by: Literal["document", "paragraph", "line"] = "document"  # files: what is one document of a text file
    text_column: str = "text"  # the column of a table, or of a JSON file, that holds the text
    val_fraction: float = 0.0  # share of the documents for validation; default 0.005, nanoGPT's 0.0005 for the hub
    seed: int = 2357  # of the split; nanoGPT's for OpenWebText
    workers: int = os.cpu_count() or 1  # threads

    def __post_init__(self):
        on_hub = self.source in HUB
        self.out = self.out or f"data/{self.source}"
        self.tokenizer = self.tokenizer or ("gpt2" if on_hub else "bytes")
        self.val_fraction = self.val_fraction or (0.0005 if on_hub else 0.005)
        if self.source == "fineweb-edu":
            self.config_name = self.config_name or "sample-10BT"
        if not 0 < self.val_fraction < 1 or bool(self.paths) != (self.source == "files"):
            raise UserError(
                f"{self.source}: found val_fraction {self.val_fraction} and {len(self.paths)} path(s); expected a "
                "val_fraction between 0 and 1, and paths for the source files alone"
            )


# ---- the documents of each source: their number, read(indices) -> texts, and where they come from


def python_files(config: PrepareConfig):
    """Python's own library and, if asked for, the installed packages. A file that cannot be decoded is empty."""
    paths = sysconfig.get_paths()
    folders, skip = [paths["stdlib"]], {"test", "tests", "idle_test", "__pycache__"}
    if config.site_packages:
        folders += [paths["purelib"], paths["platlib"]]
    else:
        skip |= {"site-packages", "dist-packages"}
    found = {path for folder in folders for path in Path(folder).rglob("*.py") if not skip & set(path.parts)}
    files = sorted(found)

    def read(indices) -> list[str]:
        texts = []
        for i in indices:
            try:
                with tokenize.open(files[i]) as file:  # decodes as Python would
                    texts.append(file.read())
            except (SyntaxError, UnicodeDecodeError, OSError):
                texts.append("")
        return texts

    return len(files), read, {"source": f"Python {platform.python_version()} library"}


def listed_files(paths: tuple[str, ...]) -> list[str]:
    """The resolved files that paths, folders and patterns name. Raises UserError."""
    found = []
    for name in map(os.path.expanduser, paths):
        inside = os.path.join(glob.escape(name), "**") if os.path.isdir(name) else name
        matches = [name] if os.path.isfile(name) else sorted(glob.glob(inside, recursive=True))
        files = [os.path.realpath(path) for path in matches if os.path.isfile(path)]
        if not files:
            raise UserError(f"{name}: no such file or folder, or no file in it")
        found += files
    twice = [path for path, count in collections.Counter(found).items() if count > 1]
    builders = {BUILDERS.get(Path(path.removesuffix(".gz")).suffix) for path in found}
    if twice or len(builders) > 1 or None in builders:
        what = f"{twice[0]} twice" if twice else f"files of the kinds {', '.join(sorted(map(str, builders)))}"
        raise UserError(f"found {what}; expected each file once, all of one kind of {', '.join(BUILDERS)}")
    return found


def load_rows(path: str, name: str | None, column: str, **options):
    """What `datasets` knows as `path`. Raises UserError with the reason in one line."""
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error is raised too
    huggingface_hub.logging.set_verbosity_error()
    try:
        rows = datasets.load_dataset(path, name or None, split="train", **options)
    except Exception as error:  # its own errors, OSErrors, pyarrow's and those of its HTTP library
        raise UserError(" ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__) from None
    if column not in rows.column_names:
        raise UserError(f"no column {column!r}, found {', '.join(rows.column_names)}; set --text_column")

    def read(indices) -> list[str]:
        texts = [t.decode() if isinstance(t, bytes) else t for t in rows[indices.tolist()][column]]
        wrong = next((text for text in texts if not isinstance(text, str | None)), None)
        if wrong is not None:
            raise UserError(f"column {column!r} holds {type(wrong).__name__}, expected text; set --text_column")
        return texts

    return len(rows), read


def local_files(config: PrepareConfig):
    """The documents of text files and tables, read through `datasets`. The file at fault is named."""
    files = [path for path in listed_files(config.paths) if os.path.getsize(path)]
    builder = BUILDERS[Path(files[0].removesuffix(".gz")).suffix] if files else "text"
    how = {"text": {"sample_by": config.sample_by}, "parquet": {"columns": [config.text_column]}}.get(builder, {})
    column = "text" if builder == "text" else config.text_column
    escaped = [glob.escape(path) for path in files]
    try:
        n, read = load_rows(builder, None, column, data_files=escaped, **how)
    except UserError as error:
        for path in escaped:  # which one is it? `datasets` does not say
            try:
                load_rows(builder, None, column, data_files=[path], **how)
            except UserError as reason:
                raise UserError(f"{path}: {reason}; fix it or leave it out") from None
        raise UserError(f"files: {error}") from None
    return n, read, {"source": f"files {' '.join(Path(path).name for path in files)}"}


def from_hub(config: PrepareConfig):
    """A corpus from the first place on the hub that has it. Raises UserError naming every place."""
    places = [(config.repository, config.revision)] if config.repository else HUB[config.source]
    reasons = []
    for repository, revision in places:
        print(f"looking for {config.source} in {repository} at {revision}")
        options = {} if os.path.isdir(repository) else {"revision": revision}  # a directory has no revisions
        try:
            n, read = load_rows(repository, config.config_name, config.text_column, **options)
        except UserError as error:
            reasons.append(f"{repository} at {revision}: {error}")
            continue
        if config.source == "openwebtext" and n != OPENWEBTEXT["documents"]:
            raise UserError(
                f"openwebtext: {repository} has {n:,} documents, expected {OPENWEBTEXT['documents']:,}; try "
                "--repository=dvruette/openwebtext, or prepare it as it is: prepare_data.py files *.parquet"
            )
        return n, read, {"source": config.source, "repository": repository, "revision": revision}
    raise UserError(
        f"{config.source} could not be loaded ({'; '.join(reasons)}); check --repository, --config_name and "
        "--revision, or connect, or set HF_HOME to a folder that has it"
    )


# ---- encode and write


def split(n_documents: int, val_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of the documents of each split, in the order they are written.

    The permutation and the rounding are those of `datasets`' train_test_split, which nanoGPT uses.
    """
    order = np.arange(n_documents, dtype=np.uint32)
    np.random.default_rng(seed).shuffle(order)
    n_val = math.ceil(n_documents * val_fraction)
    return {"val": order[:n_val], "train": order[n_val:]}  # val is short: written first, a mistake shows early


def encode_text(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """The token ids (N,) of a text. It cannot forge a special token."""
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # a lone surrogate becomes U+FFFD
        return encode_text(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), encoding)
    except ValueError:  # a run of a million spaces is too much for tiktoken's regex
        half = len(text) // 2
        return np.concatenate([encode_text(text[:half], encoding), encode_text(text[half:], encoding)])


def encoded(order: np.ndarray, read, encoding: tiktoken.Encoding, workers: int) -> Iterator[np.ndarray]:
    """The ids of each document in that order, with its end-of-text. Encoded by threads: tiktoken releases the GIL."""
    end = np.array([encoding.eot_token], np.uint32)

    def encode(indices) -> list[np.ndarray]:
        return [np.concatenate([encode_text(text, encoding), end]) for text in read(indices) if text]

    jobs = (order[i : i + JOB] for i in range(0, len(order), JOB))
    with ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque(pool.submit(encode, job) for job in itertools.islice(jobs, 4 * workers))
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(pool.submit(encode, job) for job in itertools.islice(jobs, 1))


def write_split(path: Path, documents: Iterator[np.ndarray], dtype: str, max_tokens: float, total: int) -> dict:
    """Write a token file of complete documents, at most max_tokens. Returns its entry in meta.json."""
    entry, sha256 = {"tokens": 0, "documents": 0, "max_id": 0}, hashlib.sha256()
    with open(path, "wb") as file, tqdm(desc=path.stem, total=total, unit=" documents", disable=None) as bar:
        for ids in documents:
            if entry["tokens"] + len(ids) > max_tokens:
                break
            if ids.max() > np.iinfo(dtype).max:
                raise OverflowError(f"token id {ids.max()} does not fit {dtype}")
            stored = ids.astype(dtype)
            file.write(stored)
            sha256.update(stored)
            entry["tokens"] += len(ids)
            entry["documents"] += 1
            entry["max_id"] = max(entry["max_id"], int(ids.max()))
            bar.update()
        file.flush()
        os.fsync(file.fileno())
    return entry | {"sha256": sha256.hexdigest()}


# ---- the command


def check_up_to_date(config: PrepareConfig, arguments: dict) -> bool:
    """Whether the directory already holds what these arguments make. Raises UserError if it holds something else."""
    if not (Path(config.out) / "meta.json").exists():
        return False
    then = data.verify(config.out).get("arguments", {})
    changed = [key for key in arguments if arguments[key] != then.get(key)]
    if changed:
        raise UserError(
            f"{config.out} was prepared with a different {', '.join(changed)}; choose a different --out or remove it"
        )
    return True


def prepare(config: PrepareConfig):
    """Make the data directory. Call it with the directory locked. Raises UserError."""
    arguments = {key: value for key, value in asdict(config).items() if key not in ("out", "workers")}
    arguments["paths"] = [[path, os.path.getsize(path)] for path in listed_files(config.paths)]
    if check_up_to_date(config, arguments):
        print(f"{config.out} is up to date")
        return
    encoding = tokenizer(config.tokenizer)
    dtype = "<u2" if encoding.n_vocab <= 2**16 else "<u4"
    source = {"python": python_files, "files": local_files}.get(config.source, from_hub)
    n, read, origin = source(config)
    out, splits = Path(config.out), {}
    for name, order in split(n, config.val_fraction, config.seed).items():
        most = config.max_tokens or math.inf if name == "train" else math.inf
        documents = encoded(order, read, encoding, config.workers)
        splits[name] = write_split(out / f".{name}.partial", documents, dtype, most, len(order))
        expected, found = OPENWEBTEXT[name], splits[name]["tokens"]
        like_nanogpt = (config.source, config.tokenizer, config.val_fraction) == ("openwebtext", "gpt2", 0.0005)
        if like_nanogpt and found != expected and most == math.inf and config.seed == 2357:
            raise UserError(f"openwebtext: {name} has {found:,} tokens, expected {expected:,}; try another --revision")
    if not all(entry["tokens"] for entry in splits.values()):
        counts = ", ".join(f"{name} {entry['documents']}" for name, entry in splits.items())
        raise UserError(f"documents with text: {counts}; expected at least 1 each; add text or change --val_fraction")
    for name, entry in splits.items():
        (out / f".{name}.partial").replace(out / f"{name}.bin")
        print(f"{out}/{name}.bin: {entry['tokens']:,} tokens of {entry['documents']:,} documents")
    meta = {
        "format": data.FORMAT, **origin, "tokenizer": encoding.name, "vocab_size": encoding.n_vocab,
        "eot": encoding.eot_token, "dtype": dtype, "splits": splits, "arguments": arguments,
    }
    storage.replace_json(out / "meta.json", meta)  # last: if it exists, the preparation was finished


def main():
    config = configurator.load(PrepareConfig)
    listed_files(config.paths)  # a mistake leaves no directory behind
    lock = storage.Lock(config.out)
    lock.acquire()
    try:
        prepare(config)
    except OSError as error:
        raise UserError(f"{config.out} was not written: {error.strerror or error}", exit_code=1) from None
    finally:
        lock.release()


if __name__ == "__main__":
    configurator.run(main)
