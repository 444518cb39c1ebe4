"""sample.py: a prompt goes on, and no setting gives nonsense."""

import io

import pytest
from conftest import call_script

import sample


def test_a_prompt_is_continued_and_the_seed_decides_how(reference, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert call_script(sample, reference, "--prompt=def main", "--max_new_tokens=60", f"--seed={seed}") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def main") and texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "options", [["--prompt="], ["--prompt=" + "long " * 50], ["--temperature=0"], ["--top_k=1000"]]
)
def test_the_edges_give_text(reference, capsys, options):
    assert call_script(sample, reference, "--max_new_tokens=5", *options) == 0
    assert capsys.readouterr().out


def test_a_prompt_comes_from_standard_input_and_several_samples_are_written(reference, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("class Fish"))
    assert call_script(sample, reference, "--prompt=-", "--samples=2", "--max_new_tokens=5") == 0
    assert capsys.readouterr().out.count("class Fish") == 2


@pytest.mark.parametrize("options", [["--temperature=-1"], ["--top_k=0"]])
def test_an_impossible_setting_is_one_line(reference, capsys, options):
    assert call_script(sample, reference, *options) == 2
    assert "temperature >= 0, top_k >= 1" in capsys.readouterr().err
