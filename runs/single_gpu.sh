#!/bin/sh
# Two experiments on one GPU, in an afternoon each on an H100. (a) GPT-2 medium from the hub: half of its layers, trained
# and grown. (b) From scratch: which third of GPT-2 small's layers transfers (the paper, table 4), and the recipe.
#
#   sh runs/single_gpu.sh                      # 80 GB; (a), then (b)
#   sh runs/single_gpu.sh a                    # (a) alone
#   sh runs/single_gpu.sh a --micro_batch=4    # 24 GB; further options go to inheritune.py
#
# You can interrupt it with Ctrl-C. Rerun it to resume: complete stages are skipped. Any error ends it.
#
# Nothing here was run on a GPU yet. ESTIMATED, not measured: hours = FLOPs / (40% of the GPU's dense bf16 peak: H100
# 989e12 a second, A100 312e12, RTX 4090 165.2e12); FLOPs = model.py's flops_per_token x 49,152 tokens x steps.
# Validation and the preparation come on top. The text is 2 of 14 files of FineWeb-Edu's sample: 4.3 GB to download,
# some 14 GB on disk with the tokens (estimated). The checkpoints of (a) take 27 GB if 12 layers match, 43 GB if 16 do,
# and 83 GB if only all 24 do: 12 bytes a parameter, two checkpoints of each model, and 4 for what it began with.
#
# (a) config/single_gpu.toml. GPT-2 medium was trained by OpenAI, at a cost that is not known.
#   model                      layers    steps     FLOPs     H100     A100 RTX 4090
#   inherited, round 1             12    10000  6.71e+17      0.5      1.5      2.8
#   inherited, round 2             14    10000  7.58e+17      0.5      1.7      3.2
#   inherited, round 3             16    10000  8.44e+17      0.6      1.9      3.5
#   random                         16    10000  8.44e+17      0.6      1.9      3.5
#   random, twice the steps        16    20000  1.69e+18      1.2      3.8      7.1
#   reference, trained on          24    10000  1.19e+18      0.8      2.7      5.0
#   all of it                                   6.00e+18      4.2     13.3     25.2
# That is if 16 layers match the reference. If 12 do, it takes 2.7, 8.6 or 16.3 hours. If only all 24 do, the baselines
# have 24 layers too: 7.9, 25.1 or 47.4 hours. --tolerance=0.02 calls a loss that is 0.02 higher a match.
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
PATH="$PWD/.venv/bin:$PATH" # what `make demo` has installed, if it was run

case "${1:-}" in
    a | b) parts=$1 && shift ;;
    "" | -*) parts="a b" ;;
    *) echo "error: found $1, expected a, b or an option of inheritune.py" >&2 && exit 2 ;;
esac
python prepare_data.py fineweb-edu --data_files='sample/10BT/00[01]*.parquet' --tokenizer=gpt2 \
    --max_tokens=1_000_000_000 --out=data/fineweb-edu-1b
for part in $parts; do
    [ "$part" = b ] || python inheritune.py config/single_gpu.toml "$@"
    [ "$part" = a ] || python inheritune.py config/single_gpu_scratch.toml "$@"
done
