"""A checkpoint is a Hugging Face directory: save and load models, and what a run needs to resume.

    python -c "from plumbing import checkpoint as c; print(c.load_model('out/demo/reference').config)"
    python -c "import transformers as t; t.AutoModelForCausalLM.from_pretrained('out/.../step-00000600')"

config.json            GPT2Config's fields, and ours: bias, tokenizer
tokenizer.json         and tokenizer_config.json, copied from the data directory
model.safetensors      float32, GPT-2's keys, Conv1D layout (in, out), the tied head stored once
optimizer.safetensors  "<key>|exp_avg", "<key>|exp_avg_sq", "<key>|step", or Muon's
                       "<key>|momentum_buffer", in the layout of the weights
trainer_state.json     step, tokens, settings, data, versions
val_losses.json        the loss of every validation window
lineage.json           where each tensor came from, if it was inherited
manifest.json          size and sha256 of every other file (plumbing/storage.py)
"""

import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import GPT, GPTConfig
from plumbing import storage
from plumbing.configurator import UserError

CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # GPT-2: (in, out); nn.Linear: (out, in)
RENAMED = {"block_size": "n_positions", "dropout": "resid_pdrop"}  # ours -> GPT2Config's
FIXED = {  # what model.py computes, in GPT2Config's words: the value we write, then its synonyms
    "model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"], "n_inner": [None],
    "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True], "tie_word_embeddings": [True],
    "add_cross_attention": [False],
}


# ---- config.json


def hf_config(config: GPTConfig, tokenizer: str, eot: int) -> dict:
    """config.json of a model. It has every option of GPTConfig, under GPT2Config's name if any."""
    fixed = {key: values[0] for key, values in FIXED.items()}
    options = {RENAMED.get(key, key): value for key, value in asdict(config).items()}
    ours = {"architectures": ["GPT2LMHeadModel"], "n_ctx": config.block_size, "tokenizer": tokenizer}
    dropout = {"embd_pdrop": config.dropout, "attn_pdrop": config.dropout}
    return fixed | options | ours | dropout | {"bos_token_id": eot, "eos_token_id": eot}


def is_gpt2(table: dict) -> bool:
    """Whether model.py computes the model of a config.json. Else plumbing/decoders.py does."""
    accepted = FIXED | {"n_inner": [None, 4 * table.get("n_embd", 0)]}
    same = all(table.get(key, values[0]) in values for key, values in accepted.items())
    return "model_type" in table and same


def gpt_config(table: dict, path: Path) -> GPTConfig:
    """The GPTConfig of a GPT-2's config.json. UserError where a value is missing or impossible."""
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
        config = GPTConfig(**options) if not wrong else None
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
        return gpt_config(table, path)
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
    """UserError if a model reads other tokens than the data has. A GPT-2 that names none: gpt2."""
    table = storage.read_json(path / "config.json")
    theirs, ours = vocabulary(path), vocabulary(Path(meta["directory"]))
    unnamed = "gpt2" if theirs is None and table.get("model_type") == "gpt2" else str(path)
    found = table.get("tokenizer", unnamed)
    other_name = found != meta["tokenizer"]
    other_tokens = theirs != ours if theirs and ours else other_name
    if other_tokens:
        named = "" if other_name else " (another vocabulary of that name)"
        remedy = f"prepare it anew with --tokenizer={path if named or '/' in found else found}"
        raise UserError(
            f"{path} reads tokens of {found!r}{named}, the data in {meta['directory']} those of "
            f"{meta['tokenizer']!r}; {remedy}"
        )


# ---- weights


def hf_layout(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """nn.Linear's layout to Conv1D's, or back: it is its own inverse."""
    return tensor.mT if CONV1D.search(key) and tensor.ndim == 2 else tensor


def hf_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors, as GPT2LMHeadModel has them: always with biases."""
    if not isinstance(model, GPT):
        return model.stored_tensors()
    tensors = {}
    for key, parameter in model.named_parameters():
        tensors[key] = hf_layout(key, parameter.detach())
        if not model.config.bias and key.endswith(".weight") and "wte" not in key and "wpe" not in key:
            tensors[key.removesuffix("weight") + "bias"] = parameter.detach().new_zeros(parameter.shape[0])
    return tensors


def stored_weights(path: Path) -> dict[str, torch.Tensor]:
    """The parameters in a GPT-2 directory, in nn.Linear's layout, without masks and tied head."""
    stored = storage.read_tensors(path).items()
    found = {key: hf_layout(key, tensor) for name, tensor in stored if (key := storage.gpt2_key(name))}
    head = found.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, found.get("transformer.wte.weight", head.new_empty(0))):
        raise UserError(f"{path}: lm_head.weight differs from wte.weight, but config.json ties them")
    return found


def load_model(
    name: str | Path, dtype: torch.dtype = torch.float32, options: dict | None = None, fresh: bool = False
) -> GPT:
    """The model in a checkpoint, a run or on the hub, on the CPU, in evaluation mode. UserError.

    Of GPTConfig's options, dropout applies, and a shorter block_size: the first positions. All
    apply to a `fresh` model (random weights). Another family: plumbing/decoders.py:Decoder.
    """
    path, options = storage.resolve(name), options or {}
    table = storage.read_json(path / "config.json")
    if not is_gpt2(table):
        from plumbing import decoders  # imported here: GPT-2 does without it

        return decoders.load(path, dtype, options, fresh)
    config = gpt_config(table, path)
    if fresh:
        return fresh_model(asdict(config) | options, dtype).eval()
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
        model.load_state_dict({key: tensor for key, tensor in weights.items() if bias or key[-5:] != ".bias"})
    except RuntimeError as error:  # it names every missing, unexpected or misshapen tensor
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    return model.eval()


def fresh_model(options: dict, dtype: torch.dtype) -> GPT:
    """A GPT-2 of random weights. Raises UserError for an impossible shape."""
    try:
        return GPT(GPTConfig(**options)).to(dtype)
    except ValueError as error:
        raise UserError(str(error)) from None


def open_model(name: str, meta: dict, dtype: torch.dtype, options: dict, seed: int = 0) -> tuple[GPT, dict]:
    """The model that a run starts from or is taught by, on the CPU, and its lineage: {} if fresh.

    "scratch" is a fresh GPT-2 of these options, "scratch:DIR" a fresh model of DIR's shape.
    Raises UserError unless it has these options and reads the tokens of the data.
    """
    torch.manual_seed(seed)
    if name == "scratch":
        return fresh_model(options, dtype), {}
    fresh, path = name.startswith("scratch:"), storage.resolve(name.removeprefix("scratch:"))
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


def save(path, model, tokenizer: str, eot: int, optimizer=None, files: dict | None = None, data_dir=None):
    """Publish a model with the tokenizer files of data_dir, and a run's optimizer and JSON.

    Raises UserError, exit code 1, for a value that is not finite and for whatever the disk refuses.
    """
    config = hf_config(model.config, tokenizer, eot) if isinstance(model, GPT) else model.table
    tensors = {"model": hf_tensors(model), "optimizer": {}}
    for key, parameter in model.named_parameters() if optimizer else ():
        for part, value in optimizer.state[parameter].items():
            value = hf_layout(key, value) if isinstance(model, GPT) else value
            tensors["optimizer"][f"{key}|{part}"] = value
    storage.check_finite(path, tensors["model"] | tensors["optimizer"], exit_code=1)
    with storage.publish(path) as directory:
        for stem, values in tensors.items():
            if values:
                values = {key: value.contiguous() for key, value in values.items()}
                save_file(values, directory / f"{stem}.safetensors", metadata={"format": "pt"})
        if data_dir and (source := Path(data_dir).expanduser()).is_dir():  # deleted: the weights are saved
            storage.copy_tokenizer(source, directory)
        for name, content in ({"config.json": config} | (files or {})).items():
            storage.write_json(directory / name, content)


# ---- lineage


def origin(path: Path) -> dict:
    """The lineage of what is trained from `path`: its own if it was only inherited, else itself."""
    lineage = storage.read_json(path / "lineage.json") if (path / "lineage.json").exists() else {}
    if lineage and not (path / "trainer_state.json").exists():
        return lineage
    return {"reference": str(path), "sha256": storage.hashes(path)}


def identity(lineage: dict) -> str | dict:
    """Identifies a run's starting weights, so that two runs can be compared: hashes and layers."""
    keys = ("sha256", "layers", "parts", "width", "top_sha256")
    return {key: lineage[key] for key in keys if key in lineage} or "scratch"
