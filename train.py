"""Train one model: from scratch, from a checkpoint or a part of one, or resumed. The loop reads top to bottom.

    python train.py config/demo.toml --out_dir=out/mine --max_steps=100    # minutes on a laptop's CPU
    python train.py config/demo.toml --out_dir=out/mine --max_steps=100 --resume
    torchrun --standalone --nproc_per_node=4 train.py config/demo.toml --out_dir=out/mine --micro_batch=8
    python train.py config/demo.toml --out_dir=out/pupil --n_layer=4 --teacher=out/mine    # distil it
    python train.py --init_from=out/mine --data_dir=data/demo --eval_only  # its validation loss, once

It leaves checkpoints (out_dir/step-*/) and out_dir/metrics.jsonl. A step is one update of the weights: max_steps are
made, and the weights after the last one are evaluated and saved.
"""

import contextlib
import functools
import itertools
import math
import signal
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import attention
import checkpoint
import configurator
import data
import machine
import storage
from configurator import UserError
from model import GPT, GPTConfig
from objective import distillation_loss, evaluate, learning_rate, load_teacher, stable_steps
from update import check_finite, make_optimizer, update_weights


@dataclass
class TrainConfig:
    """Train one GPT-2 on a prepared data directory."""

    out_dir: str = "out/run"  # checkpoints and metrics go here
    data_dir: str = "data/python"  # made by prepare_data.py
    init_from: str = "scratch"  # or a checkpoint, a run directory or a name on the hub: its weights and shape
    resume: Literal["auto", True, False] = False  # go on from out_dir's latest checkpoint; auto: if there is one
    override: str = ""  # settings, comma between, that a resumed run may have otherwise than before; or data
    eval_only: bool = False  # print the validation loss of init_from and stop

    # model: for each of these, None takes init_from's value, or else GPTConfig's default
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    block_size: int | None = None  # T, tokens of a sequence
    vocab_size: int | None = None
    bias: bool | None = None
    scale_attn_by_inverse_layer_idx: bool | None = None
    dropout: float = 0.0

    # optimization: part of the experiment
    tokens_per_step: int = 49_152  # over all processes: 48 sequences of 1,024
    max_steps: int = 100_000
    lr: float = 6e-4  # peak learning rate, reached after the warm-up
    min_lr: float = 1e-5  # where the schedule ends
    warmup_steps: int = 2_000
    schedule: Literal["cosine", "wsd"] = "cosine"  # after the warm-up; wsd: stable, then a linear decay
    decay_fraction: float = 0.5  # wsd: the share of max_steps, at the end, in which the rate falls
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # largest norm of the gradient; 0 switches it off
    seed: int = 1337  # of the fresh weights, the order of the data and dropout

    # distillation: the loss is alpha · cross-entropy + (1 - alpha) · tau² · KL to the teacher's distribution
    teacher: str = ""  # a checkpoint, a run directory or a name on the hub
    alpha: float = 0.5
    tau: float = 2.0  # the temperature of both distributions

    # machine and habits: none of these changes what is learned
    micro_batch: int = 8  # sequences at a time on one process; only a matter of memory
    eval_interval: int = 1_000  # steps between walks over the validation data
    save_interval: int = 1_000  # steps between checkpoints
    keep_checkpoints: int = 1  # the newest ones; older ones are deleted
    log_interval: int = 10  # steps between lines in metrics.jsonl
    track_rank: bool = False  # log the attention rank and columns of every layer at each evaluation
    device: str = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # of the arithmetic
    compile: Literal["auto", True, False] = "auto"  # torch.compile
    gradient_checkpointing: bool = False  # compute each block again for its gradient: less memory, a third slower
    deterministic: bool = False  # GPU: the same bits again, slower; on a CPU they are the same anyway

    def __post_init__(self):
        counts = "tokens_per_step max_steps micro_batch eval_interval save_interval keep_checkpoints log_interval"
        bounds = dict.fromkeys(counts.split(), (1, math.inf)) | {
            "warmup_steps": (0, self.max_steps), "lr": (0, 1e6), "min_lr": (0, self.lr), "seed": (0, 2**32 - 1),
            "beta1": (0, 0.999999), "beta2": (0, 0.999999), "grad_clip": (0, 1e6), "weight_decay": (0, 1e6),
            "decay_fraction": (0, 1), "alpha": (0, 1), "tau": (1e-3, 1e3),
        }  # fmt: skip
        for key, (least, most) in bounds.items():
            if not least <= getattr(self, key) <= most:  # written so that nan is out of bounds too
                raise UserError(f"{key} is {getattr(self, key)}, expected {least} to {most}")
        if self.schedule == "wsd" and self.warmup_steps > stable_steps(self):
            raise UserError(
                f"warmup_steps {self.warmup_steps} end after the decay begins, at step {stable_steps(self)}"
            )
        for key in filter(None, self.override.split(",")):
            configurator.check_key(key, [*self.__dataclass_fields__, "data"], "override")
        if self.eval_only and self.init_from == "scratch":
            raise UserError("eval_only needs a model: --init_from=CHECKPOINT_OR_RUN_DIRECTORY")


# ----------------------------------------------------------------------------------------------------------
# Helpers of the loop


def build_model(config: TrainConfig, meta: dict, dtype: torch.dtype) -> tuple[GPT, dict]:
    """The model to start from, on the CPU, and where it comes from: fresh weights of the seed, or init_from's."""
    asked = {f.name: value for f in fields(GPTConfig) if (value := getattr(config, f.name)) is not None}
    if config.init_from == "scratch":
        try:
            torch.manual_seed(config.seed)
            return GPT(GPTConfig(**asked)).to(dtype), {}
        except ValueError as error:
            raise UserError(str(error)) from None
    path = storage.resolve(config.init_from)
    checkpoint.check_tokenizer(path, meta)
    model = checkpoint.load_model(path, dtype, config.dropout)
    found = asdict(model.config)
    differ = [f"{key}: checkpoint {found[key]}, settings {asked[key]}" for key in asked if found[key] != asked[key]]
    if differ:
        raise UserError(f"{path} is not the model asked for: {'; '.join(differ)}")
    return model, checkpoint.provenance(path)


# ----------------------------------------------------------------------------------------------------------
# One run


def train(config: TrainConfig) -> Path | None:
    """Train as configured; return the last checkpoint, which a finished run that is resumed already has.

    With eval_only, print the validation loss of init_from and return None. Raises UserError, also when a signal
    stopped the run, which has then been saved.
    """
    with contextlib.ExitStack() as until_the_end:
        return run(config, until_the_end)


def run(config: TrainConfig, until_the_end: contextlib.ExitStack) -> Path | None:
    """`train`, with a stack for what has to be closed however it ends."""
    # ---- machine
    rank, world_size = machine.rank_and_world_size()
    say = tqdm.write if rank == 0 else lambda _: None  # tqdm's write leaves the progress bar whole
    device = machine.pick_device(config.device)
    if config.deterministic:
        machine.make_deterministic()
    dtype, dtype_reason = machine.pick_dtype(config.dtype, device)
    mixed = dtype in (torch.bfloat16, torch.float16)  # float32 weights, faster arithmetic where it is safe
    autocast = torch.autocast(device.type, dtype) if mixed else contextlib.nullcontext()

    # ---- model and data
    meta = machine.on_rank_0(data.verify, config.data_dir)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    model, lineage = build_model(config, meta, wide)
    flops = model.config.flops_per_token()
    teacher = None
    if config.teacher:
        teacher, taught_by = load_teacher(config.teacher, meta, model.config, wide)
        flops += teacher.config.flops_per_token() // 3  # its forward pass: 2 of the 6 for each weight
        lineage = checkpoint.with_teacher(lineage, taught_by)
    total_tokens = 0 if config.eval_only else config.max_steps * config.tokens_per_step
    compiled, compile_reason = machine.pick_compile(config.compile, device, total_tokens * flops)
    machine.keep_freed_memory(device)
    torch.compiler.reset()  # an earlier model of a recipe must not use up the limit of recompilations
    for network in filter(None, (model, teacher)):
        network.to(device)
        machine.pick_attention(network, compiled, device, dtype)
        if compiled:
            network.compile(dynamic=False)  # in place: the parameters keep their names
    model.gradient_checkpointing = config.gradient_checkpointing
    T = model.config.block_size
    val_tokens = data.open_tokens(config.data_dir, "val", T, model.config.vocab_size)
    if config.eval_only:
        losses = evaluate(model, val_tokens, config.micro_batch, device, autocast)
        mean, error = data.mean_and_error(losses)
        say(f"{config.init_from}: val loss {mean!r} ± {error:.4f} nats ({len(losses)} windows of {T} tokens)")
        return None
    train_tokens = data.open_tokens(config.data_dir, "train", T, model.config.vocab_size)
    accumulation = data.accumulation(config.tokens_per_step, config.micro_batch, T, world_size)

    # ---- optimizer
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # ---- resume
    out_dir = Path(config.out_dir)
    settings = asdict(config) | asdict(model.config) | {
        "dtype": str(dtype), "data": data.fingerprint(meta), "init_from": checkpoint.origin(lineage),
        "teacher": checkpoint.origin(lineage.get("teacher", {})),
    }  # fmt: skip
    start_step, evaluated_at, best = 0, None, {"loss": math.inf, "step": None}
    machine.on_rank_0(lambda: until_the_end.enter_context(storage.lock(out_dir)))
    resume_from = machine.on_rank_0(checkpoint.to_resume, out_dir, config.resume)
    if resume_from:
        state = checkpoint.read_state(resume_from)
        checkpoint.check_same(settings, state["settings"], config.override, resume_from)
        if state["step"] > config.max_steps:
            raise UserError(f"{resume_from} is beyond max_steps {config.max_steps}; raise it or use another out_dir")
        checkpoint.load_training(resume_from, model, optimizer)
        start_step, evaluated_at, best = state["step"], state["evaluated_at"], state["best"]
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        if start_step == config.max_steps:
            say(f"{resume_from}: already at step {start_step} of {config.max_steps}")
            return resume_from
        say(f"resuming from {resume_from}")
    elif lineage.get("moments"):
        checkpoint.load_moments(storage.resolve(config.init_from), model, optimizer)
    machine.on_rank_0(checkpoint.forget_after, out_dir, start_step)
    log = functools.partial(storage.append_json, out_dir / "metrics.jsonl") if rank == 0 else lambda _: None
    made_by = machine.versions(device) | {"processes": world_size}
    parallel = machine.distribute(model, device)

    say(
        f"{out_dir}: {model.config.n_layer} layers, {model.config.num_params():,} parameters, from {config.init_from}"
        f"{f', taught by {config.teacher}' if teacher else ''}\n"
        f"  {config.max_steps:,} steps x {config.tokens_per_step:,} tokens = {total_tokens:,} tokens "
        f"({total_tokens / len(train_tokens):.2f} epochs), {total_tokens * flops:.3g} FLOPs\n"
        f"  a step: {world_size} process(es) x {accumulation} micro-batches x {config.micro_batch} sequences x {T}\n"
        f"  {device}, {str(dtype).removeprefix('torch.')}: {dtype_reason}; "
        f"torch.compile {'on' if compiled else 'off'}: {compile_reason}"
    )

    # ---- loop: `step` counts the updates made so far
    model.train()
    stable = stable_steps(config) if config.schedule == "wsd" else 0  # the checkpoint after so many steps is kept
    progress = tqdm(total=config.max_steps, initial=start_step, unit="step", disable=None if rank == 0 else True)
    updates = []  # (rate, loss, gradient norm) of each since the CPU last looked; loss and norm are on the device
    logged_step, training_s, t0 = start_step, 0.0, time.perf_counter()
    for step in itertools.count(start_step):
        last = step == config.max_steps
        tokens = step * config.tokens_per_step
        stop = machine.stop_requested()
        to_log = step % config.log_interval == 0
        to_evaluate = (step % config.eval_interval == 0 or step == stable or last) and evaluated_at != step
        to_save = step % config.save_interval == 0 or step == stable or last or stop
        if updates and (to_log or to_evaluate or to_save):  # no other step waits for the device
            rate, train_loss, grad_norm = updates[-1]
            check_finite([norm for *_, norm in updates], step, scaler, out_dir)
            training_s += time.perf_counter() - t0
            updates.clear()
            if to_log:
                if world_size > 1:
                    dist.all_reduce(train_loss)
                line = {
                    "step": step, "tokens": tokens, "train_loss": train_loss.item() / world_size, "lr": rate,
                    "grad_norm": grad_norm.item() if grad_norm.isfinite() else None,
                    "tokens_per_s": round((step - logged_step) * config.tokens_per_step / training_s),
                }  # fmt: skip
                log(line)
                progress.set_postfix(loss=f"{line['train_loss']:.3f}", tokens_per_s=line["tokens_per_s"])
                logged_step, training_s = step, 0.0
        if to_evaluate:
            data.read_meta(config.data_dir)  # still the files that the run began with?
            losses = evaluate(model, val_tokens, config.micro_batch, device, autocast, may_stop=not last)
            if losses is None:
                stop = machine.stop_requested()
            else:
                val_loss, error = data.mean_and_error(losses)
                best = min(best, {"loss": val_loss, "step": step}, key=lambda evaluation: evaluation["loss"])
                log({"step": step, "tokens": tokens, "val_loss": val_loss, "val_se": error})
                if config.track_rank and rank == 0:
                    log({"step": step, "tokens": tokens, **attention.collapse(model, val_tokens)})
                say(f"  step {step:>6,} of {config.max_steps:,}: val loss {val_loss:.4f} ± {error:.4f}")
                evaluated_at = step
        if (to_save or stop) and step > start_step:
            state = {
                "format": storage.FORMAT, "step": step, "tokens": tokens, "flops": tokens * flops,
                "evaluated_at": evaluated_at, "best": best, "stable": step <= stable, "scaler": scaler.state_dict(),
                "settings": settings, "versions": made_by,
            }  # fmt: skip
            files = {"trainer_state.json": state} | ({"lineage.json": lineage} if lineage else {})
            if evaluated_at == step:
                files["val_losses.json"] = {"data": settings["data"]["val"], "block_size": T, "losses": losses.tolist()}
            path = out_dir / f"step-{step:08d}"
            machine.on_rank_0(checkpoint.save, path, model, meta["tokenizer"], meta["eot"], optimizer, files)
            machine.on_rank_0(storage.prune, out_dir, config.keep_checkpoints, out_dir / f"step-{stable:08d}")
        if stop:
            saved = f"saved {path}" if step > start_step else "nothing new to save"
            raise UserError(f"stopped by {signal.Signals(stop).name}; {saved}", exit_code=128 + stop)
        if last:
            progress.close()
            return path

        if not updates:  # nothing is under way
            t0 = time.perf_counter()
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = data.train_starts(len(train_tokens), T, config.seed, step, config.tokens_per_step // T)
        starts = starts.reshape(accumulation, world_size, config.micro_batch)[:, rank]  # this process's share
        train_loss = 0.0
        for micro_step, micro_starts in enumerate(starts):
            if config.dropout > 0:  # the same masks whenever this step is made again
                seeds = np.random.SeedSequence([config.seed, step, rank, micro_step])
                torch.manual_seed(int(seeds.generate_state(1)[0]))
            x, y = (machine.send(t, device) for t in data.windows(train_tokens, micro_starts, T))  # (B, T) each
            more_to_come = world_size > 1 and micro_step + 1 < accumulation
            with parallel.no_sync() if more_to_come else contextlib.nullcontext():  # average gradients once a step
                with autocast:
                    if teacher is None:
                        loss = parallel(x, y)
                    else:
                        with torch.no_grad():
                            teacher_logits = teacher(x)
                        loss = distillation_loss(parallel(x), y, teacher_logits, config.alpha, config.tau)
                    loss = loss / accumulation
                scaler.scale(loss).backward()
            train_loss = train_loss + loss.detach()
        grad_norm = update_weights(model, optimizer, scaler, config.grad_clip)
        updates.append((rate, train_loss, grad_norm))
        progress.update()


def main():
    config = configurator.load(TrainConfig)
    if not config.eval_only:  # which has nothing to save
        machine.watch_signals()
    with machine.process_group():
        train(config)


if __name__ == "__main__":
    configurator.run(main)
