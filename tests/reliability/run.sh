#!/usr/bin/env bash
# Faults in numbers: kill, full disks, damage, signals, hangs, several processes, endurance. About an hour on two cores.
#   bash tests/reliability/run.sh [--short] [--only WORD ...] [--out DIR]
# Results come one by one into DIR/results.jsonl [runs/reliability] and as a table into docs/reliability.md; what is
# there is not done again, so that an interrupted call can be repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python tests/reliability/run.py "$@"
