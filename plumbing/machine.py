"""The machine under a run: its device, its arithmetic, its memory, and what to record of it.

    python -c "from plumbing import machine; print(machine.pick('auto', 'auto'))"
    python train.py config/demo.toml --device=cpu --dtype=float32 --compile=False

Each automatic choice comes with its reason, which train.py prints.
"""

import contextlib
import ctypes
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from plumbing.configurator import UserError

# FLOPs of a run on a CPU (docs/performance.md): from here one block is compiled, then the whole model
COMPILE_PAYS_FROM, WHOLE_PAYS_FROM = 5e13, 2e14
CPU = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may lack it


def pick_device(name: str) -> torch.device:
    """The device asked for, or the best there is. Under torchrun each process takes its own GPU."""
    if name == "auto":
        best = torch.accelerator.current_accelerator(check_available=True)
        name = best.type if best else "cpu"
    number = int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None
    try:
        device = torch.device(name, number)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@dataclass
class Hardware:
    """Where a run computes, and in which arithmetic."""

    device: torch.device
    dtype: torch.dtype  # of the fast arithmetic
    master: torch.dtype  # of master weights and optimizer: float32, or float64 where that is set
    autocast: contextlib.AbstractContextManager
    reason: str


def pick(device_name: str, dtype_name: str, deterministic: bool = False) -> Hardware:
    """The device and arithmetic that are set, or the fastest that are safe. Raises UserError."""
    device = pick_device(device_name)
    if deterministic:  # an operation that cannot give the same bits again raises RuntimeError
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it
        torch.use_deterministic_algorithms(True)
    dtype = getattr(torch, dtype_name, torch.float32)
    if dtype_name == "auto" and device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bf16 else torch.float16
    elif dtype_name == "auto" and device.type == "cpu":
        has_bf16 = any("bf16" in key and value for key, value in CPU.items())
        dtype = torch.bfloat16 if has_bf16 else torch.float32
    mixed = dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(device.type, dtype) if mixed else contextlib.nullcontext()
    master = torch.float64 if dtype == torch.float64 else torch.float32
    reason = f"{device}, {dtype} ({'fastest here' if dtype_name == 'auto' else 'as set'})"
    return Hardware(device, dtype, master, autocast, reason)


def pick_compile(choice: bool | str, device: torch.device, flops: float) -> tuple[bool | str, str]:
    """Whether to torch.compile a run of so many floating-point operations, or "blocks", and why."""
    if choice != "auto":
        return choice, "as set"
    if device.type == "mps" or (device.type == "cpu" and flops < COMPILE_PAYS_FROM):
        return False, "it would take longer than it saves"
    try:  # on a GPU it needs Triton, and everywhere a C++ compiler and Python's headers
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # whatever is missing, the run works without
        return False, f"it fails on this machine ({type(error).__name__})"
    short = device.type == "cpu" and flops < WHOLE_PAYS_FROM
    return "blocks" if short else True, "it works on this machine"


def prepare(models: list, compile_choice: bool | str, flops: float, hardware: Hardware) -> str:
    """Move models to the device and compile them if that pays. Returns the choices in words."""
    compiled, reason = pick_compile(compile_choice, hardware.device, flops)
    if hardware.device.type == "cpu":
        keep_freed_memory()
    torch.compiler.reset()  # earlier models of a recipe must not use up the recompilations allowed
    for model in models:
        model.to(hardware.device)
        if compiled:  # in place: the parameters keep their names
            (model.compile_blocks if compiled == "blocks" else model.compile)(dynamic=False)
    what = {"blocks": "on, one block for all", True: "on", False: "off"}[compiled]
    return f"{hardware.reason}; torch.compile {what} ({reason})"


def keep_freed_memory():
    """Make glibc keep freed memory for the next step instead of returning it to the system.

    Getting it anew, page by page, took up to a third of a step.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD (-3): larger blocks are mapped alone. Before glibc 2.35 at most 2**25
        if mallopt(-3, 2**30) or mallopt(-3, 2**25):
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep freed memory up to this


def check_finite(optimizer, scaler, kept: list[Path]):
    """Wait for the device. UserError, exit code 1, if a gradient norm was not finite."""
    # float16 tries smaller scales first, down to 1
    failed = scaler.get_scale() < 1 if scaler.is_enabled() else optimizer.found_inf
    if failed:
        # the updates made, without those skipped; Muon keeps no counter
        made = int(next((s["step"] for s in optimizer.state.values() if "step" in s), 0))
        raise UserError(
            f"step {made}: non-finite gradient norm, so no update was made since; "
            f"last good checkpoint: {kept[-1] if kept else 'none'}; lower lr or warm up longer",
            exit_code=1,
        )


def versions(device: torch.device) -> dict:
    """The code, libraries and machine that make a result."""
    here = shlex.quote(str(Path(__file__).parent))
    failed, commit = subprocess.getstatusoutput(f"git -C {here} describe --always --dirty --abbrev=12")
    name = f"{CPU.get('cpu_name', platform.machine())}, {os.cpu_count()} cores"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "commit": "unknown" if failed else commit, "device": f"{device.type}: {name}",
        "python": platform.python_version(), "torch": torch.__version__,
        "processes": int(os.environ.get("WORLD_SIZE", 1)), "command": shlex.join(sys.argv),
    }
