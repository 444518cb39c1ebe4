#!/bin/sh
# GPT-2 large on OpenWebText: 36 layers, then Inheritune with 18 of them.
#
#   sh runs/gpt2-large.sh                    # on 8 GPUs
#   GPUS=1 sh runs/gpt2-large.sh             # 1, 2, 4 or 8
#   sh runs/gpt2-large.sh --micro_batch=1    # if memory does not suffice; options go to inheritune.py
#
# You can interrupt it. Rerun it to resume: complete stages are skipped. Any error ends it.
#
# ESTIMATED, not measured: nothing here was run on such hardware. Hours of one GPU = FLOPs / (40% of its bf16 peak:
# H100 989e12 a second, A100 312e12); FLOPs = model.py's flops_per_token x 131,072 tokens x steps.
#
#   model                     layers    steps  FLOPs a token     FLOPs   H100 h   A100 h
#   reference                     36   100000       5.20e+09  6.81e+19     47.9    151.7
#   inherited                     18   100000       2.79e+09  3.66e+19     25.7     81.5
#   random                        18   100000       2.79e+09  3.66e+19     25.7     81.5
#   random, twice the steps       18   200000       2.79e+09  7.32e+19     51.4    163.0
#   half width                    36   100000       1.54e+09  2.02e+19     14.2     44.9
#   half of the target             9   100000       1.59e+09  2.08e+19     14.6     46.4
#   stacking                      18   100000       2.79e+09  3.66e+19     25.7     81.5
#   hybrid stacking               18   100000       2.79e+09  3.66e+19     25.7     81.5
#   first half                    18    10000       2.79e+09  3.66e+18      2.6      8.1
#   lazy layers                   18    10000       2.79e+09  3.66e+18      2.6      8.1
#   random, half                  18    10000       2.79e+09  3.66e+18      2.6      8.1
#   all of it                                                3.40e+20    238.6    756.2
#
# That is 30 hours on 8 H100 or 95 on 8 A100. Each further round adds at least 26 H100 hours.
# On top: validation, which on OpenWebText's 4.4 million tokens every 1,000 steps adds 3%, the preparation of the
# data, and lm_eval on one GPU.
# Memory, estimated: 20 bytes a parameter (weights, gradients and their buckets, two moments) = 15 GB, and
# activations: 80 GB should do.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # what `make demo` has installed, if it was run

python prepare_data.py openwebtext --tokenizer=gpt2 --out=data/openwebtext
torchrun --standalone --nproc_per_node="${GPUS:-8}" inheritune.py config/gpt2-large.toml "$@"
sh runs/evaluate.sh out/gpt2-large
