"""lm-evaluation-harness, by its real command, scores a checkpoint as our own logits do. No network."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, random_model

import data
import train
from model import GPT
from plumbing import checkpoint, pretrained, tokenizers

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -r requirements-dev.txt")
pytestmark = pytest.mark.slow

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder: Path) -> list[dict]:
    """Forty questions, each with four short random answers; the last ones are longer than the model reads."""
    source = random.Random(0)
    words = [word for word in Path(data.__file__).read_text().split() if len(word) < 8]
    questions = [
        {"question": " ".join(source.choices(words, k=2 if i < 36 else 20)),
         "choices": [" ".join(source.choices(words, k=source.choice([1, 2]))) for _ in range(4)],
         "answer": source.randrange(4)}
        for i in range(40)
    ]  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "tiny.yaml").write_text(TASK.format(questions=folder / "questions.jsonl"))
    return questions


def lm_eval(path: Path, folder: Path) -> tuple[float, torch.Tensor]:
    """The accuracy and the log-likelihoods (questions, choices) that the command finds for a checkpoint."""
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={path}", "--tasks", "tiny",
        "--include_path", folder, "--device", "cpu", "--batch_size", "16", "--output_path", folder / "out",
        "--log_samples",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), env=os.environ | {"HF_HOME": str(folder / "hf")}, capture_output=True, text=True,
        timeout=600, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (results,), (samples,) = (folder.glob(f"out/*/{name}_*.json*") for name in ("results", "samples"))
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    likelihoods = [[float(likelihood) for likelihood, _ in line["filtered_resps"]] for line in lines]
    return json.loads(results.read_text())["results"]["tiny"]["acc,none"], torch.tensor(likelihoods)


@torch.no_grad()
def our_log_likelihoods(model, encoding, questions: list[dict]) -> torch.Tensor:
    """Sum of the log-probabilities of each choice's tokens after its question, cut on the left to fit the model."""
    rows = []
    for question in questions:
        start = encoding.encode_ordinary(question["question"])
        row = []
        for choice in question["choices"]:
            ids = start + encoding.encode_ordinary(" " + choice)
            ids = torch.tensor(ids[-(model.config.block_size + 1) :])
            n = len(encoding.encode_ordinary(" " + choice))
            log_probs = model(ids[None, :-1])[0].double().log_softmax(-1)  # (T, V)
            row.append(log_probs[-n:].gather(1, ids[-n:, None]).sum().item())
        rows.append(row)
    return torch.tensor(rows)


def accuracy(likelihoods: torch.Tensor, questions: list[dict]) -> float:
    answers = torch.tensor([question["answer"] for question in questions])
    return (likelihoods.argmax(1) == answers).double().mean().item()


def test_a_trained_checkpoint_has_the_accuracy_and_likelihoods_that_our_logits_give(data_dir, tmp_path):
    # large random weights before the training, or attention would be so even that its scale did not show
    start = random_model(
        std=0.5, vocab_size=257, block_size=32, dtype=torch.float32, scale_attn_by_inverse_layer_idx=True
    )
    checkpoint.save(tmp_path / "start", start, "bytes", 256)
    settings = TINY | {"n_layer": 3, "max_steps": 2, "lr": 1e-3, "init_from": str(tmp_path / "start")}
    path = train.train(train.TrainConfig(data_dir=str(data_dir), out_dir=str(tmp_path / "run"), **settings))
    questions, encoding, model = write_task(tmp_path), tokenizers.tokenizer("bytes"), pretrained.load_model(path)
    ours = our_log_likelihoods(model, encoding, questions)
    found_accuracy, found = lm_eval(path, tmp_path)
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-4)
    assert found_accuracy == pytest.approx(accuracy(ours, questions)) and 0 < found_accuracy < 1

    # controls that differ: the weights before the training, and without the layer scale (transformers before 5.4)
    unscaled = GPT(replace(model.config, scale_attn_by_inverse_layer_idx=False)).eval()
    unscaled.load_state_dict(model.state_dict())
    for control in (start, unscaled):
        differences = (our_log_likelihoods(control, encoding, questions) - found).abs()
        assert (differences.amax(1) > 1e-3).all() and differences.median() > 1e-2  # each question; 100 tolerances


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs TIKTOKEN_CACHE_DIR with GPT-2's files")
def test_a_padded_gpt2_vocabulary_is_scored_as_our_logits_score_it(tmp_path):
    tokenizers.write_files(tokenizers.tokenizer("gpt2"), tmp_path)
    model = random_model(vocab_size=50304, block_size=32, dtype=torch.float32, scale_attn_by_inverse_layer_idx=True)
    checkpoint.save(tmp_path / "padded", model, "gpt2", 50256, data_dir=tmp_path)
    questions = write_task(tmp_path)
    ours = our_log_likelihoods(model, tokenizers.tokenizer("gpt2"), questions)
    found_accuracy, found = lm_eval(tmp_path / "padded", tmp_path)
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-4)
    assert found_accuracy == pytest.approx(accuracy(ours, questions))


def test_the_documented_tasks_are_the_harness_s():
    """A name in one of its YAML files: to import the harness and to index its thousands of tasks takes long."""
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    known = set(re.findall(r"^task: (\S+)$", "".join(path.read_text() for path in folder.rglob("*.yaml")), re.MULTILINE))
    for file in (ROOT / "docs/reproduce.md", ROOT / "runs/evaluate.sh"):
        (tasks,) = re.findall(r"--tasks[ =](\S+)", file.read_text())
        assert len(tasks.split(",")) == 8 and set(tasks.split(",")) <= known
