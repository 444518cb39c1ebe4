"""objective.py and what train.py does with it: schedules, the checkpoint before the decay, distillation, moments."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY, call_script, options, random_model, read_metrics
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from plumbing import checkpoint
import inherit
import objective
from plumbing import storage
import train
from plumbing.configurator import UserError


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
    """So what its last stable checkpoint is gone on from, with the moments, is the longer run itself."""
    changes = {"schedule": "wsd", "eval_interval": 5, "save_interval": 5}
    short = tmp_path / "short"
    run(data_dir, short, max_steps=10, decay_fraction=0.5, keep_checkpoints=1, **changes)
    assert [path.name for path in storage.steps(short)] == ["step-00000005", "step-00000010"]  # pruned, but for stable
    stable = checkpoint.last_stable(short)
    assert stable.name == "step-00000005" and (stable / "val_losses.json").exists()
    run(data_dir, tmp_path / "long", max_steps=20, decay_fraction=0.5, **changes)
    for name in ("model", "optimizer"):
        theirs, ours = (load_file(path / f"{name}.safetensors") for path in (tmp_path / "long/step-00000005", stable))
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_without_a_stable_rate_there_is_no_stable_checkpoint(reference):
    with pytest.raises(UserError, match="keeps no checkpoint of a stable rate; train it with --schedule=wsd"):
        checkpoint.last_stable(reference)


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
    found = objective.distillation_loss(logits, targets, teacher, alpha, tau)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_a_teacher_equal_to_the_student_gives_kl_zero_and_the_plain_gradient():
    torch.manual_seed(0)
    idx, targets = torch.randint(65, (2, 2, 16))
    plain, taught = random_model(), random_model()
    F.cross_entropy(plain(idx).flatten(0, 1), targets.flatten()).backward()
    with torch.no_grad():
        teacher_logits = random_model()(idx)
    divergence = objective.distillation_loss(taught(idx), targets, teacher_logits, 0.0, 2.0)
    assert abs(divergence.item()) < 1e-14
    (objective.distillation_loss(taught(idx), targets, teacher_logits, 0.25, 2.0) / 0.25).backward()
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


def test_the_teacher_s_forward_pass_and_its_training_are_counted(reference, data_dir, tmp_path):
    teacher = checkpoint.load_model(reference).config
    path = run(data_dir, tmp_path / "taught", teacher=str(reference), max_steps=4)
    student = checkpoint.load_model(path).config
    own = storage.read_json(path / "trainer_state.json")
    assert own["flops"] == 4 * 256 * (student.flops_per_token() + teacher.flops_per_token() // 3)
    theirs = storage.read_json(storage.latest(reference) / "trainer_state.json")
    assert checkpoint.cost(path) == {key: own[key] + theirs[key] for key in ("tokens", "flops")}
    # a reference that is also the teacher is counted once
    half = inherit.inherit(reference, "0:2", tmp_path / "half")
    both = run(
        data_dir, tmp_path / "both", init_from=str(half), teacher=str(reference), max_steps=4, **shape_of_source()
    )
    assert checkpoint.cost(both)["tokens"] == (4 + 20) * 256


def test_a_distilled_run_resumes_exactly_and_with_its_own_teacher_only(reference, data_dir, tmp_path):
    changes = {"teacher": str(reference), "max_steps": 8, "save_interval": 4, "dropout": 0.1}
    straight = run(data_dir, tmp_path / "run", **changes)
    whole = load_file(straight / "model.safetensors")
    storage.discard(straight)
    again = run(data_dir, tmp_path / "run", resume=True, **changes)
    assert all(torch.equal(whole[key], tensor) for key, tensor in load_file(again / "model.safetensors").items())
    storage.discard(again)
    other = run(data_dir, tmp_path / "other", max_steps=2)
    with pytest.raises(UserError, match="cannot resume .*teacher: "):
        run(data_dir, tmp_path / "run", resume=True, **changes | {"teacher": str(other)})


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"vocab_size": 300}, "has vocab_size 257, the student 300; they must be equal"),
        ({"block_size": 16}, "has block_size 32, the student 16"),
        ({"alpha": 1.5}, "alpha is 1.5, expected 0 to 1"),
        ({"tau": 0.0}, "tau is 0.0, expected 0.001 to"),
        ({"teacher": "nowhere/at/all"}, "nowhere/at/all does not exist"),
        ({"schedule": "linear"}, "invalid choice"),
        ({"decay_fraction": "nan"}, "decay_fraction is nan"),
        ({"schedule": "wsd", "decay_fraction": 0.95}, "warmup_steps 2 end after the decay begins, at step 1"),
    ],
)
def test_a_mistake_is_one_line(reference, data_dir, tmp_path, capsys, changes, words):
    settings = TINY | {"teacher": reference, "data_dir": data_dir, "out_dir": tmp_path / "run"} | changes
    assert call_script(train, *options(**settings)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- the optimizer's moments


def test_all_layers_with_their_moments_go_on_as_the_run_itself(data_dir, tmp_path):
    """Inherited with moments at step 10 and given the batches of steps 10 to 20, it becomes what the run became."""
    changes = {"schedule": "wsd", "decay_fraction": 0.0, "warmup_steps": 0}
    straight = run(data_dir, tmp_path / "straight", **changes)
    for moments in (True, False):
        init = inherit.inherit(tmp_path / "straight/step-00000010", ":", tmp_path / f"init-{moments}", moments=moments)
        settings = changes | shape_of_source() | {"init_from": str(init), "max_steps": 10}
        with pytest.MonkeyPatch.context() as patch:
            starts = train.data.train_starts
            patch.setattr(train.data, "train_starts", lambda *a: starts(*a[:3], a[3] + 10, a[4]))  # noqa: B023
            again = run(data_dir, tmp_path / f"again-{moments}", **settings)
        ours, theirs = (load_file(path / "model.safetensors") for path in (again, straight))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs) is moments


def test_each_moment_comes_from_the_layer_of_its_weights(reference, tmp_path):
    theirs = load_file(storage.latest(reference) / "optimizer.safetensors")
    out = inherit.inherit(reference, "2,0", tmp_path / "out", parts="attn,ln", moments=True)
    ours = load_file(out / "optimizer.safetensors")
    for key, tensor in ours.items():
        source = key.replace(".h.0.", ".h.2.") if ".h.0." in key else key.replace(".h.1.", ".h.0.")
        fresh = ".mlp." in key  # no history of its own
        assert torch.equal(tensor, torch.zeros_like(tensor) if fresh else theirs[source]), key
    assert len(ours) == 3 * (2 * 6 + 3)  # three for each parameter
    assert storage.read_json(out / "lineage.json")["moments"] is True


def test_moments_that_are_not_there_are_missed(tmp_path):
    checkpoint.save(tmp_path / "weights", random_model(), "bytes", 0)
    with pytest.raises(UserError, match="has no optimizer.safetensors, so no moments"):
        inherit.inherit(tmp_path / "weights", "0:2", tmp_path / "out", moments=True)
    assert not (tmp_path / "out").exists()


def test_the_log_of_a_distilled_run_has_the_plain_validation_loss(reference, data_dir, tmp_path):
    path = run(data_dir, tmp_path / "taught", teacher=str(reference), max_steps=2)
    last = [line for line in read_metrics(tmp_path / "taught") if "val_loss" in line][-1]["val_loss"]
    model, losses = checkpoint.load_model(path), []
    tokens = train.data.open_tokens(data_dir, "val", 32, 257)
    for start in train.data.val_starts(len(tokens), 32):
        x, y = train.data.windows(tokens, np.array([start]), 32)
        losses.append(model(x, y).item())
    assert last == pytest.approx(sum(losses) / len(losses), abs=1e-6)
