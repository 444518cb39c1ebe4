#!/bin/sh
# The CPU study on two corpora at once, each with a core of its own: Python's own source code, and a text of yours.
#   sh runs/study_cpu.sh english.parquet      # text, jsonl or parquet; stop it and start it again at any time
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
[ -f data/demo/meta.json ] || python prepare_data.py python --out=data/demo
[ -f data/english/meta.json ] || python prepare_data.py files "$1" --out=data/english
export OMP_NUM_THREADS=1
python inheritune.py config/study_cpu.toml &
ours=$!
python inheritune.py config/study_cpu.toml --data_dir=data/english --out_dir=out/study_cpu_english
wait $ours
