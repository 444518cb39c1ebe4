"""report.py: paired differences, costs, verdicts; what it reads is verified, what it writes follows from the runs."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from conftest import TINY, call_script, options

import inheritune
import report
from plumbing import resume, storage
from plumbing.configurator import UserError

PRESET = '[inheritune]\nbaselines = ["random", "stacking"]\nsequences = 3\nseq_len = 16\ntolerance = 9.0\n'


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A small recipe: a reference of 4 layers, a target of 2, two baselines and what stacking begins with."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "tiny.toml").write_text(PRESET)
    settings = TINY | {"n_layer": 4, "data_dir": data_dir, "out_dir": folder / "out"}
    assert call_script(inheritune, folder / "tiny.toml", *options(**settings)) == 0
    return folder / "out"


def test_a_lost_log_leaves_the_last_point_of_the_curve(finished, tmp_path):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    (out_dir / "reference/metrics.jsonl").unlink()
    report.report(out_dir)
    reference = storage.latest(out_dir / "reference")
    tokens, values = report.curve([reference])
    assert tokens == resume.read_state(reference)["tokens"] and values == report.val_losses(reference).mean()


def with_losses(folder, *losses):
    """Directories as checkpoints, with these validation losses."""
    paths = []
    for i, each in enumerate(losses):
        (folder / str(i)).mkdir()
        storage.write_json(folder / str(i) / "val_losses.json", {"data": "x", "block_size": 8, "losses": each})
        paths.append(folder / str(i))
    return paths


def test_a_difference_is_paired_over_windows_and_its_interval_is_the_pairs(tmp_path):
    a, b = np.array([1.0, 5.0, 9.0, 2.0]), np.array([1.2, 5.1, 9.3, 2.2])
    ours, theirs = with_losses(tmp_path, a.tolist(), b.tolist())
    mean, interval = report.paired_difference([ours], [theirs])
    assert mean == pytest.approx((a - b).mean()) and interval == pytest.approx(1.96 * (a - b).std(ddof=1) / 2)
    assert report.verdict(mean, interval, 0.0) == "matched, better"


def test_one_window_has_no_interval_and_no_model_is_better(tmp_path):
    ours, theirs = with_losses(tmp_path, [1.0], [2.0])
    mean, interval = report.paired_difference([ours], [theirs])
    assert (mean, interval) == (-1.0, math.inf)
    assert report.verdict(mean, interval, 0.0) == "matched, within noise"


@pytest.mark.parametrize(
    "difference,interval,tolerance,words",
    [
        (-0.2, 0.1, 0.0, "matched, better"), (-0.05, 0.1, 0.0, "matched, within noise"),
        (0.05, 0.1, 0.0, "not matched, within noise"), (0.2, 0.1, 0.0, "not matched, worse"),
        (0.2, 0.1, 0.3, "matched, worse"),
    ],
)  # fmt: skip
def test_the_verdict_says_matched_by_the_tolerance_and_better_by_the_interval(difference, interval, tolerance, words):
    assert report.verdict(difference, interval, tolerance) == words


def test_models_evaluated_on_different_windows_are_not_compared(tmp_path):
    ours, theirs = with_losses(tmp_path, [1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="different windows"):
        report.paired_difference([ours], [theirs])


def test_every_model_has_a_row_and_tokens_of_all_it_came_from(finished):
    text = (finished / "report.md").read_text()
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.setdefault(cells[0], cells)
    step = 20 * 256 / 1e6  # every model is trained for 20 steps of 256 tokens
    for name, runs in {"reference": 1, "inherited, 2 layers": 2, "random": 1, "stacking": 2}.items():
        assert rows[name][3:5] == [f"{step:.2f} M", f"{runs * step:.2f} M"], name
        assert rows[name][-1].startswith("reference" if name == "reference" else "matched")
    assert "Inherited layers beat random ones" in rows and "Inheriting beats half width" not in rows
    assert "MaxRank, layer 3" in rows and rows["heads near rank one"][1].endswith("%")
    for figure in ("loss.png", "differences.png", "rank.png"):
        assert f"({figure})" in text and (finished / figure).read_bytes().startswith(b"\x89PNG")


def test_what_was_made_from_a_model_that_was_trained_elsewhere_has_an_unknown_cost(finished, tmp_path):
    copy, recipe = shutil.copytree(finished, tmp_path / "copy"), storage.read_json(finished / "recipe.json")
    assert report.spent(recipe["models"][1], recipe, copy)[0] == f"{2 * 20 * 256 / 1e6:.2f} M"
    path = copy / "reference/step-00000020/trainer_state.json"
    storage.write_json(path, storage.read_json(path) | {"step": 0, "tokens": 0})
    assert report.spent(recipe["models"][1], recipe, copy) == ["?", "?"]


@pytest.mark.parametrize("run", ["reference", "random-2", "stacking-2", "inherited-2"])
def test_a_changed_loss_of_a_finished_checkpoint_is_seen(finished, tmp_path, capsys, run):
    copy = shutil.copytree(finished, tmp_path / "copy")
    path = next(copy.glob(f"{run}/step-*/val_losses.json"))
    path.write_text(path.read_text().replace("1", "2", 1))
    assert call_script(report, copy) == 2
    assert "val_losses.json: sha256 mismatch" in capsys.readouterr().err


def test_a_full_disk_is_one_line_after_the_tables(finished, tmp_path, capsys, monkeypatch):
    def full_disk(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(storage, "write_text", full_disk)
    assert call_script(report, shutil.copytree(finished, tmp_path / "copy")) == 1
    printed = capsys.readouterr()
    assert "| model" in printed.out and "MaxRank, layer 0" in printed.out
    assert printed.err.endswith("report.md: No space left on device\n") and printed.err.count("\n") == 1


def test_torn_lines_of_a_log_are_skipped(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    with open(copy / "reference" / "metrics.jsonl", "ab") as file:
        file.write(b'\xff{"step": 9, "val\n[1]\n')
    assert call_script(report, copy) == 0


def test_the_attention_of_a_report_is_of_the_recipe_s_sequences(finished):
    text = (finished / "report.md").read_text()
    assert "T = 16, τ = 0.9, 3 sequences" in text
    result = storage.read_json(next(finished.glob("inherited-2/recipe_attention")) / "attention.json")
    thirds = ", ".join(f"{group['layers']} {group['avg_rank']:.2f}" for group in result["groups"])
    assert f"| AvgRank of the thirds | {thirds} |" in re.sub(r" +", " ", text)


def test_a_directory_that_is_no_recipe_is_one_line(tmp_path, capsys):
    assert call_script(report, tmp_path) == 2
    error = capsys.readouterr().err
    assert "recipe.json: No such file" in error and error.count("\n") == 1


def test_baselines_are_put_beside_the_paper_s_only_for_a_target_of_its_size(finished, monkeypatch):
    rows = report.rows_of(json.loads((finished / "recipe.json").read_text()), finished)
    for k, names in ((2, {"reference", "random"}), (3, {"reference"})):
        monkeypatch.setattr(report, "PAPER", {"mine": {"k": k, "reference": 2.0, "random": 3.0}})
        lines = report.paper_table(rows, "mine").splitlines()[2:]
        assert {line.split("|")[1].strip() for line in lines} == names


def test_the_seeds_of_a_claim_are_counted(finished):
    recipe = json.loads((finished / "recipe.json").read_text())
    table = report.claims(report.rows_of(recipe, finished))
    line = next(line for line in table.splitlines() if "Inherited layers beat random ones" in line)
    assert "of 1" in line and line.split("|")[-2].strip() in {"yes", "no", "within noise"}
