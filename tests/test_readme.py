"""The README's own commands, run as they stand but smaller; and what it says of the repository."""

import dataclasses
import importlib
import json
import re
import shlex

import pytest
from conftest import ROOT, TINY, options, run_script

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python ([^#\n]+?)\s*(?:#.*)?$", README, flags=re.MULTILINE)
SMALL = {"prepare_data.py": [], "analyze_attention.py": ["--sequences=2"], "sample.py": ["--max_new_tokens=5"]}
SMALL["train.py"] = SMALL["inheritune.py"] = options(**TINY | {"n_layer": 6, "max_steps": 2})


def small(command: str) -> list[str]:
    """The command with settings that make it quick; those that it has itself come later and win."""
    script, *arguments = shlex.split(command.replace("config/", f"{ROOT}/config/"))
    extra = SMALL.get(script, [])
    position = 1 if arguments[0].endswith(".toml") or script == "prepare_data.py" else 0
    return [script, *arguments[:position], *extra, *arguments[position:]]


def test_the_demo_s_commands_work_in_the_order_of_the_readme(tmp_path):
    """In an empty folder, with the preset and the scripts of this repository; what needs the hub is left out."""
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        if "gpt2" in command or "SmolLM2" in command:  # needs the hub
            continue
        done = run_script(*small(command), cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    assert (tmp_path / "out/demo/report.md").exists()


def documented_commands() -> list[tuple[str, str]]:
    """Every command that the README, a file's docstring or a preset shows: (script, the rest of the line)."""
    texts = [README, *(path.read_text().split('"""')[1] for path in ROOT.glob("*.py"))]
    texts += [path.read_text() for path in (ROOT / "config").glob("*.toml")]
    texts += [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    pattern = r"(?:python|--nproc_per_node=\d+) (\w+)\.py([^\n#`]*)"
    return sorted({(script, rest) for text in texts for script, rest in re.findall(pattern, text)})


@pytest.mark.parametrize("script,rest", documented_commands())
def test_every_option_and_preset_of_a_documented_command_exists(script, rest):
    if script == "minimal":  # has one option of its own, which tests/test_minimal.py uses
        return
    module = importlib.import_module(script)
    known = {
        field for cls in vars(module).values() if dataclasses.is_dataclass(cls) for field in cls.__dataclass_fields__
    }
    assert {option.replace("-", "_") for option in re.findall(r"--([\w-]+)", rest)} - {"help"} <= known
    assert all((ROOT / preset).exists() for preset in re.findall(r"config/\w+\.toml", rest))


def test_the_torchrun_commands_split_a_step_among_their_processes():
    found = re.findall(
        r"--nproc_per_node=(\d+) \w+\.py config/demo.toml([^\n#]*)",
        README + "".join(p.read_text() for p in ROOT.glob("*.py")),
    )
    assert len(found) >= 3
    for processes, rest in found:
        micro_batch = int(re.search(r"--micro_batch=(\d+)", rest)[1])
        assert 4096 % (int(processes) * micro_batch * 128) == 0


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:tests/|config/|results/)?[\w/]+\.\w+)(?:::?\w+)?`", README)))
)
def test_every_file_in_the_readme_exists(path):
    if path.split(".")[-1] in ("py", "toml", "md", "png"):
        assert (ROOT / path).exists()


FAULTS = (ROOT / "docs/faults.md").read_text()


@pytest.mark.parametrize(
    "row", [line for line in FAULTS.splitlines() if line.startswith("| ") and "| test |" not in line and "---" not in line]
)
def test_every_row_of_the_faults_names_a_test_that_exists(row):
    path, name = re.search(r"`(test_\w+\.py)::(test_\w+)` \|$", row).groups()
    assert f"\ndef {name}(" in (ROOT / "tests" / path).read_text()


@pytest.mark.parametrize("path,name", sorted(set(re.findall(r"`((?:tests/)?\w+\.py):(\w+)`", README))))
def test_every_function_in_the_readme_exists(path, name):
    assert re.search(rf"(def|class) {name}\b", (ROOT / path).read_text())


def test_the_readme_fits_its_budget():
    assert len(README.splitlines()) <= 120


PERFORMANCE = (ROOT / "docs/performance.md").read_text()
MUON = re.findall(r"^\| (adamw|muon) \| (\S+) \| (\S+) \|$", PERFORMANCE, flags=re.MULTILINE)


@pytest.mark.parametrize("optimizer,rate,loss", MUON)
def test_the_losses_of_both_optimizers_are_those_of_their_curves(optimizer, rate, loss):
    lines = (ROOT / f"results/muon/{optimizer}-{rate}.jsonl").read_text().splitlines()
    curve = [json.loads(line) for line in lines]
    assert curve[-1]["step"] == 400 and f"{curve[-1]['val_loss']:.4f}" == loss


def test_muon_reaches_adamw_s_best_loss_after_the_share_of_steps_that_is_claimed():
    best = min(float(loss) for optimizer, _, loss in MUON if optimizer == "adamw")
    lines = (ROOT / "results/muon/muon-8e-3.jsonl").read_text().splitlines()
    reached = next(line["step"] for line in map(json.loads, lines) if line["val_loss"] <= best)
    assert f"best final loss after {reached} of 400 steps" in PERFORMANCE


REPORT = (ROOT / "results/demo/report.md").read_text()


@pytest.mark.parametrize("number", re.findall(r"\d\.\d{4} ± \d\.\d{4}", README))
def test_the_demo_s_numbers_in_the_readme_are_those_of_its_report(number):
    assert number in REPORT
