"""Resume a run: find its latest checkpoint, compare the settings, load weights and optimizer.

    python train.py config/demo.toml --out_dir=out/mine --resume         # the latest checkpoint of out/mine
    python train.py config/demo.toml --out_dir=out/mine --resume=auto    # if there is one

A resumed run ends at the same bits as one that was never interrupted. Besides the tensors, only the
step has to be restored: data.py computes the order of the data from it.
"""

import contextlib
import json
import shutil
from dataclasses import fields
from pathlib import Path

import torch

from model import GPT, GPTConfig
from plumbing import checkpoint, model_files, pretrained, storage
from plumbing.configurator import UserError


def read_state(path: Path) -> dict:
    """The trainer_state.json of a checkpoint that a run can resume from. Raises UserError."""
    if not (path / "trainer_state.json").is_file():
        raise UserError(f"{path} has weights but no training state; start from it with --init_from={path}")
    return storage.read_json(path / "trainer_state.json")


def read_log(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, but for those that a kill or a full disk has torn."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            found += [value] if isinstance(value, dict) and "step" in value else []
    return found


def load_optimizer(path: Path, model: GPT, optimizer: torch.optim.Optimizer):
    """Put the optimizer state of a directory into place. A parameter without one begins at zero."""
    parameters, stored = dict(model.named_parameters()), model_files.read_tensors(path, "optimizer")
    for name, tensor in stored.items():
        key, part = name.split("|")
        tensor = tensor.to(parameters[key].device)
        tensor = checkpoint.hf_layout(key, tensor) if isinstance(model, GPT) else tensor
        # contiguous like the weights: fused AdamW walks both memories in step
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        optimizer.state[parameters[key]][part] = tensor


def to_resume(run_dir: Path, resume: bool | str) -> Path:
    """The checkpoint that a run resumes from: the latest one. `resume` is True, False or "auto".

    Raises UserError where a fresh start would overwrite a run, or there is nothing to resume. Drops later
    log lines and sets damaged later checkpoints aside: the run writes them again.
    """
    found = storage.steps(run_dir)
    if found and not resume:
        raise UserError(f"{run_dir} holds checkpoints; add --resume to continue it, or change out_dir")
    newest = storage.latest(run_dir)
    if newest is None:
        remedy = "change out_dir" if found else "leave out --resume, or use --resume=auto"
        raise UserError(f"no usable checkpoint in {run_dir} ({len(found)} damaged); {remedy}")
    log, last = run_dir / "metrics.jsonl", int(newest.name.removeprefix("step-"))
    kept = [json.dumps(line) + "\n" for line in read_log(log) if line["step"] <= last]
    if log.is_file() and "".join(kept) != log.read_text(encoding="utf-8", errors="replace"):
        storage.write_text(log, "".join(kept))
    for path in found[found.index(newest) + 1 :]:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return newest


def resume(path: Path, model: GPT, optimizer, scaler, settings: dict, override: list[str]) -> dict:
    """Load a checkpoint into a run with these settings. Returns its state. UserError if one differs."""
    state = read_state(path)
    then = {"optimizer": "adamw"} | state["settings"] | state.get("made_from", {})  # older ones name none
    shape = {field.name for field in fields(GPTConfig)} - {"dropout"}  # another shape is another model
    changed = [key for key in settings if key not in override or key in shape]
    changed = [key for key in changed if then.get(key) != settings[key]]
    if changed:
        differences = "; ".join(f"{key}: {then.get(key)} then, {settings[key]} now" for key in changed)
        remedy = "use the settings of then or a different out_dir"
        if shape.isdisjoint(changed):
            allowed = ",".join(filter(None, changed + override))
            remedy += f", or, in train.py, allow the change with --override={allowed}"
        raise UserError(f"cannot resume {path}: {differences}; {remedy}")
    if state["step"] > settings["max_steps"]:
        raise UserError(f"{path} is beyond max_steps {settings['max_steps']}; raise it or change out_dir")
    if state["step"] == settings["max_steps"]:  # finished
        return state
    with torch.no_grad():
        saved = pretrained.load_model(path, next(model.parameters()).dtype)
        for ours, theirs in zip(model.parameters(), saved.parameters(), strict=True):
            ours.copy_(theirs)
    if state["step"] and then["optimizer"] == settings["optimizer"]:  # else it starts afresh
        load_optimizer(path, model, optimizer)
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return state
