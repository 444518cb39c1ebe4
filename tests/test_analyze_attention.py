"""analyze_attention.py: matrices whose rank is known, a plain SVD beside it, and what the command leaves."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import call_script, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import analyze_attention
import checkpoint
from analyze_attention import approximate_rank, column_count, sink
from configurator import UserError


def svd_rank(matrix: torch.Tensor, tau: float) -> int:
    """The definition, word for word."""
    energy = torch.linalg.svdvals(matrix.double()).square()
    return int((energy.cumsum(0) < tau * energy.sum() * (1 - 1e-6)).sum()) + 1


def plain_columns(matrix: torch.Tensor, tau: float) -> int:
    """The definition, word for word."""
    mass = sorted((column @ column for column in matrix.double().numpy().T), reverse=True)
    return next(c for c in range(1, len(mass) + 1) if sum(mass[:c]) >= tau * sum(mass) * (1 - 1e-6))


def random_attention(T: int, sharpness: float, seed: int, heads: int = 3) -> torch.Tensor:
    logits = sharpness * torch.randn(1, heads, T, T, generator=torch.Generator().manual_seed(seed))
    return logits.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)  # (1, H, T, T)


def of(matrix: torch.Tensor, measure, *arguments) -> float:
    return measure(matrix[None, None], *arguments).item()


@pytest.mark.parametrize("T", [8, 64, 128])
def test_matrices_of_known_rank(T):
    one_column = torch.zeros(T, T)
    one_column[:, 0] = 1
    assert of(one_column, approximate_rank) == of(one_column, column_count) == 1 and of(one_column, sink) == 1
    assert of(torch.full((T, T), 1 / T), approximate_rank) == 1
    assert of(torch.full((T, T), 1 / T), column_count) == math.ceil(0.9 * T)
    assert of(torch.eye(T), approximate_rank) == of(torch.eye(T), column_count) == math.ceil(0.9 * T)
    assert of(torch.eye(T), sink) == pytest.approx(1 / T)
    uniform = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    assert of(uniform, approximate_rank) == svd_rank(uniform, 0.9) < of(uniform, column_count)
    assert of(uniform, sink) == pytest.approx(sum(1 / t for t in range(1, T + 1)) / T, rel=1e-5)


@pytest.mark.parametrize("r", [1, 3, 10])
def test_planted_directions_are_counted(r):
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(r)))[0]
    matrix = basis[:, :r] @ basis[:, -r:].T  # r equal singular values
    assert of(matrix, approximate_rank, 0.999) == r
    assert of(matrix, approximate_rank, 0.5) == math.ceil(r / 2)


@settings(max_examples=60)
@given(T=st.integers(2, 48), sharpness=st.floats(0, 12), seed=st.integers(0, 10**6), tau=st.floats(0.05, 1.0))
def test_rank_equals_the_plain_svd_and_never_exceeds_the_columns(T, sharpness, seed, tau):
    attention = random_attention(T, sharpness, seed)
    rank, columns = approximate_rank(attention, tau), column_count(attention, tau)
    if tau < 0.999:  # beyond, float32 cannot tell the smallest energies from rounding
        assert rank[0].tolist() == [svd_rank(matrix, tau) for matrix in attention[0]]
        assert (rank <= columns).all()
    assert (rank >= 1).all() and (columns <= T).all()
    assert tau >= 0.999 or columns[0].tolist() == [plain_columns(matrix, tau) for matrix in attention[0]]


def test_the_order_of_heads_and_sequences_does_not_matter():
    attention = torch.cat([random_attention(32, s, s) for s in (1, 4, 9)])  # (3, 3, T, T)
    for measure in (approximate_rank, column_count, sink):
        assert torch.equal(measure(attention).flip(0, 1), measure(attention.flip(0, 1)))
        assert torch.equal(measure(attention)[1:2], measure(attention[1:2]))


@settings(max_examples=20)
@given(sharpness=st.floats(0, 8), seed=st.integers(0, 10**6))
def test_one_thread_or_two_find_the_same(sharpness, seed):
    attention, found = random_attention(40, sharpness, seed), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append([measure(attention).tolist() for measure in (approximate_rank, column_count)])
    torch.set_num_threads(1)
    assert found[0] == found[1]


def test_half_precision_is_measured_in_float32():
    attention = random_attention(32, 3, 0).bfloat16()
    assert torch.equal(approximate_rank(attention), approximate_rank(attention.float()))
    assert torch.equal(column_count(attention), column_count(attention.float()))


def test_attention_that_is_not_finite_is_an_error_that_names_layer_and_head():
    model = random_model(dtype=torch.float32)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[16:32] = math.nan  # the queries of head 1
    with pytest.raises(UserError, match=r"layer 1, heads \[1\]: attention is not finite") as caught:
        analyze_attention.measure(model, torch.zeros(2, 8, dtype=torch.long), 0.9, 2)
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
