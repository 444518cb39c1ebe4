"""The machine under a run: its device, the arithmetic it is good at, its processes, and what to record of it.

    python -c "import machine; print(machine.pick_dtype('auto', machine.pick_device('auto')))"
    torchrun --standalone --nproc_per_node=2 train.py config/demo.toml --device=cpu --micro_batch=16

The choices of arithmetic and of compiling come with their reason, which train.py prints.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError

COMPILE_PAYS_FROM = 1e14  # FLOPs of a run on a CPU, above what docs/performance.md estimates: evaluation compiles too


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


def pick_compile(choice: bool | str, device: torch.device, flops: float) -> tuple[bool, str]:
    """Whether to torch.compile a run of so many floating point operations, and the reason."""
    if choice != "auto":
        return choice, "as asked for"
    if device.type == "cuda":
        found = importlib.util.find_spec("triton") is not None
        return found, "Triton is here" if found else "it needs Triton, which is not here"
    if device.type != "cpu":
        return False, f"not tried on {device.type} yet"
    if flops < COMPILE_PAYS_FROM:
        return False, "on a CPU it takes half a minute or more, too long for a short run"
    try:  # it needs a C++ compiler and Python's headers
        torch.compile(torch.sin)(torch.zeros(2))
    except Exception as error:  # whatever is missing, the run goes on without
        return False, f"it fails here ({type(error).__name__})"
    return True, "the run is long"


def pick_attention(model: torch.nn.Module, compiled: bool, device: torch.device, dtype: torch.dtype):
    """Choose what computes the attention of a GPT: torch's fused kernel, or matrix products.

    On a CPU in bfloat16, compiled matrix products take about half the time of the fused kernel and its slow backward
    pass, but keep B x heads x T x T numbers a layer (from some length on too much) and round them to bfloat16.
    """
    products = compiled and device.type == "cpu" and dtype == torch.bfloat16 and model.config.block_size <= 512
    for block in model.transformer.h:
        block.attn.fused = not products


def keep_freed_memory(device: torch.device):
    """On a CPU, let glibc keep what is freed for the next step, which needs as much again; elsewhere do nothing.

    It gives large blocks back to the system, and getting them anew, page by page, took a tenth to a third of a step.
    The price: this process hardly shrinks any more. The numbers are those of malloc.h.
    """
    if device.type != "cpu":
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such function here
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: only larger blocks are asked of the system one by one. Before glibc 2.35, 2**25 at most.
        if mallopt(-3, 2**30) or mallopt(-3, 2**25):
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory up to this is kept


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device. For a GPU the CPU does not wait: it goes on to prepare the next batch."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def distribute(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model, in DDP if there are more processes than one: its backward pass averages the gradients over them."""
    if rank_and_world_size()[1] == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


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


# ----------------------------------------------------------------------------------------------------------
# Time, memory, and what the device could do at best


# Dense bf16 FLOP/s from the makers' data sheets, by the whole name that torch gives the device. A slice of a GPU or a
# laptop's has another name and another peak: what is not here is held against a matrix product measured beside it.
PEAK_FLOPS = {
    r"NVIDIA B200": 2250e12,
    r"NVIDIA (H200|GH200 480GB|H100 80GB HBM3)": 989.4e12,
    r"NVIDIA H100 NVL": 835e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA A100-(SXM|PCI).*-[48]0GB|NVIDIA A100 80GB PCIe": 312e12,
    r"NVIDIA A40": 149.7e12,
    r"NVIDIA A30": 165e12,
    r"NVIDIA A10": 125e12,
    r"NVIDIA RTX A6000": 154.8e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA GeForce RTX 4090": 165.2e12,
    r"NVIDIA GeForce RTX 3090": 71e12,
    r"AMD Instinct MI300X": 1307.4e12,
}


def mark(device: torch.device):
    """A moment in the device's own time; the CPU does not wait for it."""
    events = {"cuda": torch.cuda.Event, "mps": torch.mps.Event}
    if device.type not in events:
        return time.perf_counter()
    event = events[device.type](enable_timing=True)
    event.record()
    return event


def seconds(start, end) -> float:
    """Between two marks, after the device has passed the second."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most in tensors at once, on a CPU the most that this process ever had, on MPS what it has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def known_peak(name: str) -> float | None:
    """FLOP/s of a device by its name; None if the table does not have it."""
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    """FLOP/s of the product of two n x n matrices, the best of three, for some n."""
    found = {}
    for n in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        marks = [mark(device)]
        for _ in range(3):
            torch.mm(a, b)
            marks.append(mark(device))
        found[n] = 2 * n**3 / min(itertools.starmap(seconds, itertools.pairwise(marks)))
    return found
