"""analyze_attention.py: the paper's definitions against an independent script; measures; files."""

import csv
import errno
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call_script, publish_again, random_model
from test_decoders import save

import analyze_attention
import prepare_data
from analyze_attention import MEASURES, AnalyzeConfig, Measure, analyze, k_star, m_star, sink, stored, track
from plumbing import checkpoint, figures, pretrained
from plumbing.configurator import UserError

# ---- The definitions, word for word and independent of the project's code


def independent(path, tokens: np.ndarray, ours: bool, T=100, N=100, tau=0.9, seed=0):
    """Rank, m*, sink, share of sinks {name: (L, H)}, means over N sequences; N; how many ties at tau."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    begin = [] if ours else transformers.AutoTokenizer.from_pretrained(path)("")["input_ids"]
    n = T - len(begin)
    starts = np.random.RandomState(seed).choice(len(tokens) - n + 1, min(N, len(tokens) // n), replace=False)
    ranks, masses, sinks, ties = [], [], [], 0
    for start in starts:
        with torch.no_grad():
            attentions = model(
                torch.tensor([[*begin, *tokens[start : start + n].tolist()]]), output_attentions=True
            ).attentions
        A = torch.stack([layer[0] for layer in attentions]).double()  # (L, H, T, T)
        energy = torch.linalg.svdvals(A) ** 2
        share = energy.cumsum(-1) / energy.sum(-1, keepdim=True)
        ties += ((share - tau).abs() < 1e-5).any(-1).sum().item()
        ranks.append(
            [[min(k for k in range(1, T + 1) if h[k - 1] >= tau) for h in layer] for layer in share.tolist()]
        )
        mass = (A**2).sum(-2).sort(-1, descending=True).values
        share = (mass.cumsum(-1) / mass.sum(-1, keepdim=True)).tolist()
        masses.append(
            [[min(m for m in range(1, T + 1) if h[m - 1] >= 0.9) for h in layer] for layer in share]
        )
        sinks.append(A[..., 0].mean(-1).tolist())
    return (
        {
            "rank": np.mean(ranks, 0), "mass": np.mean(masses, 0), "sink": np.mean(sinks, 0),
            "sink_share": np.mean(np.array(sinks) > 0.3, 0),
        },
        len(starts),
        ties,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, documents) -> Path:
    """A data directory over bytes, as prepare_data.py leaves it."""
    folder = tmp_path_factory.mktemp("corpus")
    ascii_only = [text.encode("ascii", "ignore").decode() for text in documents]
    meta = {"tokenizer": "bytes", "vocab_size": 257, "eot": 256, "dtype": "<u2", "splits": {}}
    for split, texts in (("train", ascii_only[12:]), ("val", ascii_only[:12])):
        tokens = np.array([token for text in texts for token in (*text.encode(), 256)], dtype="<u2")
        tokens.tofile(folder / f"{split}.bin")
        meta["splits"][split] = {"tokens": len(tokens), "documents": len(texts), "max_id": 256}
    (folder / "meta.json").write_text(json.dumps(meta))
    publish_again(folder)
    return folder


def save_gpt(path: Path, seed: int = 0, **changes) -> Path:
    shape = {"n_layer": 4, "block_size": 128, "vocab_size": 257, "std": 0.6, "dtype": torch.float32}
    checkpoint.save(path, random_model(seed, **shape | changes), "bytes", 256)
    return path


@pytest.fixture(scope="module")
def gpt(tmp_path_factory) -> Path:
    return save_gpt(tmp_path_factory.mktemp("runs") / "reference" / "step-00000300", bias=True)


def save_with_corpus(tmp_path: Path, family: str, documents, bos: bool, **changes) -> tuple[Path, Path]:
    """A tiny model of another family, and documents that prepare_data.py tokenized for it."""
    path, source = save(tmp_path / family, family, documents, bos, **changes), tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    options = [f"--tokenizer={path}", "--val_fraction=0.2", f"--out={tmp_path / 'tokens'}"]
    assert call_script(prepare_data, "files", source, *options) == 0
    return path, tmp_path / "tokens"


def config(model, corpus, out, **changes) -> AnalyzeConfig:
    return AnalyzeConfig(str(model), data_dir=str(corpus), out=str(out), device="cpu", **changes)


@pytest.mark.parametrize("family", ["ours", "Llama", "Gemma3Text"])
def test_the_measures_equal_an_independent_script(family, gpt, corpus, documents, tmp_path):
    path = gpt
    if family != "ours":
        path, corpus = save_with_corpus(tmp_path, family, documents, bos=family == "Gemma3Text")
    result = analyze(config(path, corpus, tmp_path / "a"))
    val = np.fromfile(corpus / "val.bin", dtype="<u2")
    expected, n, ties = independent(path, val, family == "ours")
    assert (result["T"], result["tau"], result["sequences"]) == (100, [0.9], n)
    heads = {name: np.array(result["heads"][name]) for name in expected}
    assert np.abs(heads["rank"] - expected["rank"]).sum() * n <= ties <= 20  # equal, but for ties at tau
    assert np.abs(heads["mass"] - expected["mass"]).max() <= 0.02
    np.testing.assert_allclose(heads["sink"], expected["sink"], atol=1e-5)
    np.testing.assert_allclose(heads["sink_share"], expected["sink_share"], atol=1.01 / n)  # one at 0.3
    print(f"{family}: {ties} ties at tau in {expected['rank'].size * n} matrices")
    near = {"abs": ties / n + 1e-9}
    for layer, row in enumerate(result["layers"]):  # first the mean over sequences, then over heads
        assert row["max_rank"] == pytest.approx(expected["rank"][layer].max(), **near)
        assert row["avg_mass"] == pytest.approx(expected["mass"][layer].mean(), abs=0.02)
        assert row["near_rank_one"] == pytest.approx(np.mean(expected["rank"][layer] < 1.5))
    assert result["near_rank_one"] == pytest.approx(np.mean(expected["rank"] < 1.5))
    ranks = expected["rank"].max(1)  # (L,)
    for i, group in enumerate(result["groups"]):
        third = ranks[len(ranks) * i // 3 : len(ranks) * (i + 1) // 3]
        assert group["avg_rank"] == pytest.approx(third.mean(), **near)


@pytest.mark.parametrize("T", [8, 64, 100])
def test_matrices_of_known_rank_and_mass(T):
    one_column, even = (
        torch.zeros(T, T),
        torch.ones(T, T) / 128,
    )  # exact in binary: no tie is lost to rounding
    one_column[:, 0] = 1
    tenths = math.ceil(0.9 * T)
    cases = [(one_column, 1, 1, 1), (even, 1, tenths, 1 / 128), (torch.eye(T), tenths, tenths, 1 / T)]
    for matrix, rank, mass, first in cases:
        assert (k_star(matrix).item(), m_star(matrix).item()) == (rank, mass)
        assert sink(matrix).item() == pytest.approx(first)


def test_the_mean_over_sequences_comes_before_the_maximum_over_heads():
    """Each head has rank 2 on one of two sequences. Max first: 2, not lazy. The paper: 1.5, lazy."""
    ranks = np.array([[1.0, 2.0], [2.0, 1.0]])  # (H, S)
    values = {0: {m.name: ranks for m in MEASURES}}
    (row,) = analyze_attention.summarize(values, MEASURES, [])["layers"]
    assert row["max_rank"] == 1.5 and row["lazy"] and not row["strictly_lazy"]
    assert ranks.max(0).mean() == 2


def test_the_error_is_that_of_the_winning_head_or_of_the_mean_head():
    values = np.array([[1.0, 9.0, 1.0], [6.0, 7.0, 8.0]])  # means 11/3 and 7
    assert analyze_attention.over_heads(values, "max") == (7.0, pytest.approx(1 / 3**0.5))
    of_sequences = values.mean(0)  # what varies between sequences, not between heads
    expected = of_sequences.mean(), of_sequences.std(ddof=1) / 3**0.5
    assert analyze_attention.over_heads(values, "mean") == pytest.approx(expected)


def layers(*lazy, n_layer=None) -> dict:
    rows = [{"layer": i, "lazy": bool(one)} for i, one in enumerate(lazy) if one is not None]
    return {"layers": rows, "n_layer": n_layer or len(lazy)}


@pytest.mark.parametrize(
    "lazy, expected",
    [
        ((0, 0, 0), 3),
        ((0, 1, 0), 3),
        ((0, 0, 1), 2),
        ((0, 1, 1), 1),
        ((1, 1), 1),
        ((0, 1, None), 3),
        ((0, None, 1), 2),
    ],
)
def test_the_suggestion_drops_the_lazy_layers_at_the_end_and_never_unmeasured_ones(lazy, expected):
    assert analyze_attention.suggested_layers(layers(*lazy), "lazy") == expected


def test_lazy_layers_are_counted_strictly_and_by_floor(capsys):
    values = {
        layer: {m.name: np.full((2, 4), rank) for m in MEASURES}
        for layer, rank in enumerate([2.0, 1.5, 1.0])
    }
    about = {"model": "m", "n_layer": 3, "sequences": 4, "T": 8, "tau": [0.9], "compared": None}
    about |= {"measures": {m.key: m.label for m in MEASURES}, "suggested_by_rank": 1}
    summary = analyze_attention.summarize(values, MEASURES, [(0, 2), (2, 3)])
    assert [g["avg_rank"] for g in summary["groups"]] == [1.75, 1.0]
    analyze_attention.print_table(about | summary)
    printed = capsys.readouterr().out
    assert "2 by floor(MaxRank) = 1, 1 strictly (MaxRank = 1)" in printed and "33% of the model" in printed
    assert "layers 0:2 1.75 (lazy), layers 2:3 1.00 (lazy)" in printed and "layers before the lazy tail: 1" in printed


# ---- One list of measures


def entropy(A: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(A).sum(-1).mean(-1)


def test_a_new_measure_is_one_entry(gpt, corpus, tmp_path, capsys, monkeypatch):
    before = analyze(config(gpt, corpus, tmp_path / "a", sequences=3))
    assert stored(config(gpt, corpus, tmp_path / "a", sequences=3)) == before
    monkeypatch.setattr(
        analyze_attention, "MEASURES", [*MEASURES, Measure("entropy", entropy, "mean", "Entropy")]
    )
    assert stored(config(gpt, corpus, tmp_path / "a", sequences=3)) is None  # it lacks the entropy
    drawn, plot_layers = [], figures.draw_layers
    monkeypatch.setattr(figures, "draw_layers", lambda *a: drawn.append(a[2]) or plot_layers(*a))
    capsys.readouterr()
    result = analyze(config(gpt, corpus, tmp_path / "a", sequences=3))
    assert "Entropy" in capsys.readouterr().out.splitlines()[1] and drawn[0]["avg_entropy"] == "Entropy"
    assert result == json.loads((tmp_path / "a/attention.json").read_text())
    with open(tmp_path / "a/attention.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 4 and float(lines[2]["avg_entropy"]) == result["layers"][2]["avg_entropy"] > 0
    values = np.fromfile(corpus / "val.bin", dtype="<u2")
    tracked = track(pretrained.load_model(gpt), values, [])
    assert len(tracked["Entropy"]) == 4
    figures.plot_collapse([tracked | {"step": 0}, tracked | {"step": 5}], tmp_path / "collapse.png")


def test_several_tau_are_measured_in_one_pass(gpt, corpus, tmp_path):
    several = analyze(
        config(gpt, corpus, tmp_path / "a", sequences=5, tau="0.8,0.85,0.9,0.95")
    )
    assert several["tau"] == [0.9, 0.95, 0.85, 0.8]
    for tau in (0.8, 0.95):
        alone = analyze(config(gpt, corpus, tmp_path / "b", sequences=5, tau=str(tau)))
        assert [row["max_rank"] for row in alone["layers"]] == [
            row[f"max_rank_{tau}"] for row in several["layers"]
        ]
        assert alone["heads"]["rank"] == several["heads"][f"rank_{tau}"] != several["heads"]["rank"]


# ---- The command


def test_the_paper_s_setting_is_the_default_and_a_seed_fixes_the_windows(gpt, corpus, tmp_path):
    assert (AnalyzeConfig.seq_len, AnalyzeConfig.sequences, AnalyzeConfig.tau) == (100, 100, "0.9")
    tokens = np.arange(5000)
    idx = analyze_attention.random_windows(tokens, 100, 20, 0, [])
    assert idx.shape == (20, 100) and (idx.diff(dim=1) == 1).all() and (idx[:, 0] % 100).unique().numel() > 5
    assert torch.equal(idx, analyze_attention.random_windows(tokens, 100, 20, 0, []))
    assert not torch.equal(idx, analyze_attention.random_windows(tokens, 100, 20, 1, []))
    assert analyze_attention.random_windows(tokens, 100, 200, 0, []).shape == (50, 100)  # the text is short
    with_bos = analyze_attention.random_windows(tokens, 100, 20, 0, [7777])
    assert with_bos.shape == (20, 100) and (with_bos[:, 0] == 7777).all() and (with_bos[:, 1:] < 5000).all()
    short = save_gpt(tmp_path / "short", block_size=32)
    assert analyze(config(short, corpus, tmp_path / "a", sequences=2))["T"] == 32


@pytest.mark.parametrize(
    "wrong",
    ["--tau=0", "--tau=1.0", "--tau=0.9,x", "--groups=4", "--groups=0:99", "--groups=-1:2", "--heads=-1.0", "--heads=7", "--heads=1.2.3", "--heads=9.0"],
)
def test_an_impossible_setting_is_one_line(gpt, corpus, tmp_path, capsys, wrong):
    assert call_script(analyze_attention, gpt, f"--data_dir={corpus}", f"--out={tmp_path / 'a'}", wrong) == 2
    error = capsys.readouterr().err
    assert "expected 0 < tau <= 0.999" in error and error.count("\n") == 1 and not (tmp_path / "a").exists()


def test_two_models_and_the_control_are_analyzed_side_by_side(gpt, corpus, tmp_path, capsys):
    other = save_gpt(tmp_path / "inherited-2" / "step-00000050", n_layer=2, bias=True)
    options = [f"--compare={other}", f"--data_dir={corpus}", f"--out={tmp_path / 'a'}", "--sequences=3"]
    assert call_script(analyze_attention, gpt, *options, "--heads=2.1,0.0", "--groups=0:2") == 0
    result = json.loads((tmp_path / "a/attention.json").read_text())
    assert result["name"] == "reference" and result["compared"]["name"] == "inherited-2"  # the runs' names
    assert [len(result[key]["layers"]) for key in ("untrained", "compared")] == [4, 2]
    assert [group["layers"] for group in result["groups"]] == ["0:2"]
    assert result["untrained"]["heads"]["rank"] != result["heads"]["rank"]
    assert capsys.readouterr().out.count("layers before the lazy tail") == 2
    for name in ("attention.png", "heads.png"):
        assert (tmp_path / "a" / name).read_bytes().startswith(b"\x89PNG")


def test_the_heads_that_are_drawn_are_those_asked_for_or_the_extremes(gpt, corpus):
    model = pretrained.load_model(gpt)
    idx = analyze_attention.random_windows(np.fromfile(corpus / "val.bin", dtype="<u2"), 50, 4, 0, [])
    values = analyze_attention.measure(model, idx, MEASURES, 3)
    matrices = list(model.attention_matrices(idx[:1]))
    extremes = analyze_attention.pictures(model, idx[:1], values, [])
    ranks = np.array([by_name["rank"].mean(1) for by_name in values.values()])
    assert [picture["rank"] for picture in extremes] == [ranks.min(), ranks.max()]
    for picture in (*extremes, *analyze_attention.pictures(model, idx[:1], values, [[3, 1], [1, 0]])):
        expected = matrices[picture["layer"]][0, picture["head"]]
        np.testing.assert_allclose(picture["matrix"], expected, atol=1e-6)


def test_a_stored_analysis_is_reused_only_for_the_same_weights_data_and_settings(gpt, corpus, tmp_path):
    def same(model=gpt, folder=corpus, **changes) -> bool:
        return stored(config(model, folder, tmp_path / "a", **{"sequences": 2} | changes)) is not None

    assert not same()
    analyze(config(gpt, corpus, tmp_path / "a", sequences=2))
    assert same() and same(micro_batch=1)
    assert not same(save_gpt(tmp_path / "other", seed=1, bias=True))
    for change in ({"sequences": 3}, {"seq_len": 50}, {"tau": "0.8"}, {"seed": 1}, {"groups": "0:2"},
                   {"heads": "0.0"}, {"compare": str(gpt)}):  # fmt: skip
        assert not same(**change)
    elsewhere = shutil.copytree(corpus, tmp_path / "elsewhere")
    (elsewhere / "val.bin").write_bytes(bytes(2) + (elsewhere / "val.bin").read_bytes()[2:])
    publish_again(elsewhere)
    assert not same(folder=elsewhere)
    (tmp_path / "a/attention.json").write_text("{")  # damaged: measured again
    assert not same()


def test_a_full_disk_is_one_line_after_the_table_and_the_json(gpt, corpus, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figures, "plot_attention", full)
    options = [f"--data_dir={corpus}", f"--out={tmp_path / 'a'}", "--sequences=2"]
    assert call_script(analyze_attention, gpt, *options) == 1
    captured = capsys.readouterr()
    assert "layers before the lazy tail" in captured.out and captured.err.count("\n") == 1
    assert "No space left on device" in captured.err and (tmp_path / "a/attention.json").exists()
    (tmp_path / "file").touch()
    options[1] = f"--out={tmp_path / 'file' / 'a'}"
    assert call_script(analyze_attention, gpt, *options) == 1
    assert "layers before the lazy tail" in capsys.readouterr().out


def test_attention_that_is_not_finite_ends_the_analysis_with_the_layer():
    model = random_model(dtype=torch.float32)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[16:32] = math.nan  # the queries of head 1
    with pytest.raises(UserError, match="layer 1: no causal attention matrix; expected finite weights") as caught:
        analyze_attention.measure(model, torch.zeros(2, 8, dtype=torch.long), MEASURES, 2)
    assert caught.value.exit_code == 1


def test_a_hybrid_s_layers_without_attention_are_neither_measured_nor_lazy(documents, tmp_path, capsys):
    pytest.importorskip("transformers")
    kinds = {
        "layer_types": ["full_attention", "conv", "conv"],
        "block_multiple_of": 1,
        "num_key_value_heads": 2,
    }
    path, corpus = save_with_corpus(tmp_path, "Lfm2", documents, bos=False, **kinds)
    result = analyze(config(path, corpus, tmp_path / "a", sequences=2))
    assert [row["layer"] for row in result["layers"]] == [0]
    assert analyze_attention.suggested_layers(result, "lazy") == 3
    assert "without attention: 2" in capsys.readouterr().out


# ---- What train.py --track_rank logs


def test_tracking_puts_the_beginning_of_text_in_front_of_every_window_too(documents, tmp_path):
    path, corpus = save_with_corpus(tmp_path, "Gemma3Text", documents, bos=True)
    begin = json.loads((corpus / "meta.json").read_text())["begin"]
    tracked = track(pretrained.load_model(path), np.fromfile(corpus / "val.bin", dtype="<u2"), begin)
    found = analyze(config(path, corpus, tmp_path / "a", sequences=8))
    assert begin and tracked["MaxRank"] == pytest.approx([row["max_rank"] for row in found["layers"]], rel=1e-4)


def test_tracking_finds_what_the_analysis_finds_and_leaves_model_and_random_state_alone(
    gpt, corpus, tmp_path
):
    model, val = pretrained.load_model(gpt).train(), np.fromfile(corpus / "val.bin", dtype="<u2")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    tracked = track(model, val, [])
    assert model.training and torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    found = analyze(config(gpt, corpus, tmp_path / "a", sequences=8))
    for m in MEASURES:
        assert tracked[m.label] == pytest.approx([row[m.key] for row in found["layers"]], rel=1e-4)
    assert {key: tracked[key] for key in ("T", "tau", "sequences")} == {"T": 100, "tau": 0.9, "sequences": 8}


# ---- The figures of report.py


def test_every_figure_of_the_report_is_drawn(gpt, corpus, tmp_path):
    from PIL import Image

    curve, each = ([0, 1000, 2000, 3000], [5.5, 3.0, 2.5, 2.25]), [0.01, 0.03]
    rows = [
        {"name": name, "role": role, "curve": curve, "loss": 2.25, "each": each, "difference": 0.02,
         "interval": interval, "n_layer": 4, "own_tokens": 3000}
        for name, role, interval in (("reference", "reference", None), ("inherited-2", "target", 0.01),
                                     ("random", "baseline", None))
    ]  # fmt: skip
    figures.plot_losses(rows, tmp_path / "loss.png")
    figures.plot_differences(rows, tmp_path / "differences.png")  # one model has no interval
    result = analyze(config(gpt, corpus, tmp_path / "a", sequences=2))
    figures.plot_attention(result, tmp_path / "rank.png")
    lines = [
        track(pretrained.load_model(gpt), np.fromfile(corpus / "val.bin", dtype="<u2"), []) | {"step": s}
        for s in (0, 10, 20)
    ]
    lines[0]["renamed since"] = lines[-1]["new"] = lines[0]["MaxRank"]  # neither is there for every step
    figures.plot_collapse(lines, tmp_path / "collapse.png")
    figures.animate_collapse(lines, tmp_path / "collapse.gif")
    for name in ("loss", "differences", "rank", "collapse"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with Image.open(tmp_path / "collapse.gif") as moving:
        assert moving.n_frames == 3
