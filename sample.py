"""Write text with a model. It has no cache: for speed, transformers' generate() takes the same checkpoint.

    python sample.py out/demo/reference --prompt="def main("
    python sample.py gpt2 --prompt="In 2026," --max_new_tokens=50 --top_k=40 --samples=3
"""

from plumbing import configurator  # isort: skip  # before the slow imports: a quiet Ctrl-C

import sys
from dataclasses import dataclass

import torch
import tyro

from plumbing import machine, model_files, pretrained, storage, tokenizers
from plumbing.configurator import UserError


@dataclass
class SampleConfig:
    """Continue a prompt with a model."""

    model: tyro.conf.Positional[str]  # a checkpoint, a run directory or a name on the hub
    prompt: str = ""  # empty: start from an end-of-text; -: read standard input
    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = 200  # sample among the k likeliest tokens; None: among all
    samples: int = 1
    seed: int = 1337
    device: str = "auto"


def main():
    config = configurator.load(SampleConfig)
    device, path = machine.pick_device(config.device), model_files.resolve(config.model)
    model = pretrained.load_model(path).to(device)
    table, has_own = storage.read_json(path / "config.json"), (path / "tokenizer.json").is_file()
    unnamed = "gpt2" if table.get("model_type") == "gpt2" and not has_own else path
    name = table.get("tokenizer", unnamed)
    encoding = tokenizers.tokenizer(name if name in tokenizers.KNOWN else path)
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    ids = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    torch.manual_seed(config.seed)
    idx = torch.tensor(ids, device=device).repeat(config.samples, 1)  # (samples, T)
    try:
        idx = model.generate(idx, config.max_new_tokens, config.temperature, config.top_k)
    except ValueError as error:
        raise UserError(str(error)) from None
    for row in idx.tolist():  # a padded vocabulary has ids that mean nothing
        print(encoding.decode([i for i in row if i < encoding.n_vocab]))


if __name__ == "__main__":
    configurator.run(main)
