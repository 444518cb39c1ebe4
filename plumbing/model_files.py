"""The files of a trained model: find them, here or on the hub, and read their tensors. Any family.

    python -c "from plumbing import model_files as m; print(m.resolve('out/demo/reference'))"
    python -c "from plumbing import model_files as m; print(*m.read_tensors(m.resolve('gpt2')))"
"""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open  # not safetensors.torch: prepare_data.py needs no torch

from plumbing.configurator import UserError
from plumbing.storage import TOKENIZER_FILES, latest, read_json, sha256_of, verify

MASK_BUFFER = re.compile(r"\.attn\.(masked_)?bias$")  # the causal mask, in old GPT-2 files


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
    reason = f"found no {needed} there; pickles are not loaded"
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


def hashes(directory: Path) -> dict[str, str]:
    """File name -> sha256 of a model's weights."""
    return {path.name: sha256_of(path) for path in tensor_files(directory)}
