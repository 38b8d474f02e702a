#!/usr/bin/env bash
# Style check and the whole test suite, from nothing: bash tests/run.sh [arguments of pytest]
# TEST_WORKERS: test processes side by side [2].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup_env.sh --test
.venv/bin/python -m ruff check .
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
