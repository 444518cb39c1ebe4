#!/bin/sh
# GPT-2 XL on OpenWebText: 48 layers, then Inheritune with 24 of them.
#
#   sh runs/gpt2-xl.sh                    # on 8 GPUs
#   GPUS=1 sh runs/gpt2-xl.sh             # 1, 2, 4 or 8
#   sh runs/gpt2-xl.sh --micro_batch=1    # if memory does not suffice; options go to inheritune.py
#
# You can interrupt it. Rerun it to resume: complete stages are skipped. Any error ends it.
#
# ESTIMATED, not measured: nothing here was run on such hardware. Hours of one GPU = FLOPs / (40% of its bf16 peak:
# H100 989e12 a second, A100 312e12); FLOPs = model.py's flops_per_token x 131,072 tokens x steps.
#
#   model                     layers    steps  FLOPs a token     FLOPs   H100 h   A100 h
#   reference                     48   100000       1.03e+10  1.35e+20     94.6    299.7
#   inherited                     24   100000       5.38e+09  7.05e+19     49.5    156.9
#   random                        24   100000       5.38e+09  7.05e+19     49.5    156.9
#   random, twice the steps       24   200000       5.38e+09  1.41e+20     99.0    313.8
#   half of the target            12   100000       2.93e+09  3.84e+19     27.0     85.5
#   stacking                      24   100000       5.38e+09  7.05e+19     49.5    156.9
#   hybrid stacking               24   100000       5.38e+09  7.05e+19     49.5    156.9
#   all of it                                                5.96e+20    418.5   1326.7
#
# That is 52 hours on 8 H100 or 166 on 8 A100. Each further round adds at least 50 H100 hours.
# On top: validation, which on OpenWebText's 4.4 million tokens every 1,000 steps adds 3%, the preparation of the
# data, and lm_eval on one GPU.
# Memory, estimated: 20 bytes a parameter (weights, gradients and their buckets, two moments) = 31 GB, and
# activations: 80 GB should do.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # what `make demo` has installed, if it was run

python prepare_data.py openwebtext --tokenizer=gpt2 --out=data/openwebtext
torchrun --standalone --nproc_per_node="${GPUS:-8}" inheritune.py config/gpt2-xl.toml "$@"
sh runs/evaluate.sh out/gpt2-xl
