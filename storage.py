"""Directories of tensors that are whole or absent: write, publish, verify, find. Any model family.

    python -c "import storage; storage.verify(storage.Path('out/demo/reference/step-00000300'))"
    python -c "import storage; print(*storage.TensorFiles(storage.resolve('out/demo/reference')), sep='\\n')"

A directory is written beside its place, flushed to the disk and renamed into place, so what is there under its
name is whole. The newest is found by looking, not by a pointer that could be wrong. manifest.json, written
last, holds the size and the sha256 of every other file. Nothing is pickled.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from configurator import UserError

FORMAT = 1
SAFETENSORS_NAMES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Files


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


def replace_json(path: Path, value):
    """Write a JSON file that is whole or not there at all."""
    partial = path.with_name(f".{path.name}.partial")
    write_json(partial, value)
    fsync(partial)
    os.replace(partial, path)


def append_json(path: Path, value):
    """Add a line to a log; one that cannot be written is no reason to lose a run."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
    except OSError as error:
        print(f"warning: {path}: {error.strerror}; a line is lost")


def read_json(path: Path) -> dict:
    """A JSON file that holds a table. Raises UserError if it does not, or cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a {type(value).__name__}, expected a table")
    return value


def write_tensors(path: Path, names: Iterable[str], read: Callable) -> dict[str, int]:
    """Write a safetensors file holding one tensor in memory at a time; the library's own writer holds them all.

    Format: 8 bytes length of the header, the header (JSON: dtype, shape and place of each tensor), the bytes.
    read(name) is a tensor. Returns how many numbers each has.
    """
    import torch  # not above: see data.windows

    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(names):  # one order, so equal tensors make equal files
        tensor = read(name)
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    sizes = {name: math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sizes:
            file.write(read(name).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sizes


class TensorFiles(Mapping):
    """The tensors of a directory by name, in one safetensors file or sharded, each read when it is asked for."""

    def __init__(self, directory: Path, stem: str = "model"):
        index = directory / f"{stem}.safetensors.index.json"
        single = directory / f"{stem}.safetensors"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{index}: no weight_map; download it again")
            self.files = {name: directory / str(file) for name, file in weight_map.items()}
        elif single.is_file():
            with self.open(single) as file:
                self.files = dict.fromkeys(file.keys(), single)
        else:
            pickles = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            found = f", only pickles ({', '.join(pickles)}), which can run code and are not loaded" if pickles else ""
            raise UserError(
                f"{single}: not found{found}; save it with transformers: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )

    def sha256(self) -> dict[str, str]:
        """Of each file, by its name."""
        return {file.name: sha256_of(file) for file in sorted(set(self.files.values()))}

    @staticmethod
    def open(path: Path):
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None

    def __getitem__(self, name):
        with self.open(self.files[name]) as file:
            try:
                return file.get_tensor(name)
            except SafetensorError:
                raise UserError(f"{self.files[name]}: no tensor {name}, which the index says is there") from None

    def __iter__(self):
        return iter(self.files)

    def __len__(self):
        return len(self.files)


# ----------------------------------------------------------------------------------------------------------
# Publish, verify, find


@contextlib.contextmanager
def publish(path: str | Path):
    """A directory to fill, which becomes `path` whole or not at all. Raises UserError if `path` exists."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already; remove it or choose another place")
    partial = path.with_name(f".tmp-{path.name}-{os.getpid()}-{time.time_ns()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        files = sorted(partial.iterdir())
        for file in files:
            fsync(file)
        entries = {file.name: [file.stat().st_size, sha256_of(file)] for file in files}
        write_json(partial / "manifest.json", {"format": FORMAT, "files": entries})
        fsync(partial / "manifest.json")
        fsync(partial)
        os.rename(partial, path)
        fsync(path.parent)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free / 1e9 if path.parent.exists() else 0.0
        reason = f"{error.strerror or error} ({free:.1f} GB free)"
        raise UserError(f"{path} was not written: {reason}; what was there before is whole", exit_code=1) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if all went well


class FormatError(UserError):
    """Not damaged, but of another version of this code."""


def check_sizes(path: Path) -> dict:
    """The files that a manifest lists. Raises UserError unless each is there in its size."""
    manifest = read_json(path / "manifest.json")
    try:
        files = {name: (size, sha256) for name, (size, sha256) in manifest["files"].items()}
        found_format = manifest["format"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}/manifest.json: not a list of files; the checkpoint is damaged") from None
    if found_format != FORMAT:
        raise FormatError(f"{path} has format {found_format}, this code reads format {FORMAT}; update one of them")
    for name, (size, _) in files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else "no file"
        if found != size:
            raise UserError(f"{file}: found {found}, expected {size} bytes; the checkpoint is damaged")
    return files


def verify(path: Path):
    """Raise UserError unless every file of a published checkpoint is what its manifest says, to the last bit."""
    for name, (_, sha256) in check_sizes(path).items():
        try:
            found = sha256_of(path / name)
        except OSError as error:  # as when its run prunes it just now
            raise UserError(f"{path / name}: {error.strerror}") from None
        if found != sha256:
            raise UserError(f"{path / name}: sha256 mismatch; the checkpoint is damaged")


def steps(run_dir: str | Path) -> list[Path]:
    """The directories of a run that are named as its checkpoints are, oldest first."""
    return sorted(p for p in Path(run_dir).glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def latest(run_dir: str | Path) -> Path | None:
    """The checkpoint of a run with the highest step that verifies; prints a line for each that does not.

    Raises FormatError for one of another version: it is not to be passed over, let alone written again.
    """
    for path in reversed(steps(run_dir)):
        try:
            verify(path)
        except FormatError:
            raise
        except UserError as error:
            print(f"ignored {path}: {error}")
        else:
            return path
    return None


def discard(path: Path):
    """Delete a directory; half of it never stands under its name."""
    trash = path.with_name(f".trash-{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def prune(run_dir: str | Path, keep: int, spare: Path | None = None):
    """Delete all but the newest `keep` complete checkpoints of a run; `spare`, and what else is there, stays."""
    complete = []
    for path in steps(run_dir):
        with contextlib.suppress(UserError):
            check_sizes(path)
            if path != spare:
                complete.append(path)
    for path in complete[:-keep]:
        try:
            discard(path)
        except OSError as error:
            print(f"warning: {path} could not be deleted ({error.strerror}); trying again after the next save")


@contextlib.contextmanager
def lock(directory: Path):
    """Hold a directory, made if it is not there, against other processes; the system lets go when this one dies.

    Clears away what a process that was killed left half-written. Raises UserError if another one holds it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{directory} is in use by {file.read().strip()}; wait, or choose another") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        for leftover in directory.iterdir():
            if re.match(r"\.(tmp|trash)-(step-\d{8}|init)\b", leftover.name):
                shutil.rmtree(leftover, ignore_errors=True)
        yield


def resolve(name: str | Path) -> Path:
    """The verified directory of a model: a checkpoint, a run (its latest checkpoint) or a name on the hub.

    A directory without a manifest, as transformers writes it, is taken as it is. Raises UserError.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            path = latest(path)
            if path is None:
                raise UserError(f"{name}: no checkpoint there (expected config.json, or step-*/ directories)")
        elif (path / "manifest.json").is_file():
            verify(path)
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
        kind = "is a file, and pickles are not loaded" if path.exists() else "does not exist"
        raise UserError(f"{name} {kind}; expected a checkpoint directory, a run directory or a name on the hub")

    import huggingface_hub  # only here: local work never needs the hub

    try:
        patterns = {"allow_patterns": ["*.json", "*.safetensors", "*.txt"], "ignore_patterns": ["*/*"]}
        return Path(huggingface_hub.snapshot_download(str(name), **patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = type(error).__name__
        raise UserError(f"{name} is no directory here, and not on the hub or the hub is offline ({reason})") from None
