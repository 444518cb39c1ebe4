#!/bin/sh
# GPT-2 medium on OpenWebText for 200,000 steps: 24 layers, then Inheritune with 18 of them (the paper, G.4).
#
#   sh runs/gpt2-medium-200k.sh                    # on 8 GPUs
#   GPUS=1 sh runs/gpt2-medium-200k.sh             # 1, 2, 4 or 8
#   sh runs/gpt2-medium-200k.sh --micro_batch=1    # if memory does not suffice; options go to inheritune.py
#
# You can interrupt it. Rerun it to resume: complete stages are skipped. Any error ends it.
#
# ESTIMATED, not measured: nothing here was run on such hardware. Hours of one GPU = FLOPs / (40% of its bf16 peak:
# H100 989e12 a second, A100 312e12); FLOPs = model.py's flops_per_token x 49,152 tokens x steps.
#
#   model                     layers    steps  FLOPs a token     FLOPs   H100 h   A100 h
#   reference                     24   200000       2.42e+09  2.38e+19     16.7     53.0
#   inherited                     18   200000       1.89e+09  1.86e+19     13.1     41.5
#   random                        18   200000       1.89e+09  1.86e+19     13.1     41.5
#   random, twice the steps       18   400000       1.89e+09  3.72e+19     26.2     82.9
#   all of it                                                9.83e+19     69.0    218.8
#
# That is 9 hours on 8 H100 or 27 on 8 A100. Each further round adds at least 13 H100 hours.
# On top: validation, which on OpenWebText's 4.4 million tokens every 1,000 steps adds 3%, the preparation of the
# data, and lm_eval on one GPU.
# Memory, estimated: 20 bytes a parameter (weights, gradients and their buckets, two moments) = 7 GB, and
# activations: 80 GB should do.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # what `make demo` has installed, if it was run

python prepare_data.py openwebtext --tokenizer=gpt2 --out=data/openwebtext
torchrun --standalone --nproc_per_node="${GPUS:-8}" inheritune.py config/gpt2-medium-200k.toml "$@"
sh runs/evaluate.sh out/gpt2-medium-200k
