#!/bin/sh
# GPT-2 medium on OpenWebText: 24 layers, then Inheritune with 12, 14, ... of them until they match (the paper: 16).
#
#   sh runs/gpt2-medium.sh                    # on 8 GPUs
#   GPUS=1 sh runs/gpt2-medium.sh             # 1, 2, 4 or 8; with --micro_batch=8 also 3
#   sh runs/gpt2-medium.sh --micro_batch=1    # if memory does not suffice; options go to inheritune.py
#
# You can interrupt it. Rerun it to resume: complete stages are skipped. Any error ends it.
#
# ESTIMATED, not measured: nothing here was run on such hardware. Hours of one GPU = FLOPs / (40% of its bf16 peak:
# H100 989e12 a second, A100 312e12); FLOPs = model.py's flops_per_token x 49,152 tokens x steps.
#
#   model                         layers    steps  FLOPs a token     FLOPs   H100 h   A100 h
#   reference                         24   100000       2.42e+09  1.19e+19      8.4     26.5
#   inherited, round 1                12   100000       1.37e+09  6.71e+18      4.7     14.9
#   inherited, round 2                14   100000       1.54e+09  7.58e+18      5.3     16.9
#   inherited, round 3                16   100000       1.72e+09  8.45e+18      5.9     18.8
#   random                            16   100000       1.72e+09  8.45e+18      5.9     18.8
#   random, twice the steps           16   200000       1.72e+09  1.69e+19     11.9     37.6
#   half of the target                 8   100000       1.01e+09  4.98e+18      3.5     11.1
#   stacking                          16   100000       1.72e+09  8.45e+18      5.9     18.8
#   quarter of the target              4   100000       6.61e+08  3.25e+18      2.3      7.2
#   quarter, stacked                   8   100000       1.01e+09  4.98e+18      3.5     11.1
#   stacking, two rounds              16   100000       1.72e+09  8.45e+18      5.9     18.8
#   hybrid stacking                   16   100000       1.72e+09  8.45e+18      5.9     18.8
#   attention and its norm            16   100000       1.72e+09  8.45e+18      5.9     18.8
#   MLP and its norm                  16   100000       1.72e+09  8.45e+18      5.9     18.8
#   attention and MLP, no norms       16   100000       1.72e+09  8.45e+18      5.9     18.8
#   first half                        12   100000       1.37e+09  6.71e+18      4.7     14.9
#   lazy layers                       12   100000       1.37e+09  6.71e+18      4.7     14.9
#   random, half                      12   100000       1.37e+09  6.71e+18      4.7     14.9
#   distilled, random                 16    50000       2.53e+09  6.21e+18      4.4     13.8
#   distilled, inherited              16    50000       2.53e+09  6.21e+18      4.4     13.8
#   distilled, every other layer      16    50000       2.53e+09  6.21e+18      4.4     13.8
#   reference, trained on             24   100000       2.42e+09  1.19e+19      8.4     26.5
#   all of it                                                     1.75e+20    122.6    388.5
#
# That is 15 hours on 8 H100 or 49 on 8 A100. Each round past 16 layers adds about 7 H100 hours.
# On top: validation, which on OpenWebText's 4.4 million tokens every 1,000 steps adds 3%, the preparation of the
# data, and lm_eval on one GPU.
# Memory, estimated: 20 bytes a parameter (weights, gradients and their buckets, two moments) = 7 GB, and activations:
# 40 or 80 GB should do.
set -eu
cd "$(dirname "$0")/.."

python prepare_data.py openwebtext --tokenizer=gpt2 --out=data/openwebtext
torchrun --standalone --nproc_per_node="${GPUS:-8}" inheritune.py config/gpt2-medium.toml "$@"
sh runs/evaluate.sh out/gpt2-medium
