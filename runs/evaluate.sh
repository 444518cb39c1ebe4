#!/bin/sh
# Score a recipe's reference and target with lm-evaluation-harness, zero-shot:  sh runs/evaluate.sh out/gpt2-medium
#
# pip install -r requirements-dev.txt has the tested version (transformers must be 5.4 or newer: older ones ignore the
# layer scale, and score another model). The tasks' data come from the hub, so be online the first time. What has its
# results is skipped. Not yet run on models of this size.
set -eu
cd "$(dirname "$0")/.."

last() { # of the names given
    shift $(($# - 1))
    echo "$1"
}

# the target is the last round's; layers have two digits and steps eight, so names sort by number
for checkpoint in "$(last "$1"/reference/step-*)" "$(last "$1"/inherited-*/step-*)"; do
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
