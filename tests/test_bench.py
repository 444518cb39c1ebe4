"""bench.py: it measures what train.py does, beside a peer on the same batches; no time is asserted here."""

import re

import pytest
import torch
from conftest import TINY, call_script, options, run_script
from safetensors.torch import load_file
from test_train import run

import bench
import data
from plumbing import checkpoint, machine

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


def test_the_parts_make_up_the_step():
    config, hardware = setting()
    tokens = torch.arange(10_000).remainder(257).numpy()
    made = contender(bench.ours, config, hardware, tokens=tokens, config=config)
    assert len(made.turns) == 2 and made.step_s().shape == (2,)
    assert all(min(turn.values()) > 0 and set(turn) == set(bench.PARTS) for turn in made.turns)


def test_it_prints_speed_parts_memory_and_a_finite_utilisation(capsys):
    assert call_script(bench, *options(**QUICK)) == 0
    out = capsys.readouterr().out
    assert "ours, eager" in out and "first step" in out
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
    ratio, least, most = map(float, re.search(rf"{best}: ([\d.]+) x \(([\d.]+) to ([\d.]+)\)", out).groups())
    assert least <= ratio <= most


def test_two_processes_show_their_communication():
    done = run_script("bench.py", *options(**QUICK), processes=2)
    assert done.returncode == 0, done.stderr
    assert re.search(r"communication: -?[\d.]+% of a step", done.stdout) and "silent" in done.stdout


@pytest.mark.parametrize(
    "wrong,words",
    [
        (["--against=nowhere"], "nowhere/model.py does not exist"),
        (["--n_head=3"], "n_embd 32 is not divisible by n_head 3"),
        (["--micro_batch=16"], "--micro_batch=8 divides it"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capsys, wrong, words):
    assert call_script(bench, *options(**QUICK), *wrong) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


