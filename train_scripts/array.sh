#!/usr/bin/env bash
# One line of a list of commands, that of this task of a Slurm array:
#   sbatch --array=1-9 train_scripts/slurm.sh train_scripts/array.sh LIST [more flags]
# tools/reproduce.py --slurm writes the lists and such commands.
set -euo pipefail
list=${1:?usage: array.sh LIST [more flags]}
shift
line=$(sed -n "${SLURM_ARRAY_TASK_ID:?not a task of a Slurm array}p" "$list")
[[ -n $line ]] || { echo "$list has no line $SLURM_ARRAY_TASK_ID" >&2; exit 2; }
more=""
if (($#)); then more=$(printf ' %q' "$@"); fi
eval "exec env $line$more" # in the place of this script: signals reach it
