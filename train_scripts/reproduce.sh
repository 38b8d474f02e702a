#!/usr/bin/env bash
# A whole table: every run of it, in one command that can be interrupted and given again.
#   bash train_scripts/reproduce.sh TABLE [flags of tools/reproduce.py]
# TABLE: cityscapes, ade20k, coco_stuff, voc, camvid (the published rows) or a plan of train_scripts/plans/.
# GPUS, DATA, TEACHER, ...: see common.sh.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    if [[ -x $ROOT/.venv/bin/python ]]; then PYTHON=$ROOT/.venv/bin/python; else PYTHON=python3; fi
fi
exec "$PYTHON" "$ROOT/tools/reproduce.py" "$@"
