#!/bin/sh
# Two experiments on one GPU, in an afternoon each on an H100. (a) GPT-2 medium from the hub: half of its layers, trained
# and grown. (b) From scratch: which third of GPT-2 small's layers transfers (the paper, table 4), and the recipe.
#
#   sh runs/single_gpu.sh                                   # 80 GB
#   sh runs/single_gpu.sh --micro_batch=4                   # 24 GB; options go to both recipes
#
# You can interrupt it. Rerun it to resume: complete stages are skipped. Any error ends it.
#
# ESTIMATED, not measured: hours = FLOPs / (40% of the GPU's dense bf16 peak: H100 989e12 a second, A100 312e12, RTX 4090
# 165.2e12); FLOPs = model.py's flops_per_token x 49,152 tokens x steps. Validation and the preparation come on top.
#
# (a) config/single_gpu.toml. GPT-2 medium was trained by OpenAI, at a cost that is not known.
#   model                      layers    steps     FLOPs     H100     A100 RTX 4090
#   inherited, round 1             12    10000  6.71e+17      0.5      1.5      2.8
#   inherited, round 2             14    10000  7.58e+17      0.5      1.7      3.2
#   inherited, round 3             16    10000  8.44e+17      0.6      1.9      3.5
#   random                         16    10000  8.44e+17      0.6      1.9      3.5
#   random, twice the steps        16    20000  1.69e+18      1.2      3.8      7.1
#   all of it                                   4.81e+18      3.4     10.7     20.2
#
# (b) config/single_gpu_scratch.toml
#   model                      layers    steps     FLOPs     H100     A100 RTX 4090
#   reference                      12    20000  8.40e+17      0.6      1.9      3.5
#   inherited                       6    20000  5.34e+17      0.4      1.2      2.2
#   first third                     4    20000  4.32e+17      0.3      1.0      1.8
#   middle third                    4    20000  4.32e+17      0.3      1.0      1.8
#   last third                      4    20000  4.32e+17      0.3      1.0      1.8
#   random, third                   4    20000  4.32e+17      0.3      1.0      1.8
#   random                          6    20000  5.34e+17      0.4      1.2      2.2
#   random, twice the steps         6    40000  1.07e+18      0.7      2.4      4.5
#   all of it                                   4.70e+18      3.3     10.5     19.8
set -eu
cd "$(dirname "$0")/.."

python prepare_data.py fineweb-edu --tokenizer=gpt2 --max_tokens=1_000_000_000 --out=data/fineweb-edu-1b
python inheritune.py config/single_gpu.toml "$@"
python inheritune.py config/single_gpu_scratch.toml "$@"
