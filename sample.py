"""Write text with a model.

    python sample.py out/demo/reference --prompt="def main("
    python sample.py gpt2 --prompt="In 2026," --max_new_tokens=50 --top_k=40 --seed=1

It has no cache and is slow. For speed, transformers' generate() takes the same checkpoint directory.
"""

from dataclasses import dataclass

import torch
import tyro

from plumbing import checkpoint
from plumbing import configurator
import data
from plumbing import storage
from plumbing.configurator import UserError
from plumbing.machine import pick_device


@dataclass
class SampleConfig:
    """Continue a prompt with a GPT-2 checkpoint."""

    model: tyro.conf.Positional[str]  # a checkpoint, a run directory or a name on the hub
    prompt: str = ""  # empty: start from an end-of-text
    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = 200  # sample among the k likeliest tokens; None: among all
    seed: int = 1337
    device: str = "auto"


def main():
    config = configurator.load(SampleConfig)
    device, path = pick_device(config.device), storage.resolve(config.model)
    model = checkpoint.load_model(path).to(device)
    encoding = data.tokenizer(storage.read_json(path / "config.json").get("tokenizer", "gpt2"))
    ids = encoding.encode_ordinary(config.prompt) or [encoding.eot_token]
    if max(ids) >= model.config.vocab_size:
        raise UserError(f"token id {max(ids)} of the prompt >= vocab_size {model.config.vocab_size}")
    torch.manual_seed(config.seed % 2**63)
    idx = torch.tensor([ids], device=device)  # (1, T)
    try:
        idx = model.generate(idx, config.max_new_tokens, config.temperature, config.top_k)
    except ValueError as error:
        raise UserError(str(error)) from None
    # a padded vocabulary has ids that mean nothing
    print(encoding.decode([i for i in idx[0].tolist() if i < encoding.n_vocab]))


if __name__ == "__main__":
    configurator.run(main)
