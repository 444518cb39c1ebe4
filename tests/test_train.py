"""train.py: resumed equals straight, many processes equal one, and every mistake is one line."""

import contextlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call_script, options, publish_again, read_metrics, run_script
from safetensors.torch import load_file

import train
from plumbing import machine, pretrained, resume, storage
from plumbing.configurator import UserError


def run(data_dir, out_dir, **changes):
    """One training run in this process; its last checkpoint."""
    return train.train(train.TrainConfig(data_dir=str(data_dir), out_dir=str(out_dir), **TINY | changes))


def tensors(path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state."""
    return {
        f"{name} {k}": v for name in ("model", "optimizer") for k, v in load_file(path / f"{name}.safetensors").items()
    }


def equal(a, b) -> bool:
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def distance(a, b) -> float:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def losses(run_dir):
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in read_metrics(run_dir)]


# ---- exactness


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data_dir):
    """Twenty steps without a stop, with dropout and two micro-batches a step; checkpoints at 10 and 20."""
    out_dir = tmp_path_factory.mktemp("straight") / "run"
    return out_dir, run(data_dir, out_dir, dropout=0.1)


def stop_at_10(straight, tmp_path):
    """What a run that died between steps 10 and 20 leaves."""
    copy = tmp_path / "run"
    for file in (straight[0] / "step-00000010").iterdir():
        (copy / "step-00000010").mkdir(parents=True, exist_ok=True)
        (copy / "step-00000010" / file.name).write_bytes(file.read_bytes())
    (copy / "metrics.jsonl").write_bytes((straight[0] / "metrics.jsonl").read_bytes() + b'{"step": 21, "tr')
    return copy


def test_ten_and_ten_resumed_steps_equal_twenty_straight_ones_bit_for_bit(straight, data_dir, tmp_path):
    copy = stop_at_10(straight, tmp_path)
    assert equal(run(data_dir, copy, dropout=0.1, resume=True), straight[1])
    assert losses(copy) == losses(straight[0])
    state, expected = (storage.read_json(p / "step-00000020" / "trainer_state.json") for p in (copy, straight[0]))
    assert {k: v for k, v in state.items() if k != "versions"} == {
        k: v if k != "settings" else v | {"out_dir": str(copy), "resume": True} for k, v in expected.items() if k != "versions"
    }


@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq", "step"])
def test_a_resume_that_forgets_a_part_of_the_optimizer_would_be_seen(straight, data_dir, tmp_path, monkeypatch, lost):
    """Negative control of the test above."""
    load = resume.load_optimizer

    def forget(path, model, optimizer):
        load(path, model, optimizer)
        for moments in optimizer.state.values():
            moments[lost].zero_()

    monkeypatch.setattr(resume, "load_optimizer", forget)
    assert not equal(run(data_dir, stop_at_10(straight, tmp_path), dropout=0.1, resume=True), straight[1])


def test_the_same_command_twice_gives_the_same_bits_and_another_seed_does_not(data_dir, tmp_path):
    a, b = (run(data_dir, tmp_path / name, max_steps=4) for name in "ab")
    assert equal(a, b)
    c = run(data_dir, tmp_path / "c", max_steps=4, seed=1)
    assert not equal(a, c)


def test_evaluating_saving_and_logging_more_often_changes_no_weight(data_dir, tmp_path, straight):
    often = {"eval_interval": 1, "save_interval": 3, "log_interval": 7, "keep_checkpoints": 2}
    path = run(data_dir, tmp_path / "often", dropout=0.1, **often)
    assert equal(path, straight[1])
    assert [p.name for p in storage.steps(tmp_path / "often")] == ["step-00000018", "step-00000020"]


def test_the_micro_batch_changes_nothing_but_memory(data_dir, tmp_path):
    """In float64: weights after 5 steps, and the validation loss, for micro-batches of 1, 2, 4 and 8."""
    changes = {"dtype": "float64", "max_steps": 5}
    paths = [run(data_dir, tmp_path / str(b), micro_batch=b, **changes) for b in (1, 2, 4, 8)]
    assert all(distance(paths[0], path) < 1e-12 for path in paths[1:])
    for one, other in zip(losses(tmp_path / "1"), losses(tmp_path / "8"), strict=True):
        assert all(math.isclose(one[key], other[key], rel_tol=1e-9) for key in one)


def test_validation_loss_is_one_number_for_any_micro_batch(data_dir, reference):
    import data

    model = pretrained.load_model(reference, torch.float64)
    tokens = data.open_tokens(data_dir, "val", 32, 257)
    found = [train.evaluate(model, tokens, b, torch.device("cpu"), torch.no_grad()) for b in (1, 4, 16)]
    assert len(found[0]) == (len(tokens) - 1) // 32 > 200
    assert all(np.allclose(found[0], other, rtol=1e-12, atol=0) for other in found[1:])
    x, y = data.windows(tokens, np.array([0, 32 * 100]), 32)
    by_hand = [model(x[i : i + 1], y[i : i + 1]).item() for i in (0, 1)]
    assert found[0][[0, 100]] == pytest.approx(by_hand, rel=1e-12)


def test_two_processes_equal_one(data_dir, tmp_path):
    """torchrun on the CPU, float64, 5 steps of 2 micro-batches: weights, moments, losses and the validation loss."""
    settings = TINY | {"dtype": "float64", "max_steps": 5, "data_dir": data_dir, "micro_batch": 2}
    done = run_script("train.py", *options(**settings, out_dir=tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    one = run(data_dir, tmp_path / "one", **{"dtype": "float64", "max_steps": 5, "micro_batch": 2})
    assert distance(storage.latest(tmp_path / "two"), one) < 1e-12
    for ours, theirs in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert all(math.isclose(ours[key], theirs[key], rel_tol=1e-9) for key in ours)


@pytest.mark.parametrize("stops", [(1,), (19,), (3, 4, 11)])
def test_any_number_of_stops_at_any_step_changes_no_bit(straight, data_dir, tmp_path, stops, monkeypatch):
    first_batches, train_starts = [], train.data.train_starts
    for stop in (*stops, 20):
        steps = []
        monkeypatch.setattr(train.data, "train_starts", lambda *a, seen=steps: seen.append(a[3]) or train_starts(*a))
        monkeypatch.setattr(train.processes, "stop_signal", 0)
        rate = train.learning_rate

        def stopping(config, step, stop=stop, rate=rate):
            train.processes.stop_signal = 15 if step + 1 == stop < 20 else 0
            return rate(config, step)

        with monkeypatch.context() as patch, contextlib.suppress(UserError):
            patch.setattr(train, "learning_rate", stopping)
            run(data_dir, tmp_path / "run", dropout=0.1, resume="auto", save_interval=100)
        first_batches.append(steps[0])
    assert first_batches == [0, *stops]  # each life goes on with the next batch
    assert equal(storage.latest(tmp_path / "run"), straight[1])


def test_ten_losses_are_those_that_were_once_measured(tmp_path):
    """Golden values, on tokens that depend on no installed text: whatever changes the numbers shows itself here."""
    folder, random = tmp_path / "data", np.random.RandomState(0)
    folder.mkdir()
    splits = {}
    for split, n in (("train", 4000), ("val", 400)):
        tokens = (np.arange(n) % 7 * 30 + random.randint(0, 5, n)).astype("<u2")
        tokens.tofile(folder / f"{split}.bin")
        splits[split] = {"tokens": n, "documents": 1, "max_id": int(tokens.max())}
    meta = {"tokenizer": "bytes", "eot": 256, "dtype": "<u2", "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta))
    publish_again(folder)
    run(folder, tmp_path / "run", max_steps=10, scale_attn_by_inverse_layer_idx=True)
    found = [line["train_loss"] for line in read_metrics(tmp_path / "run") if "train_loss" in line]
    assert found == pytest.approx(GOLDEN, abs=1e-5)


GOLDEN = [5.573123, 5.394008, 5.03845, 4.718938, 4.417623, 4.149834, 4.124848, 3.890515, 3.834356, 3.836674]


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_gradients_do_not_depend_on_accumulation_in_float32(data_dir, accumulation):
    tokens = train.data.open_tokens(data_dir, "train", 32, 257)
    x, y = train.data.windows(tokens, train.data.train_starts(len(tokens), 32, 1, 0, 8), 32)
    torch.manual_seed(0)
    model = train.GPT(train.GPTConfig(2, 2, 32, 32, 257))
    gradients = []
    for parts in (1, accumulation):
        model.zero_grad()
        for part in range(parts):
            (model(x[part::parts], y[part::parts]) / parts).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_deterministic_asks_torch_for_it(data_dir, tmp_path):
    try:
        run(data_dir, tmp_path / "run", max_steps=2, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_checkpoint_that_cannot_be_deleted_is_warned_about_and_tried_again(data_dir, tmp_path, monkeypatch, capsys):
    rename, refused = Path.rename, []

    def busy_once(path, to):
        if to.name.startswith(".tmp-") and not refused:
            refused.append(path)
            raise OSError(16, "Device or resource busy")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", busy_once)
    run(data_dir, tmp_path / "run", save_interval=5, keep_checkpoints=1)
    assert "warning: " in capsys.readouterr().out and refused[0].name == "step-00000005"
    assert [path.name for path in storage.steps(tmp_path / "run")] == ["step-00000020"]


def test_tracking_is_told_the_beginning_of_text_of_the_data(data_dir, tmp_path, monkeypatch):
    copy, told = shutil.copytree(data_dir, tmp_path / "data"), []
    meta = json.loads((copy / "meta.json").read_text()) | {"begin": [256]}
    (copy / "meta.json").write_text(json.dumps(meta))
    publish_again(copy)
    monkeypatch.setattr("analyze_attention.track", lambda model, tokens, begin: told.append(begin) or {})
    run(copy, tmp_path / "run", max_steps=0, track_rank=True)
    assert told == [[256]]


def test_data_deleted_while_training_costs_no_step(data_dir, tmp_path, monkeypatch):
    """The system keeps a deleted file that is memory-mapped."""
    copy, rate = shutil.copytree(data_dir, tmp_path / "data"), train.learning_rate

    def delete_at_step_5(config, step):
        if step == 5:
            shutil.rmtree(copy)
        return rate(config, step)

    monkeypatch.setattr(train, "learning_rate", delete_at_step_5)
    assert run(copy, tmp_path / "run").name == "step-00000020"


def test_few_validation_windows_are_warned_about(data_dir, tmp_path, capsys):
    run(data_dir, tmp_path / "run", max_steps=0, block_size=2048, tokens_per_step=8192)
    assert re.search(r"warning: \d validation windows of 2048 tokens", capsys.readouterr().out)


def test_an_out_dir_deleted_while_training_is_noticed_at_the_next_save(data_dir, tmp_path, monkeypatch):
    rate = train.learning_rate

    def delete_at_step_5(config, step):
        if step == 5:
            shutil.rmtree(tmp_path / "run")
        return rate(config, step)

    monkeypatch.setattr(train, "learning_rate", delete_at_step_5)
    with pytest.raises(UserError, match="run was deleted while training"):
        run(data_dir, tmp_path / "run", save_interval=10)
    assert not (tmp_path / "run").exists()


# ---- what a run leaves


def test_max_steps_updates_are_made_and_the_last_weights_are_evaluated_and_saved(data_dir, tmp_path):
    path = run(data_dir, tmp_path / "run", max_steps=7, eval_interval=5, save_interval=4)
    assert path.name == "step-00000007"
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 5, 7]
    assert [line["step"] for line in lines if "train_loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert [p.name for p in storage.steps(tmp_path / "run")] == ["step-00000004", "step-00000007"]
    saved = storage.read_json(path / "val_losses.json")["losses"]
    assert np.mean(saved) == lines[-1]["val_loss"] and lines[-1]["tokens"] == 7 * 256
    assert (load_file(path / "optimizer.safetensors")["transformer.wte.weight|step"]) == 7
    state = storage.read_json(path / "trainer_state.json")
    assert state["step"] == 7 and state["versions"]["torch"] == torch.__version__


def test_a_tilde_in_out_dir_is_the_home_directory(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run(data_dir, "~/run", max_steps=1, warmup_steps=1) == tmp_path / "run" / "step-00000001"
    assert not (tmp_path / "~").exists()


def test_training_learns(data_dir, tmp_path):
    run(data_dir, tmp_path / "run", max_steps=60, warmup_steps=5)
    lines = [line["val_loss"] for line in read_metrics(tmp_path / "run") if "val_loss" in line]
    assert abs(lines[0] - math.log(257)) < 0.2 and lines[-1] < 3.6


def test_a_finished_run_says_so_and_does_nothing(straight, data_dir, capsys):
    before = (straight[0] / "metrics.jsonl").stat().st_mtime_ns
    assert run(data_dir, straight[0], dropout=0.1, resume=True) == straight[1]
    assert "step 20 of 20" in capsys.readouterr().out
    assert (straight[0] / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_finished_run_deletes_what_a_kill_before_the_last_clean_up_has_left(straight, data_dir, tmp_path):
    copy = shutil.copytree(straight[0], tmp_path / "run")
    assert len(storage.steps(copy)) == 2
    assert run(data_dir, copy, dropout=0.1, resume=True, keep_checkpoints=1) == copy / "step-00000020"
    assert [path.name for path in storage.steps(copy)] == ["step-00000020"]


def test_a_damaged_newest_checkpoint_is_made_again(straight, data_dir, tmp_path, capsys):
    copy = stop_at_10(straight, tmp_path)
    (copy / "step-00000020").mkdir()
    (copy / "step-00000020" / "config.json").write_text("{")
    assert equal(run(data_dir, copy, dropout=0.1, resume="auto"), straight[1])
    assert "ignored" in capsys.readouterr().out


def test_a_run_that_died_before_its_first_checkpoint_leaves_no_line_behind(data_dir, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "val_loss": 9.9}\n{"step": 1, "train')
    with pytest.raises(UserError, match="no usable checkpoint"):
        run(data_dir, tmp_path / "run", max_steps=2, resume=True)
    assert [path.name for path in (tmp_path / "run").glob("m*")] == ["metrics.jsonl"]  # a mistake moves nothing
    run(data_dir, tmp_path / "run", max_steps=2, resume="auto")
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "val_loss" in line] == [0, 2]


def test_weights_of_a_checkpoint_start_a_run_of_their_own(reference, data_dir, tmp_path):
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"))
    run(data_dir, tmp_path / "run", init_from=str(reference), max_steps=2, **shape)
    theirs = [line["val_loss"] for line in read_metrics(reference) if "val_loss" in line]
    assert read_metrics(tmp_path / "run")[0]["val_loss"] == theirs[-1]


def test_no_steps_evaluate_the_model_and_keep_it_as_a_run(reference, data_dir, tmp_path, capsys):
    arguments = options(
        init_from=reference, data_dir=data_dir, out_dir=tmp_path / "same", dtype="float32", device="cpu"
    )
    assert call_script(train, *arguments, "--max_steps=0") == 0
    theirs = [line["val_loss"] for line in read_metrics(reference) if "val_loss" in line]
    assert f"val loss {theirs[-1]:.4f} ±" in capsys.readouterr().out
    assert read_metrics(tmp_path / "same")[-1]["val_loss"] == theirs[-1]
    weights = [storage.latest(path) / "model.safetensors" for path in (reference, tmp_path / "same")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


# ---- the schedule, the machine


def test_the_learning_rate_warms_up_to_its_peak_and_ends_at_its_least():
    config = train.TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=4, max_steps=104)
    rates = [train.learning_rate(config, step) for step in range(104)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[4 + 99 // 2] == pytest.approx(0.55, abs=0.02)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_kept_for_the_next_step():
    code = """
import resource, torch
from plumbing import machine
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(2**22)  # 16 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
without = faults()
machine.keep_freed_memory()
faults()
print(without, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    without, kept = map(int, done.stdout.split())
    assert kept < without / 10  # 80,000 and none; fewer where the system hands out huge pages


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_float32_weights(data_dir, tmp_path, dtype):
    path = run(data_dir, tmp_path / "run", dtype=dtype, max_steps=10)
    assert all(t.dtype == torch.float32 for t in tensors(path).values())
    lines = [line["val_loss"] for line in read_metrics(tmp_path / "run") if "val_loss" in line]
    assert lines[-1] < lines[0] - 0.5


@pytest.mark.slow
def test_a_compiled_run_equals_an_eager_one_and_its_names_are_clean(data_dir, tmp_path):
    eager, compiled = (run(data_dir, tmp_path / str(c), max_steps=3, compile=c) for c in (False, True))
    assert distance(eager, compiled) < 1e-4
    assert not any("_orig_mod" in key for key in tensors(compiled))


@pytest.mark.slow
@pytest.mark.parametrize("flops,expected", [(4e13, False), (1e14, "blocks"), (3e14, True)])
def test_a_longer_run_on_a_cpu_compiles_more(flops, expected):
    assert machine.pick_compile("auto", torch.device("cpu"), flops)[0] == expected


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}])
def test_one_compiled_block_serves_all_layers(data_dir, tmp_path, monkeypatch, changes):
    """Also where layer i divides its logits by i + 1, and with blocks that are computed again."""
    counts = torch._dynamo.utils.counters["stats"]
    counts.clear()
    changes = {"n_layer": 4, "scale_attn_by_inverse_layer_idx": True, "max_steps": 2} | changes
    monkeypatch.setattr(machine, "COMPILE_PAYS_FROM", 0)
    eager, compiled = (run(data_dir, tmp_path / str(c), compile=c, **changes) for c in (False, "auto"))
    assert distance(eager, compiled) < 1e-4
    assert not any("_orig_mod" in key for key in tensors(compiled))
    assert 3 <= counts["unique_graphs"] <= 8  # block and head: to train, to evaluate, a last smaller batch; the probe


# ---- mistakes


@pytest.mark.parametrize(
    "wrong,words",
    [
        (["--n_head=3"], "n_embd 32 is not divisible by n_head 3"),
        (["--tokens_per_step=1000"], "tokens_per_step 1000 is not divisible by micro_batch 4 x block_size 32 x 1"),
        (["--data_dir=nowhere"], "nowhere/manifest.json: No such file or directory; expected a data directory"),
        (["--warmup_steps=21"], "warmup_steps is 21, expected 0 to 20"),
        (["--lr=nan"], "min_lr is 1e-05, expected 0 to nan"),
        (["--dropout=2"], "dropout is 2.0"),
        (["--device=meta"], "device 'meta'"),
        (["--max_steps=-1"], "max_steps is -1, expected 0 to inf"),
        (["--vocab_size=100"], "expected ids below vocab_size 100"),
        (["--block_size=1000000", "--tokens_per_step=4000000"], "at least 1000001 tokens"),
        (["--init_from=no/such/model"], "no/such/model is no checkpoint, run directory"),
        (["--device=tpu"], "device 'tpu'"),
        (["--resume"], "no usable checkpoint"),
        (["--micro_batch=16"], "choose a micro_batch that divides 8"),
        (["nowhere.toml"], "nowhere.toml"),
        (["--out_dir=/dev/null/x"], "/dev/null/x cannot be written: Not a directory"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(data_dir, tmp_path, capsys, wrong, words):
    settings = options(**TINY, data_dir=data_dir, out_dir=tmp_path / "run")
    preset = [argument for argument in wrong if argument.endswith(".toml")]
    assert call_script(train, *preset, *settings, *(w for w in wrong if w not in preset)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not storage.steps(tmp_path / "run")


def test_another_shape_than_init_from_s_is_refused_with_every_difference(reference, data_dir, tmp_path):
    with pytest.raises(UserError, match="n_layer: checkpoint 4, settings 2; block_size: checkpoint 32, settings 64"):
        run(data_dir, tmp_path / "run", init_from=str(reference), block_size=64)


@pytest.mark.parametrize("changes", [{"lr": 0.5}, {"max_steps": 30}, {"seed": 3}, {"tokens_per_step": 512}, {"dtype": "bfloat16"}])
def test_a_setting_that_shapes_the_run_cannot_change_on_resume(straight, data_dir, tmp_path, changes):
    with pytest.raises(UserError, match=f"cannot resume .*{next(iter(changes))}: "):
        run(data_dir, stop_at_10(straight, tmp_path), resume=True, **{"dropout": 0.1} | changes)


@pytest.mark.parametrize(
    "free",
    [{"micro_batch": 8}, {"eval_interval": 7}, {"log_interval": 3}, {"save_interval": 4}, {"keep_checkpoints": 1}],
)
def test_a_setting_that_shapes_nothing_may_change_on_resume(straight, data_dir, tmp_path, free):
    assert run(data_dir, stop_at_10(straight, tmp_path), resume=True, **{"dropout": 0.1} | free).name == "step-00000020"


def test_a_change_that_is_asked_for_is_made(straight, data_dir, tmp_path):
    path = run(
        data_dir,
        stop_at_10(straight, tmp_path),
        resume=True,
        dropout=0.1,
        lr=0.5,
        max_steps=12,
        override="lr,max_steps",
    )
    assert path.name == "step-00000012" and read_metrics(path.parent)[-1]["step"] == 12
    assert not equal(path, run(data_dir, tmp_path / "other", max_steps=12, dropout=0.1))


@pytest.mark.parametrize("shape", [{"n_layer": 3}, {"n_head": 1}, {"bias": True}])
def test_the_shape_cannot_be_overridden(straight, data_dir, tmp_path, shape):
    (key,) = shape
    with pytest.raises(UserError, match=f"{key}: ") as error:
        run(data_dir, stop_at_10(straight, tmp_path), resume=True, dropout=0.1, override=key, **shape)
    assert "--override" not in str(error.value)


@pytest.mark.parametrize("first,then", [("adamw", "muon"), ("muon", "adamw")])
def test_a_different_optimizer_starts_afresh(data_dir, tmp_path, first, then):
    run(data_dir, tmp_path / "run", max_steps=4, optimizer=first)
    again = {"resume": True, "override": "optimizer,max_steps", "optimizer": then, "max_steps": 6}
    state = load_file(run(data_dir, tmp_path / "run", **again) / "optimizer.safetensors")
    kinds = {key.split("|")[1] for key in state if "c_attn.weight" in key}
    assert kinds == ({"momentum_buffer"} if then == "muon" else {"exp_avg", "exp_avg_sq", "step"})
    assert state["transformer.wte.weight|step"].item() == 2


def test_a_run_of_no_steps_can_be_continued(reference, data_dir, tmp_path):
    same = {"init_from": str(reference), "n_layer": 4, "warmup_steps": 0}
    run(data_dir, tmp_path / "run", **same, max_steps=0)
    path = run(data_dir, tmp_path / "run", **same, max_steps=2, resume=True, override="max_steps")
    assert path.name == "step-00000002"


def test_a_run_cannot_be_resumed_beyond_its_new_end(straight, data_dir, tmp_path):
    copy = stop_at_10(straight, tmp_path)
    with pytest.raises(UserError, match="step-00000010 is beyond max_steps 8"):
        run(data_dir, copy, resume=True, dropout=0.1, max_steps=8, override="max_steps")
    assert storage.latest(copy).name == "step-00000010"


def test_a_damaged_log_stops_nothing(straight, data_dir, tmp_path):
    copy = stop_at_10(straight, tmp_path)
    with open(copy / "metrics.jsonl", "ab") as file:
        file.write(b"\n\xff\xfe{\n[1]\n")
    assert equal(run(data_dir, copy, resume=True, dropout=0.1), straight[1])
    assert losses(copy) == losses(straight[0])


def test_a_log_line_that_cannot_be_written_loses_no_run(data_dir, tmp_path, capsys):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)  # a directory in its place
    assert run(data_dir, tmp_path / "run", max_steps=2).name == "step-00000002"
    assert "a line is lost" in capsys.readouterr().out


def test_other_data_cannot_be_resumed_with(straight, data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "data")
    content = bytearray((copy / "train.bin").read_bytes())
    content[0] ^= 1
    (copy / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match="train.bin: sha256 mismatch"):  # what the manifest says is not believed
        run(copy, stop_at_10(straight, tmp_path), dropout=0.1, resume=True)
    publish_again(copy)
    with pytest.raises(UserError, match="data: .*--override=data"):
        run(copy, stop_at_10(straight, tmp_path), dropout=0.1, resume=True)


def test_a_run_never_starts_over_another(straight, data_dir):
    with pytest.raises(UserError, match="add --resume"):
        run(data_dir, straight[0], dropout=0.1)


def test_weights_without_training_state_are_no_run_to_resume(reference, data_dir, tmp_path):
    import inherit

    inherit.inherit(reference, "0:2", tmp_path / "run" / "step-00000005")
    with pytest.raises(UserError, match="has weights but no training state; start from it with --init_from="):
        run(data_dir, tmp_path / "run", resume=True, scale_attn_by_inverse_layer_idx=True)


def test_a_resumed_run_must_have_begun_from_the_same_weights(reference, data_dir, tmp_path):
    """Not from the same path: a run may be moved."""
    import inherit

    changes = {"n_layer": 2, "scale_attn_by_inverse_layer_idx": True, "max_steps": 4, "save_interval": 2}
    first, second = (inherit.inherit(reference, layers, tmp_path / layers) for layers in ("0:2", "1:3"))
    run(data_dir, tmp_path / "run", init_from=str(first), **changes)
    shutil.rmtree(tmp_path / "run" / "step-00000004")
    for other in ("scratch", str(second)):
        with pytest.raises(UserError, match="cannot resume .*init_from: "):
            run(data_dir, tmp_path / "run", resume=True, init_from=other, **changes)
    first.rename(tmp_path / "moved")
    assert run(data_dir, tmp_path / "run", resume=True, init_from=str(tmp_path / "moved"), **changes).exists()


def test_a_model_made_for_other_tokens_is_refused(reference, data_dir, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(storage.latest(reference), copy)
    (copy / "manifest.json").unlink()
    original, vocabulary = (copy / "config.json").read_text(), (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(vocabulary.replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97'))
    words = "reads tokens of 'bytes' (another vocabulary of that name), the data in .* those of 'bytes'"
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
        run(data_dir, tmp_path / "run", init_from=str(copy))
    (copy / "tokenizer.json").unlink()  # then the names decide
    (copy / "config.json").write_text(original.replace('"bytes"', '"gpt2"'))
    with pytest.raises(UserError, match="reads tokens of 'gpt2', the data in .* those of 'bytes'"):
        run(data_dir, tmp_path / "run", init_from=str(copy))


def test_a_machine_without_git_can_train(data_dir, tmp_path):
    command = [
        sys.executable,
        "train.py",
        *options(**TINY | {"max_steps": 2}, data_dir=data_dir, out_dir=tmp_path / "run"),
    ]
    done = subprocess.run(command, env=os.environ | {"PATH": "/nonexistent"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state = storage.read_json(storage.latest(tmp_path / "run") / "trainer_state.json")
    assert state["versions"]["commit"] == "unknown"



def test_a_gradient_that_is_not_finite_ends_the_run_before_the_update(data_dir, tmp_path, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_

    def poison(parameters, max_norm):
        parameters = list(parameters)
        if len(storage.steps(tmp_path / "run")) == 1:  # after step 10
            parameters[0].grad[0, 0] = math.nan
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poison)
    with pytest.raises(UserError, match="step 10: non-finite gradient norm") as caught:
        run(data_dir, tmp_path / "run")
    assert caught.value.exit_code == 1 and storage.latest(tmp_path / "run").name == "step-00000010"
