"""Train a model some of whose layers have no attention, only their MLP: does a lazy layer need more?

    python runs/without_attention.py 8: config/study_cpu.toml --init_from=out/study_cpu/seed-1/reference \
        --seed=1 --out_dir=out/better/without-attention-8-11

For GPT-2 alone. The first argument lists the layers, as in inherit.py. The others are train.py's. The
attention weights of these layers stay in the checkpoint without effect, and train.py's FLOPs still count
them. The results are its validation losses: the checkpoint computes something else when it is loaded
without this script.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from inherit import parse_layers
from plumbing import checkpoint, configurator


def main():
    text, open_model = sys.argv.pop(1), checkpoint.open_model

    def open_without_attention(*arguments):
        model, lineage = open_model(*arguments)
        for layer in parse_layers(text, model.config.n_layer):
            attention = model.transformer.h[layer].attn
            attention.requires_grad_(False)  # no gradient reaches it
            attention.forward = torch.zeros_like
        return model, lineage

    checkpoint.open_model = open_without_attention
    train.main()


if __name__ == "__main__":
    configurator.run(main)
