"""A checkpoint is a Hugging Face directory: what is in it, and how a run writes it.

    python train.py config/demo.toml --max_steps=100 --out_dir=out/mine    # leaves one
    python -c "import transformers as t; t.AutoModelForCausalLM.from_pretrained('out/.../step-00000600')"

config.json            GPT2Config's fields, and ours: bias, tokenizer
tokenizer.json         and tokenizer_config.json, copied from the data directory
model.safetensors      float32, GPT-2's keys, Conv1D layout (in, out), the tied head stored once
optimizer.safetensors  "<key>|exp_avg", "<key>|exp_avg_sq", "<key>|step", or Muon's
                       "<key>|momentum_buffer", in the layout of the weights
trainer_state.json     step, tokens, FLOPs, settings, where weights and data came from, versions
val_losses.json        the loss of every validation window
lineage.json           where each tensor came from, if it was inherited
manifest.json          size and sha256 of every other file (plumbing/storage.py)
"""

import re
from dataclasses import asdict
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


def hf_config(config: GPTConfig, tokenizer: str, eot: int) -> dict:
    """config.json of a model. It has every option of GPTConfig, under GPT2Config's name if any."""
    fixed = {key: values[0] for key, values in FIXED.items()}
    options = {RENAMED.get(key, key): value for key, value in asdict(config).items()}
    ours = {"architectures": ["GPT2LMHeadModel"], "n_ctx": config.block_size, "tokenizer": tokenizer}
    dropout = {"embd_pdrop": config.dropout, "attn_pdrop": config.dropout}
    return fixed | options | ours | dropout | {"bos_token_id": eot, "eos_token_id": eot}


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


def open_model(name: str, meta: dict, dtype: torch.dtype, options: dict, seed: int = 0) -> tuple[GPT, dict]:
    """The model that a run starts from or is taught by, on the CPU, and its lineage: {} if fresh.

    "scratch" is a fresh GPT-2 of these options, "scratch:DIR" a fresh model of DIR's shape.
    Raises UserError unless it has these options, which are possible, and reads the tokens of the data.
    """
    torch.manual_seed(seed)
    if name == "scratch":
        try:
            return GPT(GPTConfig(**options)).to(dtype), {}
        except ValueError as error:
            raise UserError(str(error)) from None
    from plumbing import pretrained  # imported where it is used: "scratch" does without it

    return pretrained.open_model(name, meta, dtype, options)


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


def identity(lineage: dict) -> str | dict:
    """Identifies a run's starting weights, so that two runs can be compared: hashes and layers."""
    keys = ("sha256", "layers", "parts", "width", "top_sha256")
    return {key: lineage[key] for key in keys if key in lineage} or "scratch"
