#!/bin/sh
# GPT-2 XL on OpenWebText: 48 layers, then Inheritune with 24 of them.
#
#   sh runs/gpt2-xl.sh                    # on 8 GPUs
#   GPUS=1 sh runs/gpt2-xl.sh             # 1, 2, 3, 4 or 8
#   sh runs/gpt2-xl.sh --micro_batch=1    # if memory does not suffice; options go to inheritune.py
#
# You can interrupt it. Rerun it to resume: complete stages are skipped. Any error ends it.
#
# ESTIMATED, not measured: nothing here was run on such hardware. Hours of one GPU = FLOPs / (40% of its bf16 peak:
# H100 989e12 a second, A100 312e12); FLOPs = model.py's flops_per_token x 49,152 tokens x steps.
#
#   model                    layers    steps  FLOPs a token     FLOPs   H100 h   A100 h
#   reference                    48   100000       1.03e+10  5.05e+19     35.5    112.4
#   inherited                    24   100000       5.38e+09  2.64e+19     18.6     58.8
#   random                       24   100000       5.38e+09  2.64e+19     18.6     58.8
#   random, twice the steps      24   200000       5.38e+09  5.29e+19     37.1    117.7
#   half of the target           12   100000       2.93e+09  1.44e+19     10.1     32.1
#   stacking                     24   100000       5.38e+09  2.64e+19     18.6     58.8
#   quarter of the target         6   100000       1.71e+09  8.39e+18      5.9     18.7
#   quarter, stacked             12   100000       2.93e+09  1.44e+19     10.1     32.1
#   stacking, two rounds         24   100000       5.38e+09  2.64e+19     18.6     58.8
#   hybrid stacking              24   100000       5.38e+09  2.64e+19     18.6     58.8
#   all of it                                                2.73e+20    191.5    607.1
#
# That is 24 hours on 8 H100 or 76 on 8 A100. Each further round adds at least 20 H100 hours.
# On top: validation, which on OpenWebText's 4.4 million tokens every 1,000 steps adds 3%, the preparation of the
# data, and lm_eval on one GPU.
# Memory, estimated: 20 bytes a parameter (weights, gradients and their buckets, two moments) = 31 GB, and
# activations: 80 GB should do.
set -eu
cd "$(dirname "$0")/.."

python prepare_data.py openwebtext --tokenizer=gpt2 --out=data/openwebtext
torchrun --standalone --nproc_per_node="${GPUS:-8}" inheritune.py config/gpt2-xl.toml "$@"
sh runs/evaluate.sh out/gpt2-xl
