#!/usr/bin/env bash
# Faults in numbers: kill, full disks, damage, signals, hangs, several processes, endurance. About an hour on two cores.
#   bash tests/reliability/run.sh [--short] [--only CASE ...] [--tries N] [--out DIR]
# Results come one by one into DIR/results.jsonl [runs/reliability] and at the end, when none is missing, as a table into
# docs/reliability.md. What is there is not done again, so that an interrupted call can be repeated, or one with fewer
# --tries go on; delete a line to try its fault again. A run that was not survived is kept in DIR/failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python tests/reliability/run.py "$@"
