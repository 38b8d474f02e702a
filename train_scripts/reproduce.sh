#!/usr/bin/env bash
# A whole table: every run of it, in one command that can be interrupted and given again.
#   bash train_scripts/reproduce.sh TABLE [flags of tools/reproduce.py]
# TABLE: cityscapes, ade20k, coco_stuff, voc, camvid (the published rows) or a plan of train_scripts/plans/.
# GPUS, DATA, TEACHER, ...: see common.sh.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/train_scripts/python.sh"
check_environment
exec "$PYTHON" "$ROOT/tools/reproduce.py" "$@"
