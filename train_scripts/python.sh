# shellcheck shell=bash
# Sourced by scripts that run a program: sets PYTHON, when it is not set, and checks that it can be used. ROOT: the
# repository.
set -euo pipefail

if [[ -z ${PYTHON:-} ]]; then
    if [[ -x $ROOT/.venv/bin/python ]]; then PYTHON=$ROOT/.venv/bin/python; else PYTHON=python3; fi
fi

# Without .venv and PYTHON, the interpreter of the machine has to have what the programs need.
check_environment() {
    if [[ $PYTHON == python3 ]] &&
        ! python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
        echo "no environment: $ROOT has no .venv, and python3 has no PyTorch; make one: bash tools/setup_env.sh" >&2
        exit 2
    fi
}
