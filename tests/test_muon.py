"""plumbing/muon.py: which optimizer takes which parameter, the update, the guard, resume and processes."""

import itertools
import math

import pytest
import torch
from conftest import TINY, options, random_model, run_script
from safetensors.torch import load_file
from test_decoders import FAMILIES, tiny, wrapped
from test_step import OFF, updated
from test_train import run

from plumbing import machine
from plumbing.configurator import UserError
from plumbing.muon import MuonAndAdamW, orthogonal
from train import TrainConfig, make_optimizer

MUON = {"optimizer": "muon"}


def test_the_matrices_of_the_blocks_are_muon_s_and_all_else_is_adamw_s():
    model = random_model(bias=True)
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.3, **MUON))
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon, decayed, rest = ([names[p] for p in group["params"]] for group in optimizer.param_groups)
    assert set(muon) == {
        f"transformer.h.{i}.{part}.weight"
        for i in range(3)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert set(decayed) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert len(muon) + len(decayed) + len(rest) == len(names)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]


def test_another_family_s_matrices_are_muon_s_too():
    model = wrapped(tiny("Llama", **FAMILIES["Llama"]))
    optimizer = make_optimizer(model, TrainConfig(**MUON))
    assert len(optimizer.param_groups[0]["params"]) == 3 * 7  # q, k, v, o, gate, up, down


def test_stacked_matrices_of_experts_are_adamw_s():
    model = random_model()
    model.transformer.h[0].experts = torch.nn.Parameter(torch.zeros(4, 8, 8))  # as transformers has them
    muon, decayed, _ = make_optimizer(model, TrainConfig(**MUON)).param_groups
    assert [p.ndim for p in decayed["params"]] == [2, 2, 3] and {p.ndim for p in muon["params"]} == {2}


def test_in_bfloat16_an_update_is_torch_s_own_of_both():
    ours, theirs = random_model(dtype=torch.float32), random_model(dtype=torch.float32)
    optimizer = make_optimizer(ours, TrainConfig(lr=0.1, weight_decay=0.2, dtype="bfloat16", **MUON))
    blocks = [p for name, p in theirs.named_parameters() if ".h." in name and p.ndim == 2]
    others = [p for p in theirs.parameters() if not any(p is block for block in blocks)]
    wide, narrow = ([p for p in others if (p.ndim == 2) == is_wide] for is_wide in (True, False))
    muon = torch.optim.Muon(blocks, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": wide, "weight_decay": 0.2}, {"params": narrow, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (8, 3)])
def test_a_matrix_is_made_orthogonal_as_far_as_five_iterations_do(shape):
    """Each singular value s moves by the polynomial, and the singular vectors stay."""
    U, s, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    found = orthogonal(U @ s.diag() @ Vh)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(found, U @ s.diag() @ Vh, atol=1e-10, rtol=0)
    assert (s > 0.3).all() and (s < 1.3).all()


def test_it_computes_in_the_arithmetic_of_the_run():
    """Emulated, bfloat16 takes nearly half of a step of the demo on a CPU without it."""
    model = random_model(dtype=torch.float32)
    for dtype, expected in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        optimizer, seen = make_optimizer(model, TrainConfig(dtype=dtype, **MUON)), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("plumbing.muon.orthogonal", lambda G, seen=seen: seen.append(G.dtype) or G)
            updated(model, optimizer)
        assert set(seen) == {expected}


def test_a_matrix_without_a_gradient_stays():
    """As of an expert that no token was sent to."""
    model = random_model(dtype=torch.float32)
    optimizer, still = make_optimizer(model, TrainConfig(**MUON)), model.transformer.h[0].mlp.c_fc.weight
    before = still.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    still.grad = None
    optimizer.step()
    assert torch.equal(still, before) and still not in optimizer.state


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(poison):
    model = random_model(dtype=torch.float32)
    optimizer = make_optimizer(model, TrainConfig(lr=0.1, **MUON))
    assert isinstance(optimizer, MuonAndAdamW)
    updated(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    updated(model, optimizer, poison)
    updated(model, optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(UserError, match="step 1: non-finite gradient norm"):
        machine.check_finite(optimizer, OFF, [])


def test_resumed_equals_straight_bit_for_bit(data_dir, tmp_path):
    straight = run(data_dir, tmp_path / "straight", **MUON)
    first = run(data_dir, tmp_path / "split", max_steps=20, save_interval=10, **MUON)
    halfway = first.with_name("step-00000010")
    first.rename(tmp_path / "gone")
    assert halfway.is_dir() and run(data_dir, tmp_path / "split", resume=True, **MUON) == first
    for stem in ("model", "optimizer"):
        one, other = (load_file(path / f"{stem}.safetensors") for path in (straight, first))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert any(key.endswith("|momentum_buffer") for key in one)


def test_it_is_part_of_the_experiment(data_dir, tmp_path):
    run(data_dir, tmp_path / "run", max_steps=2)
    with pytest.raises(UserError, match="optimizer: adamw then, muon now"):
        run(data_dir, tmp_path / "run", max_steps=2, resume=True, **MUON)


def test_two_processes_equal_one(data_dir, tmp_path):
    settings = TINY | MUON | {"dtype": "float64", "data_dir": data_dir, "max_steps": 4}
    one = run(data_dir, tmp_path / "one", **MUON, dtype="float64", max_steps=4)
    done = run_script("train.py", *options(**settings, out_dir=tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(p / "step-00000004" / "model.safetensors") for p in (one.parent, tmp_path / "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-12, rtol=0)


def test_a_bad_gradient_at_the_very_first_update_is_one_line():
    model = random_model(dtype=torch.float32)
    optimizer = make_optimizer(model, TrainConfig(lr=0.1, **MUON))
    updated(model, optimizer, math.nan)
    with pytest.raises(UserError, match="step 0: non-finite gradient norm"):
        machine.check_finite(optimizer, OFF, [])


def test_with_a_gradient_scaler_only_a_bad_update_is_skipped():
    """float16's way: the scaler looks at the gradients itself, and lowers its scale."""
    model, scaler = random_model(dtype=torch.float32), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = make_optimizer(model, TrainConfig(lr=0.1, **MUON))
    weights = [[p.detach().clone() for p in model.parameters()]]
    for poison in (0.0, math.inf, 0.0):
        updated(model, optimizer, poison, scaler=scaler)
        weights.append([p.detach().clone() for p in model.parameters()])
    same = [all(map(torch.equal, before, after)) for before, after in itertools.pairwise(weights)]
    assert same == [False, True, False] and scaler.get_scale() == 2.0
