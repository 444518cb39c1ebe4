"""configurator.py: defaults < preset < options, each typed."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, fields
from typing import Literal

import pytest
import torch
from conftest import ROOT

from plumbing import configurator, processes
from plumbing.configurator import UserError


@dataclass
class Settings:
    """Settings of a test."""

    lr: float = 0.5
    steps: int = 10
    n_layer: int | None = None
    fast: bool = False
    mode: Literal["auto", True, False] = "auto"
    names: list[str] = field(default_factory=list)
    out_dir: str = configurator.may_change("out")


def load(tmp_path, preset: str | None, *options) -> Settings:
    argv = list(options)
    if preset is not None:
        (tmp_path / "preset.toml").write_text(preset)
        argv.insert(0, str(tmp_path / "preset.toml"))
    return configurator.load(Settings, argv)


def test_an_option_beats_the_preset_and_the_preset_the_default(tmp_path):
    assert load(tmp_path, None) == Settings()
    assert load(tmp_path, "lr = 1\nsteps = 20\nfast = true") == Settings(lr=1, steps=20, fast=True)
    assert load(tmp_path, "lr = 1\nsteps = 20", "--steps=30", "--n-layer", "4") == Settings(lr=1, steps=30, n_layer=4)


def test_nanogpt_s_habits_work(tmp_path):
    assert load(tmp_path, None, "--lr=0", "--fast=True", "--mode=False") == Settings(lr=0, fast=True, mode=False)
    assert load(tmp_path, "mode = true", "--fast") == Settings(mode=True, fast=True)
    assert load(tmp_path, None, "--fast", "--steps=3") == Settings(fast=True, steps=3)


def test_a_table_of_a_preset_belongs_to_the_script_of_its_name(tmp_path, monkeypatch):
    preset = "lr = 1\n[inheritune]\nsteps = 7\n[train]\nsteps = 8"
    for script, steps in (("inheritune.py", 7), ("train.py", 8), ("sample.py", 10)):
        monkeypatch.setattr("sys.argv", [script])
        assert load(tmp_path, preset) == Settings(lr=1, steps=steps)


@pytest.mark.parametrize(
    "preset,options,words",
    [
        ("[inheritunee]\nsteps = 7", [], "unknown key 'inheritunee'; did you mean 'inheritune'?"),
        ("stepz = 3", [], "unknown key 'stepz'; did you mean 'steps'?"),
        ("steps = ", [], "not a readable preset"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, preset, options, words):
    with pytest.raises(UserError) as caught:
        load(tmp_path, preset, *options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", ["steps = 1.5", 'lr = "fast"', "fast = 3"])
@pytest.mark.parametrize("options", [[], ["--stepz=3"], ["--steps=three"], ["--fast=perhaps"], ["stray"]])
def test_what_does_not_fit_its_type_or_is_unknown_ends_with_2_and_names_it(tmp_path, capsys, preset, options):
    with pytest.raises(SystemExit) as caught:
        load(tmp_path, None if options else preset, *options)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and (options[0].split("=")[0] if options else preset.split()[0]) in error


def test_a_list_of_a_preset_may_hold_commas_and_an_option_replaces_it(tmp_path):
    preset = 'names = ["random", "random, twice the steps"]'
    assert load(tmp_path, preset).names == ["random", "random, twice the steps"]
    assert load(tmp_path, preset, "--names", "a", "b").names == ["a", "b"]


def test_a_field_says_that_it_may_change_on_resume():
    assert [f.name for f in fields(Settings) if f.metadata.get("may_change")] == ["out_dir"]


def test_help_lists_every_setting(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        load(tmp_path, None, "--help")
    assert caught.value.code == 0 and "--n_layer" in capsys.readouterr().out


@pytest.mark.parametrize("code", [1, 2])
def test_a_user_error_ends_as_one_line_with_its_exit_code(capsys, code):
    def main():
        raise UserError("found x, expected y", exit_code=code)

    with pytest.raises(SystemExit) as caught:
        configurator.run(main)
    assert caught.value.code == code and capsys.readouterr().err == "error: found x, expected y\n"


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        configurator.run(lambda: 1 / 0)


def test_a_reader_that_leaves_early_ends_a_script_without_a_word():
    code = "from plumbing import configurator; configurator.run(lambda: print('line ' * 100_000))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(4) == b"line"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_an_empty_kernel_in_the_compiler_s_cache_is_one_line_with_what_to_do(tmp_path):
    """A kill while a kernel is compiled leaves an empty one in the cache, which then fails at every start."""
    code = "import torch; from plumbing import configurator; configurator.run(lambda: torch.compile(torch.sin)(torch.zeros(99)))"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = {"args": [sys.executable, "-c", code], "cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    assert subprocess.run(**command).returncode == 0
    (kernel,) = tmp_path.rglob("*.main.so")
    kernel.write_bytes(b"")
    again = subprocess.run(**command)
    assert again.returncode == 1 and again.stderr.count("\n") == 1, again.stderr
    assert "--compile=False, or remove TORCHINDUCTOR_CACHE_DIR" in again.stderr


def test_an_import_that_fails_is_a_mistake_of_ours_unless_it_is_of_a_kernel(capsys):
    def load(message):  # what torch lets through where a kernel was compiled by an earlier process
        raise ImportError(message)

    with pytest.raises(SystemExit) as stopped:
        configurator.run(lambda: load("/cache/x.main.so: file too short"))
    assert stopped.value.code == 1 and "remove TORCHINDUCTOR_CACHE_DIR" in capsys.readouterr().err
    with pytest.raises(ImportError):
        configurator.run(lambda: load("no module named x"))


def test_out_of_memory_is_one_line_with_what_to_do(capsys):
    with pytest.raises(SystemExit) as stopped:
        configurator.run(lambda: torch.empty(10**15))
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.count("\n") == 1 and "; lower --micro_batch" in error


def test_a_terminal_without_utf8_prints_a_question_mark():
    code = "from plumbing import configurator; configurator.run(lambda: print('1 ± 2'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment) == b"1 ? 2\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_printing_to_a_full_disk_ends_no_run(tmp_path, unbuffered):
    """What say() cannot print is lost. The script works to its end."""
    code = f"""
from pathlib import Path
from plumbing import configurator
def main():
    for _ in range(100):
        configurator.say("x" * 999)
    Path({str(tmp_path / "saved")!r}).touch()
configurator.run(main)"""
    with open("/dev/full", "w") as full:
        how = {"env": os.environ | {"PYTHONUNBUFFERED": unbuffered}, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, **how)
    assert (tmp_path / "saved").exists() and done.returncode in (0, 1)  # 120: Python's own flush failed
    assert done.stderr in ("", "error: the output: No space left on device\n")


def test_what_was_printed_before_a_full_disk_is_not_lost():
    """A redirected output is buffered: the table of an analysis must reach it although its files cannot be written."""
    code = """
from plumbing import configurator
def main():
    print("the table")
    raise OSError(28, "No space left on device", "report.md")
configurator.run(main)"""
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "the table\n")
    assert done.stderr == "error: report.md: No space left on device\n"


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_a_number_that_is_not_finite_is_refused(tmp_path, value):
    with pytest.raises(UserError, match=f"lr is {value}, expected a finite number"):
        load(tmp_path, "", f"--lr={value}")


def test_a_rank_without_a_world_size_is_no_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.rank_and_world_size() == (0, 1)


def test_a_switch_that_may_be_unset_can_stand_alone_too():
    """Model options are "bool | None"."""
    from train import TrainConfig

    config = configurator.load(TrainConfig, ["--bias", "--track_rank", "--max_steps=3000"])
    assert config.bias is True and config.track_rank is True
