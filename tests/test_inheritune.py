"""inheritune.py and report.py: the whole chain on a tiny model, stopped and taken up again; and the verdict."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, call_script, options, read_metrics, run_script

from plumbing import checkpoint
import inheritune
import report
from plumbing import storage
from plumbing.configurator import UserError

TOLERANCE = -0.2
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
steps = 2
"""


def preset(tmp_path, tolerance):
    (tmp_path / "tiny.toml").write_text(PRESET.format(tolerance=tolerance))
    settings = {key: value for key, value in TINY.items() if key != "n_layer"}
    return [tmp_path / "tiny.toml", *options(**settings, out_dir=tmp_path / "out")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A recipe whose tolerance demands to be better by more than any target is, so that it goes through all rounds."""
    tmp_path = tmp_path_factory.mktemp("recipe")
    arguments = [*preset(tmp_path, TOLERANCE), f"--data_dir={data_dir}"]
    assert call_script(inheritune, *arguments) == 0
    return tmp_path / "out", arguments


def test_rounds_go_on_until_one_matches_and_arms_have_its_size(tmp_path, data_dir, monkeypatch):
    """The difference is set here (it has no reason to fall with k in so few steps); all else is real."""
    by_layers = {1: (0.3, 0.1), 2: (0.2, 0.3), 3: (-0.01, 0.1)}

    def difference(paths, _):
        return by_layers[checkpoint.read_config(paths[0]).n_layer]

    monkeypatch.setattr(inheritune, "paired_difference", difference)
    arguments = [*preset(tmp_path, 0.0), f"--data_dir={data_dir}", "--max_steps=4"]
    assert call_script(inheritune, *arguments) == 0
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    roles = [
        (model["role"], int(checkpoint.read_config(tmp_path / "out" / model["paths"][0]).n_layer))
        for model in recipe["models"]
    ]
    assert roles == [("reference", 4), ("round", 1), ("round", 2), ("target", 3), ("arm", 3), ("arm", 3)]


def test_without_a_match_the_rounds_end_at_the_reference_s_size(finished):
    out_dir, _ = finished
    recipe = json.loads((out_dir / "recipe.json").read_text())
    roles = [model["role"] for model in recipe["models"]]
    n_rounds = roles.count("round") + 1
    assert roles == ["reference", *["round"] * (n_rounds - 1), "target", "arm", "arm"]
    layers = [checkpoint.read_config(out_dir / model["paths"][0]).n_layer for model in recipe["models"]]
    k = layers[n_rounds]
    assert layers == [4, *range(1, k + 1), k, k]
    reference = out_dir / recipe["models"][0]["paths"][0]
    differences = [
        report.paired_difference([out_dir / m["paths"][0]], [reference])[0] for m in recipe["models"][1 : n_rounds + 1]
    ]
    assert all(d > TOLERANCE for d in differences) and k == 4
    assert "not matched" in next(s for s in (out_dir / "report.md").read_text().splitlines() if "inherited, 4 la" in s)
    assert "*A smaller inherited model matches the reference*: no." in (out_dir / "report.md").read_text()


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
    assert lineage["layers"] == [0] and [run["tokens"] for run in lineage["ancestors"].values()] == [20 * 256]


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
        evaluations, reference = (
            [entry for entry in read_metrics((out_dir / path).parent) if "val_loss" in entry]
            for path in (model["paths"][0], recipe["models"][0]["paths"][0])
        )
        last, own = evaluations[-1], 40 if "twice" in model["name"] else 20
        assert cells[6] == f"{last['val_loss']:.4f} ± {last['val_se']:.4f}"
        assert cells[7].startswith(f"{last['val_loss'] - reference[-1]['val_loss']:+.4f} ± ")
        before = 20 if model["role"] in ("round", "target") else 0
        assert cells[3:5] == [f"{own * 256 / 1e6:.2f} M", f"{(own + before) * 256 / 1e6:.2f} M"]
        reached = [entry["step"] for entry in evaluations if entry["val_loss"] <= reference[-1]["val_loss"]]
        assert cells[9].split(":")[0] == (f"{reached[0] / own:.0%}" if reached else "never")
    target = next(model["paths"][0] for model in recipe["models"] if model["role"] == "target").split("/")[0]
    for figure in ("loss.png", "rank.png", "reference/attention/attention.png", f"{target}/attention/attention.png"):
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
    arguments = [*preset(tmp_path, TOLERANCE), f"--data_dir={data_dir}"]
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
        (["--expand_by=0"], "expand_by is 0, expected 1 to 4"),
        (["--start_layers=0"], "start_layers is 0"),
        (["--sequences=0"], "sequences is 0"),
        (["--tolerance=nan"], "tolerance is nan"),
        (["--init_from=gpt2"], "init_from, eval_only, override and teacher are for train.py"),
        (["--expnd_by=1"], "did you mean 'expand_by'"),
        (["--data_dir=nowhere"], "data directory nowhere does not exist"),
    ],
)
def test_a_mistake_is_one_line(finished, capsys, wrong, words):
    assert call_script(inheritune, *finished[1], *wrong) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arms,words",
    [
        ([{"name": "random"}, {"name": "Random!"}], "a name of its own"),
        ([{"name": "!!"}], "a name of its own"),
        ([{"name": "target"}], "a name of its own"),
        ([{"name": "a", "layers": "0:m"}], "expected numbers, k, n and"),
        ([{"name": "a", "layers": "0:k/0"}], "layers '0:k/0': "),
        ([{"name": "a", "layers": "0:(k"}], r"layers '0:\(k': "),
        ([{"name": "a", "layers": "0:n+1"}], "does not lie in 0:12"),
        ([{"name": "a", "layers": ":", "source": "b"}, {"name": "b"}], "source 'b' is neither an arm above it"),
        ([{"name": "a", "teacher": "b"}], "teacher 'b' is neither"),
        ([{"name": "a", "steps": 0}], "steps 0"),
        ([{"name": "a", "seeds": 2}], "seeds 2; expected more than 0, and 1 to all"),
        ([{"name": "a", "settings": {"n_embed": 1}}], "unknown key 'n_embed'; did you mean 'n_embd'"),
        ([{"name": "a", "settings": {"lr": "fast"}}], "arm 'a': its settings: lr = 'fast'"),
        ([{"name": "a", "n_layer": "0:k"}], "n_layer '0:k' is 0:6, expected a number from 1"),
        ([{"name": "a", "n_layer": "k/9"}], "n_layer 'k/9' is 0,"),
        ([{"name": "a", "steps": math.inf}], "steps inf"),
        ([{"name": "a", "parts": "mlp"}], "found parts but no layers"),
        ([{"name": "a", "source": "target"}], "found source but no layers"),
        ([{"name": "a", "layers": ":", "n_layer": 3}], "so no n_layer"),
        ([{"name": "a", "layers": ":", "top_layers": "0:1"}], "top and top_layers go together"),
        ([{"name": "a", "layers": ":", "parts": "attention"}], "parts 'attention'; expected some of attn"),
        ([{"name": "a", "layers": "0:k+1", "source": "target"}], "does not lie in 0:6"),
        ([{"name": "b", "n_layer": 2}, {"name": "a", "layers": "0:3", "source": "b"}], "arm 'a'.* lie in 0:2"),
        ([{"name": "a", "layers": "0:9**9"}], "expected numbers, k, n and"),
        ([{"name": "a", "settings": {"seed": 5}}], "settings cannot have seed"),
        ([{"name": "a", "settings": {"n_layer": 5}}], "settings cannot have n_layer"),
        ([{"name": "a", "layers": "0:k", "settings": {"n_embd": 8}}], "settings cannot have n_embd"),
        ([{"name": "a", "layers": ":", "inherit_from": "stable"}], "not an arm with schedule"),
        ([{"name": "a", "teacher": "out/refrence"}], "teacher 'out/refrence' is neither"),
    ],
)
def test_an_arm_that_could_not_be_trained_is_refused_at_once(arms, words):
    with pytest.raises(UserError, match=words):
        inheritune.RecipeConfig(arms=[inheritune.Arm(**arm) for arm in arms])


@pytest.mark.parametrize(
    "text,k,n,layers",
    [
        ("0:k", 4, 12, "0:4"), ("n-k:n", 4, 12, "8:12"), ("0:k/2,0:k/2", 6, 12, "0:3,0:3"), ("::2", 4, 12, "::2"),
        ("0 : (k+1)/2, 0:k/2", 9, 18, "0:5,0:4"), (":", 4, 12, ":"), ("n", 4, 12, "12"), ("k/2*2", 5, 9, "4"),
    ],
)  # fmt: skip
def test_layers_are_arithmetic_on_k_and_n(text, k, n, layers):
    assert inheritune.with_numbers(text, k, n) == layers


def test_an_arm_of_any_name_is_never_the_target_itself():
    assert inheritune.slug("Inherited, 4!") == "inherited-4"  # and arm- before it


def test_another_target_is_analyzed_and_not_the_old_analysis_shown(finished, tmp_path):
    out_dir = shutil.copytree(finished[0], tmp_path / "out")
    assert call_script(inheritune, *finished[1], f"--out_dir={out_dir}", "--tolerance=10", "--sequences=2") == 0
    recipe = json.loads((out_dir / "recipe.json").read_text())
    target = next(model for model in recipe["models"] if model["role"] == "target")
    assert target["paths"][0].startswith("inherited-1/") and recipe["tolerance"] == 10
    found = json.loads((out_dir / "inherited-1" / "attention" / "attention.json").read_text())
    assert found["sequences"] == 2 and len(found["layers"]) == 1
    reference = json.loads((out_dir / "reference" / "attention" / "attention.json").read_text())
    assert reference["sequences"] == 2  # measured again with the new setting


def test_an_analysis_with_other_settings_is_made_again(finished, tmp_path):
    out_dir = shutil.copytree(finished[0], tmp_path / "out")
    table = out_dir / "reference" / "attention" / "attention.json"
    found = json.loads(table.read_text())
    for key, other in {
        "tau": 0.5, "T": 7, "average_first": True, "lazy_below": 3.0, "untrained": None,
    }.items():  # fmt: skip
        table.write_text(json.dumps(found | {key: other}))
        assert call_script(inheritune, *finished[1], f"--out_dir={out_dir}") == 0
        assert json.loads(table.read_text())[key] == found[key]


def test_what_another_reference_left_is_never_taken_for_this_one_s(finished, tmp_path, capsys):
    out_dir = shutil.copytree(finished[0], tmp_path / "out")
    shutil.rmtree(out_dir / "reference")
    assert call_script(inheritune, *finished[1], f"--out_dir={out_dir}", "--seed=7") == 2
    assert "inherited-1/init was made with another source" in capsys.readouterr().err
    shutil.rmtree(out_dir / "inherited-1" / "init")
    assert call_script(inheritune, *finished[1], f"--out_dir={out_dir}", "--seed=7") == 2
    assert "cannot resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "before,after,word",
    [
        ({"layers": "0:1"}, {"layers": "1:2"}, "layers"),
        ({"layers": "0:1", "parts": "attn"}, {"layers": "0:1", "parts": "mlp"}, "parts"),
        ({"layers": "0:1"}, {"layers": "0:1", "moments": True}, "moments"),
        ({"layers": "0:1"}, {"layers": "0:1", "source": "target"}, "source"),
        ({"layers": "0:1", "top": "reference", "top_layers": "1:2"},
         {"layers": "0:1", "top": "target", "top_layers": "0:1"}, "top"),
    ],
)  # fmt: skip
def test_an_arm_that_was_edited_is_never_given_the_old_one_s_result(tmp_path, data_dir, capsys, before, after, word):
    settings = TINY | {"max_steps": 2, "n_layer": 2, "data_dir": data_dir, "out_dir": tmp_path / "out"}

    def run(arm):
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in ({"name": "arm"} | arm).items()]
        text = "[inheritune]\ntolerance = 9.0\nsequences = 2\n\n[[inheritune.arms]]\n"
        (tmp_path / "recipe.toml").write_text(text + "".join(lines))
        return call_script(inheritune, tmp_path / "recipe.toml", *options(**settings))

    assert run(before) == 0 and run(before) == 0
    report_before = (tmp_path / "out/report.md").read_bytes()
    capsys.readouterr()
    assert run(after) == 2
    error = capsys.readouterr().err
    assert "/arm-arm-1/init was made with another" in error and word in error and error.count("\n") == 1
    assert (tmp_path / "out/report.md").read_bytes() == report_before


def test_a_finished_report_is_not_cut_short_by_a_second_run_that_is_stopped(finished, tmp_path, monkeypatch):
    out_dir = shutil.copytree(finished[0], tmp_path / "out")
    whole = (out_dir / "report.md").read_text().count("\n| ")
    measured = storage.read_json(out_dir / "latency.json")
    train, calls = inheritune.train, []

    def stopped(config):
        calls.append(config)
        if len(calls) == 6:  # the first arm
            raise KeyboardInterrupt
        return train(config)

    monkeypatch.setattr(inheritune, "train", stopped)
    assert call_script(inheritune, *finished[1], f"--out_dir={out_dir}") == 130
    assert (out_dir / "report.md").read_text().count("\n| ") == whole
    assert storage.read_json(out_dir / "latency.json") == measured  # once is enough


def test_a_damaged_analysis_is_made_again(finished, tmp_path):
    out_dir = shutil.copytree(finished[0], tmp_path / "out")
    analysis = out_dir / "reference" / "attention" / "attention.json"
    whole = analysis.read_bytes()
    analysis.write_bytes(whole[:50])
    assert call_script(inheritune, *finished[1], f"--out_dir={out_dir}") == 0
    assert json.loads(analysis.read_bytes())["layers"] == json.loads(whole)["layers"]


def test_models_evaluated_on_other_data_are_not_compared(tmp_path):
    a, b = write_losses(tmp_path / "a", [1, 2, 3]), write_losses(tmp_path / "b", [1, 2, 4])
    (b / "val_losses.json").write_text(json.dumps({"losses": [1, 2, 4], "data": "another"}))
    with pytest.raises(UserError, match="other data"):
        report.paired_difference([a], [b])


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
    difference, interval = report.paired_difference([a], [b])
    assert difference == pytest.approx(np.mean(better - hard)) and abs(difference + 0.02) < interval < 0.006
    assert interval == pytest.approx(1.96 * np.std(better - hard, ddof=1) / math.sqrt(400))
    assert report.verdict(difference, interval, 0.0) == "matched, better"
    with pytest.raises(UserError, match=r"\(3 windows\) and .* were evaluated on other data"):
        report.paired_difference([write_losses(tmp_path / "c", [1, 2, 3])], [b])


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
