"""Two hundred SIGKILLs at random moments of a training run, each followed by a resume. Minutes; not part of the tests.

    python tests/faults.py                # prints where each resume began; exit code 0 if nothing was lost
    python tests/faults.py 20             # fewer kills

The run saves every two steps. Each attempt is a process of its own, forked from this one (which has imported
torch already, so that most of an attempt's life is training and saving), and killed after a random time.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch._dynamo  # imported by the first optimizer: better here, once, than in each life
from conftest import TINY, call_script

import prepare_data
import train
from plumbing import processes, storage
from plumbing.configurator import UserError

SETTINGS = TINY | {"save_interval": 2, "eval_interval": 50, "keep_checkpoints": 2, "dropout": 0.1, "max_steps": 100_000}


def attempt(folder: Path):
    """One life of the run: resume from what is there and train until killed."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    train.train(train.TrainConfig(resume="auto", data_dir=f"{folder}/data", out_dir=f"{folder}/killed", **SETTINGS))


def uninterrupted(folder: Path, last_step: int) -> Path:
    """The checkpoint that the same run has after last_step when nothing stops it before."""
    rate = train.learning_rate

    def stop_after_last_step(config, step):
        processes.stop_signal = signal.SIGTERM if step + 1 == last_step else 0
        return rate(config, step)

    train.learning_rate = stop_after_last_step
    settings = SETTINGS | {"save_interval": 100_000, "data_dir": f"{folder}/data", "out_dir": f"{folder}/straight"}
    with contextlib.suppress(UserError), contextlib.redirect_stdout(sys.stderr):
        train.train(train.TrainConfig(**settings))
    return folder / "straight" / f"step-{last_step:08d}"


def main():
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    folder = Path(tempfile.mkdtemp(prefix="inheritune-faults-"))
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 300}) + "\n" for i in range(50)))
    with contextlib.redirect_stdout(sys.stderr):
        assert (
            call_script(prepare_data, "files", folder / "corpus.jsonl", "--val_fraction=0.1", f"--out={folder}/data")
            == 0
        )

    fork, moments = multiprocessing.get_context("fork"), random.Random(1337)
    resumed = died_early = saving = newest_step = 0
    for kill in range(1, kills + 1):
        process = fork.Process(target=attempt, args=(folder,))
        process.start()
        time.sleep(moments.uniform(0.3, 1.5))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        log = (folder / "log").read_text() if (folder / "log").exists() else ""
        assert process.exitcode == -signal.SIGKILL, f"it ended by itself:\n{log}"
        begun = re.search(r"resuming from \S*step-(\d+)", log)
        began_at = int(begun[1]) if begun else 0 if "from scratch" in log else None  # None: died before it said
        resumed += began_at == newest_step
        died_early += began_at is None
        half_written = sorted(path.name for path in (folder / "killed").glob(".t*-*"))
        saving += bool(half_written)
        newest = storage.latest(folder / "killed")
        step = int(newest.name.removeprefix("step-")) if newest else 0
        print(
            f"kill {kill:3d}: began at step {began_at:5d}, whole at step {step:5d} {' '.join(half_written)}", flush=True
        )
        assert step >= newest_step
        newest_step = step

    names = ("model.safetensors", "optimizer.safetensors")
    assert newest_step > 0, "no life was long enough to save"
    expected = uninterrupted(folder, newest_step)
    equal = all((newest / name).read_bytes() == (expected / name).read_bytes() for name in names)
    print(
        f"{resumed} of {kills} began where the newest whole checkpoint was, {died_early} died before they began; "
        f"{saving} died in a save or a clean-up\n"
        f"weights and optimizer at step {newest_step}: {'equal' if equal else 'NOT EQUAL'}, bit for bit, to the "
        f"uninterrupted run's\npython {platform.python_version()}, torch {torch.__version__}, seed 1337"
    )
    shutil.rmtree(folder)
    sys.exit(0 if equal and resumed + died_early == kills else 1)


if __name__ == "__main__":
    main()
