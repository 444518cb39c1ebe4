"""Atomic directories, of a model or of data: publish, verify, find, lock.

    python -c "from plumbing import storage; storage.verify(storage.Path('out/.../step-00000600'))"
    python -c "from plumbing import storage; print(*storage.steps('out/demo/reference'))"

A directory is written under a temporary name, flushed to the disk and renamed, so one that has its
name is complete. manifest.json, written last, holds the size and sha256 of every other file.
Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from plumbing.configurator import UserError, say

TOKENIZER_FILES = (  # what travels with the weights
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "generation_config.json",
)


# ---- files


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path):
    """Flush a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str):
    """Write a file atomically. OSError names it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # another process has its own
    try:
        partial.write_text(text, encoding="utf-8")
        fsync(partial)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, value):
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_json(path: Path, value):
    """Add a line to a log. A line that cannot be written does not end the run."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
    except OSError as error:
        say(f"warning: {path}: {error.strerror}; a line is lost")


def read_json(path: Path) -> dict:
    """A JSON file that holds an object. Raises UserError if it does not, or cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a {type(value).__name__}, expected a JSON object")
    return value


def check_finite(path: Path, tensors: dict, exit_code: int = 2):
    """Raise UserError naming a tensor that holds NaN or infinity. isfinite does not know FP8."""
    for name, tensor in tensors.items():
        if tensor.dtype.itemsize > 1 and not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite", exit_code)


def copy_tokenizer(source: Path, directory: Path):
    """Copy what a model needs beside its weights and config.json: its tokenizer, its code."""
    for file in source.iterdir():
        if file.name in TOKENIZER_FILES or file.suffix == ".py":
            shutil.copy(file, directory)


# ---- publish, verify, find


def is_free(path: Path) -> bool:
    """Whether nothing is at a path, or an empty directory."""
    empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    return empty or not os.path.lexists(path)


@contextlib.contextmanager
def publish(path: str | Path):
    """A directory to fill, which becomes `path` atomically. UserError if that is not possible."""
    path = Path(path).expanduser()
    if not is_free(path):
        raise UserError(f"{path} exists already; remove it or choose a different place")
    partial = path.with_name(f".tmp-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process
    try:
        partial.mkdir(parents=True)
        yield partial
        files = sorted(partial.iterdir())
        for file in files:
            file.chmod(partial.stat().st_mode & 0o666)  # the umask's; safetensors writes 0600
            fsync(file)
        entries = {file.name: [file.stat().st_size, sha256_of(file)] for file in files}
        write_json(partial / "manifest.json", {"format": 1, "files": entries})
        fsync(partial)
        os.rename(partial, path)
        fsync(path.parent)
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: NaN in a JSON file
        reason = getattr(error, "strerror", None) or error
        problem = f"{path} was not written: {reason}; earlier files are untouched"
        raise UserError(problem, exit_code=1) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # already renamed if nothing failed


def verify(path: Path, unread: tuple = ()) -> dict:
    """The files of a published directory: name -> [size, sha256]. UserError unless they match.

    Unlisted weights are an error too. Of names that end in one of `unread`, only the size has to.
    """
    listed = read_json(path / "manifest.json").get("files", {"manifest.json": None})
    listed |= {file.name: None for file in path.glob("model*.safetensors*") if file.name not in listed}
    for name, entry in listed.items():
        file = path / name
        trusted = entry[1] if entry and name.endswith(unread) else ""
        if not file.is_file() or [file.stat().st_size, trusted or sha256_of(file)] != entry:
            raise UserError(f"{file}: sha256 mismatch, no file or not listed; {path} is damaged")
    return listed


def steps(run_dir: str | Path) -> list[Path]:
    """The checkpoint directories of a run, oldest first, verified or not."""
    return sorted(Path(run_dir).glob("step-" + 8 * "[0-9]"))


def latest(run_dir: str | Path) -> Path | None:
    """The checkpoint of a run with the highest step that verifies. Warns of those that do not."""
    for path in reversed(steps(run_dir)):
        try:
            verify(path)
            return path
        except UserError as error:
            say(f"warning: ignored {path.name}: {error}")
    return None


def prune(run_dir: Path, keep: int, stable: int):
    """Keep a run's newest `keep` complete checkpoints and that of step `stable`. Delete the others."""
    complete = [path for path in steps(run_dir) if (path / "manifest.json").is_file()]
    for path in [path for path in complete if path.name != f"step-{stable:08d}"][:-keep]:
        try:
            trash = path.rename(path.with_name(f".tmp-{path.name}"))  # a kill leaves no half of one
            shutil.rmtree(trash, ignore_errors=True)
        except OSError as error:
            say(f"warning: {path} could not be deleted ({error.strerror}); trying again later")


@contextlib.contextmanager
def lock(directory: str | Path):
    """Hold a directory against other processes; clear what a killed one left. Raises UserError.

    The system releases the lock when its process dies.
    """
    directory = Path(directory).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = FileLock(directory / ".lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"{directory} is in use by another process; wait for it or stop it") from None
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    with held:
        for leftover in directory.glob(".tmp-step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
