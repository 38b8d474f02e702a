#!/usr/bin/env bash
# Evaluate a checkpoint: bash train_scripts/eval.sh DATASET MODEL BACKBONE FILE [more flags of eval.py]
#   bash train_scripts/eval.sh citys deeplabv3 resnet18 work_dir/student.pth --json result.json
# A network from elsewhere (cirkd:, smp:, hf: ...) has no backbone: any word does in its place, such as -.
# Environment variables (GPUS, DATA, ...): see common.sh.
set -euo pipefail
if (($# < 4)); then
    echo "usage: bash train_scripts/eval.sh DATASET MODEL BACKBONE FILE [more flags of eval.py]" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$1"

launch eval.py --dataset "$1" --data "$DATA" --model "$2" --backbone "$3" --pretrained "$4" "${@:5}"
