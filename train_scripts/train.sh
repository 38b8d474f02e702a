#!/usr/bin/env bash
# A training that has no script of its own, on the GPUs of this machine: train.sh DATASET [flags of train_kd.py]
# tools/reproduce.py starts the runs of its plans by it. GPUS, DATA, ...: see common.sh.
set -euo pipefail
dataset=${1:?usage: train.sh DATASET [flags of train_kd.py]}
shift
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$dataset"

train --dataset "$dataset" --data "$DATA" "$@"
