"""Measure the speed of a training step and its parts, and compare it with other GPT-2 code in the same run.

    python bench.py config/demo.toml                           # how fast train.py is on this machine
    python bench.py config/demo.toml --against=../nanoGPT      # compared with a nanoGPT-like model.py
    torchrun --standalone --nproc_per_node=2 bench.py config/demo.toml --micro_batch=16

The settings and the step are train.py's: bench.py times train.py:train_step for every contender. The tokens
are random, because speed does not depend on them. Contenders take turns on the same batches, so a slow moment
of the machine slows them all. Each time and ratio is a median over turns, with its range.
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

PARTS = ("data", "forward", "backward", "optimizer")  # of a step; data is whatever is in no other part
PEAK_FLOPS = {  # dense bfloat16 or float16 FLOP/s from the data sheets, by the name that torch gives the GPU
    "NVIDIA H200": 989.4e12, "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165.2e12,
}


@dataclass
class BenchConfig(TrainConfig):
    """Measure the training of one GPT-2 from fresh weights, with the settings of train.py."""

    against: str = ""  # comma-separated directories, each with a nanoGPT-like model.py to compare with
    steps: int = 3  # updates in a turn
    rounds: int = 7  # turns of each contender, after two updates to warm up


# ---- measuring


def mark(device: torch.device):
    """A point in the device's own time. The CPU does not wait for it."""
    if device.type == "cpu":
        return time.perf_counter()
    event = getattr(torch, device.type).Event(enable_timing=True)
    event.record()
    return event


def seconds(start, end) -> float:
    """Seconds between two marks. Waits until the device has reached the second."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The highest FLOP/s of a product of two n x n matrices, over some n, each computed three times."""
    speeds = []
    for n in (512, 1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        for _ in range(3):
            start = mark(device)
            torch.mm(a, b)
            speeds.append(2 * n**3 / seconds(start, mark(device)))
    return max(speeds)


def peak_memory(device: torch.device) -> int:
    """Bytes so far: on CUDA the most in tensors at once, elsewhere the most that the process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- contenders


class Contender:
    """A model in training, and the seconds of each part of a step in each of its turns: turns[i][part]."""

    def __init__(self, name: str, model, optimizer, loss_of, scaled: bool):
        self.name, self.model, self.optimizer, self.loss_of = name, model, optimizer, loss_of
        self.device, self.turns = next(model.parameters()).device, []
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)

    def take_turn(self, steps, config: TrainConfig, tokens: np.ndarray):
        """Make these updates as train.py does. Raises UserError if micro-batches do not divide a step."""
        place, shape = machine.rank_and_world_size(), (config.micro_batch, config.block_size)
        accumulation = data.accumulation(config.tokens_per_step, *shape, place[1])
        marks = [("", mark(self.device))]
        for step in steps:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            batches = machine.send_all(data.step_batches(tokens, config, step, *place), self.device)
            self.loss, _ = train_step(
                self.model, self.optimizer, self.scaler, config.grad_clip, self.loss_of, batches, accumulation,
                mark=lambda part: marks.append((part, mark(self.device))),
            )
        self.turns.append(dict.fromkeys(PARTS, 0.0))
        for (_, start), (part, end) in itertools.pairwise(marks):
            self.turns[-1][part] += seconds(start, end) / len(steps)

    def step_s(self) -> np.ndarray:
        """Seconds of a step in each turn."""
        return np.array([sum(parts.values()) for parts in self.turns])


def fresh_model(config: TrainConfig) -> GPT:
    """The weights that train.py starts from, in float32 on the CPU. Raises UserError for a wrong shape."""
    options = {f.name: value for f in fields(GPTConfig) if (value := getattr(config, f.name)) is not None}
    return checkpoint.open_model("scratch", {}, torch.float32, options, config.seed)[0]


def ours(config: TrainConfig, hardware: machine.Hardware, communicates=True) -> Contender:
    """What train.py trains. Without communication each process keeps its own gradients (no DDP)."""
    model = fresh_model(config).to(hardware.wide)
    model.gradient_checkpointing = config.gradient_checkpointing
    flops = config.max_steps * config.tokens_per_step * model.config.flops_per_token()
    choices = machine.prepare([model], config.compile, flops, hardware)
    parallel = machine.distribute(model, hardware.device) if communicates else model
    loss_of = functools.partial(training_loss, config, parallel, None, hardware.autocast)
    way = "compiled" if "compile on" in choices else "eager"
    name = f"ours, {way}{'' if communicates else ', no communication'}"
    return Contender(name, model, make_optimizer(model, config), loss_of, hardware.dtype == torch.float16)


def peer(directory: str, config: TrainConfig, hardware: machine.Hardware, compiled: bool) -> Contender:
    """A nanoGPT-like model with its own optimizer, started from our weights. Raises UserError."""
    path, device = Path(directory).resolve() / "model.py", hardware.device
    if not path.is_file():
        raise UserError(f"against: {path} does not exist; name a directory with a nanoGPT-like model.py")
    spec = importlib.util.spec_from_file_location(f"peer_{len(sys.modules)}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    options = {  # of its configure_optimizers: nanoGPT's, then those that only the authors' model has
        "weight_decay": config.weight_decay, "learning_rate": config.lr, "device_type": device.type,
        "betas": (config.beta1, config.beta2), "optimizer_name": "adamw", "rho": 0.04,
    }
    source = fresh_model(config)
    with contextlib.redirect_stdout(sys.stderr):  # it prints its size
        spec.loader.exec_module(module)
        known = {field.name for field in fields(module.GPTConfig)}
        model = module.GPT(module.GPTConfig(**{k: v for k, v in asdict(source.config).items() if k in known}))
        model.to(device).load_state_dict(source.state_dict(), strict=False)  # its head is tied to wte
        asked = inspect.signature(model.configure_optimizers).parameters
        optimizer = model.configure_optimizers(**{k: v for k, v in options.items() if k in asked})
    parallel = machine.distribute(torch.compile(model) if compiled else model, device)
    # nanoGPT computes in float32 on a CPU
    autocast = hardware.autocast if device.type == "cuda" else contextlib.nullcontext()

    def loss_of(x, y, is_last):
        parallel.require_backward_grad_sync = is_last
        with autocast:
            return parallel(x, y.contiguous())[1]  # it views y

    name = f"{path.parent.name}, {'compiled' if compiled else 'eager'}"
    return Contender(name, model, optimizer, loss_of, hardware.dtype == torch.float16)


# ---- the command


def report(contenders: list[Contender], config: TrainConfig):
    """Print the speed and parts of each, communication, and ratios to the better one of each pair of peers."""

    def spread(values, form: str) -> str:
        return f"{np.median(values):{form}} ({values.min():{form}} to {values.max():{form}})"

    heading = "".join(f"{part:>11s}" for part in PARTS)
    machine.say(f"\n{'':34s} tokens/s   lowest  highest  ms a step{heading}    loss")
    for each in contenders:
        step_s = each.step_s()
        speed = config.tokens_per_step / step_s
        numbers = f"{np.median(speed):9.0f}{speed.min():9.0f}{speed.max():9.0f}{1e3 * np.median(step_s):11.1f}"
        shares = "".join(f"{np.median([t[part] for t in each.turns] / step_s):11.1%}" for part in PARTS)
        machine.say(f"{each.name:34s}{numbers}{shares}{float(each.loss):8.4f}")
    first, *rest = contenders
    if machine.rank_and_world_size()[1] > 1:
        machine.say(f"communication: {spread(1 - rest.pop(0).step_s() / first.step_s(), '.1%')} of a step")
    for pair in zip(rest[::2], rest[1::2], strict=True):  # eager and compiled
        best = min(pair, key=lambda each: np.median(each.step_s()))
        machine.say(f"{first.name} / {best.name}: {spread(best.step_s() / first.step_s(), '.2f')} x the speed")


def bench(config: BenchConfig):
    """Train ours and the peers in turn, and report. Raises UserError."""
    hardware, processes = machine.pick(config.device, config.dtype), machine.rank_and_world_size()[1]
    device, shape = hardware.device, fresh_model(config).config
    config = replace(config, **asdict(shape))  # no None
    n_tokens = 10**6 + 2 * config.tokens_per_step + shape.block_size
    tokens = np.random.RandomState(config.seed).randint(shape.vocab_size, size=n_tokens)
    made_by = ", ".join(f"{key} {value}" for key, value in machine.versions(device).items())
    machine.say(f"{made_by}; {shape.num_params():,} parameters; {hardware.reason}\n")
    contenders = [ours(config, hardware)]
    contenders += [ours(config, hardware, communicates=False)] if processes > 1 else []
    for directory in filter(None, config.against.split(",")):
        contenders += [peer(directory, config, hardware, compiled) for compiled in (False, True)]
    for each in contenders:
        t0 = time.perf_counter()
        each.take_turn([0], config, tokens)
        first_s = time.perf_counter() - t0  # with compiling
        each.take_turn([1], config, tokens)
        each.turns.clear()
        peak = f"{peak_memory(device) / 1e6:,.0f} MB"
        machine.say(f"{each.name:34s} first step {first_s:6.1f} s, peak memory so far {peak}")
    products = []
    for i in range(2, 2 + config.rounds * config.steps, config.steps):
        for each in contenders:
            each.take_turn(range(i, i + config.steps), config, tokens)
        products.append(matmul_flops(device, hardware.dtype))
    report(contenders, config)
    speed = config.tokens_per_step / processes / np.median(contenders[0].step_s())  # of a process
    achieved, peaks = speed * shape.flops_per_token(), {"the best matrix product here": max(products)}
    if device.type == "cuda" and torch.cuda.get_device_name(device) in PEAK_FLOPS and hardware.dtype.itemsize == 2:
        peaks["the data sheet"] = PEAK_FLOPS[torch.cuda.get_device_name(device)]
    for name, peak in peaks.items():
        machine.say(f"MFU {achieved / peak:.1%} of {name}: {achieved / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s")


def main():
    config = configurator.load(BenchConfig)
    with machine.process_group():
        bench(config)


if __name__ == "__main__":
    configurator.run(main)
