"""ablation.py: each cost against the same part deleted by hand; norms, hooks, Spearman, the command."""

import copy
import csv
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call_script, random_model
from test_decoders import FAMILIES, tiny, wrapped

import ablation
import analyze_attention
from analyze_attention import MEASURES
from inherit import inherit
from plumbing import checkpoint, figures, pretrained, storage
from plumbing.configurator import UserError

PROJECTION = r"(attn\.c_proj|o_proj|attention\.dense|attn\.out_proj)\.(weight|bias)$"  # of layer i: ".i."


def save(folder: Path, kind: str, data_dir: Path) -> Path:
    """A random model of four layers over bytes: our GPT without biases, or a Llama with grouped queries."""
    if kind == "GPT":
        model = random_model(n_layer=4, block_size=64, vocab_size=257, dtype=torch.float32)
        checkpoint.save(folder, model, "bytes", 256)
    else:
        shape = {"num_hidden_layers": 4, "vocab_size": 257} | FAMILIES["Llama"]
        tiny("Llama", **shape).save_pretrained(folder)
        storage.copy_tokenizer(data_dir, folder)
    return folder


@pytest.fixture(scope="module", params=["GPT", "Llama"])
def path(request, tmp_path_factory, data_dir) -> Path:
    return save(tmp_path_factory.mktemp(request.param) / "run" / "step-00000300", request.param, data_dir)


@pytest.fixture(scope="module")
def idx() -> torch.Tensor:
    return torch.randint(257, (5, 24), generator=torch.Generator().manual_seed(0))


def measured(model, idx: torch.Tensor, cheap_below: float = 0.02) -> dict:
    """A model's analysis with costs."""
    values = analyze_attention.measure(model, idx, MEASURES, 2)
    result = analyze_attention.summarize(values, MEASURES, [])
    ablation.add_costs(result, model, idx, 2, cheap_below)
    return result


@torch.no_grad()
def by_hand(model, idx: torch.Tensor) -> np.ndarray:
    """The loss of each window, one at a time: (S, T) -> (S,)."""
    found = []
    for window in idx:
        likelihood = model(window[None, :-1])[0].log_softmax(-1)  # (T - 1, V)
        found.append(-np.mean([likelihood[t, token].item() for t, token in enumerate(window[1:])]))
    return np.array(found)


def changed(model, change):
    """A copy of a model after change(name, parameter) of each parameter."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            change(name, parameter)
    return other


def test_a_layer_left_out_is_the_layer_deleted_from_the_checkpoint(path, idx, tmp_path):
    model = pretrained.load_model(path, torch.float64)
    whole, result = by_hand(model, idx), measured(model, idx)
    assert result["ablation"]["loss"] == pytest.approx(whole.mean(), abs=1e-6)
    for layer, row in enumerate(result["layers"]):
        rest = [i for i in range(4) if i != layer]
        inherit(str(path), ",".join(map(str, rest)), tmp_path / f"without-{layer}")
        without = pretrained.load_model(tmp_path / f"without-{layer}", torch.float64)
        assert without.config.n_layer == 3
        differences = by_hand(without, idx) - whole  # paired by window
        assert row["cost"] == pytest.approx(differences.mean(), abs=1e-6) != 0
        assert row["cost_se"] == pytest.approx(differences.std(ddof=1) / 5**0.5, abs=1e-6)


def test_a_silenced_head_is_its_part_of_the_output_projection_at_zero(path, idx):
    model = pretrained.load_model(path, torch.float64)
    whole, result, H = by_hand(model, idx), measured(model, idx), model.config.n_head
    size = 32 // H
    for layer, costs in enumerate(result["heads"]["cost"]):
        assert len(costs) == H
        for head, cost in enumerate(costs):

            def change(name, weight, layer=layer, head=head):
                if f".{layer}." in name and re.search(PROJECTION, name):
                    weight[:, head * size : (head + 1) * size] = 0  # rows in a GPT-2 file, which is (in, out)

            differences = by_hand(changed(model, change), idx) - whole
            assert cost == pytest.approx(differences.mean(), abs=1e-6) != 0
            error = result["heads"]["cost_se"][layer][head]
            assert error == pytest.approx(differences.std(ddof=1) / 5**0.5, abs=1e-6)


@pytest.mark.parametrize("family", ["GPT", "Llama", "Qwen3", "GPTNeoX", "Gemma3Text", "Falcon", "OPT"])
def test_in_every_family_attention_and_heads_left_out_are_zeros_in_the_output_projection(family, idx):
    gpt = family == "GPT"
    model = random_model(block_size=24, vocab_size=257) if gpt else wrapped(tiny(family, **FAMILIES[family]))
    model = changed(model.double(), lambda name, p: p.normal_() if name.endswith("bias") else None)
    whole, result = by_hand(model, idx), measured(model, idx)
    assert len(result["layers"]) == 3
    for layer, row in enumerate(result["layers"]):

        def all_of_it(name, parameter, layer=layer):
            if f".{layer}." in name and re.search(PROJECTION, name):
                parameter.zero_()

        def last_head(name, parameter, layer=layer):
            if f".{layer}." in name and re.search(PROJECTION, name) and parameter.ndim == 2:
                parameter.chunk(model.config.n_head, 1)[-1].zero_()

        shorter = copy.deepcopy(model)
        del next(m for m in shorter.modules() if isinstance(m, torch.nn.ModuleList))[layer]
        costs = row["cost"], row["attention_cost"], result["heads"]["cost"][layer][-1]
        for cost, other in zip(costs, (shorter, changed(model, all_of_it), changed(model, last_head)), strict=True):
            assert cost == pytest.approx((by_hand(other, idx) - whole).mean(), abs=1e-6)
        assert len(set(costs)) == 3


def layer_outputs(model, idx: torch.Tensor):
    """For each layer: values (B, KV, T, hs), attention (B, H, T, T), the output projection's weight."""
    if hasattr(model, "transformer"):
        x = model.embed(idx)
        for block in model.transformer.h:
            q, k, v = block.attn.heads(block.ln_1(x))
            yield v, block.attn.attention_weights(q, k), block.attn.c_proj.weight
            x = block(x)
        return
    model.hf.set_attn_implementation("eager")
    found = model.hf(idx, output_attentions=True, output_hidden_states=True)
    for x, A, block in zip(found.hidden_states, found.attentions, model.hf.model.layers, strict=False):
        v = block.self_attn.v_proj(block.input_layernorm(x)).unflatten(-1, (2, -1)).transpose(1, 2)
        yield v, A, block.self_attn.o_proj.weight


@torch.no_grad()
def test_the_norms_are_those_of_a_head_s_part_and_of_its_group_s_first_value(path, idx):
    model = pretrained.load_model(path, torch.float64)
    heads = measured(model, idx)["heads"]
    for layer, (v, A, weight) in enumerate(layer_outputs(model, idx[:, :-1])):
        H = A.shape[1]
        v = v.repeat_interleave(H // v.shape[1], 1)  # grouped queries: heads 0 and 1 share the first value
        assert heads["sink_value_norm"][layer] == pytest.approx(v[:, :, 0].norm(dim=-1).mean(0).tolist())
        for head, part in enumerate(weight.chunk(H, 1)):
            added = (A @ v)[:, head] @ part.T  # (B, T, C)
            assert heads["output_norm"][layer][head] == pytest.approx(added.norm(dim=-1).mean().item())


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_stays_also_after_an_error(path, idx, monkeypatch):
    model = pretrained.load_model(path)
    before, calls, losses = by_hand(model, idx), [], ablation.losses
    measured(model, idx)
    assert (by_hand(model, idx) == before).all() and hooks_of(model) == 0

    def fails(last, *arguments):
        calls.append(hooks_of(model))
        if len(calls) == last:
            raise RuntimeError
        return losses(*arguments)

    for last in (2, 3, 5):  # a layer, its attention, a head
        calls.clear()
        monkeypatch.setattr(ablation, "losses", functools.partial(fails, last))
        with pytest.raises(RuntimeError):
            measured(model, idx)
        assert calls[-1] > 0 and hooks_of(model) == 0


def test_only_the_layers_with_attention_are_left_out(idx):
    kinds = {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 1, "num_key_value_heads": 2}
    (row,) = measured(wrapped(tiny("Lfm2", **kinds)), idx)["layers"]
    assert row["layer"] == 1 and row["cost"] != 0


# ---- the summary


def test_spearman_s_rho_and_p_have_known_values():
    iq, hours = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110], [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    rho, p = ablation.spearman(iq, hours)
    assert rho == pytest.approx(-29 / 165) and p == pytest.approx(0.627, abs=0.02)
    rho, p = ablation.spearman([1, 2, 2, 9], [1, 3, 2, 4])  # equal values: both have rank 2.5
    assert rho == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    rho, p = ablation.spearman([1, 2, 3, 4], [10, 20, 30, 99])
    assert rho == pytest.approx(1) and p == pytest.approx(2 / 24, abs=0.01)  # two of 24 orders
    assert ablation.spearman([1, 2, 3], [5, 5, 5]) == (0, 1)


def test_a_layer_is_cheap_below_the_limit_and_k_by_cost_leaves_the_cheap_ones_at_the_end_out(path, idx):
    model = pretrained.load_model(path)
    costs = [row["cost"] for row in measured(model, idx)["layers"]]
    for limit in (min(costs), sorted(costs)[2], max(costs) + 1):
        rows = measured(model, idx, limit)["layers"]
        assert [row["cheap"] for row in rows] == [cost < limit for cost in costs]
        kept = [i + 1 for i, cost in enumerate(costs) if cost >= limit] or [1]
        assert analyze_attention.suggested_layers({"layers": rows, "n_layer": 4}, "cheap") == kept[-1]


# ---- the command


def test_the_command_prints_stores_and_draws_the_costs(path, data_dir, tmp_path, capsys, monkeypatch):
    drawn, draw_costs = [], figures.draw_costs
    monkeypatch.setattr(figures, "draw_costs", lambda *a: drawn.append(a[0]) or draw_costs(*a))
    options = [f"--data_dir={data_dir}", f"--out={tmp_path / 'a'}", "--sequences=3", "--seq_len=20"]
    assert call_script(analyze_attention, path, *options, "--ablate", "--cheap_below=0.5") == 0
    result, printed = json.loads((tmp_path / "a/attention.json").read_text()), capsys.readouterr().out
    with open(tmp_path / "a/attention.csv", encoding="utf-8") as file:
        trained, untrained = np.split(np.array(list(csv.DictReader(file))), 2)
    for line, row, control in zip(trained, result["layers"], untrained, strict=True):
        for key in ("cost", "cost_se", "attention_cost", "attention_cost_se"):
            assert float(line[key]) == row[key] and control[key] == ""
        cells = [f"{row[key]:8.3f} ± {row[f'{key}_se']:<6.3f}" for key in ("cost", "attention_cost")]
        assert " ".join(cells) in printed
    found = result["ablation"]
    for text, (rho, p, n) in found["spearman"].items():
        assert f"Spearman correlation of {text}: {rho:+.2f} (p = {p:.4f}, n = {n})" in printed
    assert [n for *_, n in found["spearman"].values()] == [4, 4, sum(map(len, result["heads"]["cost"]))]
    cheap = ", ".join(str(row["layer"]) for row in result["layers"] if row["cost"] < 0.5) or "none"
    assert f"layers that cost less than 0.5 nats: {cheap}" in printed
    k = f"k suggested by cost: {result['suggested_by_cost']}; by rank: {result['suggested_by_rank']}"
    assert k in printed and result["suggested_by_rank"] == analyze_attention.suggested_layers(result, "lazy")
    (axis,) = drawn
    points = [(row["max_rank"], row["cost"]) for row in result["layers"]]
    assert [(text.get_text(), text.xy) for text in axis.texts] == [(str(i), xy) for i, xy in enumerate(points)]
    assert (tmp_path / "a/attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", ["GPT"], indirect=True)
def test_a_stored_analysis_without_these_costs_is_not_reused(path, data_dir, tmp_path):
    settings = {"data_dir": str(data_dir), "out": str(tmp_path), "sequences": 2, "seq_len": 10, "device": "cpu"}

    def config(**changes):
        return analyze_attention.AnalyzeConfig(str(path), **settings | changes)

    analyze_attention.analyze(config())
    assert analyze_attention.stored(config(cheap_below=0.5)) and not analyze_attention.stored(config(ablate=True))
    analyze_attention.analyze(config(ablate=True))
    assert analyze_attention.stored(config(ablate=True))
    assert not analyze_attention.stored(config(ablate=True, cheap_below=0.5))


@pytest.mark.parametrize("path", ["GPT"], indirect=True)
def test_a_family_whose_parts_have_other_names_is_one_line(path, data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablation, "PROJECTIONS", (".unknown",))
    options = [f"--data_dir={data_dir}", f"--out={tmp_path}", "--sequences=2", "--ablate"]
    assert call_script(analyze_attention, path, *options) == 1
    error = capsys.readouterr().err
    assert "layers [0, 1, 2, 3]" in error and error.count("\n") == 1
    with pytest.raises(UserError, match="expected a list of 4 blocks"):
        model = torch.nn.Linear(1, 1)
        model.config = pretrained.read_config(path)
        ablation.parts(model, [0])
