#!/bin/sh
# The CPU study, on two cores: the first seed on one, the two others on the other, then the report of all three.
#   sh runs/study_cpu.sh      # two to three hours; stop it and start it again at any time
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
[ -f data/study/manifest.json ] || python prepare_data.py python --val_fraction=0.02 --out=data/study
export OMP_NUM_THREADS=1
python inheritune.py config/study_cpu.toml --seeds 2 3 --once &
others=$!
python inheritune.py config/study_cpu.toml --seeds 1
wait $others
python inheritune.py config/study_cpu.toml
python analyze_attention.py out/study_cpu/seed-1/reference --data_dir=data/study --ablate --cheap_below=0.05
