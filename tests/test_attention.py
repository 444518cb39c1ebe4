"""attention.py: matrices whose rank is known, a plain SVD beside it, what a subspace proves, transformers' models."""

import math
import weakref

import pytest
import torch
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import attention
from attention import approximate_rank, column_count, sink
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


# ----------------------------------------------------------------------------------------------------------
# What a subspace proves


def proofs(matrices: torch.Tensor, tau: float) -> list[int]:
    """proven_rank of matrices (N, T, T) for the first width."""
    gram = matrices.mT @ matrices
    trace, norm = gram.diagonal(dim1=-2, dim2=-1).double().sum(-1), torch.linalg.matrix_norm(gram).double()
    return attention.proven_rank(gram, trace, norm, tau, attention.WIDTHS[0]).tolist()


@settings(max_examples=60)
@given(energies=st.lists(st.floats(0, 1), min_size=40, max_size=40), seed=st.integers(0, 99), tau=st.floats(0.05, 0.99))
def test_what_a_subspace_proves_is_the_rank_whatever_the_spectrum(energies, seed, tau):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q for _ in range(2))
    matrix = left * torch.tensor([1.0, *energies[1:]]).sqrt() @ right
    (found,) = proofs(matrix[None], tau)
    assert found in (0, svd_rank(matrix, tau))


def test_lazy_heads_need_no_spectrum_and_others_get_one(monkeypatch):
    """One column proves rank one, a subspace ranks to 8 or so; of sharp random heads neither is tried for long."""
    logits = torch.randn(1, 12, 128, 128, generator=torch.Generator().manual_seed(0))
    logits[..., 0] += torch.linspace(3, 9, 12)[:, None]
    lazy = logits.masked_fill(torch.ones(128, 128).triu(1).bool(), -math.inf).softmax(-1)
    both = torch.cat([lazy, random_attention(128, 4, 0)], dim=1)
    expected = [svd_rank(matrix, 0.9) for matrix in both[0]]
    columns = column_count(both)[0].tolist()
    assert 2 <= max(expected[:12]) <= 8 and min(expected[12:]) > 40 and 2 < columns.count(1) < 12
    batches = {}
    for module, name in ((attention, "gram_matrices"), (attention, "proven_rank"), (torch.linalg, "eigvalsh")):
        function, batches[name] = getattr(module, name), []

        def counted(matrices, *others, function=function, seen=batches[name]):
            seen.append(len(matrices) if matrices.shape[-1] == 128 else 0)  # 0: Ritz values
            return function(matrices, *others)

        monkeypatch.setattr(module, name, counted)
    assert approximate_rank(both)[0].tolist() == expected
    several = 15 - columns.count(1)
    assert batches["gram_matrices"] == [several] and 0 < max(batches["proven_rank"]) <= several - 3
    assert [size for size in batches["eigvalsh"] if size] == [3]  # in one batch, and of the sharp ones alone


@pytest.mark.parametrize("T", [2, 17, 64, 100])
def test_gram_matrices_of_causal_and_other_matrices(T):
    causal, full = random_attention(T, 1, 0)[0], torch.rand(3, T, T)
    for matrices in (causal, full):
        torch.testing.assert_close(attention.gram_matrices(matrices), matrices.mT @ matrices)


# ----------------------------------------------------------------------------------------------------------
# Models


SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FAMILIES = {"Llama": {"num_key_value_heads": 2}, "Qwen3": {"num_key_value_heads": 2, "head_dim": 8}, "GPTNeoX": {}}


def tiny(family: str, **changes):
    """A randomly initialised model of a family of transformers, with eager attention."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_measures_are_those_of_the_family_s_own_output_attentions(family):
    model, idx = tiny(family, **FAMILIES[family]), torch.randint(300, (3, 40))
    values = attention.measure(model, idx, 0.9, micro_batch=2)
    with torch.no_grad():
        own = model(idx, output_attentions=True).attentions
    assert list(values) == [0, 1, 2]
    for layer, matrices in enumerate(own):  # (S, H, T, T)
        expected = [[svd_rank(matrix, 0.9) for matrix in heads] for heads in matrices]
        assert matrices.shape == (3, 4, 40, 40) and values[layer]["rank"].T.tolist() == expected
        expected = [[plain_columns(matrix, 0.9) for matrix in heads] for heads in matrices]
        assert values[layer]["columns"].T.tolist() == expected
        torch.testing.assert_close(torch.tensor(values[layer]["sink"].T), matrices[..., 0].mean(-1).double())


def test_one_layer_of_one_batch_is_in_memory_at_a_time():
    model, alive, most = tiny("Llama", num_hidden_layers=6), [], 0

    def visit(layer, matrices):
        nonlocal most
        alive.append(weakref.ref(matrices))
        most = max(most, sum(reference() is not None for reference in alive))

    attention.visit_layers(model, torch.randint(300, (2, 20)), visit)
    assert len(alive) == 6 and most == 1


def test_layers_without_attention_are_named_and_a_model_without_any_is_refused(capsys):
    linear = {f"linear_{kind}": 8 for kind in ("key_head_dim", "value_head_dim")}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 2, "num_experts_per_tok": 1}
    linear |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "head_dim": 8}
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    idx = torch.randint(300, (2, 20))
    hybrid = tiny("Qwen3Next", num_key_value_heads=2, layer_types=kinds, **linear)
    assert list(attention.measure(hybrid, idx, 0.9, 2)) == [1]
    assert "layers [0, 2] have no attention matrix" in capsys.readouterr().out
    with pytest.raises(UserError, match="MambaForCausalLM: no layer has an attention matrix"):
        attention.measure(tiny("Mamba", state_size=4), idx, 0.9, 2)


def test_average_first_is_the_rank_of_the_mean_matrix():
    model, idx = random_model(dtype=torch.float32), torch.randint(65, (5, 16))
    values = attention.measure(model, idx, 0.9, micro_batch=2, average_first=True)
    for layer, matrices in enumerate(model.attention_matrices(idx)):
        expected = [[svd_rank(matrix, 0.9)] for matrix in matrices.double().mean(0)]
        assert values[layer]["rank"].tolist() == expected
