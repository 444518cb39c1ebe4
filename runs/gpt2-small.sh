#!/bin/sh
# GPT-2 small on OpenWebText: 12 layers, then 4 of them from the beginning, middle and end (the paper, table 4).
#
#   sh runs/gpt2-small.sh                    # on 4 GPUs
#   GPUS=1 sh runs/gpt2-small.sh             # 1, 2 or 4
#   sh runs/gpt2-small.sh --micro_batch=1    # if memory does not suffice; options go to inheritune.py
#
# You can interrupt it. Rerun it to resume: complete stages are skipped. Any error ends it.
#
# ESTIMATED, not measured: nothing here was run on such hardware. Hours of one GPU = FLOPs / (40% of its bf16 peak:
# H100 989e12 a second, A100 312e12); FLOPs = model.py's flops_per_token x 49,152 tokens x steps.
#
#   model                     layers    steps  FLOPs a token     FLOPs   H100 h   A100 h
#   reference                     12   100000       8.55e+08  4.20e+18      2.9      9.4
#   inherited                      6   100000       5.43e+08  2.67e+18      1.9      5.9
#   first third                    4   100000       4.39e+08  2.16e+18      1.5      4.8
#   middle third                   4   100000       4.39e+08  2.16e+18      1.5      4.8
#   last third                     4   100000       4.39e+08  2.16e+18      1.5      4.8
#   random, third                  4   100000       4.39e+08  2.16e+18      1.5      4.8
#   random                         6   100000       5.43e+08  2.67e+18      1.9      5.9
#   random, twice the steps        6   200000       5.43e+08  5.34e+18      3.7     11.9
#   all of it                                                2.35e+19     16.5     52.4
#
# That is 4 hours on 4 H100 or 13 on 4 A100. Each further round adds at least 2 H100 hours.
# On top: validation, which on OpenWebText's 4.4 million tokens every 1,000 steps adds 3%, the preparation of the
# data, and lm_eval on one GPU.
# Memory, estimated: 20 bytes a parameter (weights, gradients and their buckets, two moments) = 2 GB, and
# activations: 80 GB should do.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # what `make demo` has installed, if it was run

python prepare_data.py openwebtext --tokenizer=gpt2 --out=data/openwebtext
torchrun --standalone --nproc_per_node="${GPUS:-4}" inheritune.py config/gpt2-small.toml "$@"
sh runs/evaluate.sh out/gpt2-small
