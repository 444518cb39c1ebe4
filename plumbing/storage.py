"""Atomic directories of files and tensors: publish, verify, find, lock. Any model family.

    python -c "from plumbing import storage; storage.verify(storage.Path('out/.../step-00000600'))"
    python -c "from plumbing import storage; print(*storage.read_tensors(storage.resolve('gpt2')))"

A directory is written under a temporary name, flushed to the disk and renamed, so one that has its
name is complete. manifest.json, written last, holds the size and sha256 of every other file.
Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from plumbing.configurator import UserError, say

MASK_BUFFER = re.compile(r"\.attn\.(masked_)?bias$")  # the causal mask, in old GPT-2 files
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


def read_log(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, but for those that a kill or a full disk has torn."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            found += [value] if isinstance(value, dict) and "step" in value else []
    return found


def read_json(path: Path) -> dict:
    """A JSON file that holds an object. Raises UserError if it does not, or cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a {type(value).__name__}, expected a JSON object")
    return value


# ---- tensors


def tensor_files(directory: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a directory: one, or the shards that its index lists. UserError."""
    single = directory / f"{stem}.safetensors"
    index = directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{single}: not found, and pickles such as *.bin are not loaded")
    return sorted({directory / name for name in read_json(index)["weight_map"].values()})


def read_tensors(directory: Path, stem: str = "model") -> dict:
    """Name -> tensor, of all files, memory-mapped: a tensor takes memory only while it is used."""
    found = {}
    for path in tensor_files(directory, stem):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    return found


def gpt2_key(name: str) -> str | None:
    """The key that GPT2LMHeadModel gives a stored tensor. None for a mask: no parameter."""
    if MASK_BUFFER.search(name):
        return None
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


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


def hashes(directory: Path) -> dict[str, str]:
    """File name -> sha256 of a model's weights."""
    return {path.name: sha256_of(path) for path in tensor_files(directory)}


# ---- publish, verify, find


@contextlib.contextmanager
def publish(path: str | Path):
    """A directory to fill, which becomes `path` atomically. UserError if that is not possible."""
    path = Path(path).expanduser()
    if path.exists():
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


def verify(path: Path):
    """Raise UserError unless a published directory's files match its manifest, with no other weights."""
    listed = read_json(path / "manifest.json").get("files", {"manifest.json": None})
    listed |= {file.name: None for file in path.glob("model*.safetensors*") if file.name not in listed}
    for name, entry in listed.items():
        file = path / name
        if not file.is_file() or [file.stat().st_size, sha256_of(file)] != entry:
            raise UserError(f"{file}: sha256 mismatch, no file or not listed; the checkpoint is damaged")


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
        raise UserError(f"{directory} is in use by another process; wait or change it") from None
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    with held:
        for leftover in directory.glob(".tmp-step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def resolve(name: str | Path, needed: str = "config.json") -> Path:
    """The verified directory of a model: a checkpoint, a run's latest one or a name on the hub.

    A directory without a manifest, as transformers writes it, is taken as it is. Raises UserError.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / needed).is_file():
        path = latest(path) or path
    if (path / "manifest.json").is_file():
        verify(path)
    if (path / needed).is_file():
        return path
    reason = "pickles are not loaded"
    if not path.exists() and not Path(path.parts[0]).exists():  # nor a path that is misspelt
        import huggingface_hub  # imported here: local work never needs the hub

        wanted = ["config.json", "*.py", *TOKENIZER_FILES]  # code is copied, never run
        if needed == "config.json":
            wanted += ["model*.safetensors", "model.safetensors.index.json"]
        options = {"allow_patterns": wanted, "ignore_patterns": ["*/*"]}
        try:
            return Path(huggingface_hub.snapshot_download(str(name), **options))
        except Exception as error:  # its own errors, OSErrors and those of its HTTP library
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            reason += "; a gated or private model needs its terms accepted and HF_TOKEN set"
    raise UserError(f"{name} is no checkpoint, run directory or model on the hub ({reason})")
