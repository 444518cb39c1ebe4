"""config/ and runs/: every preset loads, its arithmetic is right, the scripts do what their headers say."""

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest
from conftest import ROOT

import inheritune
from baselines import PAPER, Plan
from inheritune import RecipeConfig
from model import GPTConfig
from plumbing import configurator
from train import TrainConfig

PRESETS = sorted(path.stem for path in (ROOT / "config").glob("*.toml"))
RUNS = sorted(path.stem for path in (ROOT / "runs").glob("*gpt2-*.sh"))
SHAPES = {  # layers, heads, width, millions of parameters
    "gpt2-small": (12, 12, 768, 124),
    "gpt2-medium": (24, 16, 1024, 355),
    "gpt2-medium-200k": (24, 16, 1024, 355),
    "gpt2-large": (36, 20, 1280, 774),
    "gpt2-xl": (48, 25, 1600, 1557),  # 1,558 with OpenAI's biases and without padding
    "gpt2-large-32": (32, 20, 1280, 695),  # the paper says 680
}
PEAK = {"H100": 989e12, "A100": 312e12}  # bf16, dense


def load(preset: str, script: str, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    config = {"train": TrainConfig, "inheritune": RecipeConfig}[script]
    from_hub = preset == "single_gpu" and script == "inheritune"
    no_hub = ["--reference="] * from_hub  # its shape is read from the hub, where tests do not go
    return configurator.load(config, [str(ROOT / f"config/{preset}.toml"), *no_hub])


def gpt_config(config) -> GPTConfig:
    names = GPTConfig.__dataclass_fields__
    return GPTConfig(**{name: value for name in names if (value := getattr(config, name)) is not None})


@pytest.mark.parametrize("script", ["train", "inheritune"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_for_both_scripts(preset, script, monkeypatch):
    config = load(preset, script, monkeypatch)
    assert config.out_dir == f"out/{preset}" and config.tokens_per_step % gpt_config(config).block_size == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_every_model_of_a_preset_can_be_built(preset, monkeypatch):
    config = load(preset, "inheritune", monkeypatch)
    inheritune.check(config)
    assert {"random", "random, twice the steps"} <= {*config.baselines}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_holds_only_what_differs_from_the_defaults(preset):
    table = tomllib.loads((ROOT / f"config/{preset}.toml").read_text())
    own = table.pop("inheritune")
    values = table | {key: value for key, value in own.items() if key not in ("start_layers", "expand_by")}
    same = [key for key, value in values.items() if RecipeConfig.__dataclass_fields__[key].default == value]
    same += [
        key for key, value in table.items() if key != "n_layer" and getattr(GPTConfig, key, None) == value
    ]
    assert same == []


def test_every_result_of_the_paper_is_in_the_facts_and_in_the_documents():
    facts = ROOT.parent / "shared/PAPER.md"
    if not facts.is_file():
        pytest.skip("needs shared/PAPER.md, the facts that this project was made from")
    lines, docs = facts.read_text().splitlines(), (ROOT / "docs/reproduce.md").read_text()

    def numbers(start: str) -> list[float]:
        row = next(line for line in lines if line.startswith(start))
        return [float(number) for number in re.findall(r"\d+\.\d\d", row.replace("**", ""))]

    parts = ("attention and its norm", "MLP and its norm", "attention and MLP, no norms")
    copies, trained = ("half width", "stacking", "hybrid stacking"), ("random", "random, twice the steps")
    rounds = {"medium": (12, 14, 16), "large": (18,), "xl": (24,)}
    random, first, rank_0, middle, rank_1, last, rank_2 = (numbers("| table 4")[i] for i in (0, 2, 1, 4, 3, 6, 5))
    expected = {"small": {"first third": first, "middle third": middle, "last third": last, "random, third": random}}
    for i, (key, layers) in enumerate(rounds.items()):
        names = ["reference", *trained, *(f"inherited, {n} layers" for n in layers)]
        found = numbers("| table 5, medium" if key == "medium" else f"| {key} |")
        expected[key] = {"k": layers[-1]} | dict(zip(names, found, strict=True))
        expected[key] |= dict(zip(copies, numbers("| table 2")[4 * i : 4 * i + 3], strict=True))
    *of_parts, everything = numbers("| table 3")
    expected["medium"] |= dict(zip(parts, of_parts, strict=True))
    expected["medium-200k"] = {"k": 18} | dict(zip(("reference", "inherited, 18 layers"), numbers("| figure 24"), strict=True))
    assert expected == PAPER
    for key, results in PAPER.items():
        for name in results.keys() - {"k"}:
            assert f"| {key} | {name} | {results[name]:.2f} |" in docs, (key, name)

    def there(start: str) -> list[float]:
        rows = [line.split("|")[2] for line in docs.splitlines() if line.startswith(f"| {start}")]
        return [float(number) for row in rows for number in re.findall(r"\d+\.\d\d", row)]

    assert there("table 1") == numbers("| table 1") and there("table 7") == numbers("| table 7")
    assert there("table 3") == [everything] and there("table 4") == [rank_0, rank_1, rank_2]


@pytest.mark.parametrize("name", RUNS)
def test_a_paper_s_preset_has_the_paper_s_model_and_training(name, monkeypatch):
    config, fineweb = load(name, "inheritune", monkeypatch), name.startswith("fineweb-")
    model = gpt_config(config)
    n_layer, n_head, n_embd, millions = SHAPES[name.removeprefix("fineweb-")]
    assert (model.n_layer, model.n_head, model.n_embd) == (n_layer, n_head, n_embd)
    assert round(model.num_params() / 1e6) == millions
    assert f"{millions:,} million parameters" in (ROOT / f"config/{name}.toml").read_text()
    assert (model.block_size, model.vocab_size, model.bias, model.dropout) == (1024, 50304, False, 0.0)
    assert model.scale_attn_by_inverse_layer_idx
    steps = 200_000 if name.endswith("200k") else 100_000
    assert (config.max_steps, config.warmup_steps, config.min_lr) == (steps, 2_000, 1e-5)
    assert (config.weight_decay, config.grad_clip, config.beta1) == (0.1, 1.0, 0.9)
    tokens = {"gpt2-medium": 393_216, "gpt2-large": 131_072, "gpt2-xl": 131_072}.get(name, 49_152)
    assert (config.tokens_per_step, config.beta2) == ((61_440, 0.999) if fineweb else (tokens, 0.95))
    rates = {"gpt2-small": 6e-4, "gpt2-medium": 3e-4, "gpt2-medium-200k": 3e-4, "gpt2-xl": 1.5e-4}
    assert config.lr == rates.get(name, 2e-4)
    assert config.data_dir == ("data/fineweb-edu" if fineweb else "data/openwebtext")
    first = {"gpt2-small": 6, "gpt2-large": 18, "gpt2-xl": 24, "gpt2-medium": 12, "gpt2-medium-200k": 18}
    assert config.start_layers == first.get(name, 16)


@pytest.mark.parametrize("name", RUNS)
def test_a_step_can_be_split_among_the_processes_that_the_script_names(name, monkeypatch):
    config = load(name, "inheritune", monkeypatch)
    script = (ROOT / f"runs/{name}.sh").read_text()
    counts, other, other_count = re.search(
        r"GPUS=1 .*# ([\d, or]+\d)(?:; with --micro_batch=(\d+) also (\d+))?\n", script
    ).groups()
    default = re.search(r"--nproc_per_node=\"\$\{GPUS:-(\d+)\}\"", script)[1]
    assert default in re.findall(r"\d+", counts) and f"# on {default} GPUs\n" in script
    splits = [(int(n), config.micro_batch) for n in re.findall(r"\d+", counts)]
    splits += [(int(other_count), int(other))] if other else []
    for processes, micro_batch in splits:
        assert config.tokens_per_step % (1024 * processes * micro_batch) == 0, (processes, micro_batch)


@pytest.mark.parametrize("name", RUNS)
def test_the_hours_in_a_script_s_header_follow_from_the_flops(name, monkeypatch):
    config, script = load(name, "inheritune", monkeypatch), (ROOT / f"runs/{name}.sh").read_text()
    assert "ESTIMATED, not measured" in script and f"{config.tokens_per_step:,} tokens x steps" in script
    number = r"\s+([\d.e+]+)"
    rows = re.findall(rf"^#   (\w[^#\n]*?)\s+(\d+)\s+(\d+){number * 4}$", script, flags=re.MULTILINE)
    k = int([row for row in rows if row[0].startswith("inherited")][-1][1])  # of the last round in the table
    total, baselines = 0.0, inheritune.wanted(config.baselines, config.n, k)
    for row_name, layers, steps, per_token, flops, *hours in rows:
        baseline = baselines.get(row_name, Plan(n_layer=int(layers)))
        assert int(layers) == (baseline.n_layer or len(baseline.layers) + len(baseline.top_layers)), row_name
        shape, share = gpt_config(config), baseline.width
        narrow = {"n_embd": int(share * shape.n_embd), "n_head": int(share * shape.n_head)}
        model = replace(shape, n_layer=int(layers), **narrow)
        a_token = model.flops_per_token() + bool(baseline.teacher) * gpt_config(config).flops_per_token() // 3
        expected = a_token * config.tokens_per_step * int(steps)
        assert int(steps) == baseline.steps * config.max_steps
        assert float(per_token) == pytest.approx(a_token, rel=0.01)
        assert float(flops) == pytest.approx(expected, rel=0.01)
        for found, peak in zip(hours, PEAK.values(), strict=True):
            assert float(found) == pytest.approx(expected / (0.4 * peak) / 3600, rel=0.1)
        total += expected
    found = re.search(rf"^#   all of it{number * 3}$", script, flags=re.MULTILINE).groups()
    expected = [total, *(total / (0.4 * peak) / 3600 for peak in PEAK.values())]
    assert [float(value) for value in found] == pytest.approx(expected, rel=0.1)
    summary = re.search(r"That is (\d+) hours on (\d+) H100 or (\d+) on (\d+) A100", script).groups()
    assert [float(h) * int(n) for h, n in zip(summary[::2], summary[1::2], strict=True)] == pytest.approx(
        expected[1:], rel=0.1
    )
    # a line for the reference, for each round of the paper, and for each baseline and what it begins with
    assert int(rows[0][1]) == config.n_layer and int(rows[1][1]) == config.start_layers
    assert [row[0] for row in rows[-len(baselines) :]] == list(baselines)


def test_the_hours_on_a_single_gpu_follow_from_the_flops(monkeypatch):
    script, number = (ROOT / "runs/single_gpu.sh").read_text(), r"\s+([\d.e+]+)"
    medium = GPTConfig(n_layer=24, n_head=16, n_embd=1024, vocab_size=50257, bias=True)  # of the hub
    small = gpt_config(load("single_gpu_scratch", "inheritune", monkeypatch))
    halves = script.split("# (b) ")
    for half, shape, preset in zip(halves, (medium, small), ("single_gpu", "single_gpu_scratch"), strict=True):
        config, total = load(preset, "inheritune", monkeypatch), 0.0
        rows = re.findall(rf"^#   (\w[^#\n]*?)\s+(\d+)\s+(\d+){number * 4}$", half, flags=re.MULTILINE)
        assert {row[0] for row in rows} >= set(config.baselines)
        for _, layers, steps, flops, *hours in rows:
            expected = replace(shape, n_layer=int(layers)).flops_per_token() * config.tokens_per_step * int(steps)
            total += expected
            assert float(flops) == pytest.approx(expected, rel=0.01)
            in_hours = [expected / (0.4 * peak) / 3600 for peak in (989e12, 312e12, 165.2e12)]
            assert [float(hour) for hour in hours] == pytest.approx(in_hours, abs=0.051)
        assert float(re.search(rf"^#   all of it{number}", half, flags=re.MULTILINE)[1]) == pytest.approx(total, rel=0.01)

    def hours(*layers):  # all models of (a), 10,000 steps each
        flops = 49_152 * 10_000 * sum(replace(medium, n_layer=n).flops_per_token() for n in layers)
        return "{:.1f}, {:.1f} or {:.1f} hours".format(*(flops / (0.4 * p) / 3600 for p in (989e12, 312e12, 165.2e12)))

    assert f"If 12 do, it takes {hours(12, *[12] * 3, 24)}" in script  # random, twice the steps: two of three
    assert f"have 24 layers too: {hours(*range(12, 26, 2), *[24] * 3, 24)}" in script


@pytest.mark.parametrize("path", sorted((ROOT / "runs").glob("*.sh")), ids=lambda path: path.name)
def test_every_script_is_plain_sh_and_stops_at_the_first_error(path):
    assert subprocess.run(["sh", "-n", path], timeout=60).returncode == 0
    assert path.read_text().startswith("#!/bin/sh\n") and "\nset -eu\n" in path.read_text()


def run_with_stubs(name: str, folder, fails: str = "") -> tuple[int, list[str]]:
    """A script of runs/ in an empty folder, where each program notes how it was called: (exit code, notes).

    torchrun leaves the checkpoints of two rounds, lm_eval its results. A program named `fails` exits with 3.
    """
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    (folder / "bin").mkdir(exist_ok=True)
    for script in (ROOT / "runs").glob("*.sh"):
        (folder / "runs" / script.name).write_text(script.read_text())
    (folder / "recipe.json").write_text(json.dumps({"models": RECIPE_LEAVES}))
    scores = {name: {"acc,none": 0.1 * i} for i, name in enumerate(TASKS)}
    scores["wikitext"] = {"word_perplexity,none": 25.46}
    (folder / "scores.json").write_text(json.dumps({"results": scores}))
    leaves = {
        "torchrun": " && ".join(f"mkdir -p out/{name}/{model['paths'][0]}" for model in RECIPE_LEAVES)
        + f" && cp recipe.json out/{name}/",
        "lm_eval": 'mkdir -p "$9/model" && cp scores.json "$9/model/results_2026.json"',  # after --output_path
    }
    for program in ("python", "torchrun", "lm_eval"):
        stub = folder / "bin" / program
        end = "exit 3" if program == fails else leaves.get(program, "true")
        real = f'[ "$1" = -c ] && exec {sys.executable} "$@"\n' if program == "python" else ""
        stub.write_text(
            f'#!/bin/sh\n{real}echo "{program} $*" >> calls\nshift $(($# > 9 ? $# - 9 : 0))\n{end}\n'
        )
        stub.chmod(0o755)
    (folder / "calls").unlink(missing_ok=True)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", f"runs/{name}.sh"], cwd=folder, env=environment, timeout=60)
    return done.returncode, (folder / "calls").read_text().splitlines()


TASKS = ["arc_easy", "piqa", "sciq", "hellaswag", "lambada_openai", "winogrande", "boolq"]
RECIPE_LEAVES = [
    {"name": run, "role": role, "paths": [f"{run}/step-00100000"]}
    for role, run in (
        ("reference", "reference"), ("round", "inherited-12"), ("target", "inherited-14"),
        ("baseline", "random"), ("baseline", "stacking"),
    )
]  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_script_prepares_trains_and_scores_reference_target_and_random_once(name, tmp_path, capfd):
    data_dir = "data/fineweb-edu" if name.startswith("fineweb") else "data/openwebtext"
    code, (prepare, recipe, *scores) = run_with_stubs(name, tmp_path)
    assert code == 0
    assert prepare == f"python prepare_data.py {data_dir[5:]} --tokenizer=gpt2 --out={data_dir}"
    assert re.fullmatch(
        rf"torchrun --standalone --nproc_per_node=\d inheritune.py config/{name}.toml", recipe
    )
    for score, run in zip(scores, ("reference", "inherited-14", "random"), strict=True):
        assert f"pretrained=out/{name}/{run}/step-00100000 " in score
    assert run_with_stubs(name, tmp_path) == (0, [prepare, recipe])  # again: the first two see to themselves
    printed = capfd.readouterr().out
    assert printed.count("mean of 5 tasks (table 1) 20.00, of 7 (table 7) 30.00, WikiText 25.46") == 6


@pytest.mark.parametrize("fails,calls", [("python", 1), ("torchrun", 2), ("lm_eval", 3)])
def test_a_script_ends_at_the_first_stage_that_fails(fails, calls, tmp_path):
    code, made = run_with_stubs("gpt2-medium", tmp_path, fails)
    assert code == 3 and len(made) == calls


@pytest.mark.parametrize(
    "arguments,parts",
    [([], ["", "_scratch"]), (["a"], [""]), (["b", "--micro_batch=8"], ["_scratch"]), (["c"], None), (["A"], None)],
)
def test_the_single_gpu_script_runs_the_parts_that_are_named(arguments, parts, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/single_gpu.sh").write_text((ROOT / "runs/single_gpu.sh").read_text())
    (tmp_path / "python").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["sh", "runs/single_gpu.sh", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    if parts is None:  # refused before the download
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        return
    prepare, *recipes = done.stdout.splitlines()
    assert done.returncode == 0 and prepare.startswith("prepare_data.py fineweb-edu --data_files=sample/10BT/00[01]*.parquet ")
    assert recipes == [" ".join([f"inheritune.py config/single_gpu{part}.toml", *arguments[1:]]) for part in parts]


def test_scoring_a_recipe_that_was_not_run_is_one_line(tmp_path):
    command = ["sh", ROOT / "runs/evaluate.sh", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "run the recipe first" in done.stderr
