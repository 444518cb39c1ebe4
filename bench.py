"""Measure speed: a training step and its parts, beside peers in the same run; how fast two checkpoints write.

    python bench.py config/demo.toml                                     # what train.py would do on this machine
    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --tokens_per_step=2048 --against=../nanoGPT
    python bench.py --reference=out/demo/reference --target=out/demo/inherited-4         # tokens a second, batch 1
    torchrun --standalone --nproc_per_node=2 bench.py config/demo.toml --micro_batch=16  # the share of communication

The settings are train.py's, and so is every operation of a step: after as many steps the weights are the same, bit
for bit (tests/test_bench.py). The tokens are random: no data is needed, and no speed depends on them. Contenders take
turns on the same batches, so that a machine that slows down slows them all; what is printed are medians over turns.
"""

import contextlib
import functools
import importlib.util
import inspect
import itertools
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from plumbing import checkpoint
from plumbing import configurator
import data
from plumbing import machine
from plumbing import storage
from plumbing.configurator import UserError
from model import GPT, GPTConfig
from objective import learning_rate
from train import TrainConfig
from update import make_optimizer, update_weights

PARTS = ("data", "forward", "backward", "optimizer")  # of a step; data is all that is none of the others


@dataclass
class BenchConfig(TrainConfig):
    """Measure the training of one GPT-2 of fresh weights, set as for train.py; or how fast two checkpoints write."""

    against: str = ""  # directories with a nanoGPT-like model.py, comma between: train these too, in turn
    steps: int = 3  # updates in a turn
    rounds: int = 7  # turns of each contender, after two updates to warm up
    reference: str = ""  # a checkpoint, a run directory or a name on the hub; and
    target: str = ""  # another: measure these two instead
    new_tokens: int = 64  # that each of them writes in a turn

    def __post_init__(self):
        super().__post_init__()
        for key in ("steps", "rounds", "new_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} is {getattr(self, key)}, expected at least 1")
        if bool(self.reference) != bool(self.target):
            raise UserError("give --reference and --target, or neither")
        if self.init_from != "scratch" or self.teacher or self.dropout:
            raise UserError("bench.py trains fresh weights without a teacher and without dropout")


# ----------------------------------------------------------------------------------------------------------
# Training


class Contender:
    """A model in training, and the seconds of each part of a step in each of its turns: turns[i][part].

    loss_of(x, y, last_micro_step) is its loss, a mean; update() ends a step.
    """

    def __init__(self, name: str, model, loss_of, optimizer, update, autocast, scaler):
        self.name, self.model, self.loss_of = name, model, loss_of
        self.optimizer, self.update, self.autocast, self.scaler = optimizer, update, autocast, scaler
        self.turns = []

    def take_turn(self, numbers, config: TrainConfig, tokens: np.ndarray, T: int, device: torch.device):
        """Make the updates of these numbers, each as train.py does it, with a mark after each part."""
        rank, processes = machine.rank_and_world_size()
        marks = [("", machine.mark(device))]
        for number in numbers:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(config, number)
            starts = data.train_starts(len(tokens), T, config.seed, number, config.tokens_per_step // T)
            starts = starts.reshape(-1, processes, config.micro_batch)[:, rank]
            self.loss = 0.0
            for micro_step, micro_starts in enumerate(starts, start=1):
                x, y = (machine.send(t, device) for t in data.windows(tokens, micro_starts, T))  # (B, T) each
                marks.append(("data", machine.mark(device)))
                with self.autocast:
                    loss = self.loss_of(x, y, micro_step == len(starts)) / len(starts)
                marks.append(("forward", machine.mark(device)))
                self.scaler.scale(loss).backward()
                marks.append(("backward", machine.mark(device)))
                self.loss = self.loss + loss.detach()
            self.update()
            marks.append(("optimizer", machine.mark(device)))
        parts = dict.fromkeys(PARTS, 0.0)
        for (_, start), (part, end) in itertools.pairwise(marks):
            parts[part] += machine.seconds(start, end) / len(numbers)
        self.turns.append(parts)

    def step_s(self) -> np.ndarray:
        """Seconds of a step in each turn."""
        return np.array([sum(parts.values()) for parts in self.turns])


def ours(config: TrainConfig, shape: GPTConfig, dtype: torch.dtype, device, compiled: bool, talks=True) -> Contender:
    """What train.py trains: the same model, optimizer and arithmetic. If it does not talk, gradients are not shared."""
    torch.manual_seed(config.seed)
    model = GPT(shape).to(torch.float64 if dtype == torch.float64 else torch.float32).to(device)
    model.gradient_checkpointing = config.gradient_checkpointing
    machine.pick_attention(model, compiled, device, dtype)
    if compiled:
        model.compile(dynamic=False)
    mixed = dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(device.type, dtype) if mixed else contextlib.nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizer = make_optimizer(model, config)
    processes = machine.rank_and_world_size()[1]
    parallel = machine.distribute(model, device)

    def loss_of(x, y, last_micro_step):
        silent = processes > 1 and not (talks and last_micro_step)
        with parallel.no_sync() if silent else contextlib.nullcontext():
            return parallel(x, y)

    def update():
        update_weights(model, optimizer, scaler, config.grad_clip)

    name = f"ours, {'compiled' if compiled else 'eager'}{'' if talks else ', silent'}"
    return Contender(name, model, loss_of, optimizer, update, autocast, scaler)


def peer_module(directory: str):
    """The model.py of a nanoGPT-like checkout. Raises UserError."""
    path = Path(directory) / "model.py"
    if not path.is_file():
        raise UserError(f"against: {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"peer_{len(sys.modules)}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # for what stands beside it
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"against: {path} cannot be imported: {error}") from None
    finally:
        sys.path.pop(0)
    return module


def peer(directory: str, config: TrainConfig, shape: GPTConfig, device: torch.device, compiled: bool) -> Contender:
    """A peer's model and optimizer as nanoGPT's train.py runs them, from our weights: on CUDA in half precision, else
    in float32; the fused optimizer only where its own configure_optimizers asks for it.
    """
    module = peer_module(directory)
    known = {field.name for field in fields(module.GPTConfig)}
    with contextlib.redirect_stdout(sys.stderr):  # it prints its size
        model = module.GPT(module.GPTConfig(**{k: v for k, v in asdict(shape).items() if k in known})).to(device)
        torch.manual_seed(config.seed)
        model.load_state_dict(GPT(shape).state_dict(), strict=False)  # the head is tied to wte, which is there
        on_gpu = device.type == "cuda"
        arguments = {
            "weight_decay": config.weight_decay, "learning_rate": config.lr, "betas": (config.beta1, config.beta2),
            "device_type": "cuda" if on_gpu else "cpu", "optimizer_name": "adamw", "rho": 0.04,
        }  # fmt: skip
        asked = inspect.signature(model.configure_optimizers).parameters
        optimizer = model.configure_optimizers(**{key: arguments[key] for key in asked})
    half = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float16
    autocast = torch.autocast("cuda", half) if on_gpu else contextlib.nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu and half == torch.float16)
    trained = torch.compile(model) if compiled else model

    def update():
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    name = f"{Path(directory).name}, {'compiled' if compiled else 'eager'}"

    def loss_of(x, y, _):
        return trained(x.contiguous(), y.contiguous())[1]

    return Contender(name, model, loss_of, optimizer, update, autocast, scaler)


def training(config: BenchConfig, say):
    """Train ours and the peers in turn; print what came out."""
    device = machine.pick_device(config.device)
    dtype, reason = machine.pick_dtype(config.dtype, device)
    machine.keep_freed_memory(device)
    asked = {f.name: value for f in fields(GPTConfig) if (value := getattr(config, f.name)) is not None}
    try:
        shape = GPTConfig(**asked)
    except ValueError as error:
        raise UserError(str(error)) from None
    T, flops, step_tokens = shape.block_size, shape.flops_per_token(), config.tokens_per_step
    processes = machine.rank_and_world_size()[1]
    data.accumulation(step_tokens, config.micro_batch, T, processes)  # or is it no whole number?
    compiled, compile_reason = machine.pick_compile(config.compile, device, flops * step_tokens * config.max_steps)
    tokens = np.random.RandomState(config.seed).randint(shape.vocab_size, size=10**6 + 2 * step_tokens + T)
    makers = [functools.partial(ours, config, shape, dtype, device, compiled)]
    if processes > 1:
        makers.append(functools.partial(makers[0], talks=False))
    peers = [directory for directory in config.against.split(",") if directory]
    for directory in peers:
        makers += [functools.partial(peer, directory, config, shape, device, on) for on in (False, True)]
    say(
        f"{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, T {T}, vocabulary {shape.vocab_size}: "
        f"{shape.num_params() / 1e6:.1f} M parameters, {flops / 1e6:.1f} MFLOPs a token\n"
        f"a step: {step_tokens} tokens; {config.micro_batch} sequences at a time on each of {processes} process(es)\n"
        f"{str(dtype).removeprefix('torch.')}: {reason}; torch.compile {'on' if compiled else 'off'}: {compile_reason}"
        f"\n\n{'':32s}first step, s   peak memory, MB"
    )

    contenders, cuda = [], device.type == "cuda"
    for make in makers:
        held = torch.cuda.memory_allocated(device) if cuda else 0  # by the contenders before it
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        contender, t0 = make(), time.perf_counter()
        contender.take_turn([0], config, tokens, T, device)
        first_s = time.perf_counter() - t0  # with compiling
        contender.take_turn([1], config, tokens, T, device)
        contender.turns.clear()
        # a process has one peak on a CPU: after the first contender it would say nothing
        memory = f"{(machine.peak_memory(device) - held) / 1e6:18.0f}" if cuda or not contenders else ""
        say(f"{contender.name:32s}{first_s:13.1f}{memory}")
        contenders.append(contender)

    peak, products = machine.known_peak(torch.cuda.get_device_name(device)) if cuda else None, []
    for i in range(config.rounds):
        for contender in contenders:
            contender.take_turn(range(2 + i * config.steps, 2 + (i + 1) * config.steps), config, tokens, T, device)
        products.append(machine.matmul_flops(device, dtype))

    say(f"\n{'':32s}tokens/s    lowest   highest  ms a step  {'  '.join(f'{part:>9s}' for part in PARTS)}    loss")
    for contender in contenders:
        step_s = contender.step_s()
        speed = np.sort(step_tokens / step_s)
        shares = [np.median([turn[part] for turn in contender.turns] / step_s) for part in PARTS]
        say(
            f"{contender.name:32s}{np.median(speed):8.0f}  {speed[0]:8.0f}  {speed[-1]:8.0f}  "
            f"{1e3 * np.median(step_s):9.1f}  "
            + "  ".join(f"{share:9.1%}" for share in shares) + f"{float(contender.loss):8.4f}"
        )  # fmt: skip
    say("")
    first, rest = contenders[0], contenders[1:]
    if processes > 1:
        share = 1 - rest.pop(0).step_s() / first.step_s()
        say(f"communication: {np.median(share):.1%} of a step (turns: {share.min():.1%} to {share.max():.1%})")
    for pair in zip(rest[::2], rest[1::2], strict=True):
        other = min(pair, key=lambda contender: np.median(contender.step_s()))
        ratio = other.step_s() / first.step_s()
        say(f"{first.name} / {other.name}: {np.median(ratio):.2f} x (turns: {ratio.min():.2f} to {ratio.max():.2f})")
    achieved = np.median(step_tokens / processes * flops / first.step_s())
    best = {n: np.median([each[n] for each in products]) for n in products[0]}
    against = f"the best median of {', '.join(f'{v / 1e9:,.0f} at n = {n}' for n, v in best.items())}, measured here"
    if peak:
        against = f"the data sheet's bf16 peak; products of {dtype}: {against}"
    peak = peak or max(best.values())
    say(f"MFU {achieved / peak:.1%}: {achieved / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s a process, {against}")


# ----------------------------------------------------------------------------------------------------------
# Writing


def writers(path: Path, dtype: torch.dtype, device: torch.device, new_tokens: int) -> dict:
    """Ways to continue a prompt (1, T) by so many of the likeliest tokens: ours and, where it is, transformers'."""
    model = checkpoint.load_model(path, dtype).to(device)
    found = {"ours": lambda idx: model.generate(idx, new_tokens, temperature=0)}
    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        found["transformers, cached"] = lambda idx: theirs.generate(idx, attention_mask=torch.ones_like(idx), **length)
    return found


def writing(config: BenchConfig, say):
    """Let reference and target write in turn, one sequence each; print tokens a second and their ratio."""
    device = machine.pick_device(config.device)
    dtype, reason = machine.pick_dtype(config.dtype, device)
    machine.keep_freed_memory(device)
    paths = [storage.resolve(name) for name in (config.reference, config.target)]
    shapes = [checkpoint.read_config(path) for path in paths]
    T = min(shape.block_size for shape in shapes)
    if T <= config.new_tokens:
        raise UserError(f"new_tokens is {config.new_tokens}, expected less than block_size {T}")
    V = min(shape.vocab_size for shape in shapes)
    prompt = torch.randint(V, (1, min(16, T - config.new_tokens)), generator=torch.Generator().manual_seed(config.seed))
    prompt = prompt.to(device)
    made_by = [writers(path, dtype, device, config.new_tokens) for path in paths]
    say(
        f"{shapes[0].n_layer} layers against {shapes[1].n_layer}; {prompt.shape[1]} tokens of prompt, "
        f"{config.new_tokens} written; {str(dtype).removeprefix('torch.')}: {reason}\n\n"
        f"{'tokens/s':32s}reference    target   ratio, turns"
    )
    for way in made_by[0]:
        speeds = []  # (turns, 2)
        for _ in range(config.rounds + 1):
            speeds.append([])
            for each in made_by:
                start = machine.mark(device)
                each[way](prompt)
                speeds[-1].append(config.new_tokens / machine.seconds(start, machine.mark(device)))
        speeds = np.array(speeds[1:])  # the first warms up
        ratio = speeds[:, 1] / speeds[:, 0]
        medians = np.median(speeds, axis=0)
        say(
            f"{way:32s}{medians[0]:9.1f}  {medians[1]:8.1f}   {np.median(ratio):.2f} x, {ratio.min():.2f} to "
            f"{ratio.max():.2f}"
        )


def main():
    config = configurator.load(BenchConfig)
    with machine.process_group():
        rank, _ = machine.rank_and_world_size()
        say = functools.partial(print, flush=True) if rank == 0 else lambda _: None
        made_by = machine.versions(machine.pick_device(config.device))
        say(
            f"python {made_by['command']}\n{made_by['device']}, {torch.get_num_threads()} thread(s); "
            f"torch {made_by['torch']}; commit {made_by['commit']}; seed {config.seed}"
        )
        (writing if config.reference else training)(config, say)


if __name__ == "__main__":
    configurator.run(main)
