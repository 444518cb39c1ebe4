"""A checkpoint is a Hugging Face GPT-2 directory: save and load models, and what a run needs to resume.

    python train.py config/demo.toml                          # leaves out/.../step-00000300/
    python -c "import checkpoint; print(checkpoint.load_model('out/demo/reference').config)"
    python -c "import transformers; transformers.AutoModelForCausalLM.from_pretrained('out/.../step-00000300')"

The files of a checkpoint:

    config.json            GPT2Config's fields, and ours: bias, tokenizer
    tokenizer.json         and tokenizer_config.json: the tokenizer itself, for transformers (see hf_tokenizer.py)
    model.safetensors      float32, GPT-2's keys, Conv1D layout (in, out), the tied head stored once
    optimizer.safetensors  "<key>|exp_avg", "<key>|exp_avg_sq", "<key>|step", in the layout of the weights
    trainer_state.json     step, settings, data, versions
    lineage.json           where each tensor came from, if it was inherited
    manifest.json          size and sha256 of every other file (see storage.py)
"""

import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch

import hf_tokenizer
from configurator import UserError
from model import GPT, GPTConfig
from storage import FORMAT, TensorFiles, latest, publish, read_json, resolve, steps, write_json, write_tensors

CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # stored (in, out) by GPT-2, (out, in) by nn.Linear
PARTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW's state
FREE_TO_CHANGE = {  # settings that a resumed run may have otherwise than before
    "out_dir", "data_dir", "resume", "override", "eval_only", "micro_batch", "eval_interval", "save_interval",
    "keep_checkpoints", "log_interval", "track_rank", "device", "compile", "deterministic",
    "gradient_checkpointing",
}  # fmt: skip
MASK_BUFFER = re.compile(r"\.attn\.(masked_)?bias$")  # the causal mask, which old GPT-2 files carry


def hf_config(config: GPTConfig, tokenizer: str, eot: int) -> dict:
    """config.json of a model: GPT2Config's fields, and `bias` and `tokenizer`, which transformers carries along."""
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
        "n_positions": config.block_size, "vocab_size": config.vocab_size,
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "bos_token_id": eot, "eos_token_id": eot,
        "bias": config.bias, "tokenizer": tokenizer,
    }  # fmt: skip


def read_config(path: Path) -> GPTConfig:
    """The GPTConfig of a GPT-2 directory. Raises UserError."""
    return gpt_config(read_json(path / "config.json"), path)


def gpt_config(config: dict, path: Path) -> GPTConfig:
    """The GPTConfig of a config.json. Raises UserError for whatever this code would compute differently."""
    same = {
        "model_type": ("gpt2", ["gpt2"]), "activation_function": ("gelu_new", ["gelu_new", "gelu_pytorch_tanh"]),
        "n_inner": (None, [None, 4 * config.get("n_embd", 0)]), "layer_norm_epsilon": (1e-5, [1e-5]),
        "scale_attn_weights": (True, [True]), "tie_word_embeddings": (True, [True]),
        "add_cross_attention": (False, [False]),
    }  # fmt: skip
    wrong = [
        f"{key} is {config.get(key, default)!r}, expected {' or '.join(map(repr, accepted))}"
        for key, (default, accepted) in same.items()
        if config.get(key, default) not in accepted
    ]
    missing = [key for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size") if key not in config]
    if wrong or missing:
        raise UserError(f"{path}/config.json: {'; '.join(wrong + [f'no {key}' for key in missing])}")
    try:
        return GPTConfig(
            n_layer=config["n_layer"], n_head=config["n_head"], n_embd=config["n_embd"],
            block_size=config["n_positions"], vocab_size=config["vocab_size"], bias=config.get("bias", True),
            scale_attn_by_inverse_layer_idx=config.get("scale_attn_by_inverse_layer_idx", False),
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}/config.json: {error}") from None


def gpt2_key(name: str) -> str | None:
    """The key that GPT2LMHeadModel gives a stored tensor; None for a mask buffer, which is no parameter."""
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


def check_tokenizer(path: Path, meta: dict):
    """Raise UserError if a model was made for other tokens than a data directory's. OpenAI's models name none: gpt2."""
    found = read_json(path / "config.json").get("tokenizer", "gpt2")
    if found != meta["tokenizer"]:
        raise UserError(f"{path} reads tokens of {found!r}, the data are of {meta['tokenizer']!r}; prepare others")


def check_tensors(path: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Size]):
    """Raise UserError naming every missing, unexpected or misshapen tensor."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if found[name].shape != expected[name]:
            problems.append(f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name])}")
    if problems:
        raise UserError(f"{path}: {'; '.join(sorted(problems)[:20])}")


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

    files = hf_tokenizer.files(tokenizer, model.config.block_size) | (files or {})
    with publish(path) as directory:
        write_json(directory / "config.json", hf_config(model.config, tokenizer, eot))
        write_tensors(directory / "model.safetensors", weights, weights.get)
        if optimizer:
            write_tensors(directory / "optimizer.safetensors", moments, moments.get)
        for name, content in files.items():
            write_json(directory / name, content)


@torch.no_grad()
def load_weights(path: Path, model: GPT):
    """Fill a model from a GPT-2 directory, every parameter exactly once. Raises UserError naming what does not fit."""
    stored = TensorFiles(path)
    keys = [key for name in stored if (key := gpt2_key(name))]
    if len(set(keys)) < len(keys):
        raise UserError(f"{path}: {', '.join(sorted({key for key in keys if keys.count(key) > 1}))} stored twice")
    found = {key: hf_layout(key, stored[name]) for name in stored if (key := gpt2_key(name))}
    head = found.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, found.get("transformer.wte.weight", head.new_empty(0))):
        raise UserError(f"{path}: lm_head.weight differs from wte.weight, but config.json says that they are tied")
    if not model.config.bias:
        for key in [key for key in found if key.endswith(".bias")]:
            if found.pop(key).any():
                raise UserError(f"{path}: {key} is not zero, but config.json says bias: false")
    parameters = dict(model.named_parameters())
    check_tensors(path, found, {key: parameter.shape for key, parameter in parameters.items()})
    for key, parameter in parameters.items():
        parameter.copy_(found[key])


def load_model(name: str | Path, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> GPT:
    """The model in a checkpoint, a run or on the hub, on the CPU, in evaluation mode. Raises UserError."""
    path = resolve(name)
    with torch.device("meta"):  # no time and no random numbers for weights that are about to be replaced
        model = GPT(replace(read_config(path), dropout=dropout))
    model = model.to(dtype).to_empty(device="cpu")
    load_weights(path, model)
    return model.eval()


def read_state(path: Path) -> dict:
    """The trainer_state.json of a checkpoint that a run can go on from. Raises UserError."""
    if not (path / "trainer_state.json").is_file():
        raise UserError(f"{path} has weights but no training state; start from it with --init_from={path}")
    state = read_json(path / "trainer_state.json")
    if state.get("format") != FORMAT:
        raise UserError(f"{path}/trainer_state.json has format {state.get('format')}, this code reads {FORMAT}")
    return state


def load_training(path: Path, model: GPT, optimizer: torch.optim.Optimizer):
    """Put a verified checkpoint's weights and optimizer state into place. Raises UserError naming what does not fit."""
    load_weights(path, model)
    load_moments(path, model, optimizer)


def load_moments(path: Path, model: GPT, optimizer: torch.optim.Optimizer):
    """Put the optimizer state of a directory into place. Raises UserError naming what does not fit."""
    names = {parameter: key for key, parameter in model.named_parameters()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stored = TensorFiles(path, "optimizer")
    found = {name: hf_layout(name.split("|")[0], stored[name]) for name in stored}
    expected = {f"{names[p]}|{part}": p.shape for p in order for part in PARTS[1:]}
    check_tensors(path, found, expected | {f"{names[p]}|step": torch.Size([]) for p in order})
    moments = {  # contiguous like the weights: fused AdamW walks both memories in step
        i: {part: found[f"{names[p]}|{part}"].clone(memory_format=torch.contiguous_format) for part in PARTS}
        for i, p in enumerate(order)
    }
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def to_resume(run_dir: Path, resume: bool | str) -> Path | None:
    """The checkpoint that a run goes on from, None for a fresh start; resume is True, False or "auto".

    Raises UserError where a fresh start would write over a run, and where there is nothing to resume.
    """
    found = steps(run_dir)
    if found and not resume:
        raise UserError(
            f"{run_dir} holds checkpoints; add --resume to go on from the latest, or choose another out_dir"
        )
    newest = latest(run_dir)
    if newest is None and (found or resume is True):
        remedy = "remove them or choose another out_dir" if found else "start without --resume"
        raise UserError(f"no usable checkpoint in {run_dir} (found {len(found)} damaged); {remedy}")
    return newest


def check_same(now: dict, then: dict, override: str, path: Path):
    """Raise UserError if a setting is not what it was when `path` was saved, nor free to change, nor in override."""
    allowed = set(override.split(","))
    changed = [key for key in now if key not in FREE_TO_CHANGE | allowed and then.get(key) != now[key]]
    if changed:
        differences = "; ".join(f"{key}: {then.get(key)} there, {now[key]} now" for key in changed)
        raise UserError(
            f"cannot resume {path}: {differences}; use what was there or another out_dir, "
            f"or allow the change with --override={','.join(sorted({*changed, *allowed} - {''}))}"
        )


def forget_after(run_dir: Path, step: int):
    """Make room for what a run that goes on from `step` writes again; damaged checkpoints are set aside."""
    metrics, partial = run_dir / "metrics.jsonl", run_dir / ".metrics.jsonl.partial"
    before = metrics.read_text(encoding="utf-8", errors="replace") if metrics.exists() else ""
    kept = "".join(line + "\n" for line in before.splitlines() if step and step_of(line) <= step)
    if kept != before:
        partial.write_text(kept, encoding="utf-8")
        partial.replace(metrics)
    for path in steps(run_dir):
        if int(path.name.removeprefix("step-")) > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that was cut off or damaged."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_lineage(path: Path) -> dict:
    """Where the tensors of a checkpoint came from; empty for a model that began with random weights."""
    return read_json(path / "lineage.json") if (path / "lineage.json").exists() else {}


def provenance(path: Path) -> dict:
    """The lineage of what is trained from `path`: its own if it was only inherited, itself if it was trained."""
    lineage = read_lineage(path)
    if lineage and not (path / "trainer_state.json").exists():
        return lineage
    return {"reference": str(path), "sha256": TensorFiles(path).sha256(), "ancestors": ancestors(path)}


def with_teacher(lineage: dict, teacher: dict) -> dict:
    """The lineage of a student: what it was inherited from, if anything, and its teacher's provenance."""
    both = merged(lineage.get("ancestors", {}), teacher["ancestors"])
    return lineage | {"ancestors": both, "teacher": {key: teacher[key] for key in ("reference", "sha256")}}


def origin(lineage: dict) -> str | dict:
    """What tells where two runs began apart: "scratch", or the weights and the layers that they inherited."""
    keys = ("sha256", "layers", "parts", "moments", "top_sha256")
    return {key: lineage[key] for key in keys if key in lineage} or "scratch"


def ancestors(path: Path) -> dict[str, dict | None]:
    """Every training run that led to a checkpoint: what it was set to, hashed -> tokens and FLOPs of its own.

    None stands for a cost that is not known, as of a model from the hub. A run counts once, however often and at
    whatever step it is met: as the reference and as the teacher, say.
    """
    lineage, own = read_lineage(path), {}
    if (path / "trainer_state.json").exists():
        state = read_json(path / "trainer_state.json")
        settings = {key: value for key, value in state["settings"].items() if key not in FREE_TO_CHANGE}
        run = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        own = {run: {key: state[key] for key in ("tokens", "flops")}}
    elif not lineage:
        own = {" ".join(TensorFiles(path).sha256().values()): None}
    return merged(lineage.get("ancestors", {}), own)


def merged(*each: dict[str, dict | None]) -> dict[str, dict | None]:
    """The runs of several models, each once, at the latest of its steps that is among them."""
    found = {}
    for run, spent in (item for runs in each for item in runs.items()):
        if not (found.get(run) and spent and found[run]["tokens"] >= spent["tokens"]):
            found[run] = spent
    return found


def cost(path: Path) -> dict | None:
    """Tokens and FLOPs spent on a checkpoint and on all that led to it; None where a part of it is not known."""
    spent = ancestors(path).values()
    return None if None in spent else {key: sum(each[key] for each in spent) for key in ("tokens", "flops")}


def last_stable(run_dir: Path) -> Path:
    """The newest checkpoint of a "wsd" run from before its rate began to fall. Raises UserError."""
    for path in reversed(steps(run_dir)):
        if read_state(path).get("stable"):
            return resolve(path)
    raise UserError(f"{run_dir} keeps no checkpoint of a stable rate; train it with --schedule=wsd")
