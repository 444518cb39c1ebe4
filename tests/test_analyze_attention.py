"""analyze_attention.py: what the command leaves, follows from the matrices; two models; other families."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import call_script, random_model
from test_attention import svd_rank

import analyze_attention
import attention
import checkpoint
from configurator import UserError


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
        "--tau=1.1",
        "--micro_batch=0",
        "--micro_batch=-1",
        "--lazy_below=nan",
    ],
)
def test_an_impossible_setting_is_one_line(reference, data_dir, tmp_path, capsys, wrong):
    arguments = [reference, f"--data_dir={data_dir}", f"--out={tmp_path / 'a'}", wrong]
    assert call_script(analyze_attention, *arguments) == 2
    assert "expected 2 <= seq_len <= block_size 32" in capsys.readouterr().err
