"""minimal.py: it runs, it is short, and its rank and its slice are the paper's."""

import ast
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script

import minimal
from model import GPT

SOURCE = (ROOT / "minimal.py").read_text()


def test_it_prints_the_ranks_and_the_comparison():
    fewer = "minimal.max_rank.__defaults__, minimal.evaluate.__wrapped__.__defaults__ = (0.90, 5, 100), (1,)"
    command = [sys.executable, "-c", f"import minimal; {fewer}; minimal.main(steps=2)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(reference|inherited|random) +(\d)  ", done.stdout, re.MULTILINE))
    assert rows["reference"] == "8" and rows["inherited"] == rows["random"] in {"4", "6", "8"}
    assert len(re.findall(r"^MaxRank by layer, (?:untrained|reference) +(?:[\d.]+ *){8}$", done.stdout, re.M)) == 2


def test_it_is_one_page_and_imports_the_model_alone():
    assert len(SOURCE.splitlines()) <= 130
    found = {alias.name for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in found} <= sys.stdlib_module_names | {"model", "torch", "numpy"}


def test_the_paper_s_steps_are_marked():
    assert all(f"Inheritune step {i}" in SOURCE for i in (1, 2, 3)) and "definition G.1" in SOURCE


def test_max_rank_is_the_mean_over_sequences_and_then_the_maximum_over_heads():
    torch.manual_seed(0)
    model = GPT(minimal.replace(minimal.CONFIG, n_layer=2, n_embd=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    found = minimal.max_rank(model, N=5, length=30)
    starts = minimal.np.random.default_rng(minimal.SEED).integers(len(minimal.val_data) - 30, size=5)
    for layer, A in enumerate(model.attention_matrices(minimal.windows(minimal.val_data, starts, 30)[0])):
        ranks = torch.zeros(5, 4)
        for n in range(5):
            for h in range(4):
                energy = torch.linalg.svdvals(A[n, h].double()) ** 2
                ranks[n, h] = next(k for k in range(1, 31) if energy[:k].sum() >= 0.9 * energy.sum())
        assert found[layer] == pytest.approx(max(ranks[:, h].mean().item() for h in range(4)))


def test_the_target_has_the_reference_s_tensors_bit_for_bit():
    reference = GPT(minimal.replace(minimal.CONFIG, n_embd=32))
    target = minimal.inherit(reference, 3)
    theirs = reference.state_dict()
    assert target.config.n_layer == 3
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, theirs[name]) and tensor.data_ptr() != theirs[name].data_ptr(), name


def test_the_number_of_steps_is_an_option():
    done = run_script("minimal.py", "--help")
    assert done.returncode == 0 and "--steps" in done.stdout
