"""Open a trained model as a GPT, on the CPU: our checkpoints, GPT-2 of the hub, any other decoder.

    python -c "from plumbing import pretrained as p; print(p.load_model('out/demo/reference').config)"
    python -c "from plumbing import pretrained as p; print(p.load_model('gpt2').num_params())"

A GPT-2 becomes a model.py:GPT. Other families, and a GPT-2 that model.py would compute differently,
are left to transformers (plumbing/decoders.py). plumbing/checkpoint.py describes the files.
"""

from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from model import GPT, GPTConfig
from plumbing import storage
from plumbing.checkpoint import FIXED, RENAMED, hf_layout
from plumbing.configurator import UserError
from plumbing.model_files import gpt2_key, hashes, read_tensors, resolve

# ---- config.json


def is_gpt2(table: dict) -> bool:
    """Whether model.py computes the model of a config.json. Else plumbing/decoders.py does."""
    accepted = FIXED | {"n_inner": [None, 4 * table.get("n_embd", 0)]}
    same = all(table.get(key, values[0]) in values for key, values in accepted.items())
    return "model_type" in table and same


def gpt_config(table: dict, path: Path, others: dict) -> GPTConfig:
    """A config.json as GPTConfig, with other options. UserError: a missing or impossible one."""
    wrong, options = [], {"bias": True}  # OpenAI's models have biases
    for field in fields(GPTConfig):
        key = RENAMED.get(field.name, field.name)
        if key in table and field.name != "dropout":  # which is a setting of train.py
            options[field.name] = table[key]
        elif field.name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            wrong.append(f"no {key}")
        plain = isinstance(field.type, type) and field.name in options
        if plain and key in table and type(table[key]) is not field.type:  # "false" would pass for true
            wrong.append(f"{key} is {table[key]!r}, expected {field.type.__name__}")
    try:
        config = GPTConfig(**options | others) if not wrong else None
    except ValueError as error:
        wrong.append(str(error))
    if wrong:
        raise UserError(f"{path}/config.json: {'; '.join(wrong)}")
    return config


def read_config(path: Path, options: dict | None = None) -> GPTConfig:
    """The shape of the model in a directory, with its parameters and FLOPs. UserError.

    `options` are those of load_model, for another family than GPT-2.
    """
    table = storage.read_json(path / "config.json")
    if is_gpt2(table):
        return gpt_config(table, path, {})
    with torch.device("meta"):
        return load_model(path, options=options, fresh=True).config


def vocabulary(directory: Path) -> dict | None:
    """Token -> id, of the tokenizer files in a directory; None if there are none."""
    if not (directory / "tokenizer.json").is_file():
        old = directory / "vocab.json"
        return storage.read_json(old) if old.is_file() else None
    table = storage.read_json(directory / "tokenizer.json")
    tokens = table["model"]["vocab"]
    if isinstance(tokens, list):  # Unigram: [token, score]
        tokens = {token: i for i, (token, _) in enumerate(tokens)}
    return tokens | {token["content"]: token["id"] for token in table.get("added_tokens") or []}


def check_tokenizer(path: Path, meta: dict):
    """UserError if a model reads other tokens than the data has. Without a tokenizer: those of gpt2."""
    table = storage.read_json(path / "config.json")
    theirs, ours = vocabulary(path), vocabulary(Path(meta["directory"]))
    is_openai = table.get("model_type") == "gpt2" and table.get("vocab_size") in (50257, 50304)
    found = table.get("tokenizer", "gpt2" if theirs is None and is_openai else str(path))
    other_name = found != meta["tokenizer"]
    other_tokens = theirs != ours if theirs and ours else other_name
    if other_tokens:
        note = "" if other_name else " (another vocabulary of that name)"
        remedy = f"prepare it anew with --tokenizer={path if note or '/' in found else found}"
        raise UserError(
            f"{path} reads tokens of {found!r}{note}, the data in {meta['directory']} those of "
            f"{meta['tokenizer']!r}; {remedy}"
        )


# ---- weights


def stored_weights(path: Path) -> dict[str, torch.Tensor]:
    """The parameters in a GPT-2 directory, in nn.Linear's layout, without masks and tied head."""
    stored = read_tensors(path).items()
    found = {key: hf_layout(key, tensor) for name, tensor in stored if (key := gpt2_key(name))}
    head = found.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, found.get("transformer.wte.weight", head.new_empty(0))):
        raise UserError(f"{path}: lm_head.weight differs from wte.weight, but config.json ties them")
    return found


def load_model(name: str | Path, dtype=torch.float32, options: dict | None = None, fresh=False) -> GPT:
    """The model in a checkpoint, a run or on the hub, on the CPU, in evaluation mode. UserError.

    Of `options` only dropout and a shorter block_size (the first positions) apply. To a `fresh` model,
    which has random weights, all apply. Another family: plumbing/decoders.py:Decoder.
    """
    path, options = resolve(name), options or {}
    table = storage.read_json(path / "config.json")
    if not is_gpt2(table):
        from plumbing import decoders  # imported here: GPT-2 does without it

        return decoders.load(path, dtype, options, fresh)
    config = gpt_config(table, path, options if fresh else {})
    if fresh:
        return GPT(config).to(dtype).eval()
    weights = stored_weights(path)
    T = min(options.get("block_size", config.block_size), config.block_size)
    if T < config.block_size:
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:T]
    # fine-tuned in transformers, a model's biases may no longer be zero
    bias = config.bias or any(tensor.any() for key, tensor in weights.items() if key.endswith(".bias"))
    with torch.device("meta"):  # no time, no random numbers for weights that are replaced
        model = GPT(replace(config, bias=bias, block_size=T, dropout=options.get("dropout", 0.0)))
    model = model.to(dtype).to_empty(device="cpu")
    try:
        model.load_state_dict({key: t for key, t in weights.items() if bias or key[-5:] != ".bias"})
    except RuntimeError as error:  # it names every missing, unexpected or misshapen tensor
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    return model.eval()


def open_model(name: str, meta: dict, dtype: torch.dtype, options: dict) -> tuple[GPT, dict]:
    """The trained or fresh model of a directory, and its lineage: checkpoint.py:open_model."""
    fresh, path = name.startswith("scratch:"), resolve(name.removeprefix("scratch:"))
    check_tokenizer(path, meta)
    model = load_model(path, dtype, options, fresh)
    found = asdict(model.config)
    differ = [
        f"{key}: checkpoint {found[key]}, settings {value}"
        for key, value in options.items()
        if found[key] != value
    ]
    if differ:
        raise UserError(f"{path} does not have the expected model options: {'; '.join(differ)}")
    storage.check_finite(path, dict(model.named_parameters()))
    return model, {} if fresh else origin(path)


def origin(path: Path) -> dict:
    """The lineage of what is trained from `path`: its own if it was only inherited, else itself."""
    lineage = storage.read_json(path / "lineage.json") if (path / "lineage.json").exists() else {}
    if lineage and not (path / "trainer_state.json").exists():
        return lineage
    return {"reference": str(path), "sha256": hashes(path)}
