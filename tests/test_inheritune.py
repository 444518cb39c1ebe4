"""inheritune.py and report.py: the whole chain on a tiny model, stopped and taken up again; and the verdict."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY, call_script, options, read_metrics, run_script

import checkpoint
import inheritune
import report
import storage
from configurator import UserError

PRESET = """
n_layer = 4

[inheritune]
start_layers = 1
expand_by = 1
tolerance = {tolerance}
sequences = 3

[[inheritune.arms]]
name = "random"

[[inheritune.arms]]
name = "random, twice the steps"
step_factor = 2
"""


def preset(tmp_path, tolerance):
    (tmp_path / "tiny.toml").write_text(PRESET.format(tolerance=tolerance))
    settings = {key: value for key, value in TINY.items() if key != "n_layer"}
    return [tmp_path / "tiny.toml", *options(**settings, out_dir=tmp_path / "out")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A recipe whose reference cannot be matched at once: a tolerance of -0.1 nats demands to be better."""
    tmp_path = tmp_path_factory.mktemp("recipe")
    arguments = [*preset(tmp_path, -0.1), f"--data_dir={data_dir}"]
    assert call_script(inheritune, *arguments) == 0
    return tmp_path / "out", arguments


def test_rounds_expand_until_the_target_matches_and_arms_have_its_size(finished):
    out_dir, _ = finished
    recipe = json.loads((out_dir / "recipe.json").read_text())
    roles = [model["role"] for model in recipe["models"]]
    n_rounds = roles.count("round") + 1
    assert roles == ["reference", *["round"] * (n_rounds - 1), "target", "arm", "arm"]
    layers = [checkpoint.read_config(out_dir / model["path"]).n_layer for model in recipe["models"]]
    k = layers[n_rounds]
    assert layers == [4, *range(1, k + 1), k, k]
    reference = out_dir / recipe["models"][0]["path"]
    differences = [
        report.paired_difference(out_dir / m["path"], reference)[0] for m in recipe["models"][1 : n_rounds + 1]
    ]
    assert all(d > -0.1 for d in differences[:-1]) and (differences[-1] <= -0.1 or k == 4)


def test_each_round_starts_from_the_reference_s_first_layers(finished):
    out_dir, _ = finished
    reference = checkpoint.load_model(out_dir / "reference")
    first = checkpoint.load_model(out_dir / "inherited-1" / "init")
    for (name, p), q in zip(
        first.named_parameters(),
        map(dict(reference.named_parameters()).get, dict(first.named_parameters())),
        strict=True,
    ):
        assert torch.equal(p, q), name
    lineage = storage.read_json(storage.latest(out_dir / "inherited-1") / "lineage.json")
    assert lineage["layers"] == [0] and lineage["cost"]["tokens"] == 20 * 256


def test_the_report_has_every_model_with_numbers_that_follow_from_the_runs(finished, capsys):
    out_dir, _ = finished
    assert call_script(report, out_dir) == 0
    printed, text = capsys.readouterr().out, (out_dir / "report.md").read_text()
    assert str(out_dir / "report.md") in printed
    recipe = json.loads((out_dir / "recipe.json").read_text())
    for model in recipe["models"]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {model['name']} "))
        assert line in printed
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        last = [entry for entry in read_metrics((out_dir / model["path"]).parent) if "val_loss" in entry][-1]
        assert cells[5] == f"{last['val_loss']:.4f} ± {last['val_se']:.4f}"
        steps = {"reference": 20, "round": 40, "target": 40}.get(model["role"], 40 if "twice" in model["name"] else 20)
        assert cells[3] == f"{steps * 256 / 1e6:.2f} M"
    for figure in ("loss.png", "rank.png", "attention/reference/attention.png", "attention/target/attention.png"):
        assert figure in text and (out_dir / figure).read_bytes().startswith(b"\x89PNG")
    assert "Deep layers are lazy" in text and "matches the reference" in text


def test_a_finished_recipe_trains_nothing_again(finished, capsys):
    out_dir, arguments = finished
    before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("step-*/model.safetensors")}
    assert call_script(inheritune, *arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in out_dir.rglob("step-*/model.safetensors")} == before
    assert "already at step 20 of 20" in capsys.readouterr().out


def test_a_recipe_that_was_killed_goes_on_and_ends_at_the_same_weights(finished, tmp_path, data_dir, monkeypatch):
    """Killed in the reference, then in the first round, then left alone."""
    arguments = [*preset(tmp_path, -0.1), f"--data_dir={data_dir}"]
    save, saved = checkpoint.save, []

    def killed(path, *rest):
        save(path, *rest)
        saved.append(path)
        if len(saved) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", killed)
    assert [call_script(inheritune, *arguments) for _ in range(3)] == [130, 130, 0]
    assert len({*saved}) == len(saved)  # nothing was made twice
    paths = sorted(path.relative_to(finished[0]) for path in finished[0].rglob("model.safetensors"))
    assert len(paths) > 6
    for path in paths:
        assert (tmp_path / "out" / path).read_bytes() == (finished[0] / path).read_bytes()


def test_the_recipe_works_under_torchrun(tmp_path, data_dir):
    arguments = [*preset(tmp_path, 10.0), f"--data_dir={data_dir}", "--max_steps=4", "--micro_batch=2"]
    done = run_script("inheritune.py", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.md").exists() and done.stdout.count("report: ") == 1


@pytest.mark.parametrize(
    "wrong,words",
    [
        (["--start_layers=5"], "start_layers is 5, expected 1 to 4"),
        (["--expand_by=0"], "expand_by 0"),
        (["--expnd_by=1"], "did you mean 'expand_by'"),
        (["--data_dir=nowhere"], "data directory nowhere does not exist"),
    ],
)
def test_a_mistake_is_one_line(finished, capsys, wrong, words):
    assert call_script(inheritune, *finished[1], *wrong) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_report_without_a_recipe_is_one_line(tmp_path, capsys):
    assert call_script(report, tmp_path) == 2
    assert "recipe.json: not found" in capsys.readouterr().err


# ---- the verdict


def write_losses(path, losses):
    path.mkdir()
    (path / "val_losses.json").write_text(json.dumps({"losses": list(losses)}))
    return path


def test_pairing_sees_a_difference_that_is_smaller_than_the_spread(tmp_path):
    random = np.random.default_rng(0)
    hard = random.normal(3, 1, 400)  # how hard each window is, for any model
    better = hard - 0.02 + random.normal(0, 0.05, 400)
    a, b = write_losses(tmp_path / "a", better), write_losses(tmp_path / "b", hard)
    difference, interval = report.paired_difference(a, b)
    assert difference == pytest.approx(np.mean(better - hard)) and abs(difference + 0.02) < interval < 0.006
    assert interval == pytest.approx(1.96 * np.std(better - hard, ddof=1) / math.sqrt(400))
    assert report.verdict(difference, interval, 0.0) == "matched, better"
    with pytest.raises(UserError, match="3 windows"):
        report.paired_difference(write_losses(tmp_path / "c", [1, 2, 3]), b)


@pytest.mark.parametrize(
    "difference,interval,tolerance,words",
    [
        (-0.02, 0.01, 0.0, "matched, better"), (-0.005, 0.01, 0.0, "matched, within noise"),
        (0.005, 0.01, 0.0, "not matched, within noise"), (0.005, 0.01, 0.01, "matched, within noise"),
        (0.02, 0.01, 0.0, "not matched, worse"), (0.02, 0.01, 0.05, "matched, worse"),
    ],
)  # fmt: skip
def test_the_verdict_says_what_the_interval_allows(difference, interval, tolerance, words):
    assert report.verdict(difference, interval, tolerance) == words
