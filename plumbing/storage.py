"""Atomic directories of files and tensors: publish, verify, find, lock. Any model family.

    python -c "from plumbing import storage; storage.verify(storage.Path('out/demo/reference/step-00000300'))"
    python -c "from plumbing import storage; print(*storage.read_tensors(storage.resolve('gpt2')), sep='\\n')"

A directory is written under a temporary name, flushed to the disk and renamed, so one that has its name is
complete. manifest.json, written last, holds the size and sha256 of every other file. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from plumbing.configurator import UserError

MASK_BUFFER = re.compile(r"\.attn\.(masked_)?bias$")  # the causal mask, which old GPT-2 files carry
UMASK = os.umask(0o022)
os.umask(UMASK)  # the only way to read it is to set it
TOKENIZER_FILES = (  # what travels with the weights
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "generation_config.json",
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


def write_json(path: Path, value):
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def replace_text(path: Path, text: str):
    """Write a file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    fsync(partial)
    os.replace(partial, path)


def replace_json(path: Path, value):
    replace_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_json(path: Path, value):
    """Add a line to a log. A line that cannot be written does not end the run."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
    except OSError as error:
        print(f"warning: {path}: {error.strerror}; a line is lost")


def read_log(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl. Lines that were torn by a kill or a full disk are skipped."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
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
    """The safetensors files of a directory: one, or the shards that its index lists. Raises UserError."""
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    weight_map = read_json(index).get("weight_map") if index.is_file() else None
    if not weight_map:
        raise UserError(
            f"{single}: not found (pickles such as *.bin and *.pt can run code and are not loaded); save the "
            "model with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return sorted({directory / name for name in weight_map.values()})


def read_tensors(directory: Path, stem: str = "model") -> dict:
    """Name -> tensor, of all files. They are memory-mapped: a tensor takes memory only while it is used."""
    found = {}
    for path in tensor_files(directory, stem):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    return found


def gpt2_key(name: str) -> str | None:
    """The key that GPT2LMHeadModel gives a stored tensor. None for a mask buffer, which is no parameter."""
    name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)  # left by DDP and torch.compile in others' files
    if MASK_BUFFER.search(name):
        return None
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def check_finite(path: Path, tensors: dict, exit_code: int = 2):
    """Raise UserError naming a tensor that holds NaN or an infinite value. FP8 has no test for that."""
    for name, tensor in tensors.items():
        if tensor.dtype.itemsize > 1 and not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite", exit_code)


def copy_tokenizer(source: Path, directory: Path):
    """Copy what belongs to a model beside its weights and config.json: tokenizer files, its family's code."""
    for file in source.iterdir():
        if file.name in TOKENIZER_FILES or file.suffix == ".py":
            shutil.copy(file, directory)


def hashes(directory: Path) -> dict[str, str]:
    """File name -> sha256 of a model's weights."""
    return {path.name: sha256_of(path) for path in tensor_files(directory)}


# ---- publish, verify, find


@contextlib.contextmanager
def publish(path: str | Path):
    """A directory to fill, which becomes `path` atomically. UserError if it exists or the disk refuses."""
    path = Path(path).expanduser()
    if path.exists():
        raise UserError(f"{path} exists already; remove it or choose a different place")
    for leftover in path.parent.glob(".tmp-*"):  # of a killed process, but not of "half-2" beside "half"
        if re.fullmatch(rf"\.tmp-{re.escape(path.name)}-\d+-\d+", leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = path.with_name(f".tmp-{path.name}-{os.getpid()}-{time.time_ns()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        files = sorted(partial.iterdir())
        for file in files:
            file.chmod(0o666 & ~UMASK)  # safetensors writes 0600
            fsync(file)
        entries = {file.name: [file.stat().st_size, sha256_of(file)] for file in files}
        write_json(partial / "manifest.json", {"format": 1, "files": entries})
        fsync(partial / "manifest.json")
        fsync(partial)
        os.rename(partial, path)
        fsync(path.parent)
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: NaN in a JSON file
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} was not written: {reason}; earlier files are untouched", 1) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # already renamed if nothing failed


def verify(path: Path):
    """Raise UserError unless every file of a published directory matches its manifest to the last bit."""
    try:
        listed = read_json(path / "manifest.json")["files"]
        files = {name: (size, sha256) for name, (size, sha256) in listed.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        files = {"manifest.json": ("other", "")}
    for name, (size, sha256) in files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else "no file"
        if found != size:
            raise UserError(f"{file}: found {found}, expected {size} bytes; the checkpoint is damaged")
        if sha256_of(file) != sha256:
            raise UserError(f"{file}: sha256 mismatch; the checkpoint is damaged")


def steps(run_dir: str | Path) -> list[Path]:
    """The checkpoint directories of a run, oldest first, verified or not."""
    return sorted(p for p in Path(run_dir).glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def latest(run_dir: str | Path) -> Path | None:
    """The checkpoint of a run with the highest step that verifies. Prints a line for those that do not."""
    for path in reversed(steps(run_dir)):
        try:
            verify(path)
            return path
        except UserError as error:
            print(f"warning: ignored {path.name}: {error}")
    return None


def discard(path: Path):
    """Delete a directory. It is renamed first, so that a kill leaves no half-deleted checkpoint."""
    trash = path.with_name(f".trash-{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def prune(run_dir: Path, keep: int, spare: Path):
    """Delete all but the newest `keep` complete checkpoints of a run, and `spare`. Other files stay."""
    complete = [path for path in steps(run_dir) if path != spare and (path / "manifest.json").is_file()]
    for path in complete[:-keep]:
        try:
            discard(path)
        except OSError as error:
            print(f"warning: {path} could not be deleted ({error.strerror}); trying again at the next save")


@contextlib.contextmanager
def lock(directory: str | Path):
    """Hold a directory against other processes; clear what a killed one left. UserError if it is in use.

    The system releases the lock when its process dies.
    """
    directory = Path(directory).expanduser()
    held = FileLock(directory / ".lock", timeout=0)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        raise UserError(f"{directory} is in use by another process; wait or change it") from None
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    try:
        for leftover in directory.iterdir():
            if re.match(r"\.(tmp|trash)-(step-\d{8}|init)\b", leftover.name):
                shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        held.release()


def resolve(name: str | Path, needed: str = "config.json") -> Path:
    """The verified directory of a model: a checkpoint, a run (its latest checkpoint) or a name on the hub.

    A directory without a manifest, as transformers writes it, is taken as it is. Raises UserError.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / needed).is_file():
        path = latest(path) or path
    if (path / "manifest.json").is_file():
        verify(path)
    if (path / needed).is_file():
        return path
    if path.exists() or Path(path.parts[0]).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
        raise UserError(f"{name} is no checkpoint, run directory or name on the hub (pickles are not loaded)")

    import huggingface_hub  # imported here: local work never needs the hub

    patterns = ["config.json", "*.py", *TOKENIZER_FILES]  # code is copied, never run
    patterns += ["model*.safetensors", "model.safetensors.index.json"] if needed == "config.json" else []
    try:
        found = huggingface_hub.snapshot_download(str(name), allow_patterns=patterns, ignore_patterns=["*/*"])
        return Path(found)
    except Exception as error:  # its own errors, OSErrors and those of its HTTP library
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        remedy = "; accept its terms on the hub and set HF_TOKEN" * ("Gated" in reason)
        where = f"{name} is no directory and could not be loaded from the hub"
        raise UserError(f"{where} ({reason}){remedy}") from None
