#!/bin/sh
# The paper's "GPT-2 large" of 32 layers on FineWeb-Edu, then Inheritune with 16 of them.
#
#   sh runs/fineweb-gpt2-large-32.sh                    # on 4 GPUs
#   GPUS=1 sh runs/fineweb-gpt2-large-32.sh             # 1, 2, 3 or 4
#   sh runs/fineweb-gpt2-large-32.sh --micro_batch=1    # if memory does not suffice; options go to inheritune.py
#
# You can interrupt it. Rerun it to resume: complete stages are skipped. Any error ends it.
#
# ESTIMATED, not measured: nothing here was run on such hardware. Hours of one GPU = FLOPs / (40% of its bf16 peak:
# H100 989e12 a second, A100 312e12); FLOPs = model.py's flops_per_token x 61,440 tokens x steps.
#
#   model                     layers    steps  FLOPs a token     FLOPs   H100 h   A100 h
#   reference                     32   100000       4.66e+09  2.87e+19     20.1     63.8
#   inherited                     16   100000       2.53e+09  1.55e+19     10.9     34.5
#   random                        16   100000       2.53e+09  1.55e+19     10.9     34.5
#   random, twice the steps       16   200000       2.53e+09  3.10e+19     21.8     69.1
#   all of it                                                9.07e+19     63.7    201.9
#
# That is 16 hours on 4 H100 or 50 on 4 A100. Each further round adds at least 11 H100 hours.
# On top: validation every 1,000 steps (1% for each 1.8 million tokens of val.bin), the preparation of the data, and
# lm_eval on one GPU.
# Memory, estimated: 20 bytes a parameter (weights, gradients and their buckets, two moments) = 14 GB, and
# activations: 80 GB should do.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # what `make demo` has installed, if it was run

python prepare_data.py fineweb-edu --tokenizer=gpt2 --out=data/fineweb-edu
torchrun --standalone --nproc_per_node="${GPUS:-4}" inheritune.py config/fineweb-gpt2-large-32.toml "$@"
sh runs/evaluate.sh out/fineweb-gpt2-large-32
