#!/usr/bin/env bash
# Make or update the virtual environment .venv: bash tools/setup_env.sh [--test]
#   --test            also what tests and style check need (pyproject.toml, extra "dev")
#   PYTHON_BASE       interpreter to build it from, 3.11 or newer [python3, else the newest python3.x found]
#   TORCH_INDEX_URL   additional package index for torch. On a machine without a GPU,
#                     https://download.pytorch.org/whl/cpu gives a small torch in place of one with CUDA (several GB).
# Nothing is installed when requirements have not changed since the last complete installation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
say() { echo "environment: $*"; }
fail() { echo "environment: $*" >&2; exit 2; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

case ${1:-} in
    "" | --test) WANTED=${1:-} ;;
    *) fail "unknown option $1: expected --test or nothing" ;;
esac

find_python() {
    local candidate
    if [[ -n ${PYTHON_BASE:-} ]]; then
        is_new_enough "$PYTHON_BASE" || fail "PYTHON_BASE=$PYTHON_BASE: expected a Python of at least 3.11"
        echo "$PYTHON_BASE"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python of at least 3.11 found: install one, or name it: PYTHON_BASE=/path/to/python3.12"
}

is_usable() { is_new_enough "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

make_venv() {
    local python
    python=$(find_python)
    [[ ! -e $VENV ]] || say "$VENV is incomplete or older than Python 3.11: starting it anew"
    say "making $VENV with $("$python" --version)"
    rm -rf "$VENV"
    "$python" -m venv "$VENV"
}

# What an installation depends on: these requirements, this interpreter, this folder (a venv cannot be moved).
fingerprint() {
    {
        cat "$@" &&
            "$VENV/bin/python" -c 'import sys; print(sys.version, sys.prefix)'
    } | "$VENV/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

# install NAME FILE...: pip install -r FILE... unless the stamp of NAME says that this was done. The stamp comes last.
install() {
    local name=$1 stamp=$VENV/.installed-$1 now file arguments=()
    shift
    now=$(fingerprint "$@")
    if [[ -f $stamp && $(<"$stamp") == "$now" ]]; then
        say "$name packages are up to date"
        return
    fi
    say "installing the $name packages (the first time takes minutes)"
    rm -f "$stamp"
    for file in "$@"; do arguments+=(-r "$file"); done
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
        ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "${arguments[@]}"
    echo "$now" >"$stamp.tmp"
    mv "$stamp.tmp" "$stamp"
}

# Two installations at the same time would spoil each other. The lock is on a file that exists anyway.
exec 9<requirements.txt
if command -v flock >/dev/null && ! flock --nonblock 9; then
    say "waiting for another installation to end"
    flock 9
fi

is_usable || make_venv
if [[ ! -f $VENV/.installed-project && -z ${TORCH_INDEX_URL:-} ]] && ! command -v nvidia-smi >/dev/null; then
    say "no GPU found: TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu would fetch a small torch without CUDA"
fi
install project requirements.txt
if [[ $WANTED == --test ]]; then
    "$VENV/bin/python" -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
todo = ["dev"]
while todo:
    for line in extras[todo.pop()]:
        if line.startswith("afdcd["):  # other extras
            todo += line[6:-1].split(",")
        else:
            print(line)' >"$VENV/requirements-test.txt"
    install test requirements.txt "$VENV/requirements-test.txt"
fi
say "ready: $VENV/bin/python"
