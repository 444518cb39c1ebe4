#!/bin/sh
# GPT-2 medium on FineWeb-Edu: 24 layers, then Inheritune with 16 of them.
#
#   sh runs/fineweb-gpt2-medium.sh                    # on 4 GPUs
#   GPUS=1 sh runs/fineweb-gpt2-medium.sh             # 1, 2, 3 or 4
#   sh runs/fineweb-gpt2-medium.sh --micro_batch=1    # if memory does not suffice; options go to inheritune.py
#
# You can interrupt it. Rerun it to resume: complete stages are skipped. Any error ends it.
#
# ESTIMATED, not measured: nothing here was run on such hardware. Hours of one GPU = FLOPs / (40% of its bf16 peak:
# H100 989e12 a second, A100 312e12); FLOPs = model.py's flops_per_token x 61,440 tokens x steps.
#
#   model                     layers    steps  FLOPs a token     FLOPs   H100 h   A100 h
#   reference                     24   100000       2.42e+09  1.49e+19     10.5     33.1
#   inherited                     16   100000       1.72e+09  1.06e+19      7.4     23.5
#   random                        16   100000       1.72e+09  1.06e+19      7.4     23.5
#   random, twice the steps       16   200000       1.72e+09  2.11e+19     14.8     47.0
#   all of it                                                5.71e+19     40.1    127.1
#
# That is 10 hours on 4 H100 or 32 on 4 A100. Each further round adds at least 7 H100 hours.
# On top: validation every 1,000 steps (1% for each 1.8 million tokens of val.bin), the preparation of the data, and
# lm_eval on one GPU.
# Memory, estimated: 20 bytes a parameter (weights, gradients and their buckets, two moments) = 7 GB, and activations:
# 40 or 80 GB should do.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # what `make demo` has installed, if it was run

python prepare_data.py fineweb-edu --tokenizer=gpt2 --out=data/fineweb-edu
torchrun --standalone --nproc_per_node="${GPUS:-4}" inheritune.py config/fineweb-gpt2-medium.toml "$@"
sh runs/evaluate.sh out/fineweb-gpt2-medium
