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
# Partition and account: on the sbatch command line. Before the time limit the run is told to stop: it saves after its
# step, and the job is queued again and goes on (--resume auto). So does one that ends with code 75, a signal from
# elsewhere. A job that is killed without a warning loses at most --save-per-iters steps.
set -euo pipefail
if (($# < 1)) || ! [[ -f $1 ]]; then
    echo "usage: sbatch train_scripts/slurm.sh SCRIPT [more flags], from the root of the repository" >&2
    exit 2
fi

export NNODES=${SLURM_NNODES:?not under Slurm: start with sbatch}
hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}")
MASTER_ADDR=${hosts%%$'\n'*} # not with head: under pipefail it would end the script when there are many
export MASTER_ADDR
export PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))} # jobs that share a machine must not share a port

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-90} # seconds that torchrun lets a run save

told="" late=""
stop() { # SIGTERM to the processes of the step: srun itself would kill them
    echo "time limit: told to save"
    told=$SECONDS
    scancel --signal=TERM "$SLURM_JOB_ID" || true
}
trap stop USR1
cpus=()
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then cpus=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi # srun inherits it no more
exec {never}<> <(:) # nothing comes from it: a pause without a process
srun --kill-on-bad-exit=1 ${cpus[@]+"${cpus[@]}"} bash "$@" --resume auto &
step=$!
# Neither `wait` nor `sleep`: bash may miss the end of a child while a trap runs, and then wait for any other one.
while kill -0 "$step" 2>/dev/null; do
    read -rt 1 -u "$never" || true
    if [[ -n $told && -z $late ]] && ((SECONDS - told >= 100)); then # queued again although it has not ended in time
        late=yes
        scontrol requeue "$SLURM_JOB_ID" || true
    fi
done
wait "$step" && code=0 || code=$?
if ((code == 75)) || { [[ -n $told ]] && ((code != 0)); }; then # torchrun makes 1 of 75
    echo "queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
