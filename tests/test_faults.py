"""What a running process has to survive: kills, signals, full disks, neighbours. Real processes throughout."""

import contextlib
import errno
import functools
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, call_script, options, random_model, read_metrics, run_script
from safetensors.torch import load_file, save_file
from test_structure import VERBS
from test_train import distance, equal, losses, run

import data
import train
from plumbing import checkpoint, configurator, processes, resume, storage
from plumbing.configurator import UserError


def start(data_dir, out_dir, *extra, processes=1, **changes) -> subprocess.Popen:
    """A training run that takes a while, as a process of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    settings = TINY | {"max_steps": 100_000, "save_interval": 50, "eval_interval": 50, "keep_checkpoints": 2} | changes
    settings |= {"data_dir": data_dir, "out_dir": out_dir, "resume": "auto"}
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *options(**settings), *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@contextlib.contextmanager
def running(*arguments, **changes):
    process = start(*arguments, **changes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def steps_made(run_dir) -> int:
    """The step of the newest checkpoint in place."""
    return max((int(path.name.removeprefix("step-")) for path in storage.steps(run_dir)), default=0)


# ---- kills (RELIABILITY 1, 25)


def test_kills_at_any_moment_leave_a_run_that_ends_at_the_same_bits(data_dir, tmp_path):
    """Three SIGKILLs at random moments of a run that saves every step; tests/faults.py does 200."""
    settings = {"max_steps": 200, "save_interval": 1, "eval_interval": 100, "keep_checkpoints": 2}
    expected = run(data_dir, tmp_path / "straight", **settings)
    moments, newest = random.Random(0), 0
    for _ in range(3):
        with running(data_dir, tmp_path / "killed", **settings) as process:
            wait_for(lambda before=newest: process.poll() is not None or steps_made(tmp_path / "killed") > before)
            time.sleep(moments.uniform(0, 0.05))  # so that it dies while it trains and saves
            process.send_signal(signal.SIGKILL)
            process.wait()
        newest = steps_made(tmp_path / "killed")
    assert newest < 200
    assert equal(run(data_dir, tmp_path / "killed", resume="auto", **settings), expected)
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert not list((tmp_path / "killed").glob(".tmp-*"))


def test_a_fault_at_every_file_operation_of_a_save_leaves_the_old_checkpoint_and_no_new_one(tmp_path, monkeypatch):
    """Dies at the 1st, 2nd, ... open, fsync and rename, as if the process were gone: no clean-up runs either."""

    class Gone(BaseException):
        pass

    from conftest import random_model

    countdown = [0]

    def dying(function):
        def call(*arguments, **options):
            countdown[0] -= 1
            if countdown[0] == 0:
                monkeypatch.setattr(storage.shutil, "rmtree", lambda *_, **__: None)
                raise Gone
            return function(*arguments, **options)

        return call

    checkpoint.save(tmp_path / "step-00000001", random_model(n_layer=1), "bytes", 0)
    rmtree, survived = shutil.rmtree, 0
    for name in ("fsync", "rename"):
        monkeypatch.setattr(storage.os, name, dying(getattr(os, name)))
    monkeypatch.setattr(storage, "write_json", dying(storage.write_json))
    monkeypatch.setattr(checkpoint, "save_file", dying(checkpoint.save_file))
    for point in range(1, 30):
        countdown[0] = point
        try:
            checkpoint.save(tmp_path / "step-00000002", random_model(n_layer=1), "bytes", 0, files={"x.json": {}})
        except Gone:
            survived += 1
        monkeypatch.setattr(storage.shutil, "rmtree", rmtree)
        newest = storage.latest(tmp_path)
        if newest.name == "step-00000002":
            storage.verify(newest)
            break
        assert newest.name == "step-00000001"
        with storage.lock(tmp_path):  # the next process clears away what is half-written
            assert {p.name for p in tmp_path.iterdir()} == {"step-00000001", ".lock"}
    assert newest.name == "step-00000002" and survived >= 7


def test_files_reach_the_disk_before_the_manifest_and_the_manifest_before_the_name(tmp_path, monkeypatch):
    from conftest import random_model

    events = []
    fsync, rename, write_json = storage.fsync, os.rename, storage.write_json
    monkeypatch.setattr(storage, "fsync", lambda path: events.append(("fsync", path.name)) or fsync(path))
    monkeypatch.setattr(storage.os, "rename", lambda a, b: events.append(("rename", b.name)) or rename(a, b))
    monkeypatch.setattr(storage, "write_json", lambda p, v: events.append(("write", p.name)) or write_json(p, v))
    checkpoint.save(tmp_path / "step-00000001", random_model(n_layer=1), "bytes", 0)
    manifest = events.index(("write", "manifest.json"))
    files = {path.name for path in (tmp_path / "step-00000001").iterdir()} - {"manifest.json"}
    assert {name for kind, name in events[:manifest] if kind == "fsync"} >= files and len(files) == 2
    partial = ".tmp-step-00000001"
    expected = [("fsync", partial), ("rename", "step-00000001"), ("fsync", tmp_path.name)]
    assert events[manifest + 1 :] == [("fsync", f".manifest.json.{os.getpid()}.partial"), *expected]


def test_only_our_own_leftovers_are_cleared_away(tmp_path):
    ours = [".tmp-step-00000003", ".tmp-step-00000001-77-88"]  # the second is of an older version
    foreign = [".tmp-mine", ".trash-can", "notes", "step-3"]
    for name in ours + foreign:
        (tmp_path / name).mkdir()
    with storage.lock(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", *foreign}


# ---- disks (2, 4, 42)


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_was_there(data_dir, tmp_path):
    path = run(data_dir, tmp_path / "run", max_steps=10)
    size = (path / "model.safetensors").stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    settings = TINY | {"data_dir": data_dir, "out_dir": tmp_path / "run", "resume": True, "override": "max_steps"}
    command = [sys.executable, str(ROOT / "train.py"), *options(**settings)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and os.strerror(errno.EFBIG) in error[0] and "step-00000020 was not written" in error[0]
    assert storage.latest(tmp_path / "run") == path and not list((tmp_path / "run").glob(".tmp-*"))


# ---- signals (57, 58, 59)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])  # TERM and HUP: with torchrun, below
def test_a_signal_saves_and_stops_and_the_run_goes_on_to_the_same_bits(data_dir, tmp_path, number):
    with running(data_dir, tmp_path / "run", save_interval=100_000, eval_interval=100_000) as process:
        wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(read_metrics(tmp_path / "run")) > 5)
        process.send_signal(number)
        error = process.communicate(timeout=30)[1]
    saved = storage.latest(tmp_path / "run")
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; saved {saved}" in error and "Traceback" not in error and "error:" not in error
    step = int(saved.name[5:])
    changes = {"max_steps": step + 5, "override": "max_steps", "lr": 1e-3, "min_lr": 1e-3}  # a constant rate
    resumed = run(data_dir, tmp_path / "run", resume=True, **changes | {"override": "max_steps,lr,min_lr"})
    assert int(resumed.name[5:]) == step + 5


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux's /proc shows that a library is being loaded")
@pytest.mark.parametrize("script", sorted(VERBS - {"minimal"}))
def test_ctrl_c_while_libraries_are_loaded_prints_no_traceback(script):
    heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # the background of a shell ignores it
    command = [sys.executable, ROOT / f"{script}.py", "--help"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeded)
    library = "numpy" if script == "prepare_data" else "libtorch"  # which prepare_data.py does without
    wait_for(lambda: library in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 130


def test_the_last_evaluation_is_finished_before_a_stop(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "stop_requested", lambda: signal.SIGTERM if calls and calls[-1] == 20 else 0)
    rate, calls = train.learning_rate, []
    monkeypatch.setattr(train, "learning_rate", lambda config, step: calls.append(step + 1) or rate(config, step))
    with pytest.raises(UserError, match="stopped by SIGTERM; saved .*step-00000020"):
        run(data_dir, tmp_path / "run")
    monkeypatch.undo()
    assert (storage.latest(tmp_path / "run") / "val_losses.json").exists()
    assert run(data_dir, tmp_path / "run", resume=True).name == "step-00000020"


def test_a_signal_during_a_save_lets_it_finish(data_dir, tmp_path):
    """A child whose writer sends itself SIGTERM in the middle of a file."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from plumbing import checkpoint, configurator
write = checkpoint.save_file
def interrupted(tensors, path, metadata):
    os.kill(os.getpid(), signal.SIGTERM)
    write(tensors, path, metadata)
checkpoint.save_file = interrupted
configurator.run(train.main)
"""
    settings = options(**TINY, data_dir=data_dir, out_dir=tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", code, *settings], capture_output=True, text=True, timeout=60)
    # the optimizer's file brings a second signal, which ends the process at once
    assert done.returncode == -signal.SIGTERM and storage.latest(tmp_path / "run") is None
    once = code.replace("    os.kill", "    if path.name == 'model.safetensors' and '00010' in str(path): os.kill")
    again = [sys.executable, "-c", once, *settings, "--resume=auto"]
    done = subprocess.run(again, capture_output=True, text=True, timeout=60)
    assert done.returncode == 143, done.stderr
    assert [p.name for p in storage.steps(tmp_path / "run")] == ["step-00000010", "step-00000011"]
    storage.verify(tmp_path / "run" / "step-00000010")


def test_sigterm_to_torchrun_saves_one_common_step(data_dir, tmp_path):
    with running(data_dir, tmp_path / "run", processes=2, micro_batch=2, save_interval=100_000) as process:
        wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(read_metrics(tmp_path / "run")) > 5)
        process.send_signal(signal.SIGTERM)
        t0 = time.monotonic()
        error = process.communicate(timeout=60)[1]
    assert time.monotonic() - t0 < 30 and process.returncode != 0
    saved = storage.steps(tmp_path / "run")
    assert len(saved) == 1 and f"stopped by SIGTERM; saved {saved[0]}" in error
    storage.verify(saved[0])


# ---- neighbours (60, 61)


def test_each_of_two_processes_on_a_directory_in_use_says_so(data_dir, tmp_path):
    settings = options(**TINY, data_dir=data_dir, out_dir=tmp_path / "run")
    with storage.lock(tmp_path / "run"):
        done = run_script("train.py", *settings, processes=2)
    assert done.returncode and done.stderr.count("error: ") == done.stderr.count("is in use by another process") == 2


def test_a_second_process_on_the_same_out_dir_is_refused_until_the_first_is_gone(data_dir, tmp_path):
    with running(data_dir, tmp_path / "run") as process:
        wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
        with pytest.raises(UserError, match="is in use by another process"):
            run(data_dir, tmp_path / "run", resume="auto")
        process.kill()
        process.wait()
        settings = {"resume": "auto", "max_steps": 100_000}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes, "stop_signal", int(signal.SIGTERM))
            with pytest.raises(UserError, match="stopped by SIGTERM"):
                run(data_dir, tmp_path / "run", **settings)


def test_a_rank_that_fails_ends_all_of_them_and_says_why(data_dir, tmp_path):
    """Rank 1 alone finds a gradient that is not finite: its NaN reaches every rank, and no update is made."""
    script = tmp_path / "poisoned.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from plumbing import configurator
calls = []
forward = train.GPT.forward
def poisoned(self, idx, targets=None, reduction="mean"):
    loss = forward(self, idx, targets, reduction)
    calls.append(self.training)
    return loss * float("nan") if os.environ["RANK"] == "1" and sum(calls) == 3 else loss
train.GPT.forward = poisoned
configurator.run(train.main)
""")
    settings = TINY | {"data_dir": data_dir, "out_dir": tmp_path / "run", "save_interval": 1, "micro_batch": 4}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, script, *options(**settings)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "error: step 2: non-finite gradient norm" in done.stderr
    assert "last good checkpoint: " + str(tmp_path / "run" / "step-00000002") in done.stderr
    assert storage.latest(tmp_path / "run").name == "step-00000002"


def test_one_process_goes_on_where_two_stopped_and_back(data_dir, tmp_path):
    changes = {"dtype": "float64", "micro_batch": 2, "max_steps": 12, "save_interval": 4, "keep_checkpoints": 9}
    straight = run(data_dir, tmp_path / "straight", **changes)
    settings = TINY | changes | {"data_dir": data_dir, "out_dir": tmp_path / "run", "resume": "auto"}
    run(data_dir, tmp_path / "run", **changes)
    for last in (4, 8):
        for path in storage.steps(tmp_path / "run"):
            if int(path.name[5:]) > last:
                shutil.rmtree(path)
        if last == 4:  # 1 process to 4, 2 processes to 12
            done = run_script("train.py", *options(**settings), processes=2)
            assert done.returncode == 0, done.stderr
            assert distance(storage.latest(tmp_path / "run"), straight) < 1e-12
        else:  # 2 processes to 8, 1 process to 12
            assert distance(run(data_dir, tmp_path / "run", resume=True, **changes), straight) < 1e-12


# ---- tokenizers, pickles, the hub


@contextlib.contextmanager
def proxy_that_answers(answer: bytes):
    """The port of a server that gives this answer to whatever it is asked, and what it was asked."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):  # closed at the end
                while True:
                    with server.accept()[0] as connection:
                        asked.append(connection.recv(4096))
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1], asked


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 404 Not Found\r\n\r\n", b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", b"garbage\r\n\r\n", b""],
    ids=["404", "407", "garbage", "closes"],
)
@pytest.mark.parametrize("what", ["model", "corpus"])
def test_a_proxy_without_a_way_to_the_hub_is_one_line(answer, what, tmp_path):
    code = "from plumbing import configurator, model_files; configurator.run(lambda: model_files.resolve('nobody/nothing'))"
    command = {"model": ["-c", code], "corpus": ["prepare_data.py", "fineweb-edu", "--tokenizer=bytes", f"--out={tmp_path}/out"]}
    with proxy_that_answers(answer) as (port, asked):
        environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        environment |= {"HTTPS_PROXY": f"http://127.0.0.1:{port}", "NO_PROXY": ""}
        done = subprocess.run([sys.executable, *command[what]], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert asked and all(request.startswith(b"CONNECT ") for request in asked)  # it did go through the proxy


def test_a_tokenizer_that_cannot_be_reached_names_the_remedy(data_dir, tmp_path):
    environment = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    arguments = ["files", str(data_dir.parent / "corpus.jsonl"), "--tokenizer=gpt2", f"--out={tmp_path / 'out'}"]
    command = [sys.executable, str(ROOT / "prepare_data.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "TIKTOKEN_CACHE_DIR" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_refused_and_its_code_does_not_run(data_dir, tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Payload(), tmp_path / "model.pt")
    assert call_script(train, f"--init_from={tmp_path / 'model.pt'}", f"--data_dir={data_dir}") == 2
    assert "pickles are not loaded" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_ranks_stop_and_save_when_torchrun_itself_is_killed(data_dir, tmp_path):
    launcher = start(data_dir, tmp_path / "run", processes=2, save_interval=100_000, micro_batch=4)
    wait_for(lambda: len(read_metrics(tmp_path / "run")) > 3)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: storage.steps(tmp_path / "run"))
    assert len(storage.steps(tmp_path / "run")) == 1


@pytest.mark.parametrize("owner,name", [(storage, "sha256_of"), (Path, "read_text")])
def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, capsys, owner, name):
    checkpoint.save(tmp_path / "step-00000001", random_model(n_layer=1), "bytes", 0)

    def failing(path, **_):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(owner, name, failing)
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as stop:
        configurator.run(lambda: resume.to_resume(tmp_path, True))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "Input/output error" in error
    assert (tmp_path / "step-00000001").exists()


def test_weights_that_are_not_finite_are_named_where_they_enter(tmp_path, data_dir):
    model = random_model(n_layer=1, vocab_size=257, dtype=torch.float32)
    checkpoint.save(tmp_path / "model", model, "bytes", 0)
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["transformer.ln_f.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "model/model.safetensors")
    (tmp_path / "model/manifest.json").unlink()
    with pytest.raises(UserError, match="ln_f.weight holds values that are not finite"):
        checkpoint.open_model(str(tmp_path / "model"), data.read_meta(data_dir), torch.float32, {})


def test_a_value_that_json_cannot_hold_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="was not written: Out of range float") as caught:
        checkpoint.save(tmp_path / "a", random_model(n_layer=1), "bytes", 0, files={"x.json": {"loss": float("nan")}})
    assert caught.value.exit_code == 1 and not list(tmp_path.iterdir())
