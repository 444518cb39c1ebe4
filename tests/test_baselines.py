"""baselines.py: every comparison of the paper, what each model begins with and is trained on."""

import csv
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call_script, options, read_metrics, run_script
from safetensors.torch import load_file

import baselines
import inheritune
import train
from model import GPT
from plumbing import checkpoint, model_files, pretrained, resume, storage
from plumbing.configurator import UserError

SIZES = [(24, 16), (24, 12), (12, 6), (12, 7), (8, 4), (8, 8), (6, 5), (5, 3), (4, 2), (4, 1), (2, 1)]


def known(n=24, k=16):
    return baselines.baselines(n, k)


def n_layer(model):
    return model.n_layer or len(model.layers) + len(model.top_layers)


# ---- the definitions


@pytest.mark.parametrize(
    "name,layers",
    [
        ("reference, trained on", "0:24"),
        ("first half", "0:12"),
        ("lazy layers", "12:24"),  # figure 3: the last half, not the last k
        ("last layers", "8:24"),
        ("first layers and the last", "0:15,23"),
        ("middle layers", "4:20"),
        ("every other layer", "::2,18:22"),
        ("spread layers", "0,2:4,5:7,8:10,11:13,14:16,17:19,20:22,23"),
        ("distilled, every other layer", "::2,18:22"),  # DistilBERT's (appendix D)
        ("lazy layers in place", "new:15,15:24"),  # figure 23
        ("stacking", "0:8,0:8"),
        ("hybrid stacking", "0:8,0:8"),
        ("attention and its norm", "0:16"),
        ("MLP and its norm", "0:16"),
        ("attention and MLP, no norms", "0:16"),
        ("distilled, inherited", "0:16"),
        ("first layers, half the steps", "0:14"),
        ("inherited, WSD", "0:16"),
    ],
)
def test_the_layers_of_a_baseline_are_those_of_the_paper(name, layers):
    """For its GPT-2 medium: 24 layers, of which 16 match."""
    from inherit import parse_layers

    assert known()[name].layers == parse_layers(layers, 24)


@pytest.mark.parametrize("n,k", SIZES)
def test_spread_layers_are_k_different_ones_from_the_first_to_the_last(n, k):
    layers = known(n, k)["spread layers"].layers
    assert len(set(layers)) == k and layers == sorted(layers) and layers[0] == 0 and layers[-1] == (n - 1 if k > 1 else 0)


@pytest.mark.parametrize(
    "name,expected",
    [
        ("random", {"n_layer": 16, "steps": 1}),
        ("random, twice the steps", {"n_layer": 16, "steps": 2}),
        ("random, half", {"n_layer": 12, "steps": 0.1}),  # figure 3: 10 K of 100 K steps
        ("first half", {"steps": 0.1}),
        ("lazy layers", {"steps": 0.1}),
        ("half width", {"layers": [*range(24)], "width": 0.5, "steps": 1}),
        ("half of the target", {"n_layer": 8}),
        ("stacking", {"source": "half of the target"}),
        ("hybrid stacking", {"source": "reference"}),
        ("attention and its norm", {"parts": "ln_1,attn", "source": "reference"}),  # table 3
        ("MLP and its norm", {"parts": "ln_2,mlp"}),
        ("attention and MLP, no norms", {"parts": "attn,mlp"}),
        ("distilled, random", {"n_layer": 16, "teacher": "reference", "steps": 0.5}),
        ("distilled, every other layer", {"teacher": "reference", "steps": 0.5}),
        ("grown from the target", {"top": "reference", "top_layers": [14, 15], "steps": 0.5}),
        ("grown with the last layers", {"layers": [*range(14)], "top_layers": [22, 23], "steps": 0.5}),
        ("grown with fresh layers", {"layers": [*range(14), None, None], "top": "", "steps": 0.5}),
        ("inherited, WSD", {"before_decay": True, "source": "reference, WSD", "settings": {"schedule": "wsd"}}),
    ],
)
def test_a_baseline_is_made_as_the_paper_says(name, expected):
    assert {key: getattr(known()[name], key) for key in expected} == expected


@pytest.mark.parametrize("n,k", SIZES)
def test_every_baseline_can_be_built_for_every_size(n, k):
    """The right number of layers, each one that its source has."""
    models = known(n, k)
    sizes = {"reference": n, "target": k} | {name: n_layer(model) for name, model in models.items()}
    half = {
        "first third",
        "middle third",
        "last third",
        "random, third",
        "first half",
        "lazy layers",
        "random, half",
        "half of the target",
    }
    for name, model in models.items():
        layers = [layer for layer in model.layers if layer is not None]
        assert all(0 <= layer < sizes[model.source] for layer in layers), name
        assert all(0 <= layer < sizes["reference"] for layer in model.top_layers), name
        in_place = name in ("lazy layers in place", "half width") or "reference" in name
        if name not in half | {"first layers, half the steps"}:
            assert sizes[name] == (n if in_place else k), name
    assert sizes["first half"] == sizes["lazy layers"] == sizes["random, half"] == n // 2
    shape = {"n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 64, "tokens_per_step": 128}
    names = [name for name, model in models.items() if k > 1 or not model.top]  # one layer cannot be grown into
    inheritune.check(inheritune.RecipeConfig(n_layer=n, start_layers=k, baselines=names, **shape))


def test_a_baseline_that_puts_no_layers_on_top_is_refused_before_the_first_step():
    with pytest.raises(UserError, match="grown from the target: top and top_layers go together"):
        inheritune.check(inheritune.RecipeConfig(n_layer=4, start_layers=1, baselines=["grown from the target"]))


def test_the_claims_name_models_that_exist():
    names = {"target", "reference", *known()}
    assert [claim for claim in baselines.CLAIMS if not set(claim[1:]) <= names] == []


def test_a_model_is_trained_after_those_that_it_is_made_from():
    models = known()
    assert list(inheritune.wanted(["stacking", "random", "half of the target"], 24, 16)) == [
        "half of the target", "stacking", "random",
    ]  # fmt: skip
    found = list(inheritune.wanted(list(reversed(models)), 24, 16))
    assert sorted(found) == sorted(models)
    for i, name in enumerate(found):
        needs = {models[name].source, models[name].top, models[name].teacher} & models.keys()
        assert needs <= set(found[:i]), name


@pytest.mark.parametrize(
    "how", [{"teacher": "random"}, {"top": "random", "top_layers": [0]}, {"source": "random"}]
)
def test_a_teacher_and_a_top_are_trained_before_too(how, monkeypatch):
    added = {"mine": baselines.Plan(layers=[0], **how)}
    monkeypatch.setattr(inheritune, "baselines", lambda n, k: added | baselines.baselines(n, k))
    assert list(inheritune.wanted(["mine"], 24, 16)) == ["random", "mine"]


@pytest.mark.parametrize(
    "wrong,nearest", [("radnom", "random"), ("lazy layer", "lazy layers"), ("stacked", "stacking")]
)
def test_an_unknown_name_is_one_line_with_the_nearest(wrong, nearest, tmp_path, data_dir, capsys):
    arguments = options(**TINY, out_dir=tmp_path / "out", data_dir=data_dir)
    assert call_script(inheritune, *arguments, "--baselines", "random", wrong) == 2
    error = capsys.readouterr().err
    assert f"{wrong!r}; did you mean {nearest!r}?" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- all of them, trained in a tiny recipe

BATCHES = {}  # run -> step -> the positions that it was trained on


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A recipe of 6 and 4 layers with every baseline. Its training batches are noted."""
    out_dir = tmp_path_factory.mktemp("baselines") / "out"
    settings = TINY | {
        "n_layer": 6,
        "max_steps": 4,
        "eval_interval": 4,
        "save_interval": 4,
        "warmup_steps": 1,
    }
    starts, run = train.data.train_starts, []

    def noted(n_tokens, T, seed, step, batch_size):
        found = starts(n_tokens, T, seed, step, batch_size)
        BATCHES.setdefault(run[-1], {})[step] = found.tolist()
        return found

    def noting(config):
        run.append(config.out_dir.rsplit("/")[-1])
        return train.train(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.data, "train_starts", noted)
        patch.setattr(inheritune, "train", noting)
        patch.setattr(inheritune, "measure", lambda *_: {})  # not needed here, and seconds of drawing
        patch.setattr(inheritune, "report", lambda _: "")
        recipe = {
            "start_layers": 4,
            "tolerance": 10.0,
            "sequences": 2,
            "data_dir": data_dir,
            "out_dir": out_dir,
        }
        assert call_script(inheritune, *options(**settings, **recipe), "--baselines", *known(6, 4)) == 0
    return out_dir


# run -> the run it inherits from, the source's layer for each of its own, and the parts that it takes
TAKEN = {
    "inherited-4": ("reference", [0, 1, 2, 3], ""),
    "reference-trained-on-4": ("reference", [0, 1, 2, 3, 4, 5], ""),
    "lazy-layers-4": ("reference", [3, 4, 5], ""),
    "last-layers-4": ("reference", [2, 3, 4, 5], ""),
    "first-layers-and-the-last-4": ("reference", [0, 1, 2, 5], ""),
    "every-other-layer-4": ("reference", [0, 2, 4, 3], ""),
    "lazy-layers-in-place-4": ("reference", [None, None, None, 3, 4, 5], ""),
    "stacking-4": ("half-of-the-target-4", [0, 1, 0, 1], ""),
    "hybrid-stacking-4": ("reference", [0, 1, 0, 1], ""),
    "attention-and-its-norm-4": ("reference", [0, 1, 2, 3], "ln_1,attn"),
    "mlp-and-its-norm-4": ("reference", [0, 1, 2, 3], "ln_2,mlp"),
    "attention-and-mlp-no-norms-4": ("reference", [0, 1, 2, 3], "attn,mlp"),
    "inherited-wsd-4": ("reference-wsd-4", [0, 1, 2, 3], ""),
    "first-half-4": ("reference", [0, 1, 2], ""),
    "first-third-4": ("reference", [0, 1], ""),
    "middle-third-4": ("reference", [2, 3], ""),
    "last-third-4": ("reference", [4, 5], ""),
    "distilled-every-other-layer-4": ("reference", [0, 2, 4, 3], ""),
}


def read_init(finished, run):
    directory = finished / run / "init"
    return load_file(directory / "model.safetensors"), storage.read_json(directory / "lineage.json")


@pytest.mark.parametrize("run", TAKEN)
def test_a_baseline_begins_with_the_tensors_of_its_definition(finished, run):
    ours, lineage = read_init(finished, run)
    source, layers, parts = TAKEN[run]
    step = 2 if "wsd" in run else 4  # WSD: before the decay
    theirs = load_file(finished / source / f"step-{step:08d}/model.safetensors")
    torch.manual_seed(TINY.get("seed", 1337))
    drawn = checkpoint.hf_tensors(GPT(pretrained.read_config(finished / run / "init")))
    assert lineage["layers"] == layers
    assert {int(key.split(".")[2]) for key in ours if ".h." in key} == {*range(len(layers))}
    for key, tensor in ours.items():
        layer = int(key.split(".")[2]) if ".h." in key else None
        old = None if layer is None else layers[layer]
        if layer is not None and (old is None or (parts and key.split(".")[3] not in parts.split(","))):
            assert torch.equal(tensor, drawn[key]) and lineage["tensors"][key] == "fresh, seed 1337", key
        else:
            origin = key if layer is None else key.replace(f".h.{layer}.", f".h.{old}.")
            assert torch.equal(tensor, theirs[origin]) and lineage["tensors"][key] == origin, key
    first = resume.read_state(storage.latest(finished / run))["made_from"]["init_from"]
    assert first["layers"] == layers  # the run started from it


def test_the_grown_model_is_the_trained_one_with_the_reference_s_next_layers_on_top(finished):
    ours, _ = read_init(finished, "grown-from-the-target-4")
    below = load_file(storage.latest(finished / "first-layers-half-the-steps-4") / "model.safetensors")
    above = load_file(storage.latest(finished / "reference") / "model.safetensors")
    for key, tensor in ours.items():
        assert torch.equal(tensor, (above if ".h.2." in key or ".h.3." in key else below)[key]), key


def test_half_width_begins_with_the_first_half_of_all_layers_heads_units_and_dimensions(finished):
    ours, lineage = read_init(finished, "half-width-4")
    theirs = load_file(storage.latest(finished / "reference") / "model.safetensors")
    assert lineage["layers"] == [0, 1, 2, 3, 4, 5] and ours.keys() == theirs.keys()
    C, qkv = 16, [*range(16), *range(32, 48), *range(64, 80)]  # of 32; of queries, keys and values
    for key, whole in theirs.items():
        columns = qkv if "c_attn" in key else range(64 if "c_fc" in key else C)
        rows = range(64 if "mlp.c_proj" in key else C)  # (in, out)
        expected = whole[..., list(columns)]
        if whole.ndim == 2 and ".h." in key:
            expected = expected[list(rows)]
        assert torch.equal(ours[key], expected), key


def test_distillation_ends_at_a_tenth_of_its_rate(finished):
    for run in ("distilled-random-4", "distilled-every-other-layer-4", "distilled-inherited-4"):
        settings = resume.read_state(storage.latest(finished / run))["settings"]
        assert settings["min_lr"] == pytest.approx(settings["lr"] / 10)
    assert resume.read_state(storage.latest(finished / "random-4"))["settings"]["min_lr"] == 1e-5


@pytest.mark.parametrize("run,layers", [("random-4", 4), ("half-of-the-target-4", 2), ("reference-wsd-4", 6)])
def test_a_baseline_without_layers_begins_at_random(finished, run, layers):
    path = storage.latest(finished / run)
    assert pretrained.read_config(path).n_layer == layers and not (finished / run / "init").exists()
    assert resume.read_state(path)["made_from"]["init_from"] == "scratch"


def test_inherited_before_the_decay_it_goes_on_at_the_rate_of_its_source(finished):
    lineage = storage.read_json(finished / "inherited-wsd-4/init/lineage.json")
    assert lineage["sha256"] == model_files.hashes(finished / "reference-wsd-4/step-00000002")
    settings = resume.read_state(storage.latest(finished / "inherited-wsd-4"))["settings"]
    assert settings["warmup_steps"] == 0 and settings["schedule"] == "wsd"


def test_a_distilled_baseline_has_the_reference_as_its_teacher(finished):
    for run in ("distilled-random-4", "distilled-every-other-layer-4", "distilled-inherited-4"):
        teacher = resume.read_state(storage.latest(finished / run))["made_from"]["teacher"]
        assert teacher["sha256"] == model_files.hashes(storage.latest(finished / "reference")), run
    assert resume.read_state(storage.latest(finished / "random-4"))["made_from"]["teacher"] == "scratch"


def test_all_models_see_the_same_batches_for_their_number_of_steps(finished):
    longest = BATCHES["random-twice-the-steps-4"]
    assert len(BATCHES) == len(known()) + 2 and len(longest) == 8
    steps = {
        "random-4": 4,
        "distilled-random-4": 2,
        "grown-from-the-target-4": 2,
        "inherited-4": 4,
        "stacking-4": 4,
        "lazy-layers-4": 1,  # a tenth of 4, but at least one
    }
    for run, batches in BATCHES.items():
        assert batches == {step: longest[step] for step in range(len(batches))}, run
        assert len(batches) == steps.get(run, len(batches)) and len(batches) >= 1, run


def test_the_recipe_lists_what_each_baseline_was_made_from(finished):
    models = {model["name"]: model for model in storage.read_json(finished / "recipe.json")["models"]}
    assert models.keys() == {"reference", "inherited, 4 layers", *known()}
    assert models["random"]["sources"] == []
    assert models["stacking"]["sources"] == ["half-of-the-target-4/step-00000004"]
    assert models["inherited, WSD"]["sources"] == ["reference-wsd-4/step-00000002"]
    assert models["distilled, every other layer"]["sources"] == ["reference/step-00000004"] * 2
    assert models["grown from the target"]["sources"] == [
        "first-layers-half-the-steps-4/step-00000002",
        "reference/step-00000004",
    ]


# ---- a researcher adds one

def test_a_baseline_is_added_in_five_lines(tmp_path, data_dir):
    """The file is edited as docs/reproduce.md says, then the recipe is run."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/reproduce.md").read_text(), flags=re.DOTALL)
    text = next(block for block in blocks if ": Plan(" in block)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert len(text.strip().splitlines()) <= 5
    for path in (*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    source = (tmp_path / "baselines.py").read_text()
    (tmp_path / "baselines.py").write_text(
        source.replace("    return {\n", f"    return {{\n{text.strip(chr(10))}\n", 1)
    )
    name = re.search(r'"([^"]+)": Plan\(', text)[1]
    settings = TINY | {
        "n_layer": 4,
        "max_steps": 4,
        "data_dir": data_dir,
        "out_dir": tmp_path / "out",
        "tolerance": 9.0,
    }
    command = [sys.executable, "inheritune.py", *options(**settings, sequences=2), "--baselines", name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"| {name} " in (tmp_path / "out/report.md").read_text()
    lineage = storage.read_json(tmp_path / "out/every-third-layer-2/init/lineage.json")
    assert lineage["layers"] == [0, 3]


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"n_embd": 33}, "33"),
        ({"block_size": 24}, "block_size and vocab_size are not those of the reference"),
        ({"vocab_size": 300}, "block_size and vocab_size are not those of the reference"),
        ({"device": "warp"}, "device 'warp' is not available"),
        ({"micro_batch": 7}, "is not divisible by micro_batch"),
        ({"warmup_steps": 99}, "warmup_steps is 99"),
        ({"n_embed": 64}, "n_embed"),
    ],
)
def test_a_mistake_in_a_baseline_is_named_before_the_first_step(
    settings, words, tmp_path, data_dir, monkeypatch
):
    added = {"wrong": baselines.Plan(n_layer=2, settings=settings)}
    monkeypatch.setattr(inheritune, "baselines", lambda n, k: baselines.baselines(n, k) | added)
    tiny = TINY | {"data_dir": str(data_dir), "out_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match=f"^wrong: .*{words}"):
        inheritune.recipe(inheritune.RecipeConfig(**tiny, baselines=["random", "wrong"]))
    assert not (tmp_path / "out").exists()


def test_the_models_of_whole_layers_are_compared_by_rank_and_by_cost(finished, data_dir, tmp_path):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    with pytest.raises(UserError, match="attention.json has no costs; run analyze_attention.py --ablate"):
        runpy.run_path(str(ROOT / "runs/which_layers.py"))["rows"](out_dir, "", [])
    arguments = [out_dir / "reference", f"--data_dir={data_dir}", "--ablate", "--sequences=3", "--device=cpu"]
    done = run_script("analyze_attention.py", *arguments)
    assert done.returncode == 0, done.stderr
    done = run_script("runs/which_layers.py", out_dir)
    assert done.returncode == 0, done.stderr
    with open(out_dir / "which_layers.csv", encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert rows["last layers"]["layers"] == "2 3 4 5" and rows["last third"]["layers"] == "4 5"
    assert rows.keys().isdisjoint({"random", "half width", "MLP and its norm", "distilled, inherited"})
    layers = storage.read_json(out_dir / "reference/attention/attention.json")["layers"]
    for key, measured in (("avg_rank", "max_rank"), ("cost", "cost")):
        expected = np.mean([layers[layer][measured] for layer in (2, 3, 4, 5)])
        assert float(rows["last layers"][key]) == pytest.approx(expected)
    loss = read_metrics(out_dir / "last-layers-4")[-1]["val_loss"]
    assert float(rows["last layers"]["loss"]) == pytest.approx(loss)
    assert (out_dir / "which_layers.png").stat().st_size > 10_000
