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

KINDS = {".txt": "text", ".md": "text", ".jsonl": "text", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
JOB_DOCUMENTS = 16  # encoded at a time by one worker
PIECE = 100_000  # characters; tiktoken's regex overflows its stack on a run of about a million spaces

# Where a corpus of the hub is found: (repository, revision), tried in this order. Skylion007's main was a loading
# script for years, which `datasets` no longer runs; the other two are complete copies in parquet.
HUB = {
    "openwebtext": [
        ("Skylion007/openwebtext", "main"), ("Skylion007/openwebtext", "refs/pr/19"), ("dvruette/openwebtext", "main")
    ],
    "fineweb-edu": [("HuggingFaceFW/fineweb-edu", "main")],
}
OPENWEBTEXT_DOCUMENTS = 8_013_769
NANOGPT = ("openwebtext", "gpt2", 0.0005, 2357)  # source, tokenizer, val_fraction, seed
NANOGPT_TOKENS = {"val": 4_434_897, "train": 9_035_582_198}  # as nanoGPT's data/openwebtext/prepare.py states them
OTHER_TEXT = "try --repository=dvruette/openwebtext, or prepare it as it is: python prepare_data.py files *.parquet"


@dataclass
class PrepareConfig:
    """Tokenize a corpus into train.bin, val.bin and meta.json."""

    source: tyro.conf.Positional[Literal["python", "files", "openwebtext", "fineweb-edu"]]
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
        if self.val_fraction is None:
            self.val_fraction = 0.0005 if hub else 0.005
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
    """The documents of several parts (name, items, read), where read(item) is the text of one; empty for none."""

    def __init__(self, parts: list):
        self.parts, self.ends = parts, np.cumsum([len(items) for _, items, _ in parts])

    def __len__(self):
        return int(self.ends[-1]) if self.parts else 0

    def __getitem__(self, i: int) -> tuple[str, str | None]:
        """What to call document i, and its text. Raises UserError where the text column holds none."""
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
        return f"{name}, document {row + 1}", text


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
    folders = [paths["stdlib"]] + [paths["purelib"], paths["platlib"]] * site_packages
    skip |= set() if site_packages else {"site-packages", "dist-packages"}
    found = {path for folder in folders for path in Path(folder).rglob("*.py")}
    return sorted(path for path in found if skip.isdisjoint(path.parts))


def kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def find_files(names: tuple[str, ...]) -> list[Path]:
    """The files that paths, folders and globs name, but for empty ones. Raises UserError."""
    found = []
    for name in names:
        path = Path(name).expanduser()
        matches = path.rglob("*") if path.is_dir() else [path] if path.exists() else glob.glob(str(path), recursive=True)
        matches = sorted(match for match in map(Path, matches) if kind(match) in KINDS and match.is_file())
        if not matches:
            raise UserError(f"{name}: found no file, expected {' '.join(KINDS)} or .gz of these; check the path")
        found += matches
    repeated = [path for path, times in Counter(path.resolve() for path in found).items() if times > 1]
    if repeated:  # its validation documents would be in train.bin too
        raise UserError(f"{repeated[0]} is named more than once, expected each file once; remove the repetition")
    return [path.absolute() for path in found if path.stat().st_size]


def load_column(column: str, path: str, name: str | None = None, num_proc: int = 1, **options):
    """One column of what `datasets` loads, memory-mapped from its cache, and the revision it has there."""
    import datasets  # imported here: the source `python` does without it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error it also raises
    if not sys.stderr.isatty() or "data_files" in options:
        datasets.disable_progress_bars()
    if path in ("csv", "parquet"):  # these builders can leave the other columns unread
        options["features"] = datasets.Features({column: datasets.Value("string")})
    builder = datasets.load_dataset_builder(path, name, **options)
    # the cache of a local directory is known by its last name alone, whatever it holds, so it is made anew
    mode = "force_redownload" if os.path.isdir(path) else None
    builder.download_and_prepare(num_proc=num_proc, download_mode=mode)
    if not builder.info.splits["train"].num_examples:
        return [], builder.hash
    return builder.as_dataset(split="train").select_columns([column]).data.column(0), builder.hash


def one_line(error: Exception) -> str:
    """The reason for an error of `datasets`, which is the error that it was raised from."""
    return " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__


def load_files(paths: list[Path], sample_by: str, column: str) -> list:
    """A part of Documents for each table, and one for all text files. Raises UserError naming the file at fault."""

    def read_json(line) -> str | None:
        return json.loads(line.as_py())[column] if line.as_py().strip() else None

    plain = [path for path in paths if kind(path) in (".txt", ".md")]
    parts = []
    for group in [[path] for path in paths if path not in plain] + [plain] * bool(plain):
        ending = kind(group[0])
        options = {
            # utf-8-sig leaves out Windows' byte order mark; lines of JSON may each have other keys
            "text": {"encoding": "utf-8-sig", "sample_by": "line" if ending == ".jsonl" else sample_by},
            "json": {},
            "csv": {"usecols": [column], "keep_default_na": False},  # a text may be "NA"
            "parquet": {"columns": [column], "batch_size": 1000},
        }[KINDS[ending]]
        builder_column = "text" if KINDS[ending] == "text" else column
        escaped = [glob.escape(str(path)) for path in group]
        try:
            items, _ = load_column(builder_column, KINDS[ending], data_files=escaped, **options)
        except Exception as error:  # also those of pyarrow, pandas and fsspec
            for path in group if len(group) > 1 else ():
                load_files([path], sample_by, column)  # raises for the one at fault
            cause = error.__cause__ or error
            remedy = "set HF_HOME to a writable folder with space" if getattr(cause, "errno", None) else "fix or remove it"
            raise UserError(f"{group[0]}: not readable as {ending} with column {column!r}: {one_line(error)}; {remedy}") from None
        name = str(group[0]) if len(group) == 1 else f"{len(group)} text files from {group[0]}"
        parts.append((name, items, read_json if ending == ".jsonl" else lambda item: item.as_py()))
    return parts


def load_hub(config: PrepareConfig) -> tuple[list, dict]:
    """A corpus of the hub from the first place that has it, and this place for meta.json. Raises UserError."""
    places = HUB[config.source]
    if config.repository or config.revision:
        places = [(config.repository or places[0][0], config.revision or "main")]
    reasons = []
    for repository, revision in places:
        print(f"looking for {config.source} in {repository} at {revision}")
        options = {} if os.path.isdir(repository) else {"revision": revision}  # a directory is laid out like one
        try:
            texts, found = load_column(config.text_column, repository, config.config_name, config.workers, **options)
        except Exception as error:  # also those of the hub's HTTP library
            reasons.append(f"{repository} at {revision}: {one_line(error)}")
            continue
        if config.source == "openwebtext" and len(texts) != OPENWEBTEXT_DOCUMENTS:
            raise UserError(
                f"{repository} at {found} has {len(texts):,} documents, expected {OPENWEBTEXT_DOCUMENTS:,}; {OTHER_TEXT}"
            )
        origin = {"repository": repository, "config_name": config.config_name, "revision": found}
        return [(repository, texts, lambda item: item.as_py())], origin
    raise UserError(
        f"{config.source} could not be loaded ({'; '.join(reasons)}); check --repository, --revision and --config_name, "
        "or set HF_HOME to a folder that has it"
    )


# ---- encoding and writing


def encode(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """Token ids of one text, as encode_ordinary gives them. Raises ValueError where tiktoken cannot."""
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # a lone surrogate becomes U+FFFD
        return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), encoding)
    except ValueError:  # its regex overflows its stack: encode in pieces, cut before white space if there is any
        pieces = re.findall(rf"(?s).{{1,{PIECE}}}(?=\s|\Z)|.{{1,{PIECE}}}", text)
        if len(pieces) < 2:
            raise
        return np.concatenate([encode(piece, encoding) for piece in pieces])


def encode_job(documents: Documents, indices, encoding: tiktoken.Encoding, dtype: str) -> tuple[np.ndarray, list[int]]:
    """Token ids of some documents, an end-of-text after each, and how many each has: 0 for one without text."""
    ids, lengths = [np.empty(0, np.uint32)], []
    for i in indices:
        name, text = documents[i]
        try:
            ids += [encode(text, encoding), [encoding.eot_token]] if text else []
        except ValueError as error:
            raise UserError(f"{name} ({text[:30]!r}...) cannot be encoded: {error}; shorten or remove it") from None
        lengths.append(len(ids[-2]) + 1 if text else 0)
    joined = np.concatenate(ids)
    assert joined.max(initial=0) <= np.iinfo(dtype).max, f"token id {joined.max()} does not fit {dtype}"
    return joined.astype(dtype), lengths


def in_order(call, items, workers: int) -> Iterator:
    """call(item) of each item, in order, by threads. Few are ahead of the one that is taken, to bound the memory."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_split(path: Path, jobs: Iterator, n_documents: int, max_tokens: float) -> dict:
    """Write the results of encode_job to a file, up to max_tokens. Returns this split's entry for meta.json."""
    entry, sha256 = {"tokens": 0, "documents": 0, "max_id": 0}, hashlib.sha256()
    bar = tqdm(total=n_documents, desc=path.name.strip("."), unit=" documents", disable=None)
    with open(path, "wb") as file, bar:
        for ids, lengths in jobs:
            complete = int(np.searchsorted(np.cumsum(lengths), max_tokens - entry["tokens"], "right"))
            ids = ids[: sum(lengths[:complete])]
            file.write(ids)
            sha256.update(ids)
            entry["tokens"] += len(ids)
            entry["documents"] += int(np.count_nonzero(lengths[:complete]))
            entry["max_id"] = max(entry["max_id"], int(ids.max(initial=0)))
            bar.update(len(lengths))
            if complete < len(lengths):  # the next document would exceed max_tokens
                break
        file.flush()
        os.fsync(file.fileno())
    return entry | {"sha256": sha256.hexdigest()}


def check_tokens(config: PrepareConfig, name: str, tokens: int):
    """Raise UserError if OpenWebText, split and encoded as nanoGPT does, has a different number of tokens."""
    like_nanogpt = (config.source, config.tokenizer, config.val_fraction, config.seed) == NANOGPT
    if like_nanogpt and not (name == "train" and config.max_tokens) and tokens != NANOGPT_TOKENS[name]:
        raise UserError(f"{name} has {tokens:,} tokens, expected nanoGPT's {NANOGPT_TOKENS[name]:,}; {OTHER_TEXT}")


# ---- the data directory


def up_to_date(out: Path, arguments: dict) -> bool:
    """Whether `out` is complete and was made with these arguments. Raises UserError if with different ones."""
    try:
        made_with = data.verify(out).get("arguments", {})
    except UserError:  # absent or damaged: made anew
        return False
    changed = [key for key, value in arguments.items() if made_with.get(key) != value]
    if changed:
        raise UserError(f"{out} was prepared with a different {', '.join(changed)}; choose a different --out or remove it")
    return True


def prepare(config: PrepareConfig, out: Path):
    """Fill the data directory `out`, unless it is up to date. Raises UserError."""
    files = find_files(config.paths)
    arguments = {key: value for key, value in asdict(config).items() if key not in ("out", "workers")}
    arguments["paths"] = [[str(path.resolve()), path.stat().st_size] for path in files]
    arguments["python"] = platform.python_version() if config.source == "python" else None
    if up_to_date(out, arguments):
        print(f"{out} is up to date")
        return

    encoding, begun = tokenizer(config.tokenizer), time.perf_counter()
    dtype = "<u2" if encoding.n_vocab <= 2**16 else "<u4"
    parts, origin = open_source(config, files)
    documents, splits = Documents(parts), {}
    partial = {name: out / f".{name}.bin.partial" for name in ("val", "train")}
    try:
        for name, order in split(len(documents), config.val_fraction, config.seed).items():
            jobs = (order[i : i + JOB_DOCUMENTS] for i in range(0, len(order), JOB_DOCUMENTS))
            encoded = in_order(lambda job: encode_job(documents, job, encoding, dtype), jobs, config.workers)
            limit = config.max_tokens if config.max_tokens and name == "train" else math.inf
            splits[name] = write_split(partial[name], encoded, len(order), limit)
            check_tokens(config, name, splits[name]["tokens"])
        if not all(entry["tokens"] for entry in splits.values()):
            counts = ", ".join(f"{name} {entry['documents']}" for name, entry in splits.items())
            raise UserError(
                f"{config.source}: documents with text: {counts}; expected at least 1 each; add documents, change "
                "--val_fraction, raise --max_tokens, or cut text files into more with --sample_by=paragraph"
            )
        (out / "meta.json").unlink(missing_ok=True)
        for name, path in partial.items():
            os.replace(path, out / f"{name}.bin")
        storage.fsync(out)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    meta = {
        "format": data.FORMAT, "source": config.source, **origin,
        "tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token, "dtype": dtype,
        "splits": {name: splits[name] for name in ("train", "val")},
        "split_rule": "default_rng(seed).permutation(documents); the first ceil(val_fraction * documents) are val",
        "arguments": arguments,
    }
    storage.replace_json(out / "meta.json", meta)  # last: if it exists, the preparation was finished
    for name, entry in meta["splits"].items():
        start = encoding.decode(np.fromfile(out / f"{name}.bin", dtype, 60).tolist())[:60]  # shows a wrong column
        print(f"{out}/{name}.bin: {entry['tokens']:,} tokens, {entry['documents']:,} documents, the first: {start!r}")
    print(f"{sum(e['tokens'] for e in splits.values()) / (time.perf_counter() - begun):,.0f} tokens per second")


def open_source(config: PrepareConfig, files: list[Path]) -> tuple[list, dict]:
    """The parts of Documents, and where they come from for meta.json."""
    if config.source in HUB:
        return load_hub(config)
    if config.source == "files":
        origin = {"source": f"files {' '.join(config.paths)}"}
        return load_files(files, config.sample_by, config.text_column), origin
    name = f"Python {platform.python_version()} library" + " and installed packages" * config.site_packages
    return [(name, python_files(config.site_packages), read_python)], {"source": name}


def main():
    config = configurator.load(PrepareConfig)
    if not 0 < config.val_fraction < 1 or min(config.workers, config.max_tokens or 1) < 1 or config.seed < 0:
        raise UserError(
            f"val_fraction {config.val_fraction}, workers {config.workers}, max_tokens {config.max_tokens}, seed "
            f"{config.seed}; expected 0 < val_fraction < 1, workers and max_tokens >= 1, seed >= 0"
        )
    if bool(config.paths) != (config.source == "files"):
        raise UserError(f"{config.source}: found {len(config.paths)} paths; expected paths after files, and only there")
    out = Path(config.out).expanduser()
    lock = storage.Lock(out)
    lock.acquire()  # everything is looked at under the lock
    try:
        prepare(config, out)
    except OSError as error:
        raise UserError(f"{out} was not written: {error}; fix this and run the same command", exit_code=1) from None
    finally:
        lock.release()


if __name__ == "__main__":
    configurator.run(main)
