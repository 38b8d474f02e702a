#!/usr/bin/env bash
#SBATCH --job-name=afdcd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%x-%j.log
# Run a training script under Slurm, on one machine or several, from the root of the repository:
#   sbatch train_scripts/slurm.sh train_scripts/cityscapes/deeplabv3_r101_r18_afdcd.sh [more flags]
#   sbatch --nodes=2 --gpus-per-node=4 train_scripts/slurm.sh SCRIPT       (8 processes, batch size still 16 in total)
# Partition and account: on the sbatch command line. A job that is preempted or reaches its time limit is queued again
# and goes on from its last training state (--resume auto); at most --save-per-iters steps are lost.
set -euo pipefail
if (($# < 1)) || ! [[ -f $1 ]]; then
    echo "usage: sbatch train_scripts/slurm.sh SCRIPT [more flags], from the root of the repository" >&2
    exit 2
fi

export NNODES=${SLURM_NNODES:?not under Slurm: start with sbatch}
MASTER_ADDR=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)
export MASTER_ADDR
export PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))} # jobs that share a machine must not share a port

trap 'echo "time limit: queued again"; scontrol requeue "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 bash "$@" --resume auto &
step=$!
code=0
while :; do # a trapped signal ends `wait` early
    wait "$step" && code=0 || code=$?
    kill -0 "$step" 2>/dev/null || break
done
exit "$code"
