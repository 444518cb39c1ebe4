"""One update of the weights, without waiting for the device: fused AdamW, a clipped gradient, a guard against NaN.

    python train.py config/demo.toml --grad_clip=0.5 --weight_decay=0 --out_dir=out/clipped
    python bench.py config/demo.toml --steps=5    # its share of a step

A gradient that is not finite must never reach the weights, yet asking for it after each step would make the CPU wait
for a GPU each time, and the GPU then for the CPU. So the optimizer's kernel itself reads the answer and skips this
update and all later ones; `check_finite` finds out, at the latest before anything is evaluated, logged or saved.
"""

import math
from pathlib import Path

import torch

import storage
from configurator import UserError
from model import GPT


def make_optimizer(model: GPT, config) -> torch.optim.AdamW:
    """AdamW as configured (TrainConfig), one kernel for all parameters."""
    optimizer = torch.optim.AdamW(
        model.param_groups(config.weight_decay), lr=config.lr, betas=(config.beta1, config.beta2), fused=True
    )
    optimizer.found_inf = torch.zeros((), device=model.transformer.wte.weight.device)  # 1: AdamW's kernel does nothing
    return optimizer


def update_weights(model: GPT, optimizer: torch.optim.AdamW, scaler, grad_clip: float) -> torch.Tensor:
    """Clip the gradient to the norm grad_clip (0: do not), update, forget the gradient; its norm, on the device.

    After a norm that is not finite no update is made any more. With a GradScaler (float16) only that one is left out:
    the scaler then tries a smaller scale.
    """
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    if not scaler.is_enabled():  # which sets found_inf itself
        optimizer.found_inf = torch.maximum(optimizer.found_inf, (~grad_norm.isfinite()).float())
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


def check_finite(grad_norms: list[torch.Tensor], step: int, scaler, out_dir: Path):
    """Wait for the last updates before `step`; raise UserError, exit code 1, if the norm of one was not finite."""
    norms = torch.stack(grad_norms).cpu()
    bad = (~norms.isfinite()).nonzero()
    if len(bad) and not (scaler.is_enabled() and scaler.get_scale() > 1):  # it can still try a smaller scale
        kept, first = storage.steps(out_dir), int(bad[0])
        raise UserError(
            f"step {step - len(norms) + first}: non-finite gradient norm ({norms[first].item()}), so the update was "
            f"not made; last good checkpoint: {kept[-1] if kept else 'none'}; lower lr or warm up longer",
            exit_code=1,
        )
