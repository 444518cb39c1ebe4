"""Train one model: from scratch, from a checkpoint, or resumed. Start reading at `loop`.

    python train.py config/demo.toml --out_dir=out/mine --max_steps=100  # a minute on a CPU
    python train.py config/demo.toml --out_dir=out/mine --max_steps=100 --resume
    torchrun --standalone --nproc_per_node=4 train.py config/demo.toml --out_dir=out/mine --micro_batch=8
    python train.py --init_from=out/mine --data_dir=data/demo --out_dir=out/same --max_steps=0  # its loss

It writes checkpoints (out_dir/step-*/) and out_dir/metrics.jsonl. A step is one update.
"""

from plumbing import configurator  # isort: skip  # before the slow imports: a quiet Ctrl-C

import contextlib
import functools
import itertools
import math
import signal
import time
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

import data
from model import GPT, GPTConfig
from plumbing import checkpoint, machine, processes, storage
from plumbing.configurator import UserError, may_change

# ---- settings

# every option of GPTConfig (model.py); None: init_from's value, or else GPTConfig's default
OPTIONS = [(f.name, f.type | None, field(default=None)) for f in fields(GPTConfig)]
ModelOptions = make_dataclass("ModelOptions", OPTIONS)


@dataclass
class TrainConfig(ModelOptions):
    """Train a model on prepared data. Unset model options are init_from's; scratch:DIR lends its shape."""

    out_dir: str = may_change("out/run")  # checkpoints and metrics
    data_dir: str = may_change("data/python")  # made by prepare_data.py; its tokens may not change
    init_from: str = may_change("scratch")  # or a model; scratch:DIR: see above
    resume: Literal["auto", True, False] = may_change(False)  # from the latest checkpoint; auto: if any
    override: str = may_change("")  # comma-separated settings allowed to differ on resume

    # optimization: part of the experiment. The defaults are the paper's (appendix F), but for batch and rate
    tokens_per_step: int = 49_152  # over all processes: 48 sequences of 1,024
    max_steps: int = 100_000  # updates; 0: evaluate init_from and save it as a run of no steps
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices (ours)
    lr: float = 6e-4  # peak learning rate, reached after the warm-up
    min_lr: float = 1e-5  # at the end of the schedule
    warmup_steps: int = 2_000
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, linear decay (ours)
    decay_fraction: float = 0.5  # wsd: the share of max_steps, at the end, in which the rate decays
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1  # of matrices and embeddings
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    seed: int = 1337  # of the fresh weights, the order of the data and dropout

    # distillation: alpha * cross-entropy + (1 - alpha) * tau^2 * KL to the teacher (appendix D)
    teacher: str = may_change("")  # a checkpoint, a run directory or a name on the hub
    alpha: float = 0.6
    tau: float = 1.0  # temperature of both distributions

    # machine: these do not change the experiment, apart from rounding
    micro_batch: int = may_change(8)  # sequences at a time on one process; only a matter of memory
    eval_interval: int = may_change(1_000)  # steps between evaluations on all validation windows
    save_interval: int = may_change(1_000)  # steps between checkpoints
    keep_checkpoints: int = may_change(1)  # the newest ones; with wsd also the one before the decay
    log_interval: int = may_change(10)  # steps between lines in metrics.jsonl
    track_rank: bool = may_change(False)  # log each layer's attention measures on 8 windows when evaluated
    device: str = may_change("auto")  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # of products
    compile: Literal["auto", "blocks", True, False] = may_change("auto")  # blocks: one for all layers
    gradient_checkpointing: bool = may_change(False)  # less memory, a third slower
    deterministic: bool = may_change(False)  # GPU: the same bits again, slower; a CPU: always

    def __post_init__(self):
        self.out_dir = str(Path(self.out_dir).expanduser())  # a shell does not expand --out_dir=~/run
        positive = "tokens_per_step micro_batch eval_interval save_interval log_interval keep_checkpoints"
        limits = dict.fromkeys(positive.split(), (1, math.inf))
        limits |= dict.fromkeys(("max_steps", "grad_clip", "weight_decay"), (0, math.inf))
        limits["seed"] = (0, 2**32 - 1)
        limits |= {"alpha": (0, 1), "tau": (1e-3, math.inf), "decay_fraction": (0, 1), "min_lr": (0, self.lr)}
        limits["warmup_steps"] = (0, stable_steps(self) or self.max_steps or math.inf)
        for key, (least, most) in limits.items():
            if not least <= (value := getattr(self, key)) <= most:
                why = " (before the decay)" if key == "warmup_steps" and stable_steps(self) else ""
                raise UserError(f"{key} is {value}, expected {least} to {most}{why}")


# ---- what a step is made of: schedule, loss, update


def stable_steps(config: TrainConfig) -> int:
    """Updates before the learning rate of a "wsd" schedule begins to decay; 0 for a cosine."""
    if config.schedule == "cosine":
        return 0
    return config.max_steps - round(config.decay_fraction * config.max_steps)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of update `step`, from 0: warm-up, then a cosine (appendix F), or stable and decay."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    start = stable_steps(config) or config.warmup_steps
    progress = max(0, step - start) / max(1, config.max_steps - 1 - start)  # from 0 to 1
    share = 1 - progress if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share


def distillation_loss(logits, targets, teacher_logits, alpha: float, tau: float):
    """Nats per token, of logits (B, T, V), targets (B, T). Paper, appendix D; arXiv 1503.02531."""
    dtype = torch.promote_types(logits.dtype, torch.float32)  # no loss in half precision
    logits, teacher_logits = (t.flatten(0, 1).to(dtype) for t in (logits, teacher_logits))  # (B*T, V)
    student, teacher = (F.log_softmax(t / tau, dim=-1) for t in (logits, teacher_logits))
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    # tau^2 keeps the size of the divergence's gradient
    return alpha * F.cross_entropy(logits, targets.flatten()) + (1 - alpha) * tau**2 * divergence


def training_loss(config: TrainConfig, parallel, teacher, autocast, x, y, is_last: bool):
    """The loss of a micro-batch (B, T). DDP averages gradients only on the last one of a step."""
    parallel.require_backward_grad_sync = is_last
    with autocast:
        if teacher is None:
            return parallel(x, y)
        with torch.no_grad():
            teacher_logits = teacher(x)  # (B, T, V)
        return distillation_loss(parallel(x), y, teacher_logits, config.alpha, config.tau)


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (paper, appendix F), one kernel for all parameters; or Muon and AdamW (ours)."""
    how = {"lr": config.lr, "betas": (config.beta1, config.beta2)}
    if config.optimizer == "muon":
        from plumbing.muon import MuonAndAdamW  # imported where it is used

        optimizer = MuonAndAdamW(model, config.weight_decay, "bfloat16" in config.dtype, **how)
    else:
        optimizer = torch.optim.AdamW(model.param_groups(config.weight_decay), fused=True, **how)
    optimizer.found_inf = torch.zeros((), device=next(model.parameters()).device)  # 1: no update
    return optimizer


def train_step(model, optimizer, scaler, grad_clip, loss_of, batches, accumulation):
    """One update on `accumulation` micro-batches (x, y): (loss, gradient norm), on the device.

    loss_of(x, y, is_last) is a mean over tokens.
    A non-finite gradient norm sets optimizer.found_inf, and the fused kernel then skips this and all
    later updates, so the CPU need not check each step. A GradScaler (float16) skips only this one.
    """
    total = 0.0
    for i, (x, y) in enumerate(batches, start=1):
        loss = loss_of(x, y, i == accumulation) / accumulation
        scaler.scale(loss).backward()
        total = total + loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)  # 0: no clipping
    if hasattr(optimizer, "found_inf") and not scaler.is_enabled():  # else scaler.step sets it
        optimizer.found_inf = torch.maximum(optimizer.found_inf, (~grad_norm.isfinite()).float())
    scaler.step(optimizer)
    scaler.update()
    model.zero_grad()
    return total, grad_norm


@torch.no_grad()
def evaluate(model: GPT, tokens: np.ndarray, micro_batch: int, device, autocast) -> np.ndarray:
    """Loss of every validation window, nats per token: float64 (windows,). Processes share them."""
    rank, world_size = processes.rank_and_world_size()
    T = model.config.block_size
    starts = data.val_starts(len(tokens), T)
    losses = torch.zeros(len(starts), dtype=torch.float64)
    mine = np.arange(rank, len(starts), world_size)
    model.eval()
    for i in range(0, len(mine), micro_batch):
        batch = mine[i : i + micro_batch]
        x, y = data.windows(tokens, starts[batch], T)
        with autocast:
            loss = model(x.to(device), y.to(device), reduction="none")  # (B, T)
        losses[batch] = loss.cpu().double().mean(1)
    model.train()
    if world_size > 1:  # each window is zero on all processes but one
        dist.all_reduce(losses)
    return losses.numpy()


def save(config: TrainConfig, meta: dict, model, optimizer, scaler, state: dict, lineage: dict, losses):
    """Publish a checkpoint with all that resuming needs. Delete older ones. Returns its path."""
    path, device = Path(config.out_dir) / f"step-{state['step']:08d}", next(model.parameters()).device
    if not path.parent.is_dir():  # and with it the lock
        raise UserError(f"{path.parent} was deleted while training; start again", exit_code=1)
    state |= {"scaler": scaler.state_dict(), "settings": asdict(config), "versions": machine.versions(device)}
    files = {"trainer_state.json": state} | ({"lineage.json": lineage} if lineage else {})
    if losses is not None:  # of every validation window: models are compared pair by pair
        windows = {"data": state["made_from"]["data"]["val"], "block_size": config.block_size}
        files["val_losses.json"] = windows | {"losses": losses.tolist()}
    tokenizer = meta["tokenizer"], meta["eot"]
    processes.on_rank_0(checkpoint.save, path, model, *tokenizer, optimizer, files, config.data_dir)
    processes.on_rank_0(storage.prune, path.parent, config.keep_checkpoints, stable_steps(config))
    return path


def set_up(config: TrainConfig):
    """(hardware, the data's meta.json, model, teacher or None, where both come from). UserError."""
    hardware = machine.pick(config.device, config.dtype, config.deterministic)
    meta = processes.on_rank_0(data.read_meta, config.data_dir, True)
    options = {f.name: value for f in fields(GPTConfig) if (value := getattr(config, f.name)) is not None}
    model, lineage = checkpoint.open_model(config.init_from, meta, hardware.master, options, config.seed)
    same = {key: getattr(model.config, key) for key in ("vocab_size", "block_size")}
    teacher, taught_by = None, {}
    if config.teacher:
        teacher, taught_by = checkpoint.open_model(config.teacher, meta, hardware.master, same)
    model.gradient_checkpointing = config.gradient_checkpointing
    flops = config.max_steps * config.tokens_per_step * model.config.flops_per_token()
    reason = machine.prepare([model, teacher] if teacher else [model], config.compile, flops, hardware)
    processes.say(
        f"{config.out_dir}: {model.config.n_layer} layers, {model.config.num_params():,} parameters from "
        f"{config.init_from}{f', taught by {config.teacher}' if teacher else ''}; {flops:.3g} FLOPs; {reason}"
    )
    return hardware, meta, model, teacher, {"init_from": lineage, "teacher": taught_by}


def loop(config: TrainConfig) -> Path:
    """Inheritune step 2 (train), until max_steps or a signal. Returns the last checkpoint."""
    # ---- set up: machine, data, model, optimizer
    hardware, meta, model, teacher, lineages = set_up(config)
    config = replace(config, dtype=str(hardware.dtype), **asdict(model.config))  # no None; dtype not "auto"
    device, T, out_dir = hardware.device, config.block_size, Path(config.out_dir)
    train_tokens = data.open_tokens(config.data_dir, "train", T, config.vocab_size)
    val_tokens = data.open_tokens(config.data_dir, "val", T, config.vocab_size)
    rank, world_size = processes.rank_and_world_size()
    accumulation = data.accumulation(config.tokens_per_step, config.micro_batch, T, world_size)
    if (n_windows := len(data.val_starts(len(val_tokens), T))) < 10:
        processes.say(f"warning: {n_windows} validation windows of {T} tokens; losses are hardly comparable")
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=hardware.dtype == torch.float16)
    teacher_flops = teacher.config.flops_per_token() // 3 if teacher else 0  # forward: 2 of 6 for each weight
    flops_per_token = model.config.flops_per_token() + teacher_flops

    # ---- resume
    made_from = {key: checkpoint.identity(lineage) for key, lineage in lineages.items()}
    made_from["data"] = meta["sha256"]
    start_step, evaluated_at = 0, None
    if processes.on_rank_0(storage.steps, out_dir) or config.resume is True:
        from plumbing import resume  # only a resumed run needs it

        path = processes.on_rank_0(resume.to_resume, out_dir, config.resume)
        fixed = {f.name: getattr(config, f.name) for f in fields(config) if not f.metadata.get("may_change")}
        state = resume.resume(path, model, optimizer, scaler, fixed | made_from, config.override.split(","))
        start_step, evaluated_at = state["step"], state["evaluated_at"]
        processes.say(f"resuming from {path}: step {start_step} of {config.max_steps}")
        if start_step == config.max_steps:  # a kill may have cut this short after the last save
            processes.on_rank_0(storage.prune, out_dir, config.keep_checkpoints, stable_steps(config))
            return path
    elif rank == 0 and (old := out_dir / "metrics.jsonl").is_file():
        old.replace(out_dir / "metrics-old.jsonl")  # of a run without checkpoints

    # ---- loop: `step` updates have been made
    parallel = processes.distribute(model, device)
    loss_of = functools.partial(training_loss, config, parallel, teacher, hardware.autocast)
    stable = stable_steps(config)  # the checkpoint after so many steps is kept
    log = functools.partial(storage.append_json, out_dir / "metrics.jsonl") if rank == 0 else lambda _: None
    progress = tqdm(total=config.max_steps, initial=start_step, disable=None if rank == 0 else True)
    timed_from, t0 = start_step, time.perf_counter()
    rate = loss = grad_norm = None  # of the last update; loss and norm are on the device
    model.train()
    for step in itertools.count(start_step):
        stop, last = processes.stop_requested(), step == config.max_steps
        to_log = step % config.log_interval == 0 and step > start_step
        to_evaluate = (step % config.eval_interval == 0 or step == stable or last) and evaluated_at != step
        new = step > start_step or config.max_steps == 0  # something to save
        to_save = new and (step % config.save_interval == 0 or step == stable or last or stop)
        counts = {"step": step, "tokens": step * config.tokens_per_step}

        # ---- guard and log. On all other steps the CPU does not wait for the device
        if step > start_step and (to_log or to_evaluate or to_save):
            machine.check_finite(optimizer, scaler, storage.steps(out_dir))
        if to_log:
            if world_size > 1:
                dist.all_reduce(loss)
            speed = round((step - timed_from) * config.tokens_per_step / (time.perf_counter() - t0))
            line = counts | {"train_loss": loss.item() / world_size, "lr": rate, "tokens_per_s": speed}
            log(line | {"grad_norm": grad_norm.item() if grad_norm.isfinite() else None})
            progress.set_postfix(loss=f"{line['train_loss']:.3f}", tokens_per_s=speed)
            timed_from, t0 = step, time.perf_counter()

        # ---- validation: the mean over all windows, which are always the same
        if to_evaluate:
            losses = evaluate(model, val_tokens, config.micro_batch, device, hardware.autocast)
            val_loss, error = data.mean_and_error(losses)
            log(counts | {"val_loss": val_loss, "val_se": error})
            if config.track_rank and rank == 0:
                import analyze_attention  # imported where it is used: training needs none of it

                log(counts | analyze_attention.track(model, val_tokens, meta.get("begin", [])))
            processes.say(f"  step {step} of {config.max_steps}: val loss {val_loss:.4f} ± {error:.4f}")
            evaluated_at, stop = step, stop or processes.stop_requested()

        # ---- checkpoint, and the end of the run
        if to_save or (stop and new):
            state = counts | {"flops": counts["tokens"] * flops_per_token, "evaluated_at": evaluated_at}
            state["made_from"] = made_from
            losses = losses if evaluated_at == step else None
            path = save(config, meta, model, optimizer, scaler, state, lineages["init_from"], losses)
        if stop:
            saved = f"saved {path}" if new else "nothing new to save"
            raise UserError(f"stopped by {signal.Signals(stop).name}; {saved}", exit_code=128 + stop)
        if last:
            progress.close()
            return path
        if to_evaluate or to_save:
            timed_from, t0 = step, time.perf_counter()

        # ---- one update
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = data.step_batches(train_tokens, config, step, rank, world_size, device)
        loss, grad_norm = train_step(
            model, optimizer, scaler, config.grad_clip, loss_of, batches, accumulation
        )
        progress.update()


def train(config: TrainConfig) -> Path:
    """Train with out_dir locked. Returns the last checkpoint. UserError, also after a signal."""
    with contextlib.ExitStack() as held:
        processes.on_rank_0(held.enter_context, storage.lock(config.out_dir))
        return loop(config)


def main():
    config = configurator.load(TrainConfig)
    with processes.process_group():
        processes.watch_signals()
        train(config)


if __name__ == "__main__":
    configurator.run(main)
