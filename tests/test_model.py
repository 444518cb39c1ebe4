"""model.py is GPT-2: held against transformers in float64, and against what a causal model must not do."""

import re

import pytest
import torch
from conftest import random_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from model import GPT, GPTConfig, gelu
from plumbing import checkpoint, pretrained

VARIANTS = [(bias, scale) for bias in (False, True) for scale in (False, True)]


def tokens(B=3, T=16, V=65, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def differences(ours: GPT, theirs: GPT2LMHeadModel) -> dict[str, float]:
    """Largest absolute difference of logits, loss and of each gradient, in float64."""
    idx = tokens()
    loss = ours(idx[:, :-1], idx[:, 1:])
    loss.backward()
    out = theirs(idx[:, :-1])
    their_loss = F.cross_entropy(out.logits.flatten(0, 1), idx[:, 1:].flatten())
    their_loss.backward()
    gradients = {key: checkpoint.hf_layout(key, p.grad) for key, p in ours.named_parameters()}
    their_gradients = {key: p.grad for key, p in theirs.named_parameters() if key in gradients}
    assert gradients.keys() == their_gradients.keys()
    result = {key: (gradients[key] - their_gradients[key]).abs().max().item() for key in gradients}
    return result | {
        "logits": (ours(idx[:, :-1]) - out.logits).abs().max().item(),
        "loss": abs(loss.item() - their_loss.item()),
    }


@pytest.mark.parametrize("bias,scale", VARIANTS)
def test_logits_loss_and_gradients_equal_transformers_when_it_reads_our_checkpoint(tmp_path, bias, scale):
    ours = random_model(bias=bias, scale_attn_by_inverse_layer_idx=scale)
    checkpoint.save(tmp_path / "ours", ours, "bytes", 0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    assert max(differences(ours, theirs).values()) < 1e-10
    for block in ours.transformer.h:
        block.attn.fused = False
    assert max(differences(ours, theirs).values()) < 1e-10


@pytest.mark.parametrize("scale", [False, True])
def test_logits_loss_and_gradients_equal_transformers_when_we_read_its_checkpoint(tmp_path, scale):
    torch.manual_seed(5)
    config = GPT2Config(
        n_layer=3, n_head=2, n_embd=32, n_positions=16, vocab_size=65, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, scale_attn_by_inverse_layer_idx=scale,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = pretrained.load_model(tmp_path / "theirs", torch.float64)
    assert ours.config.bias and ours.config.scale_attn_by_inverse_layer_idx == scale
    assert max(differences(ours, theirs.eval()).values()) < 1e-10


def test_a_square_c_proj_that_is_transposed_by_mistake_is_seen(tmp_path, monkeypatch):
    """Negative control: the parity above fails where a matrix is stored in the wrong layout, though its shape fits."""
    monkeypatch.setattr(checkpoint, "CONV1D", re.compile(r"\.(c_attn|mlp\.c_proj|c_fc)\.weight$"))
    ours = random_model()
    checkpoint.save(tmp_path / "ours", ours, "bytes", 0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    assert differences(ours, theirs)["logits"] > 1e-3


def test_no_token_sees_the_future():
    """The logits at position 7 depend on the embeddings at positions 0 to 7, each of them, and on no later one."""
    model, embeddings = random_model(bias=True), []
    model.transformer.drop.register_forward_hook(lambda module, args, out: embeddings.append(out))
    logits = model(tokens(B=1))
    (gradient,) = torch.autograd.grad(logits[0, 7].sum(), embeddings)
    sensitivity = gradient[0].abs().sum(-1)  # (T,)
    assert (sensitivity[:8] > 0).all() and (sensitivity[8:] == 0).all()


@pytest.mark.parametrize("scale", [False, True])
def test_attention_matrices_are_those_that_the_fused_attention_applies(scale):
    model = random_model(scale_attn_by_inverse_layer_idx=scale)
    fused = []
    for block in model.transformer.h:
        block.attn.register_forward_hook(lambda module, args, out: fused.append((module, args[0], out)))
    matrices = list(model.attention_matrices(tokens()))
    assert len(matrices) == len(fused) == model.config.n_layer
    for matrix, (attn, x, out) in zip(matrices, fused, strict=True):
        assert (matrix.sum(-1) - 1).abs().max() < 1e-12 and (matrix.triu(1) == 0).all()
        explicit = attn.c_proj((matrix @ attn.heads(x)[2]).transpose(1, 2).flatten(2))
        assert (explicit - out).abs().max() < 1e-12


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_attention_that_is_not_fused_agrees_in_bfloat16_too(gradient_checkpointing):
    gradients = []
    for fused in (True, False):
        model = random_model().float()
        model.gradient_checkpointing = gradient_checkpointing
        for block in model.transformer.h:
            block.attn.fused = fused
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens()[:, :-1], tokens()[:, 1:])
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_in_attention_leaves_out_links_and_keeps_the_mean(fused):
    attn = random_model(dropout=0.25).transformer.h[0].attn
    attn.fused, attn.resid_dropout.p, attn.c_proj = fused, 0.0, torch.nn.Identity()
    x = torch.randn(1, 16, 32, dtype=torch.float64)
    kept = attn.eval()(x)
    assert torch.equal(attn(x), kept)
    attn.train()
    torch.manual_seed(0)
    dropped = torch.stack([attn(x) for _ in range(4000)])
    first = dropped[:, 0, 0]  # position 0 sees only itself: each head is there, 4/3 as large, or not
    assert torch.allclose(first[first != 0].abs().unique().max(), kept[0, 0].abs().max() * 4 / 3)
    assert (first == 0).double().mean() == pytest.approx(0.25, abs=0.03)
    assert (dropped.mean(0) - kept).abs().max() < 0.1 * kept.abs().max()


def test_parameter_names_are_those_of_transformers():
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=8, vocab_size=65))
    ours = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=65, bias=True))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize("bias", [False, True])
def test_the_formula_counts_every_parameter_once(bias):
    model = random_model(bias=bias)
    assert model.config.num_params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "n_layer,n_head,n_embd,n_params",
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_the_published_sizes_have_their_published_parameters(n_layer, n_head, n_embd, n_params):
    assert GPTConfig(n_layer, n_head, n_embd, vocab_size=50257, bias=True).num_params() == n_params


def test_flops_per_token_equal_those_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = random_model(dtype=torch.float32)
    idx = tokens(B=2)  # T = block_size
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # which shows its matrix products
        model(idx, idx).backward()
    assert counter.get_total_flops() == model.config.flops_per_token() * idx.numel()


def test_weight_decay_groups_hold_every_parameter_once_and_only_matrices_decay():
    model = random_model(bias=True)
    decayed, rest = model.param_groups(0.1)
    assert len(decayed["params"] + rest["params"]) == len(list(model.parameters()))
    assert {id(p) for p in decayed["params"] + rest["params"]} == {id(p) for p in model.parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    assert all(("ln_" in names[id(p)]) or names[id(p)].endswith("bias") for p in rest["params"])
    assert not any(("ln_" in names[id(p)]) or names[id(p)].endswith("bias") for p in decayed["params"])


def test_fresh_weights_have_the_spread_of_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=128, block_size=64, vocab_size=512, bias=True))
    block = model.transformer.h[3]
    assert abs(block.mlp.c_fc.weight.std() / 0.02 - 1) < 0.05
    assert abs(block.mlp.c_proj.weight.std() / (0.02 / 16**0.5) - 1) < 0.05
    assert abs(model.transformer.wte.weight.std() / 0.02 - 1) < 0.05
    assert (block.ln_1.weight == 1).all() and (block.ln_1.bias == 0).all() and (block.attn.c_attn.bias == 0).all()


def test_generation_is_defined_at_its_edges():
    model = random_model(dtype=torch.float32)
    prompt = tokens(B=1, T=40)  # longer than block_size 16
    likeliest = model.generate(prompt, 5, temperature=0)
    assert torch.equal(likeliest, model.generate(prompt, 5, top_k=1)) and likeliest.shape == (1, 45)
    assert model.generate(prompt, 3, top_k=10_000).shape == (1, 43)
    for bad in ({"temperature": -1.0}, {"top_k": 0}):
        with pytest.raises(ValueError):
            model.generate(prompt, 1, **bad)
    with pytest.raises(ValueError):
        model.generate(prompt[:, :0], 1)


def test_top_k_never_takes_another_token():
    model = random_model(dtype=torch.float32, std=0.05)
    prompt = tokens(B=1, T=4)
    allowed = set(model(prompt)[0, -1].topk(3).indices.tolist())
    torch.manual_seed(0)
    seen = {model.generate(prompt, 1, temperature=5.0, top_k=3)[0, -1].item() for _ in range(60)}
    assert seen == allowed


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65, dropout=0.5))
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


@pytest.mark.parametrize("wrong", [{"n_head": 5}, {"n_layer": 0}, {"dropout": 1.0}, {"vocab_size": -1}])
def test_an_impossible_shape_is_refused_with_its_numbers(wrong):
    with pytest.raises(ValueError, match=str(*wrong.values())):
        GPTConfig(**{"n_embd": 128, "n_head": 4} | wrong)


def test_a_sequence_longer_than_block_size_is_refused():
    with pytest.raises(ValueError, match="17 tokens is longer than block_size 16"):
        random_model()(tokens(T=17))


def test_the_gelu_that_is_compiled_is_the_one_that_is_not(monkeypatch):
    x = torch.linspace(-30, 30, 2001, dtype=torch.float64, requires_grad=True)
    forms = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda on=compiling: on)
        y = gelu(x)
        forms.append((y, *torch.autograd.grad(y.sum(), x)))
    for plain, compiled in zip(*forms, strict=True):
        torch.testing.assert_close(plain, compiled, atol=1e-12, rtol=1e-10)
