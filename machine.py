"""The machine under a run: its device, the arithmetic it is good at, its processes, and what to record of it.

    python -c "import machine; print(machine.pick_dtype('auto', machine.pick_device('auto')))"
    torchrun --standalone --nproc_per_node=2 train.py config/demo.toml --device=cpu --micro_batch=16

The choices of arithmetic and of compiling come with their reason, which train.py prints.
"""

import contextlib
import importlib.util
import os
import platform
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from configurator import UserError


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1), or this process's place under torchrun, whose group it joins the first time it is called."""
    if "RANK" in os.environ and not dist.is_initialized():
        # the timeout has to outlast what rank 0 does alone, such as the attention analysis of a large model
        dist.init_process_group(timeout=timedelta(hours=2))  # gloo for tensors on the CPU, nccl on GPUs
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def pick_device(name: str) -> torch.device:
    """The device asked for, or the best there is; under torchrun each process takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} is not here: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def make_deterministic():
    """The same bits from the same command on a GPU as well; an operation that cannot give them raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(True)


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The arithmetic asked for, or the fastest that is safe on the device; and the reason."""
    if name == "float64" and device.type == "mps":
        raise UserError("dtype float64 is not here on mps; use --device=cpu or another dtype")
    if name != "auto":
        return getattr(torch, name), "as asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has it"
        return torch.float16, "this GPU has no bfloat16"
    if device.type == "cpu" and any("bf16" in key and value for key, value in cpu_capabilities().items()):
        return torch.bfloat16, "this CPU computes in it"
    return torch.float32, f"no fast bfloat16 known on this {device.type}"


def cpu_capabilities() -> dict:
    """What the CPU can do, as torch.cpu reports it; empty where this version of torch does not."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def pick_compile(choice: bool | str, device: torch.device) -> tuple[bool, str]:
    """Whether to torch.compile, and the reason."""
    if choice != "auto":
        return choice, "as asked for"
    if device.type != "cuda":
        return False, f"on {device.type} it takes a while to start; --compile=True for long runs"
    if importlib.util.find_spec("triton"):
        return True, "Triton is here"
    return False, "it needs Triton, which is not here"


@contextlib.contextmanager
def process_group():
    """Leave the group of processes at the end, together with the others if nothing went wrong."""
    try:
        yield
        if dist.is_initialized():
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def on_rank_0(function, *arguments):
    """function(*arguments), called by rank 0 alone while the others wait; its result, or UserError, everywhere."""
    rank, world_size = rank_and_world_size()
    result = [None]
    if rank == 0:
        try:
            result = [function(*arguments)]
        except UserError as error:
            result = [error]
        except OSError as error:
            result = [UserError(f"{error.filename or 'a file'}: {error.strerror}", exit_code=1)]
    if world_size > 1:
        dist.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


stop_signal = 0  # the first SIGTERM or SIGINT that this process received


def watch_signals():
    """From here on the first SIGTERM or SIGINT is only noted, to finish the step and save; a second ends at once."""

    def note(number, _):
        global stop_signal
        stop_signal = number
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, note)


def stop_requested() -> int:
    """The signal that asks the run to stop, 0 for none: the same answer on all processes, if one of them got it."""
    if rank_and_world_size()[1] == 1:
        return stop_signal
    flag = torch.tensor(stop_signal)  # on the CPU: a GPU does not have to wait for it
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag)


def versions(device: torch.device) -> dict:
    """What made a result: code, libraries, machine."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_capabilities().get('cpu_name', platform.machine())}, {os.cpu_count()} cores"
    return {
        "commit": commit or "unknown", "python": platform.python_version(), "torch": torch.__version__,
        "numpy": np.__version__, "device": f"{device.type}: {name}", "command": " ".join(sys.argv),
    }  # fmt: skip
