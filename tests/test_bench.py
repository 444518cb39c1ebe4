"""bench.py: it measures what train.py does, beside a peer on the same batches; no time is asserted here."""

import re

import pytest
import torch
from conftest import TINY, call_script, options, run_script
from safetensors.torch import load_file
from test_train import run

import bench
from plumbing import checkpoint
import data
from plumbing import machine
from model import GPTConfig

CPU = torch.device("cpu")
QUICK = TINY | {"steps": 1, "rounds": 2, "compile": False}
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
    for numbers in turns:
        made.take_turn(numbers, config, tokens, config.block_size, CPU)
    return made


def setting(**changes) -> tuple[bench.BenchConfig, GPTConfig]:
    config = bench.BenchConfig(**QUICK | changes)
    return config, GPTConfig(**{key: TINY[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_measured_steps_are_those_of_train_bit_for_bit(data_dir, tmp_path, dtype):
    trained = load_file(run(data_dir, tmp_path / "run", max_steps=3, dtype=dtype) / "model.safetensors")
    config, shape = setting(max_steps=3)
    tokens = data.open_tokens(data_dir, "train", 32, 257)
    made = contender(bench.ours, config, shape, getattr(torch, dtype), CPU, False, tokens=tokens, config=config)
    for key, parameter in made.model.named_parameters():
        assert torch.equal(checkpoint.hf_layout(key, parameter.detach()), trained[key]), key


def test_a_peer_begins_with_our_weights_and_sees_our_batches(data_dir, peer):
    config, shape = setting()
    tokens = data.open_tokens(data_dir, "train", 32, 257)
    ours = contender(bench.ours, config, shape, torch.float32, CPU, False, tokens=tokens, config=config)
    theirs = contender(bench.peer, str(peer), config, shape, CPU, False, tokens=tokens, config=config)
    assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=1e-6)
    other = contender(
        bench.peer, str(peer), config, shape, CPU, False, tokens=tokens, config=config, turns=([0], [1, 3])
    )
    assert float(other.loss) != pytest.approx(float(theirs.loss), rel=1e-6)


def test_the_parts_make_up_the_step():
    config, shape = setting()
    tokens = torch.arange(10_000).remainder(257).numpy()
    made = contender(bench.ours, config, shape, torch.float32, CPU, False, tokens=tokens, config=config)
    assert len(made.turns) == 2 and made.step_s().shape == (2,)
    assert all(min(turn.values()) > 0 and set(turn) == set(bench.PARTS) for turn in made.turns)


def test_it_prints_speed_parts_memory_and_a_finite_utilisation(capsys):
    assert call_script(bench, *options(**QUICK)) == 0
    out = capsys.readouterr().out
    assert "ours, eager" in out and "measured here" in out
    utilisation = float(re.search(r"MFU ([\d.]+)%", out)[1])
    assert 0 <= utilisation < 100
    shares = [float(share) for share in re.search(r"ours, eager +\d.*%.*", out)[0].replace("%", "").split()[-5:-1]]
    assert sum(shares) == pytest.approx(100, abs=5)  # medians of each


@pytest.mark.slow
def test_it_prints_the_ratio_to_the_better_of_the_peer_compiled_and_not(peer, capsys):
    assert call_script(bench, *options(**QUICK), f"--against={peer}") == 0
    out = capsys.readouterr().out
    assert "peer, eager" in out and "peer, compiled" in out
    speeds = {name: int(speed) for name, speed in re.findall(r"^(.*?) {2,}(\d+)  +\d+  +\d+", out, re.MULTILINE)}
    best = max(("peer, eager", "peer, compiled"), key=speeds.get)
    ratio, least, most = map(float, re.search(rf"{best}: ([\d.]+) x \(turns: ([\d.]+) to ([\d.]+)\)", out).groups())
    assert least <= ratio <= most


def test_two_processes_show_their_communication():
    done = run_script("bench.py", *options(**QUICK), processes=2)
    assert done.returncode == 0, done.stderr
    assert re.search(r"communication: -?[\d.]+% of a step", done.stdout) and "silent" in done.stdout


def test_two_checkpoints_write_beside_each_other(reference, tmp_path, capsys):
    import inherit

    target = inherit.inherit(reference, "0:2", tmp_path / "target")
    settings = {"reference": reference, "target": target, "new_tokens": 8, "rounds": 2, "device": "cpu"}
    assert call_script(bench, *options(**settings)) == 0
    out = capsys.readouterr().out
    assert "4 layers against 2" in out
    for way in ("ours", "transformers, cached"):
        assert re.search(rf"^{way} .* [\d.]+ x, [\d.]+ to [\d.]+$", out, re.MULTILINE)


def test_both_ways_of_writing_write_the_same(reference):
    path = checkpoint.resolve(reference)
    prompt = torch.randint(257, (1, 8), generator=torch.Generator().manual_seed(0))
    ways = bench.writers(path, torch.float32, CPU, 8)
    ours, theirs = (ways[way](prompt) for way in ("ours", "transformers, cached"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "name,peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_a_peak_is_that_of_the_very_device_or_unknown(name, peak):
    assert machine.known_peak(name) == peak


@pytest.mark.parametrize(
    "wrong,words",
    [
        (["--against=nowhere"], "nowhere/model.py does not exist"),
        (["--rounds=0"], "rounds is 0"),
        (["--target=out/x"], "--reference and --target"),
        (["--n_head=3"], "n_embd 32 is not divisible by n_head 3"),
        (["--micro_batch=16"], "--micro_batch=8 divides it"),
        (["--dropout=0.1"], "without dropout"),
        (["--reference=no/such", "--target=no/such"], "no/such is no directory here"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capsys, wrong, words):
    assert call_script(bench, *options(**QUICK), *wrong) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_a_peer_that_needs_what_is_not_here_is_named(peer, capsys):
    (peer / "model.py").write_text("import no_such_optimizer\n")
    assert call_script(bench, *options(**QUICK), f"--against={peer}") == 2
    assert "No module named 'no_such_optimizer'" in capsys.readouterr().err
