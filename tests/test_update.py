"""update.py and the loop around it: no update after a gradient that is not finite, and no waiting in a step."""

import math

import pytest
import torch
from conftest import random_model
from test_train import equal, run
from torch.utils._python_dispatch import TorchDispatchMode

from plumbing import storage
import train
from plumbing.configurator import UserError
from train import TrainConfig
from update import check_finite, make_optimizer, update_weights

OFF = torch.amp.GradScaler("cpu", enabled=False)


def updated(model, optimizer, poison=None) -> torch.Tensor:
    """One update from a gradient of ones, its first element replaced by `poison`; the norm."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if poison is not None:
        model.transformer.wpe.weight.grad[0, 0] = poison
    return update_weights(model, optimizer, OFF, grad_clip=1.0)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_nothing_is_changed_after_it(poison):
    model = random_model(dtype=torch.float32)
    optimizer = make_optimizer(model, TrainConfig(lr=0.1))
    norms = [updated(model, optimizer)]
    before = [p.detach().clone() for p in model.parameters()]
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    norms += [updated(model, optimizer, poison), updated(model, optimizer)]
    for p, weights, state in zip(model.parameters(), before, moments, strict=True):
        assert torch.equal(p, weights)
        assert all(torch.equal(optimizer.state[p][key], state[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    with pytest.raises(UserError, match="step 8: non-finite gradient norm"):  # the second of the three before step 10
        check_finite(norms, 10, OFF, storage.Path("nowhere"))


def test_without_a_mishap_the_guard_changes_no_bit():
    ours, plain = random_model(dtype=torch.float32), random_model(dtype=torch.float32)
    guarded = make_optimizer(ours, TrainConfig())
    optimizer = torch.optim.AdamW(plain.param_groups(0.1), lr=TrainConfig.lr, betas=(0.9, 0.95), fused=True)
    for _ in range(3):
        updated(ours, guarded)
        for parameter in plain.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def poisoned(monkeypatch, bad_step: int):
    """From now on the gradient of update `bad_step` is not finite, those of the others are."""
    clip, made = torch.nn.utils.clip_grad_norm_, []

    def poison(parameters, max_norm):
        parameters = list(parameters)
        if len(made) == bad_step:
            parameters[0].grad[0, 0] = math.nan
        made.append(1)
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poison)
    return made


@pytest.mark.parametrize(
    "intervals",
    [{"log_interval": 6}, {"eval_interval": 6, "log_interval": 99}, {"save_interval": 6, "log_interval": 99}],
)
def test_a_bad_gradient_is_found_with_its_step_before_anything_is_logged_evaluated_or_saved(
    data_dir, tmp_path, monkeypatch, intervals
):
    made = poisoned(monkeypatch, bad_step=3)
    with pytest.raises(UserError, match="step 3: non-finite gradient norm \\(nan\\)") as caught:
        run(data_dir, tmp_path / "run", **intervals)
    assert caught.value.exit_code == 1 and len(made) == 6 and storage.steps(tmp_path / "run") == []


def test_a_stop_right_after_a_bad_gradient_saves_nothing(data_dir, tmp_path, monkeypatch):
    made = poisoned(monkeypatch, bad_step=3)
    monkeypatch.setattr(train.machine, "stop_requested", lambda: 15 if len(made) == 5 else 0)
    with pytest.raises(UserError, match="step 3: non-finite"):
        run(data_dir, tmp_path / "run", log_interval=99)
    assert storage.steps(tmp_path / "run") == []


class Waits(TorchDispatchMode):
    """Counts what makes the CPU wait for a GPU: a tensor's value read as a number, or copied to the CPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("log_interval,per_log", [(99, False), (1, True)])
def test_more_steps_read_no_more_numbers_unless_they_are_logged(data_dir, tmp_path, log_interval, per_log):
    counts = []
    for max_steps in (4, 8):
        settings = {"max_steps": max_steps, "eval_interval": 99, "save_interval": 99, "log_interval": log_interval}
        with Waits() as waits:
            run(data_dir, tmp_path / f"{max_steps}", **settings)
        counts.append(waits.count)
    assert (counts[1] > counts[0]) is per_log


def test_gradient_checkpointing_changes_no_bit_and_keeps_less(data_dir, tmp_path):
    plain, frugal = (run(data_dir, tmp_path / f"{on}", max_steps=4, gradient_checkpointing=on) for on in (False, True))
    assert equal(plain, frugal)
    kept = []
    for frugal in (False, True):
        model, found = random_model(n_layer=6), {}

        def keep(tensor, found=found):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.gradient_checkpointing = frugal
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(torch.zeros(4, 16, dtype=torch.long), torch.zeros(4, 16, dtype=torch.long))
        kept.append(sum(found.values()) - sum(p.numel() * p.element_size() for p in model.parameters()))
        loss.backward()
    assert kept[1] < kept[0] / 3
