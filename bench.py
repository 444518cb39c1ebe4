"""Measure the speed of a training step, beside peers in the same run, and where its time goes.

    python bench.py config/demo.toml                         # what train.py does on this machine
    python bench.py config/demo.toml --against=../nanoGPT    # beside a nanoGPT-like model.py
    python bench.py config/demo.toml --profile               # shares of a step by kind of operation

The settings are train.py's, and so is the step: train.py:train_step is timed, for ours and for
peers. Tokens are random, since no speed depends on them. Contenders take turns on the same batches,
so a machine that slows down slows them all. What is printed are medians over turns.
"""

from plumbing import configurator  # isort: skip  # before the slow imports: a quiet Ctrl-C

import contextlib
import functools
import importlib.util
import inspect
import re
import resource
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

import data
from model import GPT, GPTConfig
from plumbing import checkpoint, machine, processes
from plumbing.configurator import UserError
from train import TrainConfig, learning_rate, make_optimizer, train_step, training_loss

# Kinds of operations and their names; the first kind that fits counts. A fused kernel has the names of all
# its operations, such as cpp_fused__to_copy_native_layer_norm_3.
KINDS = {
    "optimizer": "adam|muon|foreach|vector_norm|linalg_norm",
    "loss": "log_softmax|nll_loss|cross_entropy|logsumexp",
    "attention": "bmm|softmax|attention",
    "matrix products": "mm|linear|matmul|gemm",
    "communication": "all_?reduce|gloo|nccl",
    "norms and activations": "norm|gelu|tanh|dropout|embedding",
    "casts, copies, sums": "copy|cat|clone|fill|zero|add|mul|sum|div|index|arange|pow|fused",
}


@dataclass
class BenchConfig(TrainConfig):
    """Measure the training of one GPT-2 of fresh weights, set as for train.py."""

    profile: bool = False  # print the shares of a step by kind of operation instead
    against: str = ""  # comma-separated directories with a nanoGPT-like model.py: train these too
    steps: int = 3  # updates in a turn
    rounds: int = 7  # turns of each contender, after two updates to warm up


# ---- time


def clock(device: torch.device) -> float:
    """Seconds, once the device has finished what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best FLOP/s of a product of two square matrices: the peak that MFU refers to."""
    best = 0.0
    for n in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        for _ in range(3):
            start = clock(device)
            torch.mm(a, b)
            best = max(best, 2 * n**3 / (clock(device) - start))
    return best


# ---- contenders


class Contender:
    """A model in training, and the seconds of a step in each of its turns."""

    def __init__(self, name: str, model, optimizer, scaler, loss_of):
        self.name, self.model, self.loss_of = name, model, loss_of
        self.optimizer, self.scaler, self.turns = optimizer, scaler, []

    def take_turn(self, steps, config: TrainConfig, tokens: np.ndarray, device: torch.device):
        """Make these updates as train.py does."""
        rank, world_size = processes.rank_and_world_size()
        shape = config.tokens_per_step, config.micro_batch, config.block_size
        accumulation = data.accumulation(*shape, world_size)
        start = clock(device)
        for step in steps:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            batches = data.step_batches(tokens, config, step, rank, world_size, device)
            self.loss, _ = train_step(
                self.model, self.optimizer, self.scaler, config.grad_clip, self.loss_of, batches,
                accumulation,
            )
        self.turns.append((clock(device) - start) / len(steps))


def ours(config: TrainConfig, hardware: machine.Hardware) -> Contender:
    """What train.py trains."""
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(**{f.name: getattr(config, f.name) for f in fields(GPTConfig)}))
    model.gradient_checkpointing = config.gradient_checkpointing
    flops = config.max_steps * config.tokens_per_step * model.config.flops_per_token()
    choices = machine.prepare([model.to(hardware.master)], config.compile, flops, hardware)
    parallel = processes.distribute(model, hardware.device)
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16)
    name = f"ours, {'compiled' if 'compile on' in choices else 'eager'}"
    loss_of = functools.partial(training_loss, config, parallel, None, hardware.autocast)
    return Contender(name, model, make_optimizer(model, config), scaler, loss_of)


def peer(directory: str, config: TrainConfig, hardware: machine.Hardware, compiled: bool) -> Contender:
    """A nanoGPT-like model and optimizer, as nanoGPT runs them, from our weights. UserError."""
    path, device = Path(directory) / "model.py", hardware.device
    if not path.is_file():
        raise UserError(f"against: {path} does not exist; name a directory with a nanoGPT-like model.py")
    spec = importlib.util.spec_from_file_location(f"peer_{len(sys.modules)}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = GPTConfig(**{f.name: getattr(config, f.name) for f in fields(GPTConfig)})
    known = {field.name for field in fields(module.GPTConfig)}
    with contextlib.redirect_stdout(sys.stderr):  # it prints its size
        theirs = module.GPTConfig(**{k: v for k, v in asdict(shape).items() if k in known})
        model = module.GPT(theirs).to(device)
        torch.manual_seed(config.seed)
        model.load_state_dict(GPT(shape).state_dict(), strict=False)  # its head is tied to wte
        options = {"weight_decay": config.weight_decay, "learning_rate": config.lr,
                   "betas": (config.beta1, config.beta2), "device_type": device.type,
                   "optimizer_name": "adamw", "rho": 0.04}  # the authors' model.py asks for the last two
        asked = inspect.signature(model.configure_optimizers).parameters
        optimizer = model.configure_optimizers(**{key: options[key] for key in asked if key in options})
    trained = torch.compile(model) if compiled else model
    autocast = hardware.autocast if device.type == "cuda" else contextlib.nullcontext()  # nanoGPT's choice

    def loss_of(x, y, is_last):
        with autocast:
            return trained(x.contiguous(), y.contiguous())[1]

    scaler = torch.amp.GradScaler(device.type, enabled=False)
    name = f"{path.parent.name}, {'compiled' if compiled else 'eager'}"
    return Contender(name, model, optimizer, scaler, loss_of)


# ---- the command


def report(contenders: list[Contender], config: TrainConfig, flops: float, peak: float):
    """Print speeds, ratios to the better of each pair of peers, and the MFU (of peak FLOP/s)."""
    processes.say(f"\n{'':30s} tokens/s   lowest  highest  ms a step    loss")
    for each in contenders:
        speed = np.sort(config.tokens_per_step / np.array(each.turns))
        numbers = f"{np.median(speed):9.0f}{speed[0]:9.0f}{speed[-1]:9.0f}{1e3 * np.median(each.turns):11.1f}"
        processes.say(f"{each.name:30s}{numbers}{float(each.loss):8.4f}")
    first, peers = contenders[0], contenders[1:]
    for pair in zip(peers[::2], peers[1::2], strict=True):  # eager and compiled
        best = min(pair, key=lambda contender: np.median(contender.turns))
        ratio = np.array(best.turns) / np.array(first.turns)
        median, low, high = np.median(ratio), ratio.min(), ratio.max()
        processes.say(f"{first.name} / {best.name}: {median:.2f} x ({low:.2f} to {high:.2f})")
    world_size = processes.rank_and_world_size()[1]
    achieved = config.tokens_per_step / world_size * flops / np.median(first.turns)
    processes.say(f"MFU {achieved / peak:.1%}: {achieved / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s a process")


def profile(contender: Contender, config: BenchConfig, tokens: np.ndarray, device: torch.device):
    """Print the share of each kind of operation in the time of some steps, and its slowest."""
    with torch.profiler.profile() as profiler:
        contender.take_turn(range(2, 2 + config.steps), config, tokens, device)
    total, found = contender.turns[-1] * config.steps * 1e6, {}  # microseconds
    for event in profiler.key_averages():
        time_us = event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
        fits = (kind for kind, names in KINDS.items() if re.search(names, event.key.lower()))
        found.setdefault(next(fits, "other"), []).append((time_us, event.key))
    found["Python, waiting"] = [(total - sum(time_us for each in found.values() for time_us, _ in each), "")]
    processes.say(f"\n{contender.name}: {total / config.steps / 1e3:.1f} ms a step, {config.steps} steps")
    for kind, operations in sorted(found.items(), key=lambda item: -sum(t for t, _ in item[1])):
        slowest = ", ".join(f"{key[:40]} {t / total:.1%}" for t, key in sorted(operations)[:-4:-1] if key)
        processes.say(f"{kind:24s} {sum(t for t, _ in operations) / total:6.1%}  {slowest}")


def bench(config: BenchConfig):
    """Train ours and the peers in turn, and report. Raises UserError."""
    if config.profile:  # compiled kernels then show in the profile
        torch._inductor.config.cpp.enable_kernel_profile = True
    hardware = machine.pick(config.device, config.dtype)
    options = {f.name: value for f in fields(GPTConfig) if (value := getattr(config, f.name)) is not None}
    shape = checkpoint.open_model("scratch", {}, torch.float32, options)[0].config  # UserError if impossible
    config = replace(config, dtype=str(hardware.dtype), **asdict(shape))  # no "auto"
    n_tokens = 10**6 + 2 * config.tokens_per_step + shape.block_size
    tokens = np.random.RandomState(config.seed).randint(shape.vocab_size, size=n_tokens)
    made_by = machine.versions(hardware.device)
    processes.say(f"python {made_by['command']}\n{made_by['device']}, torch {made_by['torch']}, commit "
                  f"{made_by['commit']}; {shape.num_params() / 1e6:.1f} M parameters; {hardware.reason}\n")
    contenders = [ours(config, hardware)]  # all before a turn: each resets the compiler
    for directory in filter(None, config.against.split(",")):
        contenders += [peer(directory, config, hardware, compiled) for compiled in (False, True)]
    for contender in contenders:
        contender.take_turn([0], config, tokens, hardware.device)
        contender.take_turn([1], config, tokens, hardware.device)
        first_s, _ = contender.turns  # with compiling
        contender.turns.clear()
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # on Linux
        if hardware.device.type == "cuda":
            peak_mb = torch.cuda.max_memory_allocated(hardware.device) / 1e6
        memory = f"peak memory so far {peak_mb:,.0f} MB"
        processes.say(f"{contender.name:30s} first step {first_s:6.1f} s, {memory}")
    if config.profile:
        return profile(contenders[0], config, tokens, hardware.device)
    peaks = []
    for i in range(config.rounds):
        for contender in contenders:
            steps = range(2 + i * config.steps, 2 + (i + 1) * config.steps)
            contender.take_turn(steps, config, tokens, hardware.device)
        peaks.append(matmul_flops(hardware.device, hardware.dtype))
    report(contenders, config, shape.flops_per_token(), float(np.median(peaks)))


def main():
    config = configurator.load(BenchConfig)
    with processes.process_group():
        bench(config)


if __name__ == "__main__":
    configurator.run(main)
