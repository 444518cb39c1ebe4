"""Measure the speed of a training step and its parts, beside peers in the same run.

    python bench.py config/demo.toml                           # what train.py does on this machine
    python bench.py config/demo.toml --against=../nanoGPT      # beside a nanoGPT-like model.py
    torchrun --standalone --nproc_per_node=2 bench.py config/demo.toml --micro_batch=16

The settings are train.py's, and so is the step: train.py:train_step is timed, for ours and for peers. Tokens
are random, since no speed depends on them. Contenders take turns on the same batches, so a machine that slows
down slows them all. What is printed are medians over turns.
"""

import contextlib
import functools
import importlib.util
import inspect
import itertools
import resource
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

import data
from model import GPT, GPTConfig
from plumbing import checkpoint, configurator, machine
from plumbing.configurator import UserError
from train import TrainConfig, learning_rate, make_optimizer, train_step, training_loss

PARTS = ("data", "forward", "backward", "optimizer")  # of a step; data is all that is none of the others
PEAK_FLOPS = {  # dense bf16 FLOP/s from the makers' data sheets, by the name that torch gives the GPU
    "NVIDIA H200": 989.4e12, "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165.2e12, "NVIDIA GeForce RTX 3090": 71e12,
}


@dataclass
class BenchConfig(TrainConfig):
    """Measure the training of one GPT-2 of fresh weights, set as for train.py."""

    against: str = ""  # comma-separated directories with a nanoGPT-like model.py: train these too, in turn
    steps: int = 3  # updates in a turn
    rounds: int = 7  # turns of each contender, after two updates to warm up


# ---- time, on the device


def mark(device: torch.device):
    """A moment in the device's own time. The CPU does not wait for it."""
    if device.type == "cpu":
        return time.perf_counter()
    event = getattr(torch, device.type).Event(enable_timing=True)
    event.record()
    return event


def seconds(start, end) -> float:
    """Between two marks, once the device has passed the second."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best FLOP/s of a product of two square matrices, over some sizes."""
    best = 0.0
    for n in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        for _ in range(3):
            start = mark(device)
            torch.mm(a, b)
            best = max(best, 2 * n**3 / seconds(start, mark(device)))
    return best


# ---- contenders


class Contender:
    """A model in training, and the seconds of each part of a step in each of its turns: turns[i][part]."""

    def __init__(self, name: str, model, optimizer, scaler, loss_of):
        self.name, self.model, self.loss_of = name, model, loss_of
        self.optimizer, self.scaler, self.turns = optimizer, scaler, []

    def take_turn(self, steps, config: TrainConfig, tokens: np.ndarray, device: torch.device):
        """Make these updates as train.py does, with a mark after each part."""
        rank, world_size = machine.rank_and_world_size()
        accumulation = config.tokens_per_step // (config.micro_batch * config.block_size * world_size)
        marks = [("", mark(device))]
        for step in steps:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            batches = machine.send_all(data.step_batches(tokens, config, step, rank, world_size), device)
            self.loss, _ = train_step(
                self.model, self.optimizer, self.scaler, config.grad_clip, self.loss_of, batches,
                accumulation, mark=lambda part: marks.append((part, mark(device))),
            )
        parts = dict.fromkeys(PARTS, 0.0)
        for (_, start), (part, end) in itertools.pairwise(marks):
            parts[part] += seconds(start, end) / len(steps)
        self.turns.append(parts)

    def step_s(self) -> np.ndarray:
        """Seconds of a step in each turn."""
        return np.array([sum(parts.values()) for parts in self.turns])


def ours(config: TrainConfig, hardware: machine.Hardware, communicates=True) -> Contender:
    """What train.py trains. Without communication each process keeps its own gradients."""
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(**{f.name: getattr(config, f.name) for f in fields(GPTConfig)})).to(hardware.wide)
    model.gradient_checkpointing = config.gradient_checkpointing
    flops = config.max_steps * config.tokens_per_step * model.config.flops_per_token()
    choices = machine.prepare([model], config.compile, flops, hardware)
    parallel = machine.distribute(model, hardware.device) if communicates else model
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16)
    name = f"ours, {'compiled' if 'compile on' in choices else 'eager'}{'' if communicates else ', silent'}"
    loss_of = functools.partial(training_loss, config, parallel, None, hardware.autocast)
    return Contender(name, model, make_optimizer(model, config), scaler, loss_of)


def peer(directory: str, config: TrainConfig, hardware: machine.Hardware, compiled: bool) -> Contender:
    """A nanoGPT-like model and optimizer, as nanoGPT runs them, from our weights. Raises UserError."""
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
    """Print speed, parts, ratios to the better of each pair of peers, and model FLOPs utilization (MFU)."""
    processes = machine.rank_and_world_size()[1]
    heading = "  ".join(f"{part:>9s}" for part in PARTS)
    machine.say(f"\n{'':30s} tokens/s   lowest  highest  ms a step  {heading}   loss")
    for each in contenders:
        step_s = each.step_s()
        speed = np.sort(config.tokens_per_step / step_s)
        shares = [np.median([turn[part] for turn in each.turns] / step_s) for part in PARTS]
        numbers = f"{np.median(speed):9.0f}{speed[0]:9.0f}{speed[-1]:9.0f}{1e3 * np.median(step_s):11.1f}  "
        cells = "  ".join(f"{share:9.1%}" for share in shares)
        machine.say(f"{each.name:30s}{numbers}{cells}{float(each.loss):8.4f}")
    first, rest = contenders[0], contenders[1:]
    if processes > 1:
        share = 1 - rest.pop(0).step_s() / first.step_s()
        spread = f"{share.min():.1%} to {share.max():.1%}"
        machine.say(f"communication: {np.median(share):.1%} of a step ({spread})")
    for pair in zip(rest[::2], rest[1::2], strict=True):  # eager and compiled
        best = min(pair, key=lambda contender: np.median(contender.step_s()))
        ratio = best.step_s() / first.step_s()
        spread = f"{ratio.min():.2f} to {ratio.max():.2f}"
        machine.say(f"{first.name} / {best.name}: {np.median(ratio):.2f} x ({spread})")
    achieved = np.median(config.tokens_per_step / processes * flops / first.step_s())
    machine.say(f"MFU {achieved / peak:.1%}: {achieved / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s a process")


def bench(config: BenchConfig):
    """Train ours and the peers in turn, and report. Raises UserError."""
    hardware, processes = machine.pick(config.device, config.dtype), machine.rank_and_world_size()[1]
    options = {f.name: value for f in fields(GPTConfig) if (value := getattr(config, f.name)) is not None}
    shape = checkpoint.open_model("scratch", {}, torch.float32, options)[0].config  # UserError if impossible
    config = replace(config, **asdict(shape))
    data.accumulation(config.tokens_per_step, config.micro_batch, shape.block_size, processes)
    n_tokens = 10**6 + 2 * config.tokens_per_step + shape.block_size
    tokens = np.random.RandomState(config.seed).randint(shape.vocab_size, size=n_tokens)
    made_by = machine.versions(hardware.device)
    machine.say(f"python {made_by['command']}\n{made_by['device']}, torch {made_by['torch']}, commit "
                f"{made_by['commit']}; {shape.num_params() / 1e6:.1f} M parameters; {hardware.reason}\n")
    makers = [functools.partial(ours, config, hardware)]
    makers += [functools.partial(ours, config, hardware, communicates=False)] * (processes > 1)
    for directory in filter(None, config.against.split(",")):
        makers += [functools.partial(peer, directory, config, hardware, on) for on in (False, True)]
    contenders = [make() for make in makers]  # first: making one resets the compiler, and with it the others
    for contender in contenders:
        t0 = time.perf_counter()
        contender.take_turn([0], config, tokens, hardware.device)
        first_s = time.perf_counter() - t0  # with compiling
        contender.take_turn([1], config, tokens, hardware.device)
        contender.turns.clear()
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # on Linux
        if hardware.device.type == "cuda":
            peak_mb = torch.cuda.max_memory_allocated(hardware.device) / 1e6
        machine.say(f"{contender.name:30s} first step {first_s:6.1f} s, peak memory so far {peak_mb:,.0f} MB")
    products = []
    for i in range(config.rounds):
        for contender in contenders:
            steps = range(2 + i * config.steps, 2 + (i + 1) * config.steps)
            contender.take_turn(steps, config, tokens, hardware.device)
        products.append(matmul_flops(hardware.device, hardware.dtype))
    name = torch.cuda.get_device_name(hardware.device) if hardware.device.type == "cuda" else ""
    report(contenders, config, shape.flops_per_token(), PEAK_FLOPS.get(name, float(np.median(products))))


def main():
    config = configurator.load(BenchConfig)
    with machine.process_group():
        bench(config)


if __name__ == "__main__":
    configurator.run(main)
