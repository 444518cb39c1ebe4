"""Real parts, small: a corpus of Python source, a 2-layer model, the scripts as a user runs them."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from model import GPT, GPTConfig
from plumbing import configurator, storage

ROOT = Path(__file__).parent.parent
TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 257, "tokens_per_step": 256,
    "micro_batch": 4, "max_steps": 20, "warmup_steps": 2, "lr": 1e-2, "eval_interval": 10, "save_interval": 10,
    "log_interval": 1, "keep_checkpoints": 9, "dtype": "float32", "device": "cpu",
}  # fmt: skip
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
torch.set_num_threads(1)
settings.register_profile("real", deadline=None)
settings.load_profile("real")


def options(**settings) -> list[str]:
    """Settings as command line options."""
    return [f"--{key}={value}" for key, value in settings.items()]


def run_script(script: str, *arguments: str, processes: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """A script as a user runs it, under torchrun for more than one process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def call_script(module, *arguments: str) -> int:
    """A script's main as configurator.run ends it, in this process; its exit code."""
    argv, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        configurator.run(module.main)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():  # a process of its own would have taken them along
            signal.signal(number, handler)
    return 0


def random_model(seed: int = 0, std: float = 0.3, dtype=torch.float64, **changes) -> GPT:
    """A tiny model whose every weight, biases and norms too, is random: symmetric mistakes cannot hide."""
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 65} | changes
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**shape)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model.eval()


def publish_again(folder: Path):
    """Give a folder whose files a test has written or changed a manifest that fits them."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    shutil.rmtree(folder)
    with storage.publish(folder) as directory:
        for name, content in files.items():
            (directory / name).write_bytes(content)


def read_metrics(run_dir) -> list[dict]:
    log = Path(run_dir) / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Sixty documents of about 1,500 characters."""
    import argparse
    import tarfile

    text = inspect.getsource(argparse) + inspect.getsource(tarfile)
    return [text[i : i + 1500] for i in range(0, 90_000, 1500)]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, documents) -> Path:
    """A prepared data directory over bytes."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    done = run_script(
        "prepare_data.py", "files", folder / "corpus.jsonl", f"--out={folder / 'bytes'}", "--val_fraction=0.1"
    )
    assert done.returncode == 0, done.stderr
    return folder / "bytes"


@pytest.fixture(scope="session")
def reference(tmp_path_factory, data_dir) -> Path:
    """The run directory of a trained 4-layer model with an inverse-layer scale."""
    import train

    out_dir = tmp_path_factory.mktemp("reference") / "run"
    settings = TINY | {"n_layer": 4, "scale_attn_by_inverse_layer_idx": True}
    train.train(train.TrainConfig(data_dir=str(data_dir), out_dir=str(out_dir), **settings))
    return out_dir
