"""The processes of a run: torchrun's group, work for one of them, messages, the signals that stop a run.

    torchrun --standalone --nproc_per_node=2 train.py config/demo.toml --device=cpu --micro_batch=16
    kill -TERM PID      # saves a checkpoint and stops; a second signal stops at once

A single process has rank 0 and needs no group.
"""

import contextlib
import ctypes
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from plumbing import configurator
from plumbing.configurator import UserError

# ---- processes


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1), or this process's place under torchrun, whose group it joins on the first call."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        with contextlib.suppress(OSError, AttributeError):  # Linux: stop when torchrun itself was killed
            ctypes.CDLL(None).prctl(1, signal.SIGHUP)  # PR_SET_PDEATHSIG
        # the timeout has to outlast what rank 0 does alone, such as the attention analysis of a large model
        dist.init_process_group(timeout=timedelta(hours=2))  # gloo for CPU tensors, nccl for GPU tensors
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def distribute(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model, in DDP if there are several processes: then backward averages the gradients over them."""
    if rank_and_world_size()[1] == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def say(text: str):
    """Print on rank 0."""
    if rank_and_world_size()[0] == 0:
        configurator.say(text)


@contextlib.contextmanager
def process_group():
    """Leave the process group at the end, together with the others if nothing failed."""
    try:
        yield
        if dist.is_initialized():
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def on_rank_0(function, *arguments):
    """function(*arguments), called by rank 0 alone. Its result, UserError or OSError, on every rank."""
    rank, world_size = rank_and_world_size()
    result = [None]
    if rank == 0:
        try:
            result = [function(*arguments)]
        except (UserError, OSError) as error:
            result = [error]
    if world_size > 1:
        dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


# ---- signals

stop_signal = 0  # the first signal that asked this process to stop


def watch_signals():
    """From now on a first signal is noted, to save and stop. A second ends the process at once."""
    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # Slurm: USR1

    def note(number, _):
        global stop_signal
        stop_signal = number
        for each in watched:
            if each != signal.SIGHUP:  # which comes once for each thread of a killed torchrun
                signal.signal(each, signal.SIG_DFL)

    for each in watched:
        signal.signal(each, note)


def stop_requested() -> int:
    """The signal that asks the run to stop, or 0. All processes get the same answer."""
    if rank_and_world_size()[1] == 1:
        return stop_signal
    flag = torch.tensor(stop_signal)  # on the CPU, so that no GPU has to be waited for
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag)
