"""inheritune.py: the whole recipe on a tiny model, also interrupted, resumed, or on two processes."""

import json
import shutil

import pytest
import torch
from conftest import TINY, call_script, options, run_script
from safetensors.torch import load_file

import baselines
import inheritune
from baselines import Plan
from plumbing import checkpoint, pretrained, resume, storage
from plumbing.configurator import UserError

RECIPE = TINY | {"n_layer": 4, "start_layers": 1, "expand_by": 1, "sequences": 3}
NAMES = ["--baselines", "random", "random, twice the steps"]


def recipe_options(tmp_path, data_dir, **changes):
    return options(**RECIPE | {"out_dir": tmp_path / "out", "data_dir": data_dir} | changes)


def read_recipe(out_dir):
    """[(role, layers)] of every model that the recipe compares."""
    models = storage.read_json(out_dir / "recipe.json")["models"]
    return [(model["role"], pretrained.read_config(out_dir / model["paths"][0]).n_layer) for model in models]


def tensors(path):
    return load_file(path / "model.safetensors")


def weight_files(out_dir):
    return sorted(path.relative_to(out_dir) for path in out_dir.rglob("model.safetensors"))


def edit(monkeypatch, **entries):
    """baselines.py with more entries, as a researcher edits it."""
    monkeypatch.setattr(inheritune, "baselines", lambda n, k: baselines.baselines(n, k) | entries)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A recipe whose tolerance no target meets, so that it makes every round. Its directory and options."""
    tmp_path = tmp_path_factory.mktemp("recipe")
    arguments = [*recipe_options(tmp_path, data_dir, tolerance=-9.0), *NAMES]
    assert call_script(inheritune, *arguments) == 0
    return tmp_path / "out", arguments


@pytest.fixture
def quick(monkeypatch):
    """No figures and no analysis: most of the time of a recipe as small as these."""
    monkeypatch.setattr(inheritune, "measure", lambda *_: {})
    monkeypatch.setattr(inheritune, "report", lambda _: "")


# ---- rounds


def test_rounds_are_added_until_one_matches_and_baselines_have_its_size(
    tmp_path, data_dir, monkeypatch, quick
):
    """The difference is set here (it need not fall with k in so few steps). All else is real."""
    by_layers = {1: (0.3, 0.1), 2: (0.2, 0.3), 3: (-0.01, 0.1)}

    def difference(paths, _):
        return by_layers[pretrained.read_config(paths[0]).n_layer]

    monkeypatch.setattr(inheritune, "paired_difference", difference)
    assert call_script(inheritune, *recipe_options(tmp_path, data_dir, max_steps=4), *NAMES) == 0
    roles = [("reference", 4), ("round", 1), ("round", 2), ("target", 3), ("baseline", 3), ("baseline", 3)]
    assert read_recipe(tmp_path / "out") == roles


def test_a_tolerance_is_the_largest_difference_that_matches(tmp_path, data_dir, monkeypatch, quick):
    monkeypatch.setattr(inheritune, "paired_difference", lambda paths, _: (0.2, 0.1))
    for tolerance, expected in ((0.2, [("reference", 2), ("target", 1)]), (0.19, [("target", 2)])):
        changes = {"max_steps": 2, "n_layer": 2, "tolerance": tolerance}
        assert call_script(inheritune, *recipe_options(tmp_path, data_dir, **changes)) == 0
        assert read_recipe(tmp_path / "out")[-len(expected) :] == expected


def test_without_a_match_the_rounds_end_at_the_reference_s_size(finished):
    rounds = [("round", 1), ("round", 2), ("round", 3), ("target", 4)]
    assert read_recipe(finished[0]) == [("reference", 4), *rounds, ("baseline", 4), ("baseline", 4)]
    rows = [line for line in (finished[0] / "report.md").read_text().splitlines() if line.startswith("| inherited")]
    assert [row.rstrip(" |").endswith("; no smaller target matched") for row in rows[:4]] == [False, False, False, True]


def test_each_round_starts_from_the_reference_s_first_layers(finished):
    out_dir, _ = finished
    reference = tensors(storage.latest(out_dir / "reference"))
    for k in (1, 2, 3, 4):
        ours = tensors(out_dir / f"inherited-{k}/init")
        kept = {key for key in reference if ".h." not in key or int(key.split(".")[2]) < k}
        assert ours.keys() == kept and all(torch.equal(ours[key], reference[key]) for key in kept)
        state = resume.read_state(storage.latest(out_dir / f"inherited-{k}"))
        assert state["made_from"]["init_from"]["layers"] == list(range(k)) and state["tokens"] == 20 * 256


def test_a_round_grows_the_trained_target_with_expand_from_target(tmp_path, data_dir, quick):
    changes = {"n_layer": 3, "max_steps": 4, "expand_from": "target", "tolerance": -9.0}
    assert call_script(inheritune, *recipe_options(tmp_path, data_dir, **changes)) == 0
    reference = tensors(storage.latest(tmp_path / "out/reference"))
    for k in (2, 3):
        ours = tensors(tmp_path / f"out/inherited-{k}/init")
        before = tensors(storage.latest(tmp_path / f"out/inherited-{k - 1}"))
        for key, tensor in ours.items():
            assert torch.equal(tensor, (reference if f".h.{k - 1}." in key else before)[key]), key
    sources = storage.read_json(tmp_path / "out/recipe.json")["models"][-1]["sources"]
    assert sources == ["inherited-2/step-00000004", "reference/step-00000004"]


def test_a_round_grows_the_trained_target_by_fresh_layers_with_expand_from_fresh(tmp_path, data_dir, quick):
    changes = {"n_layer": 2, "max_steps": 4, "expand_from": "fresh", "tolerance": -9.0}
    assert call_script(inheritune, *recipe_options(tmp_path, data_dir, **changes)) == 0
    ours, before = tensors(tmp_path / "out/inherited-2/init"), tensors(storage.latest(tmp_path / "out/inherited-1"))
    lineage = storage.read_json(tmp_path / "out/inherited-2/init/lineage.json")
    assert lineage["layers"] == [0, None]
    assert all(torch.equal(tensor, before[key]) for key, tensor in ours.items() if ".h.1." not in key)
    fresh = ours["transformer.h.1.mlp.c_fc.weight"]
    assert not torch.equal(fresh, before["transformer.h.0.mlp.c_fc.weight"])
    assert fresh.std().item() == pytest.approx(0.02, rel=0.1)


def test_the_first_round_may_start_before_the_lazy_tail(tmp_path, data_dir, monkeypatch, capsys, quick):
    """start_layers=auto. What the analysis says is set here."""
    monkeypatch.setattr(inheritune, "suggested_layers", lambda *_: 3)
    changes = {"max_steps": 2, "start_layers": "auto", "tolerance": 9.0}
    assert call_script(inheritune, *recipe_options(tmp_path, data_dir, **changes)) == 0
    assert read_recipe(tmp_path / "out") == [("reference", 4), ("target", 3)]
    assert "by rank, the reference has 1 lazy layers at its end: k = 3" in capsys.readouterr().out


def test_the_default_is_half_of_the_reference_and_two_layers_more_each_round():
    config = inheritune.RecipeConfig(n_layer=24)
    assert (config.first_k, config.expand_by, config.expand_from, config.tolerance) == (
        12,
        2,
        "reference",
        0.0,
    )


def test_every_seed_has_its_own_reference_order_and_models(tmp_path, data_dir, monkeypatch, quick):
    edit(monkeypatch, alone=Plan(n_layer=1))
    changes = {"max_steps": 2, "n_layer": 2, "tolerance": 9.0}
    seeds = ["--seeds", "1", "2", "--baselines", "random", "--once", "alone"]
    assert call_script(inheritune, *recipe_options(tmp_path, data_dir, **changes), *seeds) == 0
    models = {model["name"]: model for model in storage.read_json(tmp_path / "out/recipe.json")["models"]}
    for name, run in (
        ("reference", "reference"),
        ("inherited, 1 layers", "inherited-1"),
        ("random", "random-1"),
    ):
        assert models[name]["paths"] == [f"seed-{seed}/{run}/step-00000002" for seed in (1, 2)]
    assert models["alone"]["paths"] == ["seed-1/alone-1/step-00000002"]
    for seed in (1, 2):
        reference = tensors(storage.latest(tmp_path / f"out/seed-{seed}/reference"))
        init = tensors(tmp_path / f"out/seed-{seed}/inherited-1/init")
        assert all(torch.equal(init[key], reference[key]) for key in init)
        for run in ("reference", "inherited-1", "random-1"):
            assert (
                resume.read_state(tmp_path / f"out/seed-{seed}/{run}/step-00000002")["settings"]["seed"]
                == seed
            )
    first, second = (tensors(tmp_path / f"out/seed-{seed}/random-1/step-00000002") for seed in (1, 2))
    assert not torch.equal(first["transformer.wte.weight"], second["transformer.wte.weight"])


# ---- interrupted, resumed, repeated


def test_a_finished_recipe_trains_nothing_again_and_measures_nothing_again(finished):
    out_dir, arguments = finished

    def times():
        found = [*out_dir.rglob("model.safetensors"), *out_dir.rglob("attention.json")]
        return {path: path.stat().st_mtime_ns for path in found}

    before = times()
    assert call_script(inheritune, *arguments) == 0
    assert times() == before and len(before) > 12


def test_a_killed_recipe_is_resumed_and_ends_at_the_same_weights(
    finished, tmp_path, data_dir, monkeypatch, quick
):
    """Killed in the reference, in the first round, and after inheriting for the second; then left alone."""
    arguments = [*recipe_options(tmp_path, data_dir, tolerance=-9.0), *NAMES]
    save, saved, inherit, inherited = checkpoint.save, [], inheritune.inherit, []

    def killed(path, *rest):
        save(path, *rest)
        saved.append(path)
        if len(saved) in (1, 3):
            raise KeyboardInterrupt

    def killed_after_inheriting(*all_of_them, **how):
        inherit(*all_of_them, **how)
        inherited.append(all_of_them)
        if len(inherited) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", killed)
    monkeypatch.setattr(inheritune, "inherit", killed_after_inheriting)
    assert [call_script(inheritune, *arguments) for _ in range(4)] == [130, 130, 130, 0]
    assert len({*saved}) == len(saved) and len(inherited) == 4  # nothing was made twice
    assert weight_files(tmp_path / "out") == weight_files(finished[0])
    for path in weight_files(finished[0]):
        assert (tmp_path / "out" / path).read_bytes() == (finished[0] / path).read_bytes()


def test_the_recipe_works_under_torchrun(tmp_path, data_dir):
    changes = {"max_steps": 4, "micro_batch": 2, "tolerance": 9.0}
    done = run_script("inheritune.py", *recipe_options(tmp_path, data_dir, **changes), processes=2)
    assert done.returncode == 0, done.stderr
    assert read_recipe(tmp_path / "out") == [("reference", 4), ("target", 1)]
    assert (tmp_path / "out/report.md").exists()
    assert done.stdout.count("round k = 1") == done.stdout.count("report: ") == 1  # no baselines: one report


def test_a_different_target_is_measured_and_a_different_setting_measures_again(finished, tmp_path):
    out_dir = shutil.copytree(finished[0], tmp_path / "out")
    changes = [f"--out_dir={out_dir}", "--tolerance=10", "--sequences=2"]
    assert call_script(inheritune, *finished[1], *changes) == 0
    assert (
        read_recipe(out_dir)[1] == ("target", 1)
        and storage.read_json(out_dir / "recipe.json")["tolerance"] == 10
    )
    found = storage.read_json(out_dir / "inherited-1/recipe_attention/attention.json")
    assert found["sequences"] == 2 and len(found["layers"]) == 4 and len(found["compared"]["layers"]) == 1


def test_a_finished_report_is_not_cut_short_by_a_second_run_that_is_stopped(finished, tmp_path, monkeypatch):
    out_dir = shutil.copytree(finished[0], tmp_path / "out")
    report = (out_dir / "report.md").read_text()
    train, calls = inheritune.train, []

    def stopped(config):
        calls.append(config)
        if len(calls) == 6:  # the first baseline
            raise KeyboardInterrupt
        return train(config)

    monkeypatch.setattr(inheritune, "train", stopped)
    assert call_script(inheritune, *finished[1], f"--out_dir={out_dir}") == 130
    assert (out_dir / "report.md").read_text() == report and len(read_recipe(out_dir)) == 7


# ---- sources that changed


def test_a_different_reference_is_never_mixed_with_what_the_old_one_left(finished, tmp_path, capsys, quick):
    out_dir = shutil.copytree(finished[0], tmp_path / "out")
    shutil.rmtree(out_dir / "reference")
    assert call_script(inheritune, *finished[1], f"--out_dir={out_dir}", "--seed=7") == 2
    assert "inherited-1/init was made with a different sha256" in capsys.readouterr().err
    shutil.rmtree(out_dir / "inherited-1/init")
    assert call_script(inheritune, *finished[1], f"--out_dir={out_dir}", "--seed=7") == 2
    assert "cannot resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "before,after,word",
    [
        ({}, {"layers": [1]}, "layers"),
        ({}, {"layers": [None]}, "layers"),
        ({"parts": "attn"}, {"parts": "mlp"}, "parts"),
        ({}, {"source": "target"}, "sha256"),
        ({"top": "reference", "top_layers": [0]}, {"top": "target", "top_layers": [0]}, "top"),
    ],
)
def test_an_edited_baseline_is_refused(finished, tmp_path, monkeypatch, capsys, quick, before, after, word):
    out_dir = shutil.copytree(finished[0], tmp_path / "out")
    arguments = [*finished[1], f"--out_dir={out_dir}", "--tolerance=10", "--baselines", "mine"]
    edit(monkeypatch, mine=Plan(**{"layers": [0]} | before))
    assert call_script(inheritune, *arguments) == 0
    recipe = (out_dir / "recipe.json").read_bytes()
    capsys.readouterr()
    edit(monkeypatch, mine=Plan(**{"layers": [0]} | after))
    assert call_script(inheritune, *arguments) == 2
    error = capsys.readouterr().err
    assert "mine-1/init was made with a different " in error and word in error and error.count("\n") == 1
    assert (out_dir / "recipe.json").read_bytes() == recipe


def test_an_edited_setting_of_a_baseline_is_refused(finished, tmp_path, monkeypatch, capsys, quick):
    out_dir = shutil.copytree(finished[0], tmp_path / "out")
    arguments = [*finished[1], f"--out_dir={out_dir}", "--tolerance=10", "--baselines", "mine"]
    for settings, code in (({}, 0), ({"lr": 2e-3}, 2)):
        edit(monkeypatch, mine=Plan(n_layer=1, settings=settings))
        assert call_script(inheritune, *arguments) == code
    assert "cannot resume" in (error := capsys.readouterr().err) and "lr: 0.01 then, 0.002 now" in error


# ---- mistakes


@pytest.mark.parametrize(
    "wrong,words",
    [
        (["--start_layers=5"], "start_layers is 5, expected 1 to 4"),
        (["--max_steps=0", "--warmup_steps=0"], "max_steps is 0, expected at least 1"),
        (["--seeds", "1", "5000000000"], "seed is 5000000000, expected 0 to 4294967295"),
        (["--once", "randm"], "baselines.py: unknown key 'randm'; did you mean 'random'?"),
        (["--n_layer=0"], "start_layers is 1, expected 1 to 0"),
        (["--start_layers=0"], "start_layers is 0, expected 1 to 4"),
        (["--sequences=0"], "sequences is 0, expected at least 1"),
        (["--expand_by=0"], "expand_by is 0, expected at least 1"),
        (["--seq_len=1"], "seq_len is 1, expected at least 2"),
        (["--init_from=gpt2"], "init_from, override and teacher are"),
        (["--teacher=gpt2"], "override and teacher are"),
        (["--n_head=3"], "reference: "),
        (["--n_embd=33"], "reference: "),
        (["--dropout=2"], "reference: "),
        (["--micro_batch=7"], "reference: tokens_per_step 256 is not divisible by micro_batch 7"),
        (["--warmup_steps=21"], "warmup_steps is 21"),
        (["--data_dir=nowhere"], "nowhere/manifest.json: No such file or directory; expected a data directory"),
        (["--device=cuda"], "device 'cuda' is not available"),
    ],
)
def test_a_mistake_is_one_line_before_the_first_step(tmp_path, data_dir, capsys, wrong, words):
    if wrong == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert call_script(inheritune, *recipe_options(tmp_path, data_dir), *wrong) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("step-*"))


def test_an_option_that_does_not_exist_ends_with_2_and_names_the_nearest(tmp_path, data_dir, capsys):
    assert call_script(inheritune, *recipe_options(tmp_path, data_dir), "--expnd_by=1") == 2
    assert "expand_by" in capsys.readouterr().err


def test_a_baseline_whose_source_has_a_different_width_is_refused(tmp_path, data_dir, monkeypatch, quick):
    narrow = Plan(n_layer=2, settings={"n_embd": 16})
    edit(monkeypatch, narrow=narrow, mine=Plan(layers=[0], source="narrow"))
    settings = RECIPE | {
        "data_dir": str(data_dir),
        "out_dir": str(tmp_path / "out"),
        "n_layer": 2,
        "max_steps": 2,
    }
    with pytest.raises(UserError, match="mine: its shape is not that of the layers that it takes"):
        inheritune.recipe(inheritune.RecipeConfig(**settings | {"tolerance": 9.0, "baselines": ["mine"]}))
    assert not (tmp_path / "out").exists()  # before the first step


def test_a_preset_names_the_baselines(tmp_path, data_dir, quick):
    preset = tmp_path / "tiny.toml"
    preset.write_text(f"max_steps = 2\n[inheritune]\ntolerance = 9.0\nbaselines = {json.dumps(NAMES[1:])}\n")
    settings = {key: value for key, value in RECIPE.items() if key != "max_steps"}
    settings |= {"n_layer": 2, "out_dir": tmp_path / "out", "data_dir": data_dir}
    assert call_script(inheritune, preset, *options(**settings)) == 0
    assert read_recipe(tmp_path / "out") == [
        ("reference", 2),
        ("target", 1),
        ("baseline", 1),
        ("baseline", 1),
    ]
