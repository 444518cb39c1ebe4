"""Every arm of the paper: what it begins with, tensor by tensor, what it is trained on, what it is counted for."""

import numpy as np
import pytest
import torch
from conftest import TINY, call_script, options, read_metrics
from safetensors.torch import load_file

from plumbing import checkpoint
import inheritune
import report
from plumbing import storage
import train
from model import GPT

K, N = 4, 6
PRESET = """
n_layer = 6

[inheritune]
sequences = 2
start_layers = 4
seeds = [1, 2]
tolerance = 10.0

[[inheritune.arms]]
name = "random"

[[inheritune.arms]]
name = "twice"
steps = 2

[[inheritune.arms]]
name = "lazy"
layers = "n-k:n"
seeds = 1

[[inheritune.arms]]
name = "half"
n_layer = "k/2"
seeds = 1

[[inheritune.arms]]
name = "stacked"
source = "half"
layers = "0:k/2,0:k/2"
seeds = 1

[[inheritune.arms]]
name = "stacked twice"
source = "stacked"
layers = ":,:"
seeds = 1

[[inheritune.arms]]
name = "hybrid"
layers = "0:k/2,0:k/2"
seeds = 1

[[inheritune.arms]]
name = "every other"
layers = "::2"
teacher = "reference"
seeds = 1

[[inheritune.arms]]
name = "attention"
layers = "0:k"
parts = "attn"
seeds = 1

[[inheritune.arms]]
name = "mlp and norms"
layers = "0:k"
parts = "mlp,ln"
seeds = 1

[[inheritune.arms]]
name = "half width"
n_layer = "n"
settings = { n_embd = 16, n_head = 1 }
seeds = 1

[[inheritune.arms]]
name = "distilled"
teacher = "reference"
settings = { alpha = 0.2 }
seeds = 1

[[inheritune.arms]]
name = "trained on"
layers = ":"
seeds = 1

[[inheritune.arms]]
name = "stable"
n_layer = "n"
settings = { schedule = "wsd" }
seeds = 1

[[inheritune.arms]]
name = "from stable"
source = "stable"
inherit_from = "stable"
moments = true
layers = "0:k"
settings = { schedule = "wsd" }
seeds = 1

[[inheritune.arms]]
name = "from stable, taught"
source = "stable"
inherit_from = "stable"
layers = "0:k"
teacher = "stable"
settings = { schedule = "wsd" }
seeds = 1

[[inheritune.arms]]
name = "grown"
source = "random"
layers = ":"
top = "reference"
top_layers = "k:n"
steps = 0.5
seeds = 1

[[inheritune.claims]]
text = "Lazy layers transfer little"
better = "target"
worse = "lazy"
"""
BATCHES = {}  # run directory -> step -> the positions that it was trained on


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """The recipe with all of these arms, its training batches noted down."""
    tmp_path = tmp_path_factory.mktemp("arms")
    (tmp_path / "arms.toml").write_text(PRESET)
    settings = TINY | {"n_layer": N, "max_steps": 6, "eval_interval": 3, "save_interval": 3}
    starts, run_dir = train.data.train_starts, []

    def noted(n_tokens, T, seed, step, batch_size):
        found = starts(n_tokens, T, seed, step, batch_size)
        BATCHES.setdefault(run_dir[-1], {})[step] = found.tolist()
        return found

    def noting(config):
        run_dir.append(str(config.out_dir))
        return train.train(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.data, "train_starts", noted)
        patch.setattr(inheritune, "train", noting)
        arguments = [tmp_path / "arms.toml", *options(**settings, data_dir=data_dir, out_dir=tmp_path / "out")]
        assert call_script(inheritune, *arguments) == 0
    return tmp_path / "out"


def init(finished, name, seed=1):
    directory = finished / f"seed-{seed}" / name / "init"
    return load_file(directory / "model.safetensors"), storage.read_json(directory / "lineage.json")


def last(finished, name, seed=1):
    return storage.latest(finished / f"seed-{seed}" / name)


# arm -> its source's run, and the source's layer for each of its own
TAKEN = {
    "inherited-4": ("reference", [0, 1, 2, 3]), "arm-lazy-4": ("reference", [2, 3, 4, 5]),
    "arm-stacked-4": ("arm-half-4", [0, 1, 0, 1]), "arm-stacked-twice-4": ("arm-stacked-4", [0, 1, 2, 3, 0, 1, 2, 3]),
    "arm-hybrid-4": ("reference", [0, 1, 0, 1]), "arm-every-other-4": ("reference", [0, 2, 4]),
    "arm-trained-on-4": ("reference", [0, 1, 2, 3, 4, 5]), "arm-attention-4": ("reference", [0, 1, 2, 3]),
    "arm-mlp-and-norms-4": ("reference", [0, 1, 2, 3]), "arm-from-stable-4": ("arm-stable-4", [0, 1, 2, 3]),
}  # fmt: skip
PARTS = {"arm-attention-4": (".attn.",), "arm-mlp-and-norms-4": (".mlp.", ".ln_")}


@pytest.mark.parametrize("name", TAKEN)
def test_an_arm_begins_with_the_tensors_of_its_definition(finished, name):
    ours, lineage = init(finished, name)
    source, layers = TAKEN[name]
    step = 3 if name == "arm-from-stable-4" else 6  # half of the six, before the decay
    theirs = load_file(finished / f"seed-1/{source}/step-{step:08d}/model.safetensors")
    torch.manual_seed(1)
    drawn = checkpoint.hf_tensors(GPT(checkpoint.read_config(finished / "seed-1" / name / "init")))
    assert lineage["layers"] == layers and {int(key.split(".")[2]) for key in ours if ".h." in key} == {
        *range(len(layers))
    }
    for key, tensor in ours.items():
        layer = int(key.split(".")[2]) if ".h." in key else None
        expected_key = key if layer is None else key.replace(f".h.{layer}.", f".h.{layers[layer]}.")
        if layer is None or any(part in key for part in PARTS.get(name, ("",))):
            assert torch.equal(tensor, theirs[expected_key]) and lineage["tensors"][key] == expected_key, key
        else:
            assert torch.equal(tensor, drawn[key]) and lineage["tensors"][key] == "fresh, seed 1", key


def test_the_grown_arm_is_the_trained_one_with_the_reference_s_next_layers_on_top(finished):
    ours, lineage = init(finished, "arm-grown-4")
    below, above = (load_file(last(finished, name) / "model.safetensors") for name in ("arm-random-4", "reference"))
    for key, tensor in ours.items():
        top = ".h.4." in key or ".h.5." in key
        assert torch.equal(tensor, (above if top else below)[key]), key
        assert lineage["tensors"][key] == ("top:" if top else "") + key


@pytest.mark.parametrize("name,n_layer,n_embd", [("random", 4, 32), ("half", 2, 32), ("half-width", 6, 16)])
def test_an_arm_without_layers_begins_at_random(finished, name, n_layer, n_embd):
    path = last(finished, f"arm-{name}-4")
    config = checkpoint.read_config(path)
    assert (config.n_layer, config.n_embd) == (n_layer, n_embd) and not (path.parent / "init").exists()
    assert checkpoint.read_lineage(path) == {}


def test_moments_are_carried_where_they_are_asked_for(finished):
    theirs = load_file(finished / "seed-1/arm-stable-4/step-00000003/optimizer.safetensors")
    ours = load_file(finished / "seed-1/arm-from-stable-4/init/optimizer.safetensors")
    assert ours and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert not (finished / "seed-1/inherited-4/init/optimizer.safetensors").exists()
    state = storage.read_json(last(finished, "arm-from-stable-4") / "trainer_state.json")
    assert state["settings"]["warmup_steps"] == 0 and state["settings"]["schedule"] == "wsd"


def test_all_models_of_one_seed_see_the_same_batches(finished):
    by_seed = [{run: b for run, b in BATCHES.items() if f"/seed-{seed}/" in run} for seed in (1, 2)]
    assert [len(runs) for runs in by_seed] == [19, 4]
    for runs in by_seed:
        longest = max(runs.values(), key=len)
        assert len(longest) == 12  # twice the steps
        for run, batches in runs.items():
            assert batches == {step: longest[step] for step in range(3 if "grown" in run else len(batches))}, run
            assert len(batches) >= 3
    a, b = (next(iter(runs.values())) for runs in by_seed)
    assert a != b


def test_everything_an_arm_was_made_from_is_counted_once(finished):
    tokens = {name: checkpoint.cost(last(finished, name))["tokens"] // 256 for name in TAKEN}
    assert tokens == {
        "inherited-4": 12, "arm-lazy-4": 12, "arm-stacked-4": 12, "arm-stacked-twice-4": 18, "arm-hybrid-4": 12,
        "arm-every-other-4": 12, "arm-trained-on-4": 12, "arm-attention-4": 12, "arm-mlp-and-norms-4": 12,
        "arm-from-stable-4": 9,
    }  # fmt: skip
    assert checkpoint.cost(last(finished, "arm-distilled-4"))["tokens"] // 256 == 12  # its teacher's too
    # a run is one run, also where its last checkpoint teaches what its stable one began
    assert checkpoint.cost(last(finished, "arm-from-stable-taught-4"))["tokens"] // 256 == 6 + 6
    assert checkpoint.cost(last(finished, "arm-grown-4"))["tokens"] // 256 == 6 + 6 + 3


def test_the_seeds_are_averaged_and_their_spread_is_told(finished):
    def final(name, seed):
        return [line["val_loss"] for line in read_metrics(finished / f"seed-{seed}" / name) if "val_loss" in line][-1]

    text = (finished / "report.md").read_text().splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:]] for line in text if line[:2] == "| "}
    for name, run in (("reference", "reference"), ("inherited, 4 layers", "inherited-4"), ("random", "arm-random-4")):
        ours, theirs = (np.array([final(r, seed) for seed in (1, 2)]) for r in (run, "reference"))
        assert cells[name][5].startswith(f"{ours.mean():.4f} ± ")
        assert cells[name][6].startswith(f"{(ours - theirs).mean():+.4f} ± ")
        spread = np.std(ours if name == "reference" else ours - theirs, ddof=1)
        assert cells[name][7] == f"{spread:.4f}, 2"
    assert cells["lazy"][7] == "one seed"
    assert cells["lazy"][6].startswith(f"{final('arm-lazy-4', 1) - final('reference', 1):+.4f} ± ")
    claim = next(line for line in text if "Lazy layers transfer little" in line)
    assert f"{final('inherited-4', 1) - final('arm-lazy-4', 1):+.4f} ± " in claim and "of 1 seed," in claim
    assert "with one seed" in claim or "within noise" in claim


def test_the_share_of_steps_until_a_loss(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"tokens": {t}, "val_loss": {loss}}}\n' for t, loss in ((0, 5.0), (10, 3.0), (20, 2.0), (40, 2.5)))
    )
    found = [report.share_until(tmp_path / "step-00000040", loss) for loss in (5.5, 3.0, 2.4, 1.9)]
    assert found == [0.0, 0.25, 0.5, None]


def test_a_claim_that_holds_with_some_seeds_only_is_not_a_yes(finished, tmp_path):
    """The same windows, one seed far better and one a little worse: the mean alone would say yes."""
    import shutil

    out_dir = shutil.copytree(finished, tmp_path / "out")
    for seed, shift in ((1, -1.0), (2, 0.1)):
        theirs = storage.read_json(storage.latest(out_dir / f"seed-{seed}/arm-random-4") / "val_losses.json")
        path = storage.latest(out_dir / f"seed-{seed}/inherited-4") / "val_losses.json"
        theirs["losses"] = [loss + shift for loss in theirs["losses"]]
        storage.write_json(path, theirs)
    recipe = storage.read_json(out_dir / "recipe.json")
    recipe["claims"] = [{"text": "It is better", "better": "target", "worse": "random"}]
    storage.write_json(out_dir / "recipe.json", recipe)
    assert "*It is better*: it depends on the seed. " in report.report(out_dir)


def test_rounds_can_grow_the_trained_target_and_start_before_the_lazy_tail(data_dir, tmp_path, monkeypatch):
    """expand_from = "target" and start_layers = "auto"; what the analysis says is set here."""
    measured = inheritune.measure_attention
    monkeypatch.setattr(inheritune, "measure_attention", lambda *a: measured(*a) | {"layers_before_lazy_tail": 1})
    settings = TINY | {"n_layer": 3, "max_steps": 4, "data_dir": data_dir, "out_dir": tmp_path / "out"}
    growing = {"start_layers": "auto", "expand_by": 1, "expand_from": "target", "tolerance": -9.0, "sequences": 2}
    assert call_script(inheritune, *options(**settings, **growing)) == 0
    reference = load_file(storage.latest(tmp_path / "out/reference") / "model.safetensors")
    for k in (2, 3):
        ours = load_file(tmp_path / f"out/inherited-{k}/init/model.safetensors")
        before = load_file(storage.latest(tmp_path / f"out/inherited-{k - 1}") / "model.safetensors")
        for key, tensor in ours.items():
            assert torch.equal(tensor, (reference if f".h.{k - 1}." in key else before)[key]), key
    assert checkpoint.cost(storage.latest(tmp_path / "out/inherited-3"))["tokens"] == 4 * 4 * 256
