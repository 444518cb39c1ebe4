"""The documents of a corpus: a sequence that reads one at a time, in any order, in the same memory at any size.

    python prepare_data.py openwebtext --out=data/openwebtext      # reads its documents through this module
    python -c "import corpus; print(corpus.TextFiles(['README.md'], 'paragraph')[0])"

Python source, text and jsonl are read from their files. Parquet and the corpora of the hub go through `datasets`,
which keeps an uncompressed copy in its cache (HF_HOME), so that any document can be read at once.
"""

import contextlib
import errno
import glob
import hashlib
import json
import math
import mmap
import os
import platform
import re
import shutil
import sys
import sysconfig
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.configurator import UserError


@dataclass(frozen=True)
class Hub:
    """A corpus on the hub: where it may be found, and what must be there."""

    places: tuple[tuple[str, str], ...]  # (repository, revision), tried in this order
    config_name: str | None = None
    documents: int | None = None  # how many there are
    tokens: tuple[tuple[str, int], ...] = ()  # of each split, with nanoGPT's tokenizer and split


HUB = {
    "openwebtext": Hub(
        # The first was a loading script for years, which `datasets` no longer runs; the others are whole copies in
        # parquet. refs/convert/parquet is none: its converter stopped after 5 GB.
        (
            ("Skylion007/openwebtext", "main"),
            ("Skylion007/openwebtext", "refs/pr/19"),
            ("dvruette/openwebtext", "main"),
        ),
        documents=8_013_769,
        tokens=(("val", 4_434_897), ("train", 9_035_582_198)),  # as nanoGPT's data/openwebtext/prepare.py states them
    ),
    "fineweb-edu": Hub((("HuggingFaceFW/fineweb-edu", "main"),), config_name="sample-10BT"),
}


# ----------------------------------------------------------------------------------------------------------
# Files that are read as they are


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


def ends(path: str, cut: str) -> np.ndarray:
    """Where the documents of a file end, in bytes: at its end ("document"), or after each line or blank line."""
    size = os.path.getsize(path)
    if cut == "document":
        return np.array([size])

    def positions(file):
        position = 0
        for line in file:
            position += len(line)
            if cut == "line" or position == size or not line.strip():
                yield position

    with open(path, "rb") as file:
        return np.fromiter(positions(file), np.int64)


class TextFiles(Sequence):
    """Documents cut out of text files ("document", "paragraph" or "line"), or of the lines of .jsonl files.

    Holds 8 bytes for each document. An item is a str, for jsonl None for a blank line or null. Raises UserError for
    what is not UTF-8, not JSON or not text, with file and line.
    """

    def __init__(self, paths: list[str], cut: str, column: str | None = None):
        self.paths, self.cut, self.column = paths, cut, column
        self.ends = [ends(path, cut) for path in paths]
        self.first = np.cumsum([0, *map(len, self.ends)])  # of each file, the index of its first document

    def __len__(self):
        return int(self.first[-1])

    def __getitem__(self, i):
        number = int(np.searchsorted(self.first, i, "right")) - 1
        path, piece = self.paths[number], int(i - self.first[number])
        begin, end = (int(self.ends[number][piece - 1]) if piece else 0), int(self.ends[number][piece])
        where = path if self.cut == "document" else f"{path}, {self.cut} {piece + 1}"
        try:
            with open(path, "rb") as file:
                file.seek(begin)
                raw = file.read(end - begin)
            if len(raw) < end - begin:
                raise UserError(f"{path} was cut while it was read; start again", exit_code=1)
            text = raw.decode("utf-8" if begin else "utf-8-sig")  # without the byte order mark of Windows
            if self.cut != "document":
                text = text.rstrip("\r\n")
            return text if self.column is None else self.field(text, where)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}", exit_code=1) from None
        except (ValueError, RecursionError) as error:
            expected = "UTF-8 text" if self.column is None else "a JSON object"
            raise UserError(f"{where}: expected {expected}, found: {error}; mend it or take it out") from None

    def field(self, line: str, where: str):
        """The text column of a line of JSON."""
        if not line.strip():
            return None
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(type(row).__name__)
        if self.column not in row:
            raise UserError(f"{where}: no column {self.column!r}; found {', '.join(row)}; set --text_column")
        if not isinstance(row[self.column], str | None):
            found = type(row[self.column]).__name__
            raise UserError(f"{where}: found {found}, expected text in {self.column!r}; choose another --text_column")
        return row[self.column]


# ----------------------------------------------------------------------------------------------------------
# Tables, by way of `datasets`


class NotLoaded(UserError):
    """What `datasets` cannot load from one place; another may have it."""


class Rows(Sequence):
    """One column of Arrow files, as `datasets` caches them."""

    def __init__(self, paths: list[str], column: str):
        import pyarrow

        self.paths, self.column, self.maps, self.chunks, self.reads = paths, column, [], [], 0
        for path in paths:
            with open(path, "rb") as file:
                self.maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            table = pyarrow.ipc.open_stream(pyarrow.py_buffer(self.maps[-1])).read_all()  # copies nothing
            self.chunks.append(table.column(column))
            self.maps[-1].madvise(mmap.MADV_DONTNEED)
        self.first = np.cumsum([0, *map(len, self.chunks)])  # of each file, the index of its first row

    def __reduce__(self):  # where processes are not forked, each opens the files itself
        return Rows, (self.paths, self.column)

    def __len__(self):
        return int(self.first[-1])

    def __getitem__(self, i):
        number = int(np.searchsorted(self.first, i, "right")) - 1
        text = self.chunks[number][int(i - self.first[number])].as_py()
        # Pages of a mapped file count as memory of each process that touched them: give them back now and then, or
        # the sum grows with the corpus. They stay in the system's cache.
        self.reads += 1
        if self.reads % 128 == 0:  # each may map 0.7 MB, and giving back takes time
            for pages in self.maps:
                pages.madvise(mmap.MADV_DONTNEED)
        return text


def has_parquet_footer(path: str) -> bool | None:
    """Whether a file ends as a parquet file does."""
    import pyarrow.parquet

    with contextlib.suppress(OSError, pyarrow.ArrowException):
        return bool(pyarrow.parquet.read_metadata(path))


def one_line(error: BaseException) -> str:
    """What went wrong, from the error that another one was raised for."""
    text = " ".join(str(error.__cause__ or error).split()).rstrip(".")
    return f"{text[:300]}..." if len(text) > 300 else text or type(error).__name__


def check_disk(what: str, needs: dict[str, float]):
    """Say how many bytes are needed in folders, which may not exist yet. Raises UserError if they are not free."""
    there = {}
    for folder in needs:
        parents = [Path(folder).absolute(), *Path(folder).absolute().parents]
        there[folder] = next(path for path in parents if path.exists())
    message = f"{what}: needs about {' and '.join(f'{need / 1e9:.2f} GB in {path}' for path, need in needs.items())}"
    for folder in needs:
        on_this_disk = [other for other in needs if there[other].stat().st_dev == there[folder].stat().st_dev]
        free = shutil.disk_usage(there[folder]).free
        if sum(needs[other] for other in on_this_disk) > free:
            remedy = "free some, set HF_HOME or --out to a larger disk, or lower --max_tokens"
            raise UserError(f"{message}, where {free / 1e9:.2f} GB are free; {remedy}")
    print(message)


def load(config, path: str, name: str | None = None, **options) -> tuple[Rows, str]:
    """The text column of what `datasets` knows by a name, downloaded unless it is in the cache, and its revision.

    The revision is the commit for a repository on the hub, else a digest of the names, sizes and times of the files.
    Raises UserError.
    """
    try:
        import datasets
        import fsspec
        import huggingface_hub
    except ImportError:
        raise UserError(f"{path} is read with `datasets`, which is missing: pip install -r requirements.txt") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error is raised too
    huggingface_hub.logging.set_verbosity_error()  # not a line for each time that it knocks
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(path, name, **options)
        files = [file for split in (builder.config.data_files or {}).values() for file in split]
        local = bool(files) and not any("://" in file for file in files)
        revision = builder.hash
        if local:
            states = [[file, os.path.getsize(file), os.stat(file).st_mtime_ns] for file in files]
            revision = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:40]
            # `datasets` takes directories of one name for one data set, whatever they hold by now: a cache for each
            options["cache_dir"] = os.path.join(datasets.config.HF_DATASETS_CACHE, revision)
            builder = datasets.load_dataset_builder(path, name, **options)
        if not os.path.isdir(builder.cache_dir):
            size = sum(fs.size(file) for fs, file in map(fsspec.core.url_to_fs, files))
            unpacked = builder.info.dataset_size or 4 * size  # zstd parquet of text: 3.6 times was seen
            tokens = min(unpacked / 4, config.max_tokens or math.inf)  # told better once there is text to encode
            cache = str(datasets.config.HF_DATASETS_CACHE)
            check_disk(f"reading {path}", {cache: unpacked + (0 if local else size), config.out: 2 * tokens})
        processes = min(config.workers, len(files))
        builder.download_and_prepare(num_proc=processes if processes > 1 else None)
        if "train" not in builder.info.splits or not builder.info.splits["train"].num_examples:
            raise UserError(f"{path}: found no rows in a split train, expected its documents there; choose another")
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        full = getattr(error.__cause__ or error, "errno", None) == errno.ENOSPC
        raise NotLoaded(one_line(error), exit_code=1 if full else 2) from None
    try:
        table = builder.as_dataset(split="train")
    except (OSError, ValueError) as error:
        raise UserError(f"{builder.cache_dir}: {one_line(error)}; remove this folder, and it is made again") from None
    if config.text_column not in table.column_names:
        raise UserError(f"no column {config.text_column!r}; found {', '.join(table.column_names)}; set --text_column")
    kind = str(table.features.arrow_schema.field(config.text_column).type)
    if kind not in ("string", "large_string", "string_view", "null"):
        raise UserError(f"column {config.text_column!r} holds {kind}, expected text; choose another --text_column")
    return Rows([file["filename"] for file in table.cache_files], config.text_column), revision


def from_hub(config, begun: dict | None) -> tuple[Rows, dict]:
    """A corpus of the hub from the first place that has it, or from where a preparation has begun with it."""
    hub = HUB[config.source]
    places = hub.places
    if begun:
        places = ((begun["repository"], begun["revision"]),)
    elif config.repository or config.revision:
        places = ((config.repository or places[0][0], config.revision or "main"),)
    name, reasons = config.config_name or hub.config_name, []
    for repository, revision in places:
        # a directory that is laid out like a repository is read by the same code, but has no revisions
        options = {} if os.path.isdir(repository) else {"revision": revision}
        print(f"looking for {config.source} in {repository} at {revision}")
        try:
            texts, found = load(config, repository, name, **options)
        except NotLoaded as error:
            if error.exit_code != 2:
                raise
            reasons.append(f"{repository} at {revision}: {error}")
            continue
        if re.fullmatch("[0-9a-f]{40}", revision) and found != revision:  # a cache, read offline, may hold another
            raise UserError(
                f"{repository}: found revision {found}, expected {revision}; connect, choose another --revision, "
                "or remove what was begun with it"
            )
        if hub.documents not in (None, len(texts)):
            raise UserError(
                f"{config.source}: {repository} at {found} has {len(texts):,} documents, expected {hub.documents:,}: "
                "part of it, or another text; try --repository=dvruette/openwebtext or another --revision, or prepare "
                "it as it is: python prepare_data.py files *.parquet"
            )
        return texts, {"source": config.source, "repository": repository, "config_name": name, "revision": found}
    raise UserError(
        f"{config.source} could not be loaded ({'; '.join(reasons)}): check --repository, --config_name and "
        "--revision; offline, set HF_HOME to a folder that has it"
    )


# ----------------------------------------------------------------------------------------------------------


def documents(config, begun: dict | None) -> tuple[Sequence, dict]:
    """The documents of the configured source, and where they come from, for meta.json. Raises UserError.

    config is prepare_data.PrepareConfig; begun is the origin that an unfinished preparation recorded, which wins
    over a branch that has moved since.
    """
    if config.source in HUB:
        return from_hub(config, begun)
    if config.source == "python":
        paths = sysconfig.get_paths()
        folders, skip = [paths["stdlib"]], {"test", "tests", "idle_test", "__pycache__"}
        if config.site_packages:
            folders += [paths["purelib"], paths["platlib"]]
        else:
            skip |= {"site-packages", "dist-packages"}
        name = f"Python {platform.python_version()} library" + (" and installed packages" * config.site_packages)
        return PythonFiles(folders, skip), {"source": name}

    for path in map(Path, config.paths):
        if not path.is_file():
            found = f"a directory, expected its files, such as {path}/*.txt" if path.is_dir() else "no such file"
            raise UserError(f"{path}: {found}")
    suffixes = {Path(path).suffix for path in config.paths}
    if len(suffixes) != 1 or not suffixes <= {".txt", ".jsonl", ".parquet"}:
        found = ", ".join(sorted(suffixes)) or "no path"
        raise UserError(f"files: found {found}, expected paths that all end in one of .txt, .jsonl, .parquet")
    origin = {"source": f"files {' '.join(Path(path).name for path in config.paths)}"}
    if suffixes == {".txt"}:
        return TextFiles(config.paths, config.sample_by), origin
    if suffixes == {".jsonl"}:
        return TextFiles(config.paths, "line", config.text_column), origin
    try:
        return load(config, "parquet", data_files=[glob.escape(path) for path in config.paths])[0], origin
    except NotLoaded as error:
        if error.exit_code == 1:
            raise UserError(f"files: {error}; free some disk, or set HF_HOME to a larger one", exit_code=1) from None
        broken = next((path for path in config.paths if not has_parquet_footer(path)), "one of the files")
        raise UserError(f"{broken}: not readable as parquet: {error}; replace it") from None  # `datasets` names none
