"""analyze_attention.py: what the command leaves, follows from the matrices; two models; other families."""

import csv
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, call_script, options, random_model, read_metrics
from PIL import Image
from safetensors.torch import load_file, save_file
from test_attention import svd_rank, tiny

import analyze_attention
import attention
from plumbing import checkpoint
import inherit
import report
import train
from plumbing.configurator import UserError


def test_attention_that_is_not_finite_is_an_error_that_names_layer_and_head():
    model = random_model(dtype=torch.float32)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[16:32] = math.nan  # the queries of head 1
    with pytest.raises(UserError, match=r"layer 1, heads \[1\]: attention is not finite") as caught:
        attention.measure(model, torch.zeros(2, 8, dtype=torch.long), 0.9, 2)
    assert caught.value.exit_code == 1


def test_the_command_leaves_a_table_a_figure_and_numbers_that_follow_from_the_matrices(
    reference, data_dir, tmp_path, capsys
):
    arguments = [
        reference,
        f"--data_dir={data_dir}",
        "--sequences=6",
        "--micro_batch=4",
        f"--out={tmp_path / 'a'}",
        "--device=cpu",
    ]
    assert call_script(analyze_attention, *arguments, "--lazy_below=1e9") == 0
    printed = capsys.readouterr().out
    assert printed.count("lazy") >= 5 and "4 of 4 layers are lazy" in printed
    result = json.loads((tmp_path / "a" / "attention.json").read_text())
    assert (result["T"], result["tau"], result["sequences"]) == (32, 0.9, 6)
    assert len(result["layers"]) == len(result["untrained"]) == 4 and result["layers_before_lazy_tail"] == 1
    assert (tmp_path / "a" / "attention.png").read_bytes().startswith(b"\x89PNG")

    model, tokens = checkpoint.load_model(reference), np.fromfile(data_dir / "val.bin", dtype="<u2").astype(np.int64)
    n_windows = (len(tokens) - 1) // 32
    starts = np.linspace(0, n_windows - 1, 6).astype(int) * 32
    idx = torch.tensor(np.stack([tokens[s : s + 32] for s in starts]))
    for layer, matrices in enumerate(model.attention_matrices(idx)):
        ranks = np.array([[svd_rank(matrix, 0.9) for matrix in heads] for heads in matrices])  # (S, H)
        row = result["layers"][layer]
        assert row["max_rank"] == ranks.max(1).mean() and row["mean_rank"] == pytest.approx(ranks.mean())
        assert row["max_rank_se"] == pytest.approx(ranks.max(1).std(ddof=1) / 6**0.5)
        assert result["heads"]["rank"][layer] == pytest.approx(ranks.mean(0).tolist())
        assert row["mean_sink"] == pytest.approx(matrices[..., 0].mean().item(), rel=1e-5)
    with open(tmp_path / "a" / "attention.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 4 * 2 and float(lines[0]["rank"]) == pytest.approx(result["heads"]["rank"][0][0])


def test_the_lazy_tail_is_what_the_last_layers_have_in_common():
    def tail(*lazy):
        return analyze_attention.layers_before_lazy_tail([{"layer": i, "lazy": one} for i, one in enumerate(lazy)])

    assert [tail(0, 0, 0), tail(0, 1, 0), tail(0, 0, 1), tail(0, 1, 1), tail(1, 1)] == [3, 3, 2, 1, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        "--seq_len=33",
        "--seq_len=1",
        "--sequences=0",
        "--tau=0",
        "--tau=1.0",
        "--micro_batch=0",
        "--micro_batch=-1",
        "--lazy_below=nan",
    ],
)
def test_an_impossible_setting_is_one_line(reference, data_dir, tmp_path, capsys, wrong):
    arguments = [reference, f"--data_dir={data_dir}", f"--out={tmp_path / 'a'}", wrong]
    assert call_script(analyze_attention, *arguments) == 2
    assert "expected 2 <= seq_len <= block_size 32" in capsys.readouterr().err


def test_two_models_stand_side_by_side(reference, data_dir, tmp_path, capsys):
    call_script(inherit, f"--reference={reference}", "--layers=0:2", f"--out={tmp_path / 'two'}")
    arguments = [reference, f"--compare={tmp_path / 'two'}", f"--data_dir={data_dir}", f"--out={tmp_path / 'a'}"]
    assert call_script(analyze_attention, *arguments, "--sequences=3", "--control=False", "--device=cpu") == 0
    result = json.loads((tmp_path / "a" / "attention.json").read_text())
    compared = result["compared"]
    assert result["untrained"] is None and len(compared["layers"]) == 2
    assert compared["layers"] == result["layers"][:2]  # the first layers are the reference's, and so is their input
    assert compared["heads"]["rank"] == result["heads"]["rank"][:2] and compared["sha256"] != result["sha256"]
    assert capsys.readouterr().out.count("k that this suggests") == 2
    examples = {entry["title"]: entry for entry in result["examples"]}
    ranks = np.array(result["heads"]["rank"])
    assert examples["most collapsed"]["mean_rank"] == ranks.min()
    assert examples["least collapsed"]["mean_rank"] == ranks.max()
    for entry in examples.values():
        assert ranks[entry["layer"], entry["head"]] == entry["mean_rank"]
        assert entry["share"][-1] >= 0.99 and entry["share"] == sorted(entry["share"])
    for name in ("attention.png", "heads.png"):
        assert (tmp_path / "a" / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def llama(tmp_path_factory, documents) -> Path:
    """A tiny random Llama on disk, with a tokenizer of its own."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(documents, vocab_size=290, special_tokens=["<end>"], show_progress=False)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<end>")
    wrapped.save_pretrained(folder)
    tiny("Llama", num_key_value_heads=2).save_pretrained(folder)
    return folder


def test_another_family_reads_the_same_text_in_its_own_tokens(llama, data_dir, documents, tmp_path, capsys):
    import transformers

    arguments = [llama, f"--data_dir={data_dir}", f"--out={tmp_path / 'a'}", "--sequences=3", "--device=cpu"]
    assert call_script(analyze_attention, *arguments) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "a" / "attention.json").read_text())
    assert (result["T"], len(result["layers"]), len(result["untrained"])) == (64, 3, 3)

    model, tokenizer = attention.load_model(llama), transformers.AutoTokenizer.from_pretrained(llama)
    tokens = attention.validation_tokens(llama, model, data_dir, 64)
    texts = tokenizer.decode(tokens).split("<end>")
    assert texts.pop() == "" and len(texts) == 6 and set(texts) <= set(documents)  # the tenth of sixty documents
    starts = np.linspace(0, (len(tokens) - 1) // 64 - 1, 3).astype(int) * 64
    with torch.no_grad():
        own = model(torch.tensor(np.stack([tokens[s : s + 64] for s in starts])), output_attentions=True).attentions
    for row, matrices in zip(result["layers"], own, strict=True):
        ranks = np.array([[svd_rank(matrix, 0.9) for matrix in heads] for heads in matrices])  # (S, H)
        assert row["max_rank"] == ranks.max(1).mean() and row["mean_rank"] == pytest.approx(ranks.mean())


def test_each_of_two_models_says_over_how_many_sequences(llama, data_dir, tmp_path, capsys):
    ours = train.train(train.TrainConfig(data_dir=str(data_dir), out_dir=str(tmp_path / "run"), **TINY))
    arguments = [ours, f"--compare={llama}", f"--data_dir={data_dir}", f"--out={tmp_path / 'a'}", "--control=False"]
    assert call_script(analyze_attention, *arguments, "--sequences=100000", "--device=cpu") == 0
    result, printed = json.loads((tmp_path / "a" / "attention.json").read_text()), capsys.readouterr().out
    n = result["sequences"], result["compared"]["sequences"]
    model, path, T = attention.load_model(llama), llama, result["T"]
    windows = (len(attention.validation_tokens(path, model, data_dir, T)) - 1) // T
    assert n[1] == windows != n[0] and all(f", {each} sequences" in printed for each in n)


def test_what_is_wrong_with_a_model_of_another_family_is_one_line(llama, data_dir, tmp_path, capsys):
    import tokenizers
    import transformers

    def error(folder: str) -> str:
        assert call_script(analyze_attention, tmp_path / folder, f"--data_dir={data_dir}") == 2
        return capsys.readouterr().err

    shutil.copytree(llama, tmp_path / "speechless")
    for file in (tmp_path / "speechless").glob("*token*"):
        file.unlink()
    assert "no tokenizer to be read there" in error("speechless")

    shutil.copytree(llama, tmp_path / "illiterate")  # every word is unknown to it
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<end>": 1}, unk_token="<unk>"))
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    wrapped.save_pretrained(tmp_path / "illiterate")
    assert "its tokenizer (vocabulary 2) loses the text" in error("illiterate")

    shutil.copytree(llama, tmp_path / "incomplete")
    path = tmp_path / "incomplete" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "no weights for model.layers.1.self_attn.k_proj.weight" in error("incomplete")

    shutil.copytree(llama, tmp_path / "unknown")
    config = json.loads((llama / "config.json").read_text()) | {"model_type": "nobody"}
    (tmp_path / "unknown" / "config.json").write_text(json.dumps(config))
    found = error("unknown")
    assert "transformers cannot load it" in found and found.count("\n") == 1


def test_without_transformers_the_error_names_it(llama, data_dir, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert call_script(analyze_attention, llama, f"--data_dir={data_dir}") == 2
    assert "is of type 'llama', which takes transformers; pip install transformers" in capsys.readouterr().err


# ---- watching it happen: train.py --track_rank


def test_tracking_changes_no_bit_of_the_training_and_logs_what_the_analysis_finds(data_dir, tmp_path):
    settings = TINY | {"data_dir": str(data_dir), "dropout": 0.1, "n_layer": 3}
    paths = {
        tracked: train.train(train.TrainConfig(out_dir=str(tmp_path / str(tracked)), track_rank=tracked, **settings))
        for tracked in (True, False)
    }
    for name in ("model", "optimizer"):
        ours, theirs = (load_file(paths[tracked] / f"{name}.safetensors") for tracked in (True, False))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    lines = [line for line in read_metrics(tmp_path / "True") if "max_rank" in line]
    assert [line["step"] for line in lines] == [0, 10, 20]
    assert not [line for line in read_metrics(tmp_path / "False") if "max_rank" in line]
    found = analyze_attention.analyze(
        analyze_attention.AnalyzeConfig(str(paths[True]), data_dir=str(data_dir), sequences=4, out=str(tmp_path / "a"))
    )
    for key in ("max_rank", "mean_rank", "max_columns", "mean_columns"):
        assert lines[-1][key] == pytest.approx([row[key] for row in found["layers"]])
    assert lines[0]["mean_rank"] != lines[-1]["mean_rank"]


def test_the_report_draws_how_a_tracked_run_went_and_moves_it_if_asked(data_dir, tmp_path, capsys):
    settings = TINY | {"data_dir": data_dir, "out_dir": tmp_path / "run", "track_rank": True, "eval_interval": 5}
    assert call_script(train, *options(**settings)) == 0
    assert call_script(report, tmp_path / "run", "--animate") == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path}/run/collapse.png\n")
    with Image.open(tmp_path / "run/collapse.gif") as moving:
        assert moving.n_frames == 5
    assert (tmp_path / "run/collapse.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_not_tracked_is_told_how_to(reference, capsys):
    assert call_script(report, reference) == 2
    assert "its attention was not tracked; train with --track_rank" in capsys.readouterr().err
