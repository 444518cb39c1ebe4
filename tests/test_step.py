"""What a step of train.py is made of: schedule, distillation, one update, the guard against NaN."""

import contextlib
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, call_script, options, random_model, read_metrics
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_train import equal
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train
from plumbing import machine, pretrained, storage
from plumbing.configurator import UserError
from train import TrainConfig, make_optimizer, train_step


def run(data_dir, out_dir, **changes):
    return train.train(train.TrainConfig(data_dir=str(data_dir), out_dir=str(out_dir), **TINY | changes))


def shape_of_source():
    return dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"))


# ---- the schedule


@given(st.integers(1, 200), st.floats(0, 1), st.integers(0, 50))
def test_wsd_warms_up_is_stable_and_decays_linearly(max_steps, decay_fraction, warmup_steps):
    stable = max_steps - round(decay_fraction * max_steps)
    warmup_steps = min(warmup_steps, stable)
    config = train.TrainConfig(
        schedule="wsd", lr=1.0, min_lr=0.1, warmup_steps=warmup_steps, max_steps=max_steps,
        decay_fraction=decay_fraction,
    )  # fmt: skip
    rates = [train.learning_rate(config, step) for step in range(max_steps)]
    assert rates[:warmup_steps] == [(step + 1) / warmup_steps for step in range(warmup_steps)]
    assert rates[warmup_steps : stable + 1] == [1.0] * len(rates[warmup_steps : stable + 1])
    if max_steps - stable > 1:
        assert rates[-1] == pytest.approx(0.1)
        falls = [a - b for a, b in zip(rates[stable:], rates[stable + 1 :], strict=False)]
        assert falls == pytest.approx([0.9 / (max_steps - 1 - stable)] * len(falls))


def test_a_longer_run_is_the_same_until_it_decays(data_dir, tmp_path):
    """So the stable checkpoint of a short run is one of the longer run too."""
    changes = {"schedule": "wsd", "eval_interval": 5, "save_interval": 5}
    short = tmp_path / "short"
    run(data_dir, short, max_steps=10, decay_fraction=0.5, keep_checkpoints=1, **changes)
    assert [path.name for path in storage.steps(short)] == ["step-00000005", "step-00000010"]  # pruned, but for stable
    stable = short / "step-00000005"
    assert (stable / "val_losses.json").exists()
    run(data_dir, tmp_path / "long", max_steps=20, decay_fraction=0.5, **changes)
    for name in ("model", "optimizer"):
        theirs, ours = (load_file(path / f"{name}.safetensors") for path in (tmp_path / "long/step-00000005", stable))
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)


# ---- distillation


@given(st.integers(0, 9), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.5, 1.0, 4.0]))
def test_the_loss_is_its_definition(seed, alpha, tau):
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, 2, 5, 7, generator=generator, dtype=torch.float64) * 3
    targets = torch.randint(7, (2, 5), generator=generator)
    expected = 0.0
    for b in range(2):
        for t in range(5):
            p = [math.exp(v / tau) for v in teacher[b, t].tolist()]
            q = [math.exp(v / tau) for v in logits[b, t].tolist()]
            kl = sum(pi / sum(p) * math.log(pi / sum(p) / (qi / sum(q))) for pi, qi in zip(p, q, strict=True))
            cross_entropy = -torch.log_softmax(logits[b, t], 0)[targets[b, t]].item()
            expected += (alpha * cross_entropy + (1 - alpha) * tau**2 * kl) / 10
    found = train.distillation_loss(logits, targets, teacher, alpha, tau)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_a_teacher_equal_to_the_student_gives_kl_zero_and_the_plain_gradient():
    torch.manual_seed(0)
    idx, targets = torch.randint(65, (2, 2, 16))
    plain, taught = random_model(), random_model()
    F.cross_entropy(plain(idx).flatten(0, 1), targets.flatten()).backward()
    with torch.no_grad():
        teacher_logits = random_model()(idx)
    divergence = train.distillation_loss(taught(idx), targets, teacher_logits, 0.0, 2.0)
    assert abs(divergence.item()) < 1e-14
    (train.distillation_loss(taught(idx), targets, teacher_logits, 0.25, 2.0) / 0.25).backward()
    for p, q in zip(plain.parameters(), taught.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() < 1e-12 and p.grad.abs().max() > 1e-6


def test_alpha_one_is_plain_training_bit_for_bit_and_half_is_not(reference, data_dir, tmp_path):
    settings = {"max_steps": 6, "save_interval": 3}
    weights = {
        name: load_file(run(data_dir, tmp_path / name, **settings, **changes) / "model.safetensors")
        for name, changes in {
            "plain": {},
            "one": {"teacher": str(reference), "alpha": 1.0},
            "half": {"teacher": str(reference)},
        }.items()
    }
    assert all(torch.equal(weights["plain"][key], weights["one"][key]) for key in weights["plain"])
    assert any(not torch.equal(weights["plain"][key], weights["half"][key]) for key in weights["plain"])


def test_the_teacher_s_forward_pass_is_counted(reference, data_dir, tmp_path):
    teacher = pretrained.load_model(reference).config
    path = run(data_dir, tmp_path / "taught", teacher=str(reference), max_steps=4)
    student = pretrained.load_model(path).config
    own = storage.read_json(path / "trainer_state.json")
    assert own["flops"] == 4 * 256 * (student.flops_per_token() + teacher.flops_per_token() // 3)


def test_a_distilled_run_resumes_exactly_and_with_its_own_teacher_only(reference, data_dir, tmp_path):
    changes = {"teacher": str(reference), "max_steps": 8, "save_interval": 4, "dropout": 0.1}
    straight = run(data_dir, tmp_path / "run", **changes)
    whole = load_file(straight / "model.safetensors")
    shutil.rmtree(straight)
    again = run(data_dir, tmp_path / "run", resume=True, **changes)
    assert all(torch.equal(whole[key], tensor) for key, tensor in load_file(again / "model.safetensors").items())
    shutil.rmtree(again)
    other = run(data_dir, tmp_path / "other", max_steps=2)
    with pytest.raises(UserError, match="cannot resume .*teacher: "):
        run(data_dir, tmp_path / "run", resume=True, **changes | {"teacher": str(other)})


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"vocab_size": 300}, "vocab_size: checkpoint 257, settings 300"),
        ({"block_size": 64}, "block_size: checkpoint 32, settings 64"),
        ({"teacher": "tests/at/all"}, "tests/at/all is no checkpoint"),
        ({"schedule": "wsd", "decay_fraction": 0.95}, "warmup_steps is 2, expected 0 to 1"),
    ],
)
def test_a_mistake_is_one_line(reference, data_dir, tmp_path, capsys, changes, words):
    settings = TINY | {"teacher": reference, "data_dir": data_dir, "out_dir": tmp_path / "run"} | changes
    assert call_script(train, *options(**settings)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_log_of_a_distilled_run_has_the_plain_validation_loss(reference, data_dir, tmp_path):
    path = run(data_dir, tmp_path / "taught", teacher=str(reference), max_steps=2)
    last = [line for line in read_metrics(tmp_path / "taught") if "val_loss" in line][-1]["val_loss"]
    model, losses = pretrained.load_model(path), []
    tokens = train.data.open_tokens(data_dir, "val", 32, 257)
    for start in train.data.val_starts(len(tokens), 32):
        x, y = train.data.windows(tokens, np.array([start]), 32)
        losses.append(model(x, y).item())
    assert last == pytest.approx(sum(losses) / len(losses), abs=1e-6)


# ---- one update, and the guard against a gradient that is not finite


OFF = torch.amp.GradScaler("cpu", enabled=False)


def updated(model, optimizer, poison=0.0, grad_clip=1.0, scaler=OFF) -> torch.Tensor:
    """One update from a gradient of ones, its first element plus `poison`; the norm."""

    def loss_of(x, y, is_last):
        return sum(p.sum() for p in model.parameters()) + poison * model.transformer.wpe.weight[0, 0]

    return train_step(model, optimizer, scaler, grad_clip, loss_of, [(None, None)], 1)[1]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_nothing_is_changed_after_it(poison):
    model = random_model(dtype=torch.float32)
    optimizer = make_optimizer(model, TrainConfig(lr=0.1))
    updated(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    updated(model, optimizer, poison)
    updated(model, optimizer)
    for p, weights, state in zip(model.parameters(), before, moments, strict=True):
        assert torch.equal(p, weights)
        assert all(torch.equal(optimizer.state[p][key], state[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    with pytest.raises(UserError, match="step 1: non-finite gradient norm"):  # after one good update
        machine.check_finite(optimizer, OFF, [])


def test_without_clipping_the_gradient_reaches_adamw_as_it_is():
    for grad_clip, expected in ((0, 1.0), (1e-3, 1e-3)):
        model = random_model(dtype=torch.float32)
        optimizer = make_optimizer(model, TrainConfig())
        norm = updated(model, optimizer, grad_clip=grad_clip)
        share = expected if grad_clip == 0 else grad_clip / norm.item()  # of each element, which is 1
        moment = optimizer.state[model.transformer.wpe.weight]["exp_avg"]
        assert moment.mean().item() == pytest.approx(0.1 * share, rel=1e-3)  # 1 - beta1


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
    with pytest.raises(UserError, match="step 3: non-finite gradient norm") as caught:
        run(data_dir, tmp_path / "run", **intervals)
    assert caught.value.exit_code == 1 and len(made) == 6 and storage.steps(tmp_path / "run") == []


def test_a_stop_right_after_a_bad_gradient_saves_nothing(data_dir, tmp_path, monkeypatch):
    made = poisoned(monkeypatch, bad_step=3)
    monkeypatch.setattr(train.processes, "stop_requested", lambda: 15 if len(made) == 5 else 0)
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


def test_a_distilled_run_s_loss_is_of_the_teacher_s_logits():
    config = TrainConfig(alpha=0.25, tau=2.0)
    student, teacher = random_model(seed=1), random_model(seed=2, n_layer=1)
    x, y = torch.randint(65, (2, 2, 16))
    found = train.training_loss(config, student, teacher, contextlib.nullcontext(), x, y, True)
    expected = train.distillation_loss(student(x), y, teacher(x), 0.25, 2.0)
    assert torch.equal(found, expected)
    assert (found - train.distillation_loss(student(x), y, student(x), 0.25, 2.0)).abs() > 1e-3


def test_float16_tries_smaller_scales_before_it_gives_up():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    optimizer.found_inf = torch.ones(())  # of the last step
    machine.check_finite(optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**15), [])
    with pytest.raises(UserError, match="non-finite gradient norm"):
        machine.check_finite(optimizer, torch.amp.GradScaler("cpu", init_scale=0.5), [])
