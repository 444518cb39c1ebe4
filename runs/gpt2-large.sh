#!/bin/sh
# GPT-2 large on OpenWebText: 36 layers, then Inheritune with 18 of them.
#
#   sh runs/gpt2-large.sh                    # on 8 GPUs
#   GPUS=1 sh runs/gpt2-large.sh             # 1, 2, 4 or 8; with --micro_batch=8 also 3
#   sh runs/gpt2-large.sh --micro_batch=1    # if memory does not suffice; options go to inheritune.py
#
# You can interrupt it. Rerun it to resume: complete stages are skipped. Any error ends it.
#
# ESTIMATED, not measured: nothing here was run on such hardware. Hours of one GPU = FLOPs / (40% of its bf16 peak:
# H100 989e12 a second, A100 312e12); FLOPs = model.py's flops_per_token x 49,152 tokens x steps.
#
#   model                    layers    steps  FLOPs a token     FLOPs   H100 h   A100 h
#   reference                    36   100000       5.20e+09  2.56e+19     17.9     56.9
#   inherited                    18   100000       2.79e+09  1.37e+19      9.6     30.6
#   random                       18   100000       2.79e+09  1.37e+19      9.6     30.6
#   random, twice the steps      18   200000       2.79e+09  2.75e+19     19.3     61.1
#   half of the target            9   100000       1.59e+09  7.81e+18      5.5     17.4
#   stacking                     18   100000       2.79e+09  1.37e+19      9.6     30.6
#   quarter of the target         5   100000       1.05e+09  5.18e+18      3.6     11.5
#   quarter, stacked              9   100000       1.59e+09  7.81e+18      5.5     17.4
#   stacking, two rounds         18   100000       2.79e+09  1.37e+19      9.6     30.6
#   hybrid stacking              18   100000       2.79e+09  1.37e+19      9.6     30.6
#   all of it                                                1.42e+20    100.0    317.1
#
# That is 13 hours on 8 H100 or 40 on 8 A100. Each further round adds at least 10 H100 hours.
# On top: validation, which on OpenWebText's 4.4 million tokens every 1,000 steps adds 3%, the preparation of the
# data, and lm_eval on one GPU.
# Memory, estimated: 20 bytes a parameter (weights, gradients and their buckets, two moments) = 15 GB, and
# activations: 80 GB should do.
set -eu
cd "$(dirname "$0")/.."

python prepare_data.py openwebtext --tokenizer=gpt2 --out=data/openwebtext
torchrun --standalone --nproc_per_node="${GPUS:-8}" inheritune.py config/gpt2-large.toml "$@"
sh runs/evaluate.sh out/gpt2-large
