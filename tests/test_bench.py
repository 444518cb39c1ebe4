"""bench.py: it measures what train.py does, beside a peer on the same batches; no time is asserted here."""

import re

import pytest
import torch
from conftest import TINY, call_script, options
from safetensors.torch import load_file
from test_train import run

import bench
import data
from plumbing import checkpoint, machine

CPU = torch.device("cpu")
QUICK = TINY | {"steps": 1, "rounds": 1, "compile": False}
PEER = """
import torch
from model import GPT as Ours, GPTConfig
class GPT(Ours):
    def forward(self, idx, targets=None):
        return None, super().forward(idx, targets)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.param_groups(weight_decay), lr=learning_rate, betas=betas)
"""


@pytest.fixture
def peer(tmp_path):
    """A checkout of a nanoGPT-like peer, which is our model under its interface."""
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "model.py").write_text(PEER)
    return tmp_path / "peer"


def contender(make, *where, tokens, config, turns=([0], [1, 2])):
    """A contender after its turns."""
    made = make(*where)
    for steps in turns:
        made.take_turn(steps, config, tokens, CPU)
    return made


def setting(dtype="float32", **changes) -> tuple[bench.BenchConfig, machine.Hardware]:
    options = {"bias": False, "dropout": 0.0, "scale_attn_by_inverse_layer_idx": False}
    return bench.BenchConfig(**QUICK | options | changes), machine.pick("cpu", dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_measured_steps_are_those_of_train_bit_for_bit(data_dir, tmp_path, dtype):
    trained = load_file(run(data_dir, tmp_path / "run", max_steps=3, dtype=dtype) / "model.safetensors")
    config, hardware = setting(dtype, max_steps=3)
    tokens = data.open_tokens(data_dir, "train", 32, 257)
    made = contender(bench.ours, config, hardware, tokens=tokens, config=config)
    for key, parameter in made.model.named_parameters():
        assert torch.equal(checkpoint.hf_layout(key, parameter.detach()), trained[key]), key


def test_a_peer_begins_with_our_weights_and_sees_our_batches(data_dir, peer):
    config, hardware = setting()
    tokens = data.open_tokens(data_dir, "train", 32, 257)
    ours = contender(bench.ours, config, hardware, tokens=tokens, config=config)
    theirs = contender(bench.peer, str(peer), config, hardware, False, tokens=tokens, config=config)
    assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=1e-6)
    other = contender(
        bench.peer, str(peer), config, hardware, False, tokens=tokens, config=config, turns=([0], [1, 3])
    )
    assert float(other.loss) != pytest.approx(float(theirs.loss), rel=1e-6)


def test_a_turn_is_timed_a_step(monkeypatch):
    config, hardware = setting()
    tokens = torch.arange(10_000).remainder(257).numpy()
    times = iter([0.0, 1.5, 10.0, 16.0])  # at the start and the end of a turn of one step, and of two
    monkeypatch.setattr(bench, "clock", lambda device: next(times))
    assert contender(bench.ours, config, hardware, tokens=tokens, config=config).turns == [1.5, 3.0]


def test_it_prints_speed_memory_and_a_finite_utilisation(capsys):
    assert call_script(bench, *options(**QUICK)) == 0
    out = capsys.readouterr().out
    assert re.search(r"ours, eager +first step +[\d.]+ s, peak memory so far [\d,]+ MB", out)
    assert re.search(r"^ours, eager +\d+ +\d+ +\d+ +[\d.]+ +[\d.]+$", out, re.MULTILINE)
    assert 0 <= float(re.search(r"MFU ([\d.]+)%", out)[1]) < 100


def test_the_profile_gives_every_kind_its_share_of_a_step(capsys):
    assert call_script(bench, *options(**QUICK | {"dtype": "bfloat16"}), "--profile") == 0
    table = capsys.readouterr().out.split("ms a step")[1]
    shares = {kind: float(share) for kind, share in re.findall(r"^(\D+?) {2,}(-?[\d.]+)%", table, re.MULTILINE)}
    assert {"matrix products", "attention", "loss", "optimizer", "norms and activations"} <= shares.keys()
    assert min(shares[kind] for kind in bench.KINDS.keys() & shares.keys()) > 0
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    assert re.search(r"loss .*aten::_log_softmax", table)
    assert re.search(r"matrix products .*aten::mm", table) and re.search(r"attention .*aten::bmm", table)


@pytest.mark.slow
def test_the_peer_runs_compiled_and_not(peer, capsys):
    assert call_script(bench, *options(**QUICK | {"n_layer": 1}), f"--against={peer}") == 0
    out = capsys.readouterr().out
    assert "peer, eager" in out and "peer, compiled" in out
    assert re.search(r"ours, eager / peer, (eager|compiled): [\d.]+ x \([\d.]+ to [\d.]+\)", out)


def test_the_ratio_is_to_the_better_of_a_pair_of_peers(capsys):
    contenders = [bench.Contender(name, *[None] * 4) for name in ("ours", "a, eager", "a, compiled")]
    for each, turns in zip(contenders, ([1, 1, 2], [4, 4, 4], [2, 3, 3]), strict=True):
        each.turns, each.loss = turns, 1.0
    bench.report(contenders, setting()[0], 1e6, 1e9)
    assert "ours / a, compiled: 2.00 x (1.50 to 3.00)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong,words",
    [
        (["--against=nowhere"], "nowhere/model.py does not exist"),
        (["--n_head=3"], "n_embd 32 is not divisible by n_head 3"),
        (["--micro_batch=16"], "choose a micro_batch that divides 8"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capsys, wrong, words):
    assert call_script(bench, *options(**QUICK), *wrong) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


