#!/bin/sh
# GPT-2 medium on OpenWebText: 24 layers, then Inheritune with 12, 14, ... of them until they match (the paper: 16).
#
#   sh runs/gpt2-medium.sh                    # on 8 GPUs
#   GPUS=1 sh runs/gpt2-medium.sh             # 1, 2, 4 or 8
#   sh runs/gpt2-medium.sh --micro_batch=1    # if memory does not suffice; options go to inheritune.py
#
# You can interrupt it. Rerun it to resume: complete stages are skipped. Any error ends it.
#
# ESTIMATED, not measured: nothing here was run on such hardware. Hours of one GPU = FLOPs / (40% of its bf16 peak:
# H100 989e12 a second, A100 312e12); FLOPs = model.py's flops_per_token x 393,216 tokens x steps.
#
#   model                          layers    steps  FLOPs a token     FLOPs   H100 h   A100 h
#   reference                          24   100000       2.42e+09  9.53e+19     66.9    212.1
#   inherited, round 1                 12   100000       1.37e+09  5.37e+19     37.7    119.6
#   inherited, round 2                 14   100000       1.54e+09  6.06e+19     42.6    135.0
#   inherited, round 3                 16   100000       1.72e+09  6.76e+19     47.4    150.4
#   random                             16   100000       1.72e+09  6.76e+19     47.4    150.4
#   random, twice the steps            16   200000       1.72e+09  1.35e+20     94.9    300.8
#   half width                         24   100000       7.59e+08  2.98e+19     20.9     66.4
#   half of the target                  8   100000       1.01e+09  3.99e+19     28.0     88.7
#   stacking                           16   100000       1.72e+09  6.76e+19     47.4    150.4
#   hybrid stacking                    16   100000       1.72e+09  6.76e+19     47.4    150.4
#   attention and its norm             16   100000       1.72e+09  6.76e+19     47.4    150.4
#   MLP and its norm                   16   100000       1.72e+09  6.76e+19     47.4    150.4
#   attention and MLP, no norms        16   100000       1.72e+09  6.76e+19     47.4    150.4
#   first half                         12    10000       1.37e+09  5.37e+18      3.8     12.0
#   lazy layers                        12    10000       1.37e+09  5.37e+18      3.8     12.0
#   random, half                       12    10000       1.37e+09  5.37e+18      3.8     12.0
#   lazy layers in place               24   100000       2.42e+09  9.53e+19     66.9    212.1
#   distilled, random                  16    50000       2.53e+09  4.97e+19     34.9    110.5
#   distilled, inherited               16    50000       2.53e+09  4.97e+19     34.9    110.5
#   distilled, every other layer       16    50000       2.53e+09  4.97e+19     34.9    110.5
#   reference, trained on              24   100000       2.42e+09  9.53e+19     66.9    212.1
#   all of it                                                     1.24e+21    873.0   2766.9
#
# That is 109 hours on 8 H100 or 346 on 8 A100. Each round past 16 layers adds about 47 H100 hours.
# On top: validation, which on OpenWebText's 4.4 million tokens every 1,000 steps adds 3%, the preparation of the
# data, and lm_eval on one GPU.
# Memory, estimated: 20 bytes a parameter (weights, gradients and their buckets, two moments) = 7 GB, and activations:
# 40 or 80 GB should do.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # what `make demo` has installed, if it was run

python prepare_data.py openwebtext --tokenizer=gpt2 --out=data/openwebtext
torchrun --standalone --nproc_per_node="${GPUS:-8}" inheritune.py config/gpt2-medium.toml "$@"
sh runs/evaluate.sh out/gpt2-medium
