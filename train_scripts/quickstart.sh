#!/usr/bin/env bash
# The whole job in small, from nothing: environment, toy streets, the same student plain, with Af-DCD and with DIST, a
# table, pictures and pages. The teacher is a file. Needs Python 3.11 or newer; no GPU. Safe to run again.
#   bash train_scripts/quickstart.sh [flags of tools/quickstart.py]
# QUICKSTART_SHORT=1: a few iterations only, to see that everything works.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup_env.sh
if [[ -n ${QUICKSTART_SHORT:-} && $QUICKSTART_SHORT != 0 ]]; then
    set -- --short "$@"
fi
exec .venv/bin/python tools/quickstart.py "$@"
