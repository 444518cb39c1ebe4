"""A checkpoint is a Hugging Face GPT-2 directory: save and load models, and what a run needs to resume.

    python train.py config/demo.toml --out_dir=out/mine       # writes out/mine/step-00000300/
    python -c "from plumbing import checkpoint; print(checkpoint.load_model('out/demo/reference').config)"
    python -c "import transformers; transformers.AutoModelForCausalLM.from_pretrained('out/.../step-00000300')"

config.json            GPT2Config's fields, and ours: bias, tokenizer
tokenizer.json         and tokenizer_config.json (plumbing/tokenizers.py)
model.safetensors      float32, GPT-2's keys, Conv1D layout (in, out), the tied head stored once
optimizer.safetensors  "<key>|exp_avg", "<key>|exp_avg_sq", "<key>|step", in the layout of the weights
trainer_state.json     step, tokens, settings, data, versions
val_losses.json        the loss of every validation window
lineage.json           where each tensor came from, if it was inherited
manifest.json          size and sha256 of every other file (plumbing/storage.py)
"""

import json
import re
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import GPT, GPTConfig
from plumbing import storage
from plumbing.configurator import UserError
from plumbing.tokenizers import hf_files

CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # stored (in, out) by GPT-2, (out, in) by nn.Linear
MASK_BUFFER = re.compile(r"\.attn\.(masked_)?bias$")  # the causal mask, which old GPT-2 files carry
RENAMED = {"block_size": "n_positions", "dropout": "resid_pdrop"}  # GPTConfig's names -> GPT2Config's
FIXED = {  # what model.py computes, as GPT2Config says it: the value, then other accepted values
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "n_inner": (None,),
    "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}


# ---- config.json


def hf_config(config: GPTConfig, tokenizer: str, eot: int) -> dict:
    """config.json of a model. Every option of GPTConfig is in it, under GPT2Config's name where it has one."""
    options = {RENAMED.get(key, key): value for key, value in asdict(config).items()}
    return {key: values[0] for key, values in FIXED.items()} | options | {
        "architectures": ["GPT2LMHeadModel"], "n_ctx": config.block_size,  # llama.cpp reads n_ctx
        "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "bos_token_id": eot, "eos_token_id": eot, "tokenizer": tokenizer,
    }


def gpt_config(table: dict, path: Path) -> GPTConfig:
    """The GPTConfig of a config.json. Raises UserError for whatever model.py would compute differently."""
    accepted = FIXED | {"n_inner": (None, 4 * table.get("n_embd", 0))}
    wrong = [
        f"{key} is {table[key]!r}, expected {values[0]!r}"
        for key, values in accepted.items()
        if key in table and table[key] not in values
    ]
    options = {"bias": True, "dropout": 0.0}  # OpenAI's models have biases; dropout is a setting of train.py
    for field in fields(GPTConfig):
        value = table.get(RENAMED.get(field.name, field.name), options.get(field.name))
        if field.name == "dropout" or value is None and field.name == "scale_attn_by_inverse_layer_idx":
            continue
        options[field.name] = value
        if type(value) is not field.type:  # "false" would be true, 2.0 layers a traceback later
            wrong.append(f"{field.name} is {value!r}, expected {field.type.__name__}")
    if wrong or "model_type" not in table:
        raise UserError(f"{path}/config.json: {'; '.join(wrong) or 'no model_type'}")
    try:
        return GPTConfig(**options)
    except ValueError as error:
        raise UserError(f"{path}/config.json: {error}") from None


def read_config(path: Path) -> GPTConfig:
    """The GPTConfig of a GPT-2 directory. Raises UserError."""
    return gpt_config(storage.read_json(path / "config.json"), path)


def check_tokenizer(path: Path, meta: dict):
    """Raise UserError if a model reads different tokens than a data directory has. OpenAI's models name none: gpt2."""
    found = storage.read_json(path / "config.json").get("tokenizer", "gpt2")
    if found != meta["tokenizer"]:
        raise UserError(
            f"{path} reads tokens of {found!r}, the data has tokens of {meta['tokenizer']!r}; "
            f"prepare data with --tokenizer={found}"
        )


# ---- weights


def gpt2_key(name: str) -> str | None:
    """The key that GPT2LMHeadModel gives a stored tensor. None for a mask buffer, which is no parameter."""
    name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)  # left by DDP and torch.compile in others' files
    if MASK_BUFFER.search(name):
        return None
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def hf_layout(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """nn.Linear's layout to Conv1D's, or back: it is its own inverse."""
    return tensor.mT if CONV1D.search(key) and tensor.ndim == 2 else tensor


def hf_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors: keys and layout of GPT2LMHeadModel, which always has biases."""
    tensors = {}
    for key, parameter in model.named_parameters():
        tensors[key] = hf_layout(key, parameter.detach())
        if not model.config.bias and not key.endswith(("wte.weight", "wpe.weight")):
            tensors[key.removesuffix("weight") + "bias"] = parameter.detach().new_zeros(parameter.shape[0])
    return tensors


def check_tensors(path: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Size]):
    """Raise UserError naming every missing, unexpected or misshapen tensor."""
    shapes = {name: tensor.shape for name, tensor in found.items()}
    problems = [
        f"{name}: found {tuple(shapes[name]) if name in shapes else 'none'}, "
        f"expected {tuple(expected[name]) if name in expected else 'none'}"
        for name in sorted(shapes.keys() | expected.keys())
        if shapes.get(name) != expected.get(name)
    ]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems[:20])}")


def stored_weights(path: Path) -> dict[str, torch.Tensor]:
    """The parameters in a GPT-2 directory, in nn.Linear's layout, without mask buffers and the tied head."""
    stored = storage.read_tensors(path).items()
    found = {key: hf_layout(key, tensor) for name, tensor in stored if (key := gpt2_key(name))}
    head = found.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, found.get("transformer.wte.weight", head.new_empty(0))):
        raise UserError(f"{path}: lm_head.weight differs from wte.weight, but config.json says that they are tied")
    return found


@torch.no_grad()
def load_weights(weights: dict[str, torch.Tensor], model: GPT, path: Path):
    """Fill a model with stored weights, every parameter exactly once. Raises UserError naming what does not fit."""
    if not model.config.bias:
        weights = {key: tensor for key, tensor in weights.items() if not key.endswith(".bias")}
    parameters = dict(model.named_parameters())
    check_tensors(path, weights, {key: parameter.shape for key, parameter in parameters.items()})
    for key, parameter in parameters.items():
        parameter.copy_(weights[key])


def load_model(name: str | Path, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> GPT:
    """The model in a checkpoint, a run or on the hub, on the CPU, in evaluation mode. Raises UserError."""
    path = storage.resolve(name)
    config, weights = replace(read_config(path), dropout=dropout), stored_weights(path)
    # fine-tuned in transformers, the biases of a model without biases are no longer zero
    config.bias = config.bias or any(tensor.any() for key, tensor in weights.items() if key.endswith(".bias"))
    with torch.device("meta"):  # no time and no random numbers for weights that are about to be replaced
        model = GPT(config)
    model = model.to(dtype).to_empty(device="cpu")
    load_weights(weights, model, path)
    return model.eval()


def open_model(name: str, meta: dict, dtype: torch.dtype, options: dict, seed: int = 0) -> tuple[GPT, dict]:
    """The model that a run starts from or is taught by, on the CPU, and its lineage: fresh weights for "scratch".

    Raises UserError unless it has these model options and reads the tokens of the data.
    """
    if name == "scratch":
        torch.manual_seed(seed)
        try:
            return GPT(GPTConfig(**options)).to(dtype), {}
        except ValueError as error:
            raise UserError(str(error)) from None
    path = storage.resolve(name)
    check_tokenizer(path, meta)
    model = load_model(path, dtype, options.get("dropout", 0.0))
    found = asdict(model.config)
    differ = [f"{key}: checkpoint {found[key]}, settings {options[key]}" for key in options if found[key] != options[key]]
    if differ:
        raise UserError(f"{path} does not have the expected model options: {'; '.join(differ)}")
    return model, origin(path)


def save(path: str | Path, model: GPT, tokenizer: str, eot: int, optimizer=None, files: dict[str, dict] | None = None):
    """Publish a model, with its optimizer's state and more JSON files (name -> content) for a resumable run.

    Raises UserError, exit code 1, for a value that is not finite and for whatever the disk refuses.
    """
    weights, moments = hf_tensors(model), {}
    for key, parameter in model.named_parameters() if optimizer else ():
        for part, value in optimizer.state[parameter].items():
            moments[f"{key}|{part}"] = hf_layout(key, value)
    for key, value in (weights | moments).items():
        if not value.isfinite().all():
            raise UserError(f"{path} was not written: {key} holds values that are not finite", exit_code=1)
    files = hf_files(tokenizer, model.config.block_size) | (files or {})
    files["config.json"] = hf_config(model.config, tokenizer, eot)
    with storage.publish(path) as directory:
        for name, tensors in (("model", weights), ("optimizer", moments)):
            if tensors:
                contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
                save_file(contiguous, directory / f"{name}.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            storage.write_json(directory / name, content)


# ---- resume


def read_state(path: Path) -> dict:
    """The trainer_state.json of a checkpoint that a run can resume from. Raises UserError."""
    if not (path / "trainer_state.json").is_file():
        raise UserError(f"{path} has weights but no training state; start from it with --init_from={path}")
    return storage.read_json(path / "trainer_state.json")


def load_optimizer(path: Path, model: GPT, optimizer: torch.optim.Optimizer):
    """Put the optimizer state of a directory into place. Raises UserError naming what does not fit."""
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    names = {parameter: key for key, parameter in model.named_parameters()}
    found = {name: hf_layout(name.split("|")[0], t) for name, t in storage.read_tensors(path, "optimizer").items()}
    parts = {"exp_avg": shapes, "exp_avg_sq": shapes, "step": dict.fromkeys(shapes, torch.Size([]))}
    check_tensors(path, found, {f"{key}|{part}": parts[part][key] for part in parts for key in shapes})
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {  # contiguous like the weights: fused AdamW walks both memories in step
        i: {part: found[f"{key}|{part}"].clone(memory_format=torch.contiguous_format) for part in parts}
        for i, key in enumerate(order)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def to_resume(run_dir: Path, resume: bool | str) -> Path | None:
    """The checkpoint that a run resumes from, None for a fresh start. `resume` is True, False or "auto".

    Raises UserError where a fresh start would overwrite a run, and where there is nothing to resume.
    """
    found = storage.steps(run_dir)
    if found and not resume:
        raise UserError(f"{run_dir} holds checkpoints; add --resume to continue it, or choose a different out_dir")
    newest = storage.latest(run_dir)
    if newest is None and (found or resume is True):
        remedy = "remove them or choose a different out_dir" if found else "start without --resume"
        raise UserError(f"no usable checkpoint in {run_dir} (found {len(found)} damaged); {remedy}")
    forget_after(run_dir, int(newest.name.removeprefix("step-")) if newest else -1)
    return newest


def forget_after(run_dir: Path, step: int):
    """Drop what a run that resumes from `step` writes again: later log lines, and damaged later checkpoints."""
    log, partial = run_dir / "metrics.jsonl", run_dir / ".metrics.jsonl.partial"
    kept = [line for line in storage.read_log(log) if line["step"] <= step]
    if log.is_file():
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(log)
    for path in storage.steps(run_dir):
        if int(path.name.removeprefix("step-")) > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def resume(path: Path, model: GPT, optimizer, scaler, settings: dict, override: list[str]) -> dict:
    """Load a checkpoint into a run with these settings. Returns its state. Raises UserError if a setting differs."""
    state = read_state(path)
    then = state["settings"] | state.get("made_from", {})
    changed = [key for key in settings if key not in override and then.get(key) != settings[key]]
    if changed:
        differences = "; ".join(f"{key}: {then.get(key)} then, {settings[key]} now" for key in changed)
        raise UserError(
            f"cannot resume {path}: {differences}; use the settings of then or a different out_dir, "
            f"or allow the change with --override={','.join(filter(None, changed + override))}"
        )
    if state["step"] > settings["max_steps"]:
        raise UserError(f"{path} is beyond max_steps {settings['max_steps']}; raise it or use a different out_dir")
    load_weights(stored_weights(path), model, path)
    load_optimizer(path, model, optimizer)
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return state


# ---- lineage


def origin(path: Path) -> dict:
    """The lineage of what is trained from `path`: its own if it was only inherited, itself if it was trained."""
    lineage = storage.read_json(path / "lineage.json") if (path / "lineage.json").exists() else {}
    if lineage and not (path / "trainer_state.json").exists():
        return lineage
    return {"reference": str(path), "sha256": storage.hashes(path)}


def identity(lineage: dict) -> str | dict:
    """Identifies a run's starting weights, so that two runs can be compared: "scratch", or hashes and layers."""
    keys = ("sha256", "layers", "parts", "moments", "top_sha256")
    return {key: lineage[key] for key in keys if key in lineage} or "scratch"


def last_stable(run_dir: Path) -> Path:
    """The newest checkpoint of a "wsd" run from before its rate began to decay. Raises UserError."""
    for path in reversed(storage.steps(run_dir)):
        if read_state(path).get("stable"):
            return storage.resolve(path)
    raise UserError(f"{run_dir} keeps no checkpoint from before the decay; train it with --schedule=wsd")
