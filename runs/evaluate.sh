#!/bin/sh
# Score a recipe's reference, target and the random model of its size, zero-shot:  sh runs/evaluate.sh out/gpt2-medium
# with lm-evaluation-harness. At the end it prints the means that tables 1 and 7 of the paper have.
#
# pip install -r requirements-dev.txt has the tested version (transformers must be 5.4 or newer: older ones ignore the
# layer scale, and score another model). The tasks' data come from the hub, so be online the first time. What has its
# results is skipped. Not yet run on models of this size.
set -eu
cd "$(dirname "$0")/.."

if [ ! -f "$1/recipe.json" ]; then
    echo "error: $1/recipe.json: not found; run the recipe first" >&2
    exit 2
fi
for path in $(python -c '
import json, sys
models = json.load(open(sys.argv[1] + "/recipe.json"))["models"]
print(*(model["paths"][0] for model in models if model["role"] in ("reference", "target") or model["name"] == "random"))' "$1"); do
    checkpoint=$1/$path
    if [ ! -d "$checkpoint" ]; then
        echo "error: $checkpoint: no such checkpoint; run the recipe first" >&2
        exit 2
    fi
    results=$(dirname "$checkpoint")/lm_eval
    if ls "$results"/*/results_*.json > /dev/null 2>&1; then # written at the end
        echo "$results is there already"
        continue
    fi
    lm_eval --model hf --model_args pretrained="$checkpoint" \
        --tasks arc_easy,piqa,sciq,hellaswag,lambada_openai,winogrande,boolq,wikitext \
        --batch_size "${EVAL_BATCH:-16}" --output_path "$results"
done
python -c '
import glob, json, sys
five = "arc_easy piqa sciq hellaswag lambada_openai".split()
for path in sorted(glob.glob(sys.argv[1] + "/**/lm_eval/*/results_*.json", recursive=True)):
    scores = json.load(open(path))["results"]
    means = [sum(100 * scores[name]["acc,none"] for name in names) / len(names) for names in (five, five + ["winogrande", "boolq"])]
    perplexity = scores["wikitext"]["word_perplexity,none"]
    print(f"{path}: mean of 5 tasks (table 1) {means[0]:.2f}, of 7 (table 7) {means[1]:.2f}, WikiText {perplexity:.2f}")
' "$1"
